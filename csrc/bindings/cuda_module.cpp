// bdkernels._cuda, which bdkernels/cuda.py calls: the ops on a CUDA device. Importing it needs neither device
// nor driver.
#include "bindings.h"
#include "cuda/launch.h"
#include "cuda/runtime.h"

namespace bdk {
namespace {

struct Cuda {
    using Place = std::pair<int, Address>;  // device and stream

    static cuda::Shape sizes(const Shape& shape) {
        const auto [n, c, h, w] = shape;
        return {n, c, h, w};
    }
    static cuda::Stream stream(const Place& place) { return {place.first, pointer<void>(place.second)}; }

    static void normal(const Shape& shape, const NormalCall& call, const Place& place) {
        cuda::normal(sizes(shape), call, stream(place));
    }
    static void fused_step(const Shape& shape, const StepCall& call, int64_t* bad_row, const Place& place) {
        cuda::fused_step(sizes(shape), call, bad_row, stream(place));
    }
    static void fused_noising(const Shape& shape, const NoisingCall& call, const Place& place) {
        cuda::fused_noising(sizes(shape), call, stream(place));
    }
    static void fused_loss(const Shape& shape, const LossCall& call, float* losses, double* parts,
                           const Place& place) {
        cuda::fused_loss(sizes(shape), call, losses, parts, stream(place));
    }
};

PYBIND11_MODULE(_cuda, m) {
    Bindings<Cuda>::define(m);
    m.def("require_device", cuda::require_device);
    m.attr("LOSS_PART") = cuda::kLossPart;
}

}  // namespace
}  // namespace bdk
