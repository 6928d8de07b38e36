// The functions that do one span of an op: one set per instruction set.
#pragma once

#include "bdk/calls.h"

namespace bdk {

// Elements first .. last - 1 of one sample; `first` is a multiple of every block size.
struct Span {
    int64_t sample, first, last;
};

struct NormCall;
struct ConvCall;
struct FilterCall;
struct FilterUnit;
struct TileRows;

struct Rows {
    const char* name;
    void (*normal)(const NormalCall&, Span);
    bool (*step)(const StepCall&, Span);  // false where the network's output holds a NaN or an infinity
    void (*noising)(const NoisingCall&, Span);
    double (*loss)(const LossCall&, Span);
    void (*norm)(const NormCall&, int64_t sample);
    void (*conv_pack)(const ConvCall&, int64_t k, float* packed);  // see conv.h
    void (*conv_multiply)(const ConvCall&, TileRows, const float* packed);
    void (*conv_filters)(const FilterCall&, const FilterUnit&);
    void (*conv_finish)(const FilterCall&, int64_t c, const float* sums, int64_t parts);
};

extern const Rows BASELINE;  // 128-bit vectors
#if defined(__x86_64__)
extern const Rows AVX2;    // and F16C
extern const Rows AVX512;  // F, BW, DQ and VL
#endif

}  // namespace bdk
