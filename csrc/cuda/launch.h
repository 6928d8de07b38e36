// The ops on a CUDA device, queued on a stream. Addresses are of device memory; nothing is read by the host.
//
// Each throws std::invalid_argument where a size is beyond the kernels, std::runtime_error where CUDA
// refuses. An arm or a row outside of its table cannot be seen from here: the kernel makes that sample NaN.
#pragma once

#include "bdk/calls.h"

namespace bdk::cuda {

struct Shape {
    int64_t samples, channels, height, width;
};

struct Stream {
    int device;
    void* handle;
};

void normal(const Shape&, const NormalCall&, Stream);
void fused_step(const Shape&, const StepCall&, int64_t* bad_row, Stream);  // bad_row may be null
void fused_noising(const Shape&, const NoisingCall&, Stream);

// Sums of at most this many elements are written to `parts`, one after another, those of a sample together.
constexpr int64_t kLossPart = 512;
void fused_loss(const Shape&, const LossCall&, float* losses, double* parts, Stream);

}  // namespace bdk::cuda
