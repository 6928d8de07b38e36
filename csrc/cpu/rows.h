// The functions that do one span of an op: one set per instruction set.
#pragma once

#include "bdk/calls.h"

namespace bdk {

// Elements first .. last - 1 of one sample; `first` is a multiple of every block size.
struct Span {
    int64_t sample, first, last;
};

struct NormCall;

struct Rows {
    const char* name;
    void (*normal)(const NormalCall&, Span);
    bool (*step)(const StepCall&, Span);  // false where the network's output holds a NaN or an infinity
    void (*noising)(const NoisingCall&, Span);
    double (*loss)(const LossCall&, Span);
    void (*norm)(const NormCall&, int64_t sample);
};

extern const Rows BASELINE;  // 128-bit vectors
#if defined(__x86_64__)
extern const Rows AVX2;    // and F16C
extern const Rows AVX512;  // F, BW, DQ and VL
#endif

}  // namespace bdk
