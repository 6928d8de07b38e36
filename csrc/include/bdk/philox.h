// Philox4x32-10 of Random123 (Salmon et al. 2011): words = Philox(counter = (group, step, stream, 0), key =
// seed).
//
//   round:  p0 = M0 c0,  p1 = M1 c2            64-bit products
//           c0 := high(p1) ^ c1 ^ k0           c1 := low(p1)
//           c2 := high(p0) ^ c3 ^ k1           c3 := low(p0)         k0 += W0, k1 += W1
#pragma once

#include "lane.h"

namespace bdk {

constexpr int PHILOX_ROUNDS = 10;
constexpr uint32_t PHILOX_M0 = 0xD2511F53, PHILOX_M1 = 0xCD9E8D57;
constexpr uint32_t PHILOX_W0 = 0x9E3779B9, PHILOX_W1 = 0xBB67AE85;

// Both keys of every round, ready for use: one seed makes the noise of thousands of elements.
template <class L>
struct Key {
    typename L::D k0[PHILOX_ROUNDS], k1[PHILOX_ROUNDS];

    BDK_HD explicit Key(int64_t seed) {
        uint32_t low = uint32_t(seed), high = uint32_t(uint64_t(seed) >> 32);
        for (int round = 0; round < PHILOX_ROUNDS; ++round, low += PHILOX_W0, high += PHILOX_W1) {
            k0[round] = typename L::D{} + uint64_t(low);
            k1[round] = typename L::D{} + uint64_t(high);
        }
    }
};

// A word rides in the low half of a 64-bit lane. The multiplier reads only low halves, so what the high ones
// hold does not matter and low(p) costs nothing: 16 instructions a round for 8 lanes, against 18 with 32-bit
// lanes, and no shuffles.
template <class L>
BDK_HD void philox(typename L::D (&counter)[L::kHalves][4], const Key<L>& key) {
    using D = typename L::D;
    for (int round = 0; round < PHILOX_ROUNDS; ++round)
        for (auto& c : counter) {
            const D p0 = L::multiply(c[0], PHILOX_M0), p1 = L::multiply(c[2], PHILOX_M1);
            c[0] = (p1 >> 32) ^ (c[1] ^ key.k0[round]);
            c[1] = p1;
            c[2] = (p0 >> 32) ^ (c[3] ^ key.k1[round]);
            c[3] = p0;
        }
}

// The four words of `L::kLanes` groups, `first` and those after it.
template <class L>
BDK_HD void words(const Key<L>& key, uint32_t first, uint32_t step, uint32_t stream, typename L::W (&w)[4]) {
    using D = typename L::D;
    D counter[L::kHalves][4];
    for (int half = 0; half < L::kHalves; ++half) {
        counter[half][0] = L::groups(first, half);
        counter[half][1] = D{} + uint64_t(step);
        counter[half][2] = D{} + uint64_t(stream);
        counter[half][3] = D{};
    }
    philox<L>(counter, key);
    for (int i = 0; i < 4; ++i) {
        D halves[L::kHalves];
        for (int half = 0; half < L::kHalves; ++half) halves[half] = counter[half][i];
        w[i] = L::join(halves);
    }
}

}  // namespace bdk
