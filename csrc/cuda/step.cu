// One sampler row over a batch, and the initial noise: the formulas are in bdk/step.h and bdk/normal.h.
#include "bdk/normal.h"
#include "bdk/step.h"
#include "launch.cuh"

namespace bdk::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads) normal_kernel(const NormalCall call, const Size size) {
    constexpr int kWidth = kElements<T>;
    const At at = this_thread<kWidth>(size);
    if (at.count == 0) return;
    float z[kWidth];
    normals(__ldg(call.seeds + at.sample), uint32_t(__ldg(call.step.data + at.sample * call.step.stride)),
            call.stream, at, z);
    store<!kIsAny<T>, T>(call.out, size, at, z);
}

// The j-th slot: slots lie one after another.
__device__ inline View slot_view(const StepCall& call, const Size& size, int64_t j) {
    View view = call.history[0];
    view.data = static_cast<float*>(view.data) + j * size.samples * size.elements;
    return view;
}

// `X` is the type of x and x', `M` the network output's. kHistory and kRegion may hold where there is
// neither: the row is then the same, in more registers.
template <class X, class M, bool kHistory, bool kRegion>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const StepCall call, const Size size, int64_t* const bad_row) {
    constexpr bool kWhole = !kIsAny<X>;
    constexpr int kWidth = kElements<X, M>,
                  kColumns = kHistory ? Step::STORE + STORES * STORE_COLUMNS + 2 : +Step::H;
    const At at = this_thread<kWidth>(size);
    if (at.count == 0) return;
    const int64_t index = __ldg(call.step.data + at.sample * call.step.stride);
    const SampleRows<kColumns, kRegion, kWhole> rows(call.table, call.arm, call.arm_inside, at.sample, index);

    float x_t[kWidth], m[kWidth], r[kWidth]{}, z[kWidth]{}, region[kWidth]{}, h[HISTORY_SLOTS][kWidth]{};
    load<kWhole, X>(call.x_t, size, at, x_t);
    load<kWhole, M>(call.m, size, at, m);
    const bool trigger = call.trigger.data != nullptr;
    if (trigger) load<kWhole, float>(call.trigger, size, at, r);
    if (kRegion && call.region.data != nullptr) load<kWhole, uint8_t>(call.region, size, at, region);
    if constexpr (kHistory)
        for (int j = 0; j < HISTORY_SLOTS; ++j)
            if (j < call.slots && (reads_slot(rows.outside.value, j) || reads_slot(rows.inside.value, j)))
                load<kWhole, float>(slot_view(call, size, j), size, at, h[j]);
    if (rows.outside[Step::Z] != 0 || rows.inside[Step::Z] != 0)
        normals(__ldg(call.seeds + at.sample), uint32_t(index), STREAM_STEP, at, z);

    float x0[kWidth], x_next[kWidth];
    int32_t bad = 0;
    const auto operands = [&](int i) {
        return Operands<Scalar>{
            x_t[i], m[i], r[i], z[i], {h[0][i], h[1][i], h[2][i], h[3][i]}, kHistory ? call.slots : 0};
    };
    for (int i = 0; i < kWidth; ++i) {
        const auto& row = rows.at(region[i]);
        const auto in = operands(i);
        x0[i] = trigger ? predicted_x0<true>(row, in) : predicted_x0<false>(row, in);
        x_next[i] = trigger ? next_sample<true>(row, in, x0[i]) : next_sample<false>(row, in, x0[i]);
        bad |= Scalar::bits(m[i] - m[i]);  // +0, or NaN
    }
    store<kWhole, X>(call.out, size, at, x_next);

    if constexpr (kHistory)
        for (int k = 0; k < STORES; ++k) {
            const float slot = rows.outside[Step::STORE + k * STORE_COLUMNS + Store::SLOT];
            if (!call.stores || !(slot >= 0 && slot < float(call.slots) && slot == float(int(slot))))
                continue;
            float value[kWidth];
            for (int i = 0; i < kWidth; ++i)
                value[i] = stored(rows.at(region[i]), k, operands(i), x0[i], x_next[i]);
            store<kWhole, float>(slot_view(call, size, int(slot)), size, at, value);
        }
    if (bad != 0 && bad_row != nullptr)
        atomicMin(reinterpret_cast<long long*>(bad_row), static_cast<long long>(index));
}

void normal(const Shape& shape, const NormalCall& call, Stream stream) {
    const Size size = size_of(shape);
    const OnDevice on(stream.device);
    if (size.samples * size.elements == 0) return;
    const int width = call.out.type == Type::float32 ? 4 : 8;
    const bool vectors = whole(size, width, {&call.out});
    const auto kernel = !vectors                          ? normal_kernel<Any>
                        : call.out.type == Type::float32  ? normal_kernel<float>
                        : call.out.type == Type::bfloat16 ? normal_kernel<Bfloat16>
                                                          : normal_kernel<Float16>;
    launch(kernel, grid_of(size, vectors ? width : 4), stream, call, size);
}

namespace {

using StepKernel = void (*)(StepCall, Size, int64_t*);

template <class X, class M>
StepKernel step_kernel_for(bool history, bool region) {
    if (region) return history ? step_kernel<X, M, true, true> : step_kernel<X, M, false, true>;
    return history ? step_kernel<X, M, true, false> : step_kernel<X, M, false, false>;
}

// Types that go together: those of a network in half precision, and x kept in float32 around one.
StepKernel whole_step_kernel(Type x, Type m, bool history, bool region) {
    if (x == Type::float32) {
        if (m == Type::float32) return step_kernel_for<float, float>(history, region);
        if (m == Type::bfloat16) return step_kernel_for<float, Bfloat16>(history, region);
        return step_kernel_for<float, Float16>(history, region);
    }
    if (x == Type::bfloat16 && m == x) return step_kernel_for<Bfloat16, Bfloat16>(history, region);
    if (x == Type::float16 && m == x) return step_kernel_for<Float16, Float16>(history, region);
    return nullptr;
}

}  // namespace

void fused_step(const Shape& shape, const StepCall& call, int64_t* bad_row, Stream stream) {
    const Size size = size_of(shape);
    const OnDevice on(stream.device);
    if (size.samples * size.elements == 0) return;
    const bool history = call.slots > 0, region = call.region.data != nullptr;
    int width = call.x_t.type == Type::float32 && call.m.type == Type::float32 ? 4 : 8;
    StepKernel kernel = nullptr;
    const bool aligned_rows = reinterpret_cast<uintptr_t>(call.table.data) % 16 == 0;
    if (aligned_rows && whole(size, width,
                              {&call.x_t, &call.m, &call.out, &call.trigger, &call.region,
                               history ? &call.history[0] : &call.out}))
        kernel = whole_step_kernel(call.x_t.type, call.m.type, history, region);
    if (kernel == nullptr) kernel = step_kernel_for<Any, Any>(history, region), width = 4;
    launch(kernel, grid_of(size, width), stream, call, size, bad_row);
}

}  // namespace bdk::cuda
