// conv.h over tiles, for any lane type: transform, multiply, transform back.
#pragma once

#include <algorithm>
#include <type_traits>

#include "conv_transform.h"

namespace bdk {
namespace {

// A product's sums stay in half of the registers, as kVectors vectors of filters by kRows rows of tiles or
// channels: 2 by 8 is a tenth faster than 2 by 12 or 14 with AVX-512, 1 by 16 than 1 by 8.
template <class L, int kVectors>
constexpr int kRows = (L::kLanes == 16 ? 16 : 8) / kVectors;

// Filters that lie together when packed.
template <class L>
constexpr int64_t kPanel = 2 * L::kLanes;

// out (+)= sum_i a_i b_i of `count` terms: a_i[row] at a + row a_row + i a_step, the vectors b_i at b + i
// b_step. Every loop but the terms' is unrolled, or the sums would live in memory: that took twice as long.
template <class L, int kVectors, bool kAdd>
__attribute__((noinline)) void product(int64_t rows, const float* a, int64_t a_row, int64_t a_step,
                                       const float* b, int64_t b_step, int64_t count, float* out,
                                       int64_t out_row) {
    using F = typename L::F;
    constexpr int kHigh = kRows<L, kVectors>;
    for (; rows > 0; rows -= kHigh, a += kHigh * a_row, out += kHigh * out_row) {
        F sum[kHigh][kVectors]{};
        const float* quarter[kHigh / 4];  // pointers to each fourth row: few enough for the registers
#pragma GCC unroll 4
        for (int q = 0; q < kHigh / 4; ++q) quarter[q] = a + 4 * q * a_row;
        const float* right_of = b;
        for (int64_t i = 0; i < count; ++i, right_of += b_step) {
            F right[kVectors];
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j) right[j] = load_lanes<L>(right_of + j * L::kLanes);
#pragma GCC unroll 16
            for (int r = 0; r < kHigh; ++r) {
                // A bare broadcast, where L::broadcast adds: -0 + 0 is not -0.
                const F left = quarter[r / 4][r % 4 * a_row] - F{};
#pragma GCC unroll 2
                for (int j = 0; j < kVectors; ++j) sum[r][j] = L::multiply_add(left, right[j], sum[r][j]);
            }
#pragma GCC unroll 4
            for (int q = 0; q < kHigh / 4; ++q) quarter[q] += a_step;
        }
#pragma GCC unroll 16
        for (int r = 0; r < kHigh; ++r)
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j) {
                float* to = out + r * out_row + j * L::kLanes;
                if constexpr (kAdd)
                    sum[r][j] += load_lanes<L>(to);  // at the end: sums of few terms lose less
                store_lanes(sum[r][j], to);
            }
    }
}

// Rows that the widest product takes at once.
constexpr int64_t whole(int64_t rows) { return (rows + 15) / 16 * 16; }

// Planes of equal size would meet in the same few sets of the first cache.
constexpr int64_t padded(int64_t plane) { return plane + 48; }

struct Image {
    const float* data;
    int64_t height, width, channels;
};

// B^T d B of `count` channels from c on, to v[product][tile][channel]; `high` and `wide` in tiles.
template <class L, Scale kScale>
void transform_input(const Image& x, int64_t high, int64_t wide, TileRows rows, int64_t c, int64_t count,
                     float* v, int64_t plane) {
    using F = typename L::F;
    using T = Transform<kScale>;
    static constexpr float kOutside[L::kLanes]{};
    for (int64_t row = rows.first; row < rows.last; ++row) {
        const float* sample = x.data + row / high * x.height * x.width * x.channels;
        for (int64_t i = 0; i < count; i += L::kLanes) {
            const float* line[T::kWindow];
            int64_t stride[T::kWindow];
            for (int y = 0; y < T::kWindow; ++y) {
                const int64_t at = row % high * T::kStep + y - T::kBorder;
                const bool inside = at >= 0 && at < x.height;
                line[y] = inside ? sample + at * x.width * x.channels + c + i : kOutside;
                stride[y] = inside ? x.channels : 0;
            }
            // A column of the window, transformed; those that the next tile shares are kept.
            auto column = [&](int64_t at, F(&to)[T::kSide]) {
                F d[T::kWindow]{};
                if (at >= 0 && at < x.width)
                    for (int y = 0; y < T::kWindow; ++y) d[y] = load_lanes<L>(line[y] + at * stride[y]);
                T::input(d, to);
            };
            F window[T::kWindow][T::kSide];
            for (int k = T::kStep; k < T::kWindow; ++k) column(k - T::kStep - T::kBorder, window[k]);
            float* to = v + (row - rows.first) * wide * count + i;
            for (int64_t tile = 0; tile < wide; ++tile, to += count) {
                for (int k = 0; k < T::kWindow - T::kStep; ++k)
                    for (int p = 0; p < T::kSide; ++p) window[k][p] = window[k + T::kStep][p];
                for (int k = T::kWindow - T::kStep; k < T::kWindow; ++k)
                    column(tile * T::kStep + k - T::kBorder, window[k]);
                for (int p = 0; p < T::kSide; ++p) {
                    F d[T::kWindow], transformed[T::kSide];
                    for (int k = 0; k < T::kWindow; ++k) d[k] = window[k][p];
                    T::input(d, transformed);
                    for (int q = 0; q < T::kSide; ++q)
                        store_lanes(transformed[q], to + (p * T::kSide + q) * plane);
                }
            }
        }
    }
}

// A^T m A of m[product][tile][filter], with bias and skip, to the pixels that there are.
template <class L, Scale kScale>
void transform_output(const ConvCall& call, int64_t high, int64_t wide, TileRows rows, const float* m,
                      int64_t plane) {
    using F = typename L::F;
    using T = Transform<kScale>;
    const int64_t K = call.filters, shrink = kScale == Scale::halved ? 2 : 1;
    const int64_t height = call.height / shrink, width = call.width / shrink;
    for (int64_t row = rows.first; row < rows.last; ++row)
        for (int64_t tile = 0; tile < wide; ++tile, m += K)
            for (int64_t k = 0; k < K; k += L::kLanes) {
                F in[T::kSide][T::kSide], y[T::kPixels][T::kPixels];
                for (int p = 0; p < T::kSide; ++p)
                    for (int q = 0; q < T::kSide; ++q)
                        in[p][q] = load_lanes<L>(m + (p * T::kSide + q) * plane + k);
                both_ways(in, y, [](const auto& from, auto& to) { T::output(from, to); });
                const F bias = call.bias == nullptr ? F{} : load_lanes<L>(call.bias + k);
                for (int i = 0; i < T::kPixels; ++i)
                    for (int j = 0; j < T::kPixels; ++j) {
                        const int64_t line = row % high * T::kPixels + i, column = tile * T::kPixels + j;
                        if (line >= height || column >= width) continue;
                        const int64_t at = ((row / high * height + line) * width + column) * K + k;
                        F v = y[i][j] + bias;
                        if (call.skip != nullptr) v += load_lanes<L>(call.skip + at);
                        store_lanes(v, call.out + at);
                    }
            }
}

template <class L, Scale kScale>
void multiply_tiles(const ConvCall& call, TileRows rows, const float* packed) {
    static thread_local Scratch left_scratch, out_scratch;
    const int64_t C = call.channels, K = call.filters, shrink = kScale == Scale::doubled ? 2 : 1;
    const int64_t high = tiles(kScale, call.height), wide = tiles(kScale, call.width);
    const int64_t count = whole((rows.last - rows.first) * wide);
    const int64_t left_plane = padded(count * C), out_plane = padded(count * K);
    float* left = left_scratch.floats(products(kScale) * left_plane);
    float* out = out_scratch.floats(products(kScale) * out_plane);
    transform_input<L, kScale>({call.x, call.height / shrink, call.width / shrink, C}, high, wide, rows, 0, C,
                               left, left_plane);
    for (int64_t p = 0; p < products(kScale); ++p)
        for (int64_t k = 0; k < K; k += kPanel<L>) {
            const float* right = packed + p * C * K + k * C;
            auto panel = [&](auto vectors) {
                constexpr int V = vectors.value;
                product<L, V, false>(count, left + p * left_plane, C, 1, right, V * L::kLanes, C,
                                     out + p * out_plane + k, K);
            };
            if (K - k >= kPanel<L>)
                panel(std::integral_constant<int, 2>{});
            else
                panel(std::integral_constant<int, 1>{});
        }
    transform_output<L, kScale>(call, high, wide, rows, out, out_plane);
}

template <class L, Scale kScale>
void pack_filters(const ConvCall& call, int64_t k, float* packed) {
    using F = typename L::F;
    constexpr int N = L::kLanes, kSide = Transform<kScale>::kSide, kTaps = Transform<kScale>::kTaps;
    constexpr int kAll = kTaps * kTaps;
    const int64_t C = call.channels, K = call.filters;
    // g[tap][channel] over filters: as they lie in memory, or turned about from channels over filters.
    F g[kAll][N];
    for (const int64_t last = std::min(k + kFilters, K); k < last; k += N)
        for (int64_t c = 0; c < C; c += N) {
            for (int tap = 0; tap < kAll; ++tap) {
                const float* from = call.turned ? call.weight + (c * kAll + kAll - 1 - tap) * K + k
                                                : call.weight + (k * kAll + tap) * C + c;
                const int64_t stride = kAll * (call.turned ? K : C);
                for (int i = 0; i < N; ++i) g[tap][i] = load_lanes<L>(from + i * stride);
                if (!call.turned) turn<L>(g[tap]);
            }
            const int64_t panel = k / kPanel<L> * kPanel<L>, width = std::min(kPanel<L>, K - panel);
            for (int i = 0; i < N; ++i) {
                F filter[kTaps][kTaps], u[kSide][kSide];
                for (int tap = 0; tap < kAll; ++tap) filter[tap / kTaps][tap % kTaps] = g[tap][i];
                both_ways(filter, u, [](const auto& from, auto& to) { Transform<kScale>::filter(from, to); });
                float* to = packed + panel * C + (c + i) * width + k - panel;
                for (int p = 0; p < kSide * kSide; ++p) store_lanes(u[p / kSide][p % kSide], to + p * C * K);
            }
        }
}

// A dy A^T of filters k .. k + count, to z[product][tile][filter]; the pixels' sum is a product of its own.
template <class L, Scale kScale>
void transform_gradient(const FilterCall& call, TileRows rows, int64_t k, int64_t count, float* z,
                        int64_t plane) {
    using F = typename L::F;
    using T = Transform<kScale>;
    const int64_t high = tiles(kScale, call.height), wide = tiles(kScale, call.width), K = call.filters;
    for (int64_t row = rows.first; row < rows.last; ++row)
        for (int64_t tile = 0; tile < wide; ++tile, z += count)
            for (int64_t i = 0; i < count; i += L::kLanes) {
                constexpr int P = T::kPixels;
                F y[P][P]{}, out[T::kSide][T::kSide];
                for (int pixel = 0; pixel < P * P; ++pixel) {
                    const int64_t line = row % high * P + pixel / P, column = tile * P + pixel % P;
                    if (line >= call.height || column >= call.width) continue;
                    const int64_t at = (row / high * call.height + line) * call.width + column;
                    y[pixel / P][pixel % P] = load_lanes<L>(call.dy + at * K + k + i);
                }
                both_ways(y, out, [](const auto& from, auto& to) { T::gradient(from, to); });
                for (int p = 0; p < T::kSide * T::kSide; ++p)
                    store_lanes(out[p / T::kSide][p % T::kSide], z + p * plane + i);
            }
}

template <class L, Scale kScale>
void filter_sums(const FilterCall& call, const FilterUnit& unit) {
    static thread_local Scratch left_scratch, right_scratch;
    const int64_t C = call.channels, K = call.filters, shrink = kScale == Scale::doubled ? 2 : 1;
    const int64_t high = tiles(kScale, call.height), wide = tiles(kScale, call.width);
    const int64_t channels = std::min(kSquare, C - unit.c), filters = std::min(kSquare, K - unit.k);
    const int64_t step = std::max<int64_t>(1, kTerms / wide);
    const int64_t left_plane = padded(step * wide * channels), right_plane = padded(step * wide * filters);
    float* left = left_scratch.floats(products(kScale) * left_plane);
    float* right = right_scratch.floats(products(kScale) * right_plane);
    const Image image{call.x, call.height / shrink, call.width / shrink, C};
    for (TileRows rows = unit.rows; rows.first < unit.rows.last; rows.first += step) {
        rows.last = std::min(rows.first + step, unit.rows.last);
        const int64_t count = (rows.last - rows.first) * wide;
        transform_input<L, kScale>(image, high, wide, rows, unit.c, channels, left, left_plane);
        transform_gradient<L, kScale>(call, rows, unit.k, filters, right, right_plane);
        const bool add = rows.first > unit.rows.first;
        for (int64_t p = 0; p < products(kScale); ++p)
            for (int64_t k = 0; k < filters; k += kPanel<L>) {
                const float *a = left + p * left_plane, *b = right + p * right_plane + k;
                auto panel = [&](auto vectors) {
                    constexpr int V = vectors.value;
                    (add ? product<L, V, true>
                         : product<L, V, false>)(channels, a, 1, channels, b, filters, count,
                                                 unit.sums + (p * C + unit.c) * K + unit.k + k, K);
                };
                if (filters - k >= kPanel<L>)
                    panel(std::integral_constant<int, 2>{});
                else
                    panel(std::integral_constant<int, 1>{});
            }
        if (unit.c > 0) continue;
        // Of a tile's pixels: the product that takes all of them.
        constexpr int kPixels = kScale == Scale::point ? 0 : Transform<kScale>::kSide + 1;
        const float* sums = right + kPixels * right_plane;
        for (int64_t k = 0; k < filters; k += L::kLanes) {
            typename L::F sum{};
            for (int64_t tile = 0; tile < count; ++tile) sum += load_lanes<L>(sums + tile * filters + k);
            for (int i = 0; i < L::kLanes; ++i) {
                double& total = unit.bias[unit.k + k + i];
                total = (add ? total : 0) + double(sum[i]);
            }
        }
    }
}

template <class L, Scale kScale>
void finish_filters(const FilterCall& call, int64_t first, const float* sums, int64_t parts) {
    using F = typename L::F;
    constexpr int N = L::kLanes, kSide = Transform<kScale>::kSide, kTaps = Transform<kScale>::kTaps;
    constexpr int kAll = kTaps * kTaps;
    const int64_t C = call.channels, K = call.filters;
    F g[kAll][N];
    for (int64_t c = first; c < first + 16; c += N)
        for (int64_t k = 0; k < K; k += N) {
            for (int i = 0; i < N; ++i) {
                F u[kSide][kSide], filter[kTaps][kTaps];
                for (int p = 0; p < kSide * kSide; ++p) {
                    const float* from = sums + (p * C + c + i) * K + k;
                    F sum = load_lanes<L>(from);
                    for (int64_t part = 1; part < parts; ++part)
                        sum += load_lanes<L>(from + part * kSide * kSide * C * K);
                    u[p / kSide][p % kSide] = sum;
                }
                both_ways(u, filter,
                          [](const auto& from, auto& to) { Transform<kScale>::filter_gradient(from, to); });
                for (int tap = 0; tap < kAll; ++tap) g[tap][i] = filter[tap / kTaps][tap % kTaps];
            }
            for (int tap = 0; tap < kAll; ++tap) {
                turn<L>(g[tap]);
                for (int i = 0; i < N; ++i)
                    store_lanes(g[tap][i], call.dweight + ((k + i) * kAll + tap) * C + c);
            }
        }
}

// Calls body(the scale, as a constant).
template <class Body>
void at_scale(Scale scale, Body body) {
    switch (scale) {
        case Scale::same:
            return body(std::integral_constant<Scale, Scale::same>{});
        case Scale::doubled:
            return body(std::integral_constant<Scale, Scale::doubled>{});
        case Scale::halved:
            return body(std::integral_constant<Scale, Scale::halved>{});
        case Scale::point:
            return body(std::integral_constant<Scale, Scale::point>{});
    }
}

}  // namespace

template <class L>
void Conv<L>::pack(const ConvCall& call, int64_t k, float* packed) {
    at_scale(call.scale, [&](auto scale) { pack_filters<L, scale.value>(call, k, packed); });
}

template <class L>
void Conv<L>::multiply(const ConvCall& call, TileRows rows, const float* packed) {
    at_scale(call.scale, [&](auto scale) { multiply_tiles<L, scale.value>(call, rows, packed); });
}

template <class L>
void Conv<L>::filters(const FilterCall& call, const FilterUnit& unit) {
    at_scale(call.scale, [&](auto scale) {
        if constexpr (scale.value != Scale::halved) filter_sums<L, scale.value>(call, unit);
    });
}

template <class L>
void Conv<L>::finish(const FilterCall& call, int64_t c, const float* sums, int64_t parts) {
    at_scale(call.scale, [&](auto scale) {
        if constexpr (scale.value != Scale::halved) finish_filters<L, scale.value>(call, c, sums, parts);
    });
}

}  // namespace bdk
