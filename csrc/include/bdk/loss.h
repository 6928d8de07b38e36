// The loss of one element and its gradient in the prediction, with R the poisoned image:
//
//   target = eps + C R      difference = prediction - target      w = W scale
//   loss = w difference^2   gradient = 2 w difference
#pragma once

#include "columns.h"

namespace bdk {

template <class F>
struct Loss {
    F value, gradient;
};

template <bool kTrigger, class F, class Row>
BDK_HD Loss<F> loss(const Row& row, F prediction, F poisoned, F eps, float scale) {
    F target = eps;
    if (kTrigger) target = target + row[Noising::C] * poisoned;
    const F difference = prediction - target;
    const F weight = row[Noising::W] * scale;
    return {weight * (difference * difference), 2.0f * weight * difference};
}

}  // namespace bdk
