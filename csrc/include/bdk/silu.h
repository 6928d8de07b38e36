// silu(v) = v / (1 + e^-v), over any lane type.
#pragma once

#include "normal.h"

namespace bdk {

constexpr float LOG2_E = 1.44269504f;
constexpr float E_LOW = -87.0f, E_HIGH = 88.0f;  // beyond, silu is v or 0 to float32's last bit

// e^v = 2^n e^r, n whole, |r| <= ln 2 / 2, e^r by its Taylor polynomial of degree 6: within 2e-7 of truth.
template <class L>
BDK_HD typename L::F exponential(typename L::F v) {
    using F = typename L::F;
    v = v < E_LOW ? L::broadcast(E_LOW) : v;
    v = v > E_HIGH ? L::broadcast(E_HIGH) : v;
    const typename L::I n = L::truncate(v * LOG2_E + 128.5f) - 128;  // the sum is positive, so this rounds
    const F whole = L::to_float(n);
    const F r =
        L::multiply_add(whole, L::broadcast(-LN2_LOW), L::multiply_add(whole, L::broadcast(-LN2_HIGH), v));
    F power = L::broadcast(0.0013888889f);
    constexpr float taylor[] = {0.008333334f, 0.041666668f, 0.16666667f, 0.5f, 1.0f, 1.0f};
    for (const float c : taylor) power = L::multiply_add(power, r, L::broadcast(c));
    return power * L::floats((n + 127) << 23);
}

template <class L>
BDK_HD typename L::F silu(typename L::F v) {
    return v / (exponential<L>(-v) + 1.0f);
}

// Its derivative, g (1 + v (1 - g)) with g = 1 / (1 + e^-v).
template <class L>
BDK_HD typename L::F silu_slope(typename L::F v) {
    const typename L::F g = 1.0f / (exponential<L>(-v) + 1.0f);
    return g * (1.0f + v * (1.0f - g));
}

}  // namespace bdk
