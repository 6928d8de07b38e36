// Standard normals from Philox words, the contract of bdkernels/noise.py:
//
//   u  = float32(w) 2^-32 + 2^-33                                in (0, 1]
//   z0 = sqrt(-2 ln u0) cos(2 pi u1)      z1 = sqrt(-2 ln u0) sin(2 pi u1)      z2, z3 likewise from u2, u3
//
// Every product and sum is rounded once: compile with -ffp-contract=off, nvcc with -fmad=false.
#pragma once

#include "philox.h"

namespace bdk {

constexpr uint32_t STREAM_STEP = 1, STREAM_TRAINING = 2;

constexpr int32_t SQRT_HALF_BITS = 0x3F3504F3;
constexpr float LN2_HIGH = 0.693115234375f;  // 12 bits: its product with an exponent is exact
constexpr float LN2_LOW = 3.194618329871446e-05f;

// horner(x, c0, c1, ...) = c0 + x (c1 + x (...)).
template <class F>
BDK_HD F horner(F, float c) {
    return F{} + c;
}
template <class F, class... Rest>
BDK_HD F horner(F x, float c, Rest... rest) {
    return horner(x, rest...) * x + c;
}

template <class L>
BDK_HD typename L::F uniform(typename L::W word) {
    return L::to_float(word) * 0x1p-32f + 0x1p-33f;
}

// u = m 2^e, m in [sqrt(1/2), sqrt(2)), a = m - 1:   ln u = e ln2_high + (a + (a^3 P(a) + e ln2_low - a^2 /
// 2)) <= 0.
template <class L>
BDK_HD typename L::F ln(typename L::F u) {
    using F = typename L::F;
    const typename L::I offset = L::bits(u) - SQRT_HALF_BITS;
    const F e = L::to_float(offset >> 23);
    const F a = L::floats((offset & 0x7FFFFF) + SQRT_HALF_BITS) - 1.0f;
    const F square = a * a;
    const F cubic = horner(a, 0.33333883f, -0.25001565f, 0.1996476f, -0.16569725f, 0.14885178f, -0.14326333f,
                           0.088718146f);
    const F tail = square * a * cubic + e * LN2_LOW - square * 0.5f;
    return e * LN2_HIGH + (a + tail);
}

// cos and sin of 2 pi u, u in [0, 1]: u = quadrant / 4 + f exactly, f an eighth of a turn to either side.
template <class L>
BDK_HD void cos_sin(typename L::F u, typename L::F& cos, typename L::F& sin) {
    using F = typename L::F;
    const typename L::I quadrant = (L::truncate(u * 8.0f) + 1) >> 1;
    const F f = u - L::to_float(quadrant) * 0.25f;
    const F square = f * f;
    const F s = f * horner(square, 6.2831855f, -41.341747f, 81.60244f, -75.74246f);
    const F c = square * horner(square, -19.739208f, 64.939186f, -85.43217f, 58.963997f) + 1.0f;
    const auto odd = (quadrant & 1) != 0;
    cos = odd ? s : c;
    sin = odd ? c : s;
    cos = ((quadrant + 1) & 2) != 0 ? -cos : cos;
    sin = (quadrant & 2) != 0 ? -sin : sin;
}

// Box and Muller: the normals of `kLanes` groups of words, in the order of their elements over z[0] .. z[3].
template <class L>
BDK_HD void box_muller(const typename L::W (&w)[4], typename L::F (&z)[4]) {
    using F = typename L::F;
    for (int i = 0; i < 4; i += 2) {
        const F radius = L::sqrt(ln<L>(uniform<L>(w[i])) * -2.0f);
        F cos, sin;
        cos_sin<L>(uniform<L>(w[i + 1]), cos, sin);
        z[i] = radius * cos;
        z[i + 1] = radius * sin;
    }
    L::transpose(z);
}

// The normals of one sample from element 4 `group` on, 4 kLanes a call. The words are made a call ahead: the
// processor then has two chains to work on, Philox for the next block and Box-Muller for this. On one core of
// an EPYC 7003, by AVX2, a normal takes 1.7 ns without, 1.2 ns with it and -fschedule-insns, which
// interleaves the two.
template <class L>
class Noise {
  public:
    BDK_HD Noise(int64_t seed, uint32_t step, uint32_t stream, int64_t group)
        : key_(seed), step_(step), stream_(stream), group_(uint32_t(group)) {
        words<L>(key_, group_, step_, stream_, words_);
    }
    BDK_HD void next(typename L::F (&z)[4]) {
        box_muller<L>(words_, z);
        group_ += L::kLanes;
        words<L>(key_, group_, step_, stream_, words_);
    }

  private:
    Key<L> key_;
    uint32_t step_, stream_, group_;
    typename L::W words_[4];
};

}  // namespace bdk
