// The rows over spans of tensors, for any lane type: load a block of each operand, apply the row, store.
//
// Everything here is a template over `L`, also what need not be: each instruction set must get code of its
// own, and the linker would merge equal names. Measurements: benchmarks/results.
#pragma once

#include "bdk/loss.h"
#include "bdk/noising.h"
#include "bdk/normal.h"
#include "bdk/step.h"
#include "conv.h"
#include "norm.h"
#include "tensor.h"

namespace bdk {

template <class L>
BDK_HD int block_count(int64_t first, int64_t last) {
    return last - first < kBlock<L> ? int(last - first) : kBlock<L>;
}

// The row, or the two rows, of a sample: `at(masks)[i]` is the row of the i-th vector of a block.
template <class L, int kColumns, bool kRegion>
struct SampleRows {
    const Row<L, kColumns> outside, inside;

    BDK_HD SampleRows(const Table& table, const int64_t* arm, const int64_t* arm_inside, int64_t sample,
                      int64_t row)
        : outside(table.row(arm[sample], row)),
          inside(table.row((kRegion ? arm_inside : arm)[sample], row)) {}

    BDK_HD decltype(auto) mixed(typename L::F region) const {
        if constexpr (kRegion)
            return MixedRow<L, kColumns, decltype(region != 0.0f)>{outside, inside, region != 0.0f};
        else
            return (outside);
    }
};

template <class L>
void normal_span(const NormalCall& call, Span span) {
    Noise<L> noise(call.seeds[span.sample], uint32_t(call.step[span.sample]), call.stream, span.first / 4);
    for (int64_t e = span.first; e < span.last; e += kBlock<L>) {
        Block<L> z;
        noise.next(z);
        store<L>(call.out, {span.sample, e, block_count<L>(e, span.last)}, z);
    }
}

template <class L, bool kTrigger, bool kHistory, bool kRegion>
bool step_span(const StepCall& call, Span span) {
    const int64_t index = call.step[span.sample];
    const SampleRows<L, STEP_COLUMNS, kRegion> rows(call.table, call.arm, call.arm_inside, span.sample,
                                                    index);
    const bool noisy = rows.outside[Step::Z][0] != 0 || rows.inside[Step::Z][0] != 0;
    Noise<L> noise(call.seeds[span.sample], uint32_t(index), STREAM_STEP, span.first / 4);

    int slot[STORES];
    for (int k = 0; k < STORES; ++k) {
        slot[k] = -1;
        for (int j = 0; kHistory && call.stores && j < call.slots; ++j)
            if (rows.outside[Step::STORE + k * STORE_COLUMNS + Store::SLOT][0] == float(j)) slot[k] = j;
    }

    bool reads[HISTORY_SLOTS];
    for (int j = 0; j < HISTORY_SLOTS; ++j)
        reads[j] = reads_slot(call.table.row(call.arm[span.sample], index), j) ||
                   (kRegion && reads_slot(call.table.row(call.arm_inside[span.sample], index), j));

    Block<L> r{}, z{}, region{}, h[HISTORY_SLOTS]{};  // zero where the row has none
    typename L::I bad{};
    for (int64_t e = span.first; e < span.last; e += kBlock<L>) {
        const Range range{span.sample, e, block_count<L>(e, span.last)};
        Block<L> x_t, m, x_next, value[STORES];
        load<L>(call.x_t, range, x_t);
        load<L>(call.m, range, m);
        if constexpr (kTrigger) load<L>(call.trigger, range, r);
        if constexpr (kRegion) load<L>(call.region, range, region);
        if constexpr (kHistory)
            for (int j = 0; j < HISTORY_SLOTS; ++j)
                if (j < call.slots && reads[j]) load<L>(call.history[j], range, h[j]);
        if (noisy) noise.next(z);

#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const auto& row = rows.mixed(region[i]);
            const Operands<L> in{
                x_t[i], m[i], r[i], z[i], {h[0][i], h[1][i], h[2][i], h[3][i]}, kHistory ? call.slots : 0};
            const auto x0 = predicted_x0<kTrigger>(row, in);
            x_next[i] = next_sample<kTrigger>(row, in, x0);
            for (int k = 0; k < STORES; ++k)
                if (slot[k] >= 0) value[k][i] = stored(row, k, in, x0, x_next[i]);
            bad |= L::bits(m[i] - m[i]);  // +0, or NaN
        }

        store<L>(call.out, range, x_next);
        for (int k = 0; k < STORES; ++k)
            if (slot[k] >= 0) store<L>(call.history[slot[k]], range, value[k]);
    }
    for (int l = 0; l < L::kLanes; ++l)
        if (bad[l] != 0) return false;
    return true;
}

// Images in [-1, 1] and, with a trigger, the poisoned image R = M x + r.
template <class L, bool kTrigger, class Call>
BDK_HD void load_images(const Call& call, Range range, Block<L>& x, Block<L>& poisoned) {
    range.flip = call.flip != nullptr && call.flip[range.sample];
    load<L>(call.x0, range, x);
    range.flip = false;
    if (call.x0.type == Type::byte)
        for (auto& v : x) v = pixel(v);
    if constexpr (kTrigger) {
        load<L>(call.trigger, range, poisoned);
        if (call.mask.data != nullptr) {
            Block<L> mask;
            load<L>(call.mask, range, mask);
            for (int i = 0; i < 4; ++i) poisoned[i] = mask[i] * x[i] + poisoned[i];
        }
    }
}

template <class L, bool kTrigger, bool kRegion>
void noising_span(const NoisingCall& call, Span span) {
    const SampleRows<L, NOISING_COLUMNS, kRegion> rows(call.table, call.arm, call.arm_inside, span.sample,
                                                       call.t[span.sample]);
    const bool backdoored = call.target.data != nullptr && call.arm[span.sample] > 0;
    Noise<L> noise(call.seeds[span.sample], 0, STREAM_TRAINING, span.first / 4);
    Block<L> poisoned{}, region{};  // zero where the row has none
    for (int64_t e = span.first; e < span.last; e += kBlock<L>) {
        const Range range{span.sample, e, block_count<L>(e, span.last)};
        Block<L> data, eps, x_t;
        load_images<L, kTrigger>(call, range, data, poisoned);
        if (backdoored) load<L>(call.target, range, data);
        if constexpr (kRegion) load<L>(call.region, range, region);
        noise.next(eps);
        for (int i = 0; i < 4; ++i)
            x_t[i] = noised<kTrigger>(rows.mixed(region[i]), data[i], poisoned[i], eps[i]);
        store<L>(call.out, range, x_t);
    }
}

// Eight sums in float64, element e in sum e % 8: the same bits for every lane type.
template <class L>
struct Sum {
    using Four = typename Vector<double, 4>::type;
    Four low{}, high{};

    BDK_HD static Four wide(typename Lanes<4>::F v) { return __builtin_convertvector(v, Four); }

    BDK_HD void add(const Block<L>& v) {
        for (int i = 0; i < 4; ++i)
            if constexpr (L::kLanes == 16) {
                low += wide(__builtin_shufflevector(v[i], v[i], 0, 1, 2, 3));
                high += wide(__builtin_shufflevector(v[i], v[i], 4, 5, 6, 7));
                low += wide(__builtin_shufflevector(v[i], v[i], 8, 9, 10, 11));
                high += wide(__builtin_shufflevector(v[i], v[i], 12, 13, 14, 15));
            } else if constexpr (L::kLanes == 8) {
                low += wide(__builtin_shufflevector(v[i], v[i], 0, 1, 2, 3));
                high += wide(__builtin_shufflevector(v[i], v[i], 4, 5, 6, 7));
            } else {
                (i % 2 == 0 ? low : high) += wide(v[i]);
            }
    }
    BDK_HD double total() const {
        const Four s = low + high;
        return (s[0] + s[2]) + (s[1] + s[3]);
    }
};

template <class L, bool kTrigger, bool kRegion>
double loss_span(const LossCall& call, Span span) {
    const SampleRows<L, NOISING_COLUMNS, kRegion> rows(call.table, call.arm, call.arm_inside, span.sample,
                                                       call.t[span.sample]);
    Noise<L> noise(call.seeds[span.sample], 0, STREAM_TRAINING, span.first / 4);
    Sum<L> sum;
    Block<L> poisoned{}, region{};  // zero where the row has none
    for (int64_t e = span.first; e < span.last; e += kBlock<L>) {
        const Range range{span.sample, e, block_count<L>(e, span.last)};
        Block<L> prediction, x, eps, value, gradient;
        load<L>(call.prediction, range, prediction);
        if constexpr (kTrigger) load_images<L, kTrigger>(call, range, x, poisoned);
        if constexpr (kRegion) load<L>(call.region, range, region);
        noise.next(eps);
        for (int i = 0; i < 4; ++i) {
            const auto one =
                loss<kTrigger>(rows.mixed(region[i]), prediction[i], poisoned[i], eps[i], call.scale);
            value[i] = one.value;
            gradient[i] = one.gradient;
        }
        store<L>(call.gradient, range, gradient);
        for (int i = range.count; i < kBlock<L>; ++i) value[i / L::kLanes][i % L::kLanes] = 0;
        sum.add(value);
    }
    return sum.total();
}

template <class L>
bool any_step(const StepCall& call, Span span) {
    const bool trigger = call.trigger.data != nullptr, region = call.region.data != nullptr;
    constexpr decltype(&any_step<L>) spans[2][2][2] = {
        {{step_span<L, false, false, false>, step_span<L, false, false, true>},
         {step_span<L, false, true, false>, step_span<L, false, true, true>}},
        {{step_span<L, true, false, false>, step_span<L, true, false, true>},
         {step_span<L, true, true, false>, step_span<L, true, true, true>}}};
    return spans[trigger][call.slots > 0][region](call, span);
}

template <class L>
void any_noising(const NoisingCall& call, Span span) {
    const bool trigger = call.trigger.data != nullptr, region = call.region.data != nullptr;
    constexpr decltype(&any_noising<L>) spans[2][2] = {
        {noising_span<L, false, false>, noising_span<L, false, true>},
        {noising_span<L, true, false>, noising_span<L, true, true>}};
    return spans[trigger][region](call, span);
}

template <class L>
double any_loss(const LossCall& call, Span span) {
    const bool trigger = call.trigger.data != nullptr, region = call.region.data != nullptr;
    constexpr decltype(&any_loss<L>) spans[2][2] = {{loss_span<L, false, false>, loss_span<L, false, true>},
                                                    {loss_span<L, true, false>, loss_span<L, true, true>}};
    return spans[trigger][region](call, span);
}

template <class L>
constexpr Rows rows_of(const char* name) {
    return {name,        normal_span<L>, any_step<L>,       any_noising<L>,   any_loss<L>,
            any_norm<L>, Conv<L>::pack,  Conv<L>::multiply, Conv<L>::filters, Conv<L>::finish};
}

}  // namespace bdk
