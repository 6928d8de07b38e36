// One noising row, with y the target image and R = M x + r the poisoned image:
//
//   x_t = A d + M R + S eps          d = y where the sample is poisoned, else x
//
// Without a trigger the term in R is left out; without a mask R = r.
#pragma once

#include "columns.h"

namespace bdk {

// A byte as a pixel in [-1, 1].
template <class F>
BDK_HD F pixel(F byte) {
    return (byte * 2.0f - 255.0f) / 255.0f;
}

template <bool kTrigger, class F, class Row>
BDK_HD F noised(const Row& row, F data, F poisoned, F eps) {
    F x_t = row[Noising::A] * data;
    if (kTrigger) x_t = x_t + row[Noising::M] * poisoned;
    return x_t + row[Noising::S] * eps;
}

}  // namespace bdk
