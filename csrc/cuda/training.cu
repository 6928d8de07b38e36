// Training inputs and the loss over a batch: the formulas are in bdk/noising.h and bdk/loss.h.
#include "bdk/loss.h"
#include "bdk/noising.h"
#include "bdk/normal.h"
#include "launch.cuh"

namespace bdk::cuda {

// Images in [-1, 1] and, with a trigger, the poisoned image R = M x + r.
template <bool kWhole, class X0, int kWidth, class Call>
__device__ void load_images(const Call& call, const Size& size, At at, float (&x)[kWidth],
                            float (&poisoned)[kWidth]) {
    at.flip = call.flip != nullptr && call.flip[at.sample];
    load<kWhole, X0>(call.x0, size, at, x);
    at.flip = false;
    if (std::is_same_v<X0, uint8_t> || (kIsAny<X0> && call.x0.type == Type::byte))
        for (float& v : x) v = pixel(v);
    if (call.trigger.data == nullptr) return;
    load<kWhole, float>(call.trigger, size, at, poisoned);
    if (call.mask.data == nullptr) return;
    float mask[kWidth];
    load<kWhole, float>(call.mask, size, at, mask);
    for (int i = 0; i < kWidth; ++i) poisoned[i] = mask[i] * x[i] + poisoned[i];
}

// Both rows always: five columns cost less than twice as many kernels. Without a region they are the same.
template <class Call>
__device__ SampleRows<NOISING_COLUMNS, true, false> rows_of(const Call& call, int64_t sample) {
    return {call.table, call.arm, call.arm_inside, sample, __ldg(call.t + sample)};
}
template <class Call>
Call with_both_arms(Call call) {
    if (call.arm_inside == nullptr) call.arm_inside = call.arm;
    return call;
}

template <class X0, class Out>
__global__ void __launch_bounds__(kThreads) noising_kernel(const NoisingCall call, const Size size) {
    constexpr bool kWhole = !kIsAny<X0>;
    constexpr int kWidth = kElements<X0, Out>;
    const At at = this_thread<kWidth>(size);
    if (at.count == 0) return;
    const auto rows = rows_of(call, at.sample);

    float data[kWidth], poisoned[kWidth]{}, region[kWidth]{}, eps[kWidth], x_t[kWidth];
    load_images<kWhole, X0>(call, size, at, data, poisoned);
    if (call.target.data != nullptr && __ldg(call.arm + at.sample) > 0)
        load<kWhole, float>(call.target, size, at, data);
    if (call.region.data != nullptr) load<kWhole, uint8_t>(call.region, size, at, region);
    normals(__ldg(call.seeds + at.sample), 0, STREAM_TRAINING, at, eps);
    for (int i = 0; i < kWidth; ++i) {
        const auto row = rows.at(region[i]);
        x_t[i] = call.trigger.data != nullptr ? noised<true>(row, data[i], poisoned[i], eps[i])
                                              : noised<false>(row, data[i], poisoned[i], eps[i]);
    }
    store<kWhole, Out>(call.out, size, at, x_t);
}

constexpr int kWarp = 32;

// The sum over a warp, in its first thread; in a fixed order.
__device__ inline double warp_sum(double v) {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) v += __shfl_down_sync(~0u, v, lanes);
    return v;
}

// In float64 but for the four of a group: so many roundings to float32 would show in the loss, and nothing
// else does.
template <class P, class X0>
__global__ void __launch_bounds__(kThreads)
    loss_kernel(const LossCall call, const Size size, double* const parts) {
    constexpr bool kWhole = !kIsAny<P>;
    constexpr int kWidth = kElements<P, X0>;
    const At at = this_thread<kWidth>(size);
    if (at.sample >= size.samples) return;
    double sum = 0;
    if (at.count > 0) {
        const auto rows = rows_of(call, at.sample);
        float prediction[kWidth], x[kWidth], poisoned[kWidth]{}, region[kWidth]{}, eps[kWidth];
        load<kWhole, P>(call.prediction, size, at, prediction);
        if (call.trigger.data != nullptr) load_images<kWhole, X0>(call, size, at, x, poisoned);
        if (call.region.data != nullptr) load<kWhole, uint8_t>(call.region, size, at, region);
        normals(__ldg(call.seeds + at.sample), 0, STREAM_TRAINING, at, eps);
        float value[kWidth], gradient[kWidth];
        for (int i = 0; i < kWidth; ++i) {
            const auto row = rows.at(region[i]);
            const auto one = call.trigger.data != nullptr
                                 ? loss<true>(row, prediction[i], poisoned[i], eps[i], call.scale)
                                 : loss<false>(row, prediction[i], poisoned[i], eps[i], call.scale);
            value[i] = i < at.count ? one.value : 0.0f;
            gradient[i] = one.gradient;
        }
        store<kWhole, P>(call.gradient, size, at, gradient);
        for (int i = 0; i < kWidth; i += 4)
            sum += double((value[i] + value[i + 1]) + (value[i + 2] + value[i + 3]));
    }

    __shared__ double warps[kThreads / kWarp];
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0;
        for (double part : warps) total += part;
        parts[at.sample * gridDim.x + blockIdx.x] = total;
    }
}

// A warp sums the parts of one sample.
__global__ void __launch_bounds__(kThreads)
    loss_total_kernel(const double* const parts, int64_t samples, int64_t per_sample, float* const losses) {
    const int64_t sample = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
    if (sample >= samples) return;
    double sum = 0;
    for (int64_t i = threadIdx.x % kWarp; i < per_sample; i += kWarp) sum += parts[sample * per_sample + i];
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) losses[sample] = float(sum);
}

namespace {

using NoisingKernel = void (*)(NoisingCall, Size);
using LossKernel = void (*)(LossCall, Size, double*);

template <class Out>
NoisingKernel noising_kernel_from(Type x0) {
    return x0 == Type::byte ? noising_kernel<uint8_t, Out> : noising_kernel<float, Out>;
}

NoisingKernel noising_kernel_for(Type x0, Type out) {
    if (out == Type::bfloat16) return noising_kernel_from<Bfloat16>(x0);
    return out == Type::float16 ? noising_kernel_from<Float16>(x0) : noising_kernel_from<float>(x0);
}

template <class P>
LossKernel loss_kernel_from(Type x0) {
    return x0 == Type::byte ? loss_kernel<P, uint8_t> : loss_kernel<P, float>;
}

LossKernel loss_kernel_for(Type prediction, Type x0) {
    if (prediction == Type::bfloat16) return loss_kernel_from<Bfloat16>(x0);
    return prediction == Type::float16 ? loss_kernel_from<Float16>(x0) : loss_kernel_from<float>(x0);
}

// A vector of pixels is mirrored whole, so it must not cross the end of their row.
bool flips_whole(const Shape& shape, const bool* flip, int width) {
    return flip == nullptr || shape.width % width == 0;
}

}  // namespace

void fused_noising(const Shape& shape, const NoisingCall& call, Stream stream) {
    const Size size = size_of(shape);
    const OnDevice on(stream.device);
    if (size.samples * size.elements == 0) return;
    const int width = call.x0.type == Type::float32 && call.out.type == Type::float32 ? 4 : 8;
    const bool vectors =
        flips_whole(shape, call.flip, width) &&
        whole(size, width, {&call.x0, &call.out, &call.target, &call.trigger, &call.mask, &call.region});
    const auto kernel = vectors ? noising_kernel_for(call.x0.type, call.out.type) : noising_kernel<Any, Any>;
    launch(kernel, grid_of(size, vectors ? width : 4), stream, with_both_arms(call), size);
}

void fused_loss(const Shape& shape, const LossCall& call, float* losses, double* parts, Stream stream) {
    const Size size = size_of(shape);
    const OnDevice on(stream.device);
    if (size.samples == 0) return;
    dim3 grid(0);
    if (size.elements > 0) {
        const int width = call.x0.type == Type::float32 && call.prediction.type == Type::float32 ? 4 : 8;
        const bool vectors =
            flips_whole(shape, call.flip, width) &&
            whole(size, width,
                  {&call.x0, &call.prediction, &call.gradient, &call.trigger, &call.mask, &call.region});
        const auto kernel =
            vectors ? loss_kernel_for(call.prediction.type, call.x0.type) : loss_kernel<Any, Any>;
        grid = grid_of(size, vectors ? width : 4);
        launch(kernel, grid, stream, with_both_arms(call), size, parts);
    }
    const dim3 totals(unsigned(quotient_up(size.samples, kThreads / kWarp)));
    launch(loss_total_kernel, totals, stream, static_cast<const double*>(parts), size.samples,
           int64_t(grid.x), losses);
}

}  // namespace bdk::cuda
