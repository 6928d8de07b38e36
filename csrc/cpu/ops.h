// The ops on whole tensors: arguments checked before anything is written, work shared among threads.
#pragma once

#include <string>
#include <vector>

#include "conv.h"
#include "norm.h"

namespace bdk {

struct Extent {
    int64_t samples, elements;  // elements of one sample: C H W
    int threads;
};

// Each throws std::invalid_argument where an index points outside of its table.
void normal(const Extent&, const NormalCall&);
void fused_step(const Extent&, const StepCall&, int64_t* bad_row);  // bad_row may be null
void fused_noising(const Extent&, const NoisingCall&);

// Sums of at most this many elements are written to `parts`, one after another, those of a sample together.
constexpr int64_t kLossPart = 8192;
void fused_loss(const Extent&, const LossCall&, float* losses, double* parts);
void group_norm(int64_t samples, int threads, const NormCall&);
void conv(const ConvCall&, int threads);
void conv_filters(const FilterCall&, int threads);

const char* isa();                // the one in use
std::vector<std::string> isas();  // those that run here, the fastest first
void set_isa(const std::string& name);

}  // namespace bdk
