// Lanes<4> (128 bits: any x86-64, aarch64), Lanes<8> (AVX2) and Lanes<16> (AVX-512) as GCC and Clang vector
// types.
//
// Intrinsics stand only where the compiler has no operator for what the machine has in one instruction.
#pragma once

#include "bdk/lane.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace bdk {

template <class T, int N>
struct Vector {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};

template <int N>
struct Lanes {
    using F = typename Vector<float, N>::type;
    using I = typename Vector<int32_t, N>::type;
    using W = typename Vector<uint32_t, N>::type;
    using D = typename Vector<uint64_t, N / 2>::type;
    static constexpr int kLanes = N;
    static constexpr int kHalves = 2;

    BDK_HD static F broadcast(float v) { return F{} + v; }
    BDK_HD static I bits(F v) { return I(v); }
    BDK_HD static F floats(I v) { return F(v); }
    BDK_HD static F to_float(W v) {
        return __builtin_convertvector(v, F);
    }  // rounds once: two exact halves, added
    BDK_HD static F to_float(I v) { return __builtin_convertvector(v, F); }
    BDK_HD static I truncate(F v) { return __builtin_convertvector(v, I); }

    // Lane l works on group (l % 4) (N / 4) + l / 4. So numbered, a transpose inside 128 bits yields elements
    // in order.
    BDK_HD static D groups(uint32_t first, int half) {
        D lane;
        for (int i = 0; i < N / 2; ++i) {
            const int l = 2 * i + half;
            lane[i] = (l % 4) * (N / 4) + l / 4;
        }
        return lane + uint64_t(first);
    }

    // Lane 2i of the result is the low half of half[0][i], lane 2i + 1 of half[1][i].
    BDK_HD static W join(const D (&half)[2]) {
        if constexpr (N == 4)
            return __builtin_shufflevector(W(half[0]), W(half[1]), 0, 4, 2, 6);
        else if constexpr (N == 8)
            return __builtin_shufflevector(W(half[0]), W(half[1]), 0, 8, 2, 10, 4, 12, 6, 14);
        else
            return __builtin_shufflevector(W(half[0]), W(half[1]), 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26,
                                           12, 28, 14, 30);
    }

    BDK_HD static F low(F a, F b) {
        if constexpr (N == 4)
            return __builtin_shufflevector(a, b, 0, 4, 1, 5);
        else if constexpr (N == 8)
            return __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
        else
            return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    }
    BDK_HD static F high(F a, F b) {
        if constexpr (N == 4)
            return __builtin_shufflevector(a, b, 2, 6, 3, 7);
        else if constexpr (N == 8)
            return __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
        else
            return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
    BDK_HD static void transpose(F (&z)[4]) {
        const F even_low = low(z[0], z[2]), even_high = high(z[0], z[2]);
        const F odd_low = low(z[1], z[3]), odd_high = high(z[1], z[3]);
        z[0] = low(even_low, odd_low);
        z[1] = high(even_low, odd_low);
        z[2] = low(even_high, odd_high);
        z[3] = high(even_high, odd_high);
    }

    BDK_HD static D multiply(D word, uint32_t m) {
#if defined(__AVX512F__)
        if constexpr (N == 16) return D(_mm512_mul_epu32(__m512i(word), _mm512_set1_epi32(int32_t(m))));
#endif
#if defined(__AVX2__)
        if constexpr (N == 8) return D(_mm256_mul_epu32(__m256i(word), _mm256_set1_epi32(int32_t(m))));
#endif
#if defined(__x86_64__)
        if constexpr (N == 4) return D(_mm_mul_epu32(__m128i(word), _mm_set1_epi32(int32_t(m))));
#elif defined(__aarch64__)
        return D(vmull_u32(vmovn_u64(uint64x2_t(word)), vdup_n_u32(m)));
#else
        return (word & 0xFFFFFFFF) * m;
#endif
    }

    BDK_HD static F sqrt(F v) {
#if defined(__AVX512F__)
        if constexpr (N == 16) return _mm512_sqrt_ps(v);
#endif
#if defined(__AVX2__)
        if constexpr (N == 8) return _mm256_sqrt_ps(v);
#endif
#if defined(__x86_64__)
        if constexpr (N == 4) return _mm_sqrt_ps(v);
#elif defined(__aarch64__)
        return F(vsqrtq_f32(float32x4_t(v)));
#else
        for (int i = 0; i < N; ++i) v[i] = sqrtf(v[i]);
        return v;
#endif
    }

    // a b + c, in one rounding where the machine can: only for what is held to a tolerance, not to bits.
    BDK_HD static F multiply_add(F a, F b, F c) {
#if defined(__AVX512F__)
        if constexpr (N == 16) return _mm512_fmadd_ps(a, b, c);
#endif
#if defined(__FMA__)
        if constexpr (N == 8) return _mm256_fmadd_ps(a, b, c);
#endif
        return a * b + c;
    }

    // GCC 12 widens a vector of 8 bytes one byte at a time.
    BDK_HD static W load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
        if constexpr (N == 16)
            return W(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#endif
#if defined(__AVX2__)
        if constexpr (N == 8)
            return W(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#endif
#if defined(__x86_64__)
        if constexpr (N == 4) {
            const __m128i zero = _mm_setzero_si128(), four = _mm_cvtsi32_si128(load<int32_t>(p));
            return W(_mm_unpacklo_epi16(_mm_unpacklo_epi8(four, zero), zero));
        }
#else
        return __builtin_convertvector(load<typename Vector<uint8_t, N>::type>(p), W);
#endif
    }

    template <class V>
    BDK_HD static V load(const void* p) {
        V v;
        memcpy(&v, p, sizeof v);
        return v;
    }
};

}  // namespace bdk
