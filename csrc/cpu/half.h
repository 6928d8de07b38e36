// Halves where the instruction set has float16 conversions of its own.
#pragma once

#include "bdk/half.h"
#include "vec.h"

namespace bdk {

#if defined(__F16C__)
template <>
BDK_HD Lanes<8>::F widen<Lanes<8>>(Float16, Lanes<8>::W h) {
    const __m256i wide = __m256i(h);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    return _mm256_cvtph_ps(packed);
}
template <>
BDK_HD Lanes<8>::W narrow<Lanes<8>>(Float16, Lanes<8>::F v) {
    return Lanes<8>::W(_mm256_cvtepu16_epi32(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)));
}
#endif

#if defined(__AVX512F__)
template <>
BDK_HD Lanes<16>::F widen<Lanes<16>>(Float16, Lanes<16>::W h) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(__m512i(h)));
}
template <>
BDK_HD Lanes<16>::W narrow<Lanes<16>>(Float16, Lanes<16>::F v) {
    return Lanes<16>::W(_mm512_cvtepu16_epi32(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)));
}
#endif

}  // namespace bdk
