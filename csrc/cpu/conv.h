// Convolutions, 3 x 3, of channels-last images padded with zeros, by Winograd's F(2x2, 3x3): 2 x 2 pixels y
// of 4 x 4 pixels d and a filter g take 16 products a channel where the plain sum takes 36.
//
//   y = A^T [ (G g G^T) (B^T d B) ] A      the products element by element, summed over channels
//
//   B^T d = (d0 - d2, d1 + d2, d2 - d1, d1 - d3)      G g = (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)
//   A^T m = (m0 + m1 + m2, m1 - m2 - m3)
//
// Over many tiles they are 16 matrix products, [tiles, channels] by [channels, filters]. Of an image doubled
// by repeating its pixels d = (a, b, b, c): the third row and column of B^T d B are 0, and 9 products remain.
//
// Backward, dx is a convolution of dy by the same filters turned about, and, summed over all tiles,
//
//   dg = G^T [ sum (B^T d B) (A dy A^T) ] G
//
// Sums are shorter than those of the plain convolution, and in float32 nearer to the truth.
//
// Filters of 1 x 1 take the same way with nothing to transform: a tile is a pixel.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace bdk {

enum class Scale {
    same,
    doubled,  // x is half as high and wide as what is convolved: each pixel stands for four
    halved,   // out is, and each of its pixels the sum of four: the adjoint of `doubled`
    point,    // filters are 1 x 1
};

// `height` and `width` are those of what is convolved; channels and filters are multiples of 16.
struct ConvCall {
    const float* x;       // [samples, height, width, channels]
    const float* weight;  // [filters, taps, channels]; turned about: [channels, taps, filters]
    const float* bias;    // [filters] or null
    const float* skip;    // added; as out, or null
    float* out;           // [samples, height, width, filters]
    int64_t samples, height, width, channels, filters;
    Scale scale;
    bool turned;
};

// Gradients in the weight and the bias of a convolution.
struct FilterCall {
    const float *x, *dy;
    float* dweight;  // [filters, taps, channels]
    float* dbias;    // [filters]
    int64_t samples, height, width, channels, filters;
    Scale scale;  // not halved
};

constexpr int64_t kFilters = 16;  // filters that are packed at once
constexpr int64_t kTiles = 64;    // tiles that are multiplied at once, about: they stay in the second cache
constexpr int64_t kSquare = 64;   // side of the block of channels by filters whose gradient is summed at once
constexpr int64_t kTerms = 32;    // tiles whose products are summed at once: longer sums lose more
constexpr int64_t kUnits = 16;    // into which such sums are cut, where there are tiles enough

// Rows of tiles, those of the first sample first.
struct TileRows {
    int64_t first, last;
};

// A unit of the filters' gradient: channels c .. by filters k .. over some tiles.
struct FilterUnit {
    int64_t c, k;
    TileRows rows;
    float* sums;   // [products, channels, filters], of which it writes its block
    double* bias;  // [filters], which the units of c = 0 write
};

constexpr int64_t products(Scale scale) { return scale == Scale::point ? 1 : scale == Scale::same ? 16 : 9; }

// Of a row or a column of so many pixels.
constexpr int64_t tiles(Scale scale, int64_t pixels) {
    return scale == Scale::point ? pixels : (pixels + 1) / 2;
}

// Memory that a thread keeps from call to call: fresh pages cost as much as what is written to them.
class Scratch {
  public:
    float* floats(int64_t count) {
        if (count > size_) {
            memory_.reset(static_cast<float*>(std::aligned_alloc(64, size_t(count + 15) / 16 * 64)));
            size_ = count;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    std::unique_ptr<float, Free> memory_;
    int64_t size_ = 0;
};

// One set per instruction set; defined in conv_inl.h.
template <class L>
struct Conv {
    // Filters k .. k + kFilters, transformed: [products, panels of filters, channels, filters of the panel].
    static void pack(const ConvCall&, int64_t k, float* packed);
    static void multiply(const ConvCall&, TileRows, const float* packed);
    static void filters(const FilterCall&, const FilterUnit&);
    // The gradient of channels c .. c + 15 from `parts` sums of [products, channels, filters].
    static void finish(const FilterCall&, int64_t c, const float* sums, int64_t parts);
};

}  // namespace bdk
