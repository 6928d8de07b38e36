// What an op is asked to do, and the functions that do one span of it: one set per instruction set.
#pragma once

#include "bdk/columns.h"

namespace bdk {

enum class Type : int { float32, bfloat16, float16, byte };

// A tensor [N|1, C, H, W]: contiguous (strides H W, 1) or channels-last (1, C) within a sample.
struct View {
    void* data;
    Type type;
    bool contiguous;
    int64_t sample_stride;  // 0 where one image serves all samples
    int64_t channel_stride, pixel_stride;
    int64_t pixels, width;  // H W, and W
};

struct Table {
    const float* data;
    int64_t arms, rows, columns;

    BDK_HD const float* row(int64_t arm, int64_t index) const {
        return data + (arm * rows + index) * columns;
    }
};

// One int64 a sample, or one for all (stride 0).
struct Index {
    const int64_t* data;
    int64_t stride;

    BDK_HD int64_t operator[](int64_t sample) const { return data[sample * stride]; }
};

// Absent tensors have null data.
struct NormalCall {
    View out;
    const int64_t* seeds;
    Index step;
    uint32_t stream;
};

struct StepCall {
    View x_t, m, out, trigger, region, history[HISTORY_SLOTS];
    int slots;
    bool stores;
    Table table;
    const int64_t *arm, *arm_inside, *seeds;
    Index step;
};

struct NoisingCall {
    View x0, out, target, trigger, mask, region;
    Table table;
    const int64_t *t, *arm, *arm_inside, *seeds;
    const bool* flip;
};

struct LossCall {
    View x0, prediction, gradient, trigger, mask, region;
    Table table;
    const int64_t *t, *arm, *arm_inside, *seeds;
    const bool* flip;
    float scale;
};

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
