// What Winograd's way does to a tile, a filter and their gradients (conv.h), for any lane type.
#pragma once

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
    static constexpr int kTaps = 3, kBorder = 1;
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

template <>
struct Transform<Scale::point> {
    static constexpr int kTaps = 1, kBorder = 0, kSide = 1, kWindow = 1, kStep = 1, kPixels = 1;

    static constexpr auto input = [](const auto& from, auto& to) { to[0] = from[0]; };
    static constexpr auto output = input, gradient = input, filter = input, filter_gradient = input;
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

}  // namespace
}  // namespace bdk
