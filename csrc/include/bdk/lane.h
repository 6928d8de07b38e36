// A lane type `L` names what the mathematics is written over: one scalar (here; also CUDA), or 4 or 8 at once
// (cpu/vec.h).
//
//   F float32   I int32   W uint32   D uint64, half as many lanes as the others (as many, for a scalar)
//
// Operators and `condition ? a : b` mean the same for scalars and for GCC vectors, so a formula is written
// once.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define BDK_HD __host__ __device__ __forceinline__
#else
#define BDK_HD inline __attribute__((always_inline))
#endif

namespace bdk {

struct Scalar {
    using F = float;
    using I = int32_t;
    using W = uint32_t;
    using D = uint64_t;
    static constexpr int kLanes = 1;
    static constexpr int kHalves = 1;  // how many D it takes to hold one word a lane

    BDK_HD static F broadcast(float v) { return v; }
    BDK_HD static D groups(uint32_t first, int) { return first; }
    BDK_HD static D multiply(D word, uint32_t m) {
#ifdef __CUDA_ARCH__  // told so, nvcc keeps words of 32 bits; else a round has 64-bit sums and exclusive ors
        D product;
        asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(uint32_t(word)), "r"(m));
        return product;
#else
        return uint64_t(uint32_t(word)) * m;
#endif
    }
    BDK_HD static W join(const D (&half)[1]) { return W(half[0]); }
    BDK_HD static void transpose(F (&)[4]) {}

    BDK_HD static F to_float(W v) { return float(v); }
    BDK_HD static F to_float(I v) { return float(v); }
    BDK_HD static I truncate(F v) { return I(v); }
    BDK_HD static I bits(F v) {
        I i;
        memcpy(&i, &v, sizeof i);
        return i;
    }
    BDK_HD static F floats(I v) {
        F f;
        memcpy(&f, &v, sizeof f);
        return f;
    }
    BDK_HD static F sqrt(F v) { return sqrtf(v); }
    BDK_HD static F multiply_add(F a, F b, F c) { return a * b + c; }
};

}  // namespace bdk
