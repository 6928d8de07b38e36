// bfloat16 and float16 to float32 (exact) and back (round to nearest, ties to even), in integer operations.
//
// Integer, so that flush-to-zero modes do not reach the subnormal halves.
#pragma once

#include "lane.h"

namespace bdk {

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <class L>
BDK_HD typename L::F widen(Bfloat16, typename L::W h) {
    return L::floats(typename L::I(h << 16));
}

template <class L>
BDK_HD typename L::W narrow(Bfloat16, typename L::F v) {
    using W = typename L::W;
    const W bits = W(L::bits(v));
    const W rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return v != v ? W{} + 0x7FC0u : rounded;
}

// The exponent moves from bias 15 to bias 127; a subnormal half is a normal float32, renormalised by one
// subtraction.
template <class L>
BDK_HD typename L::F widen(Float16, typename L::W h) {
    using I = typename L::I;
    constexpr int32_t kSmallest = 113 << 23;  // 2^-14
    const I bits = I(h & 0x7FFFu) << 13;
    const I normal = bits + (112 << 23);
    const I subnormal = L::bits(L::floats(bits + kSmallest) - L::floats(I{} + kSmallest));
    const I special = bits + (224 << 23);
    const I magnitude = bits < (1 << 23) ? subnormal : bits >= (31 << 23) ? special : normal;
    return L::floats(magnitude | I((h & 0x8000u) << 16));
}

template <class L>
BDK_HD typename L::W narrow(Float16, typename L::F v) {
    using W = typename L::W;
    using I = typename L::I;
    constexpr int32_t kMagic = 126 << 23;  // 0.5: its last bit is 2^-24, the smallest half
    const I bits = L::bits(v) & 0x7FFFFFFF;
    const I normal = (bits - (112 << 23) + 0xFFF + ((bits >> 13) & 1)) >> 13;
    const I subnormal = L::bits(L::floats(bits) + L::floats(I{} + kMagic)) - kMagic;
    const I special = bits > 0x7F800000 ? I{} + 0x7E00 : I{} + 0x7C00;
    const I magnitude = bits >= (143 << 23) ? special : bits < (113 << 23) ? subnormal : normal;
    return W(magnitude) | ((W(L::bits(v)) >> 16) & 0x8000u);
}

}  // namespace bdk
