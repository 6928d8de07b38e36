// conv.h over tiles, for any lane type: transform, multiply, transform back.
#pragma once

#include <algorithm>
#include <type_traits>

#include "conv.h"
#include "vec.h"

namespace bdk {
namespace {

template <class L>
BDK_HD typename L::F load_lanes(const float* from) {
    return L::template load<typename L::F>(from);
}

template <class F>
BDK_HD void store_lanes(F v, float* to) {
    memcpy(to, &v, sizeof v);
}

// What stands for B, A and G, by the products that are left of a dimension.
template <Scale kScale>
struct Transform {
    static constexpr int kSide = kScale == Scale::same ? 4 : 3;       // products
    static constexpr int kWindow = kScale == Scale::doubled ? 3 : 4;  // pixels of x that a tile reads
    static constexpr int kStep = kScale == Scale::doubled ? 1 : 2;    // from one tile's to the next one's
    static constexpr int kPixels = kScale == Scale::halved ? 1 : 2;   // pixels of out

    template <class F>
    BDK_HD static void input(const F (&d)[kWindow], F (&v)[kSide]) {
        if constexpr (kScale == Scale::doubled) {
            v[0] = d[0] - d[1], v[1] = d[1] + d[1], v[2] = d[1] - d[2];
        } else {
            v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[kSide - 1] = d[1] - d[3];
            if constexpr (kSide == 4) v[2] = d[2] - d[1];
        }
    }
    template <class F>
    BDK_HD static void output(const F (&m)[kSide], F (&y)[kPixels]) {
        if constexpr (kScale == Scale::same)
            y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
        else if constexpr (kScale == Scale::doubled)
            y[0] = m[0] + m[1], y[1] = m[1] - m[2];
        else
            y[0] = m[0] + (m[1] + m[1]) - m[2];
    }
    // A dy
    template <class F>
    BDK_HD static void gradient(const F (&y)[2], F (&z)[kSide]) {
        z[0] = y[0], z[1] = y[0] + y[1], z[kSide - 1] = -y[1];
        if constexpr (kSide == 4) z[2] = y[0] - y[1];
    }
    // G g and its adjoint
    template <class F>
    BDK_HD static void filter(const F (&g)[3], F (&u)[kSide]) {
        const F even = (g[0] + g[2]) * 0.5f, odd = g[1] * 0.5f;
        u[0] = g[0], u[1] = even + odd, u[kSide - 1] = g[2];
        if constexpr (kSide == 4) u[2] = even - odd;
    }
    template <class F>
    BDK_HD static void filter_gradient(const F (&u)[kSide], F (&g)[3]) {
        F sum = u[1] * 0.5f, difference = sum;
        if constexpr (kSide == 4) sum += u[2] * 0.5f, difference -= u[2] * 0.5f;
        g[0] = u[0] + sum, g[1] = difference, g[2] = u[kSide - 1] + sum;
    }
};

// `one` along the columns and then along the rows.
template <int kIn, int kOut, class F, class One>
BDK_HD void both_ways(const F (&in)[kIn][kIn], F (&out)[kOut][kOut], One one) {
    F half[kIn][kOut];
    for (int j = 0; j < kIn; ++j) {
        F column[kIn];
        for (int i = 0; i < kIn; ++i) column[i] = in[i][j];
        one(column, half[j]);
    }
    for (int i = 0; i < kOut; ++i) {
        F row[kIn];
        for (int j = 0; j < kIn; ++j) row[j] = half[j][i];
        one(row, out[i]);
    }
}

// [lanes][lanes] turned about its diagonal: each pass interleaves the two halves.
template <class L>
BDK_HD void turn(typename L::F (&v)[L::kLanes]) {
    constexpr int N = L::kLanes;
    for (int pass = 1; pass < N; pass *= 2) {
        typename L::F w[N];
        for (int i = 0; i < N / 2; ++i) {
            const typename L::F a = v[i], b = v[i + N / 2];
            if constexpr (N == 4) {
                w[2 * i] = __builtin_shufflevector(a, b, 0, 4, 1, 5);
                w[2 * i + 1] = __builtin_shufflevector(a, b, 2, 6, 3, 7);
            } else if constexpr (N == 8) {
                w[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
                w[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
            } else {
                w[2 * i] =
                    __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
                w[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14,
                                                       30, 15, 31);
            }
        }
        for (int i = 0; i < N; ++i) v[i] = w[i];
    }
}

// A product's sums stay in half of the registers, as kVectors vectors of filters by kRows rows of tiles or
// channels: 2 by 8 is a tenth faster than 2 by 12 or 14 with AVX-512, 1 by 16 than 1 by 8.
template <class L, int kVectors>
constexpr int kRows = (L::kLanes == 16 ? 16 : 8) / kVectors;

// Filters that lie together when packed.
template <class L>
constexpr int64_t kPanel = 2 * L::kLanes;

// out (+)= sum_i a_i b_i of `count` terms: a_i[row] at a + row a_row + i a_step, the vectors b_i at b + i
// b_step.
template <class L, int kVectors, bool kAdd>
__attribute__((noinline)) void product(const float* a, int64_t a_row, int64_t a_step, const float* b,
                                       int64_t b_step, int64_t count, float* out, int64_t out_row) {
    using F = typename L::F;
    constexpr int kHigh = kRows<L, kVectors>;
    F sum[kHigh][kVectors]{};
    for (int64_t i = 0; i < count; ++i, a += a_step, b += b_step) {
        F right[kVectors];
        for (int j = 0; j < kVectors; ++j) right[j] = load_lanes<L>(b + j * L::kLanes);
        for (int r = 0; r < kHigh; ++r) {
            const F left = a[r * a_row] - F{};  // a bare broadcast, where L::broadcast adds: -0 + 0 is not -0
            for (int j = 0; j < kVectors; ++j) sum[r][j] = L::multiply_add(left, right[j], sum[r][j]);
        }
    }
    for (int r = 0; r < kHigh; ++r)
        for (int j = 0; j < kVectors; ++j) {
            float* to = out + r * out_row + j * L::kLanes;
            if constexpr (kAdd) sum[r][j] += load_lanes<L>(to);  // at the end: sums of few terms lose less
            store_lanes(sum[r][j], to);
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
                const int64_t at = row % high * T::kStep + y - 1;
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
            for (int k = T::kStep; k < T::kWindow; ++k) column(k - T::kStep - 1, window[k]);
            float* to = v + (row - rows.first) * wide * count + i;
            for (int64_t tile = 0; tile < wide; ++tile, to += count) {
                for (int k = 0; k < T::kWindow - T::kStep; ++k)
                    for (int p = 0; p < T::kSide; ++p) window[k][p] = window[k + T::kStep][p];
                for (int k = T::kWindow - T::kStep; k < T::kWindow; ++k)
                    column(tile * T::kStep + k - 1, window[k]);
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
    const int64_t high = (call.height + 1) / 2, wide = (call.width + 1) / 2;
    const int64_t tiles = whole((rows.last - rows.first) * wide);
    const int64_t left_plane = padded(tiles * C), out_plane = padded(tiles * K);
    float* left = left_scratch.floats(products(kScale) * left_plane);
    float* out = out_scratch.floats(products(kScale) * out_plane);
    transform_input<L, kScale>({call.x, call.height / shrink, call.width / shrink, C}, high, wide, rows, 0, C,
                               left, left_plane);
    for (int64_t p = 0; p < products(kScale); ++p)
        for (int64_t k = 0; k < K; k += kPanel<L>) {
            const float* right = packed + p * C * K + k * C;
            auto panel = [&](auto vectors) {
                constexpr int V = vectors.value;
                for (int64_t tile = 0; tile < tiles; tile += kRows<L, V>)
                    product<L, V, false>(left + p * left_plane + tile * C, C, 1, right, V * L::kLanes, C,
                                         out + p * out_plane + tile * K + k, K);
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
    constexpr int N = L::kLanes, kSide = Transform<kScale>::kSide;
    const int64_t C = call.channels, K = call.filters;
    // g[tap][channel] over filters: as they lie in memory, or turned about from channels over filters.
    F g[9][N];
    for (const int64_t last = std::min(k + kFilters, K); k < last; k += N)
        for (int64_t c = 0; c < C; c += N) {
            for (int tap = 0; tap < 9; ++tap) {
                const float* from = call.turned ? call.weight + (c * 9 + 8 - tap) * K + k
                                                : call.weight + (k * 9 + tap) * C + c;
                const int64_t stride = 9 * (call.turned ? K : C);
                for (int i = 0; i < N; ++i) g[tap][i] = load_lanes<L>(from + i * stride);
                if (!call.turned) turn<L>(g[tap]);
            }
            const int64_t panel = k / kPanel<L> * kPanel<L>, width = std::min(kPanel<L>, K - panel);
            for (int i = 0; i < N; ++i) {
                F filter[3][3], u[kSide][kSide];
                for (int tap = 0; tap < 9; ++tap) filter[tap / 3][tap % 3] = g[tap][i];
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
    const int64_t high = (call.height + 1) / 2, wide = (call.width + 1) / 2, K = call.filters;
    for (int64_t row = rows.first; row < rows.last; ++row)
        for (int64_t tile = 0; tile < wide; ++tile, z += count)
            for (int64_t i = 0; i < count; i += L::kLanes) {
                F y[2][2]{}, out[T::kSide][T::kSide];
                for (int pixel = 0; pixel < 4; ++pixel) {
                    const int64_t line = row % high * 2 + pixel / 2, column = tile * 2 + pixel % 2;
                    if (line >= call.height || column >= call.width) continue;
                    const int64_t at = (row / high * call.height + line) * call.width + column;
                    y[pixel / 2][pixel % 2] = load_lanes<L>(call.dy + at * K + k + i);
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
    const int64_t high = (call.height + 1) / 2, wide = (call.width + 1) / 2;
    const int64_t channels = std::min(kSquare, C - unit.c), filters = std::min(kSquare, K - unit.k);
    const int64_t step = std::max<int64_t>(1, kTerms / wide);
    const int64_t left_plane = padded(step * wide * channels), right_plane = padded(step * wide * filters);
    float* left = left_scratch.floats(products(kScale) * left_plane);
    float* right = right_scratch.floats(products(kScale) * right_plane);
    const Image image{call.x, call.height / shrink, call.width / shrink, C};
    for (TileRows rows = unit.rows; rows.first < unit.rows.last; rows.first += step) {
        rows.last = std::min(rows.first + step, unit.rows.last);
        const int64_t tiles = (rows.last - rows.first) * wide;
        transform_input<L, kScale>(image, high, wide, rows, unit.c, channels, left, left_plane);
        transform_gradient<L, kScale>(call, rows, unit.k, filters, right, right_plane);
        const bool add = rows.first > unit.rows.first;
        for (int64_t p = 0; p < products(kScale); ++p)
            for (int64_t k = 0; k < filters; k += kPanel<L>) {
                const float *a = left + p * left_plane, *b = right + p * right_plane + k;
                auto panel = [&](auto vectors) {
                    constexpr int V = vectors.value;
                    for (int64_t c = 0; c < channels; c += kRows<L, V>)
                        (add ? product<L, V, true>
                             : product<L, V, false>)(a + c, 1, channels, b, filters, tiles,
                                                     unit.sums + (p * C + unit.c + c) * K + unit.k + k, K);
                };
                if (filters - k >= kPanel<L>)
                    panel(std::integral_constant<int, 2>{});
                else
                    panel(std::integral_constant<int, 1>{});
            }
        if (unit.c > 0) continue;
        const float* sums = right + (Transform<kScale>::kSide + 1) * right_plane;  // those of four pixels
        for (int64_t k = 0; k < filters; ++k) {
            float sum = 0;
            for (int64_t tile = 0; tile < tiles; ++tile) sum += sums[tile * filters + k];
            unit.bias[unit.k + k] = (add ? unit.bias[unit.k + k] : 0) + double(sum);
        }
    }
}

template <class L, Scale kScale>
void finish_filters(const FilterCall& call, int64_t first, const float* sums, int64_t parts) {
    using F = typename L::F;
    constexpr int N = L::kLanes, kSide = Transform<kScale>::kSide;
    const int64_t C = call.channels, K = call.filters;
    F g[9][N];
    for (int64_t c = first; c < first + 16; c += N)
        for (int64_t k = 0; k < K; k += N) {
            for (int i = 0; i < N; ++i) {
                F u[kSide][kSide], filter[3][3];
                for (int p = 0; p < kSide * kSide; ++p) {
                    const float* from = sums + (p * C + c + i) * K + k;
                    F sum = load_lanes<L>(from);
                    for (int64_t part = 1; part < parts; ++part)
                        sum += load_lanes<L>(from + part * kSide * kSide * C * K);
                    u[p / kSide][p % kSide] = sum;
                }
                both_ways(u, filter,
                          [](const auto& from, auto& to) { Transform<kScale>::filter_gradient(from, to); });
                for (int tap = 0; tap < 9; ++tap) g[tap][i] = filter[tap / 3][tap % 3];
            }
            for (int tap = 0; tap < 9; ++tap) {
                turn<L>(g[tap]);
                for (int i = 0; i < N; ++i)
                    store_lanes(g[tap][i], call.dweight + ((k + i) * 9 + tap) * C + c);
            }
        }
}

}  // namespace

template <class L>
void Conv<L>::pack(const ConvCall& call, int64_t k, float* packed) {
    (call.scale == Scale::same ? pack_filters<L, Scale::same> : pack_filters<L, Scale::doubled>)(call, k,
                                                                                                 packed);
}

template <class L>
void Conv<L>::multiply(const ConvCall& call, TileRows rows, const float* packed) {
    switch (call.scale) {
        case Scale::same:
            return multiply_tiles<L, Scale::same>(call, rows, packed);
        case Scale::doubled:
            return multiply_tiles<L, Scale::doubled>(call, rows, packed);
        case Scale::halved:
            return multiply_tiles<L, Scale::halved>(call, rows, packed);
    }
}

template <class L>
void Conv<L>::filters(const FilterCall& call, const FilterUnit& unit) {
    (call.scale == Scale::same ? filter_sums<L, Scale::same> : filter_sums<L, Scale::doubled>)(call, unit);
}

template <class L>
void Conv<L>::finish(const FilterCall& call, int64_t c, const float* sums, int64_t parts) {
    (call.scale == Scale::same ? finish_filters<L, Scale::same>
                               : finish_filters<L, Scale::doubled>)(call, c, sums, parts);
}

}  // namespace bdk
