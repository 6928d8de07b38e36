// One sampler row, with m the network's output, h_j the history, r the trigger image and z the noise:
//
//   x0 = clamp(A x + B m + D r, LOW0, HIGH0)
//   x' = clamp(P x + Q x0 + S m + sum_j H_j h_j + Z z + R r, LOW, HIGH)
//   store k := E x + F m + G x0 + sum_j J_j h_j + K x'
//
// Sums run left to right. Without a trigger its terms are left out.
#pragma once

#include "columns.h"

namespace bdk {

template <class L>
struct Operands {
    typename L::F x_t, m, r, z, h[HISTORY_SLOTS];
    int slots;  // how many h there are; loops over them have a fixed length, so that h stays in registers
};

// Select form: NaN passes.
template <class F>
BDK_HD F clamp(F v, F low, F high) {
    v = low > v ? low : v;
    return high < v ? high : v;
}

template <bool kTrigger, class L, class Row>
BDK_HD typename L::F predicted_x0(const Row& row, const Operands<L>& in) {
    auto x0 = row[Step::A] * in.x_t + row[Step::B] * in.m;
    if (kTrigger) x0 = x0 + row[Step::D] * in.r;
    return clamp(x0, row[Step::LOW0], row[Step::HIGH0]);
}

template <bool kTrigger, class L, class Row>
BDK_HD typename L::F next_sample(const Row& row, const Operands<L>& in, typename L::F x0) {
    auto x = row[Step::P] * in.x_t + row[Step::Q] * x0 + row[Step::S] * in.m;
    for (int j = 0; j < HISTORY_SLOTS; ++j)
        if (j < in.slots) x = x + row[Step::H + j] * in.h[j];
    const auto scale = row[Step::Z];
    x = x + scale * (scale == 0.0f ? L::broadcast(0) : in.z);
    if (kTrigger) x = x + row[Step::R] * in.r;
    return clamp(x, row[Step::LOW], row[Step::HIGH]);
}

template <class L, class Row>
BDK_HD typename L::F stored(const Row& row, int k, const Operands<L>& in, typename L::F x0,
                            typename L::F x_next) {
    const int base = Step::STORE + k * STORE_COLUMNS;
    auto value = row[base + Store::E] * in.x_t + row[base + Store::F] * in.m + row[base + Store::G] * x0;
    for (int j = 0; j < HISTORY_SLOTS; ++j)
        if (j < in.slots) value = value + row[base + Store::J + j] * in.h[j];
    return value + row[base + Store::K] * x_next;
}

}  // namespace bdk
