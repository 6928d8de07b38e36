#include "ops.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "parallel.h"

namespace bdk {
namespace {

// One piece of work, about 10 us: large against a claim (20 ns) and a parallel region (3 us), small against a
// batch. Fixed, so that a sample's loss is summed alike for any number of threads.
constexpr int64_t kSpan = kLossPart;

// Those that run here, the fastest first.
std::vector<const Rows*> usable() {
    std::vector<const Rows*> found;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.push_back(&AVX512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma"))
        found.push_back(&AVX2);
#endif
    found.push_back(&BASELINE);
    return found;
}

std::atomic<const Rows*> rows{usable().front()};

int64_t pieces(const Extent& extent) { return (extent.elements + kSpan - 1) / kSpan; }

// Calls body(span, index of the span); small samples are claimed several at a time.
template <class Body>
void for_each_span(const Extent& extent, Body body) {
    const int64_t per_sample = pieces(extent), spans = extent.samples * per_sample;
    const int64_t batch = std::max<int64_t>(1, kSpan / std::max<int64_t>(1, extent.elements));
    auto claim = [&](int64_t unit) {
        for (int64_t i = unit * batch; i < std::min(spans, (unit + 1) * batch); ++i) {
            const int64_t first = i % per_sample * kSpan;
            body(Span{i / per_sample, first, std::min(first + kSpan, extent.elements)}, i);
        }
    };
    parallel_for((spans + batch - 1) / batch, extent.threads, claim);
}

void check(const char* name, const Index& index, int64_t samples, int64_t limit) {
    for (int64_t i = 0; i < samples; ++i)
        if (index[i] < 0 || index[i] >= limit)
            throw std::invalid_argument(std::string(name) + " " + std::to_string(index[i]) + " of sample " +
                                        std::to_string(i) + " is out of range: expected 0 to " +
                                        std::to_string(limit - 1));
}

void check_arms(const int64_t* arm, const int64_t* arm_inside, int64_t samples, const Table& table) {
    check("arm", {arm, 1}, samples, table.arms);
    if (arm_inside != nullptr) check("arm_inside", {arm_inside, 1}, samples, table.arms);
}

}  // namespace

const char* isa() { return rows.load()->name; }

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Rows* one : usable()) names.push_back(one->name);
    return names;
}

void set_isa(const std::string& name) {
    std::string names;
    for (const Rows* one : usable()) {
        if (name == one->name) {
            rows = one;
            return;
        }
        names += (names.empty() ? "" : ", ") + std::string(one->name);
    }
    throw std::invalid_argument("instruction set '" + name + "' does not run here: expected one of " + names);
}

void normal(const Extent& extent, const NormalCall& call) {
    check("step", call.step, extent.samples, int64_t(1) << 32);
    const Rows& isa = *rows;
    for_each_span(extent, [&](Span span, int64_t) { isa.normal(call, span); });
}

void fused_step(const Extent& extent, const StepCall& call, int64_t* bad_row) {
    check_arms(call.arm, call.arm_inside, extent.samples, call.table);
    check("step", call.step, extent.samples, call.table.rows);
    const Rows& isa = *rows;
    std::atomic<int64_t> lowest{bad_row != nullptr ? *bad_row : 0};
    for_each_span(extent, [&](Span span, int64_t) {
        if (isa.step(call, span)) return;
        const int64_t row = call.step[span.sample];
        for (int64_t seen = lowest; row < seen && !lowest.compare_exchange_weak(seen, row);) {
        }
    });
    if (bad_row != nullptr) *bad_row = lowest;
}

void fused_noising(const Extent& extent, const NoisingCall& call) {
    check_arms(call.arm, call.arm_inside, extent.samples, call.table);
    check("timestep", {call.t, 1}, extent.samples, call.table.rows);
    const Rows& isa = *rows;
    for_each_span(extent, [&](Span span, int64_t) { isa.noising(call, span); });
}

void fused_loss(const Extent& extent, const LossCall& call, float* losses, double* parts) {
    check_arms(call.arm, call.arm_inside, extent.samples, call.table);
    check("timestep", {call.t, 1}, extent.samples, call.table.rows);
    const Rows& isa = *rows;
    const int64_t per_sample = pieces(extent);
    for_each_span(extent, [&](Span span, int64_t index) { parts[index] = isa.loss(call, span); });
    for (int64_t i = 0; i < extent.samples; ++i) {
        double total = 0;
        for (int64_t p = 0; p < per_sample; ++p) total += parts[i * per_sample + p];
        losses[i] = float(total);
    }
}

void group_norm(int64_t samples, int threads, const NormCall& call) {
    if (call.channels > kMostChannels)
        throw std::invalid_argument(std::to_string(call.channels) + " channels: expected at most " +
                                    std::to_string(kMostChannels));
    const Rows& isa = *rows;
    auto body = [&](int64_t sample) { isa.norm(call, sample); };
    parallel_for(samples, threads, body);
}

void conv(const ConvCall& call, int threads) {
    static thread_local Scratch scratch;
    const Rows& isa = *rows;
    float* packed = scratch.floats(products(call.scale) * call.channels * call.filters);
    auto pack = [&](int64_t unit) { isa.conv_pack(call, unit * kFilters, packed); };
    parallel_for((call.filters + kFilters - 1) / kFilters, threads, pack);

    const int64_t all = call.samples * tiles(call.scale, call.height), wide = tiles(call.scale, call.width);
    int64_t units = (all * wide + kTiles - 1) / kTiles;
    units = std::min(all, (units + threads - 1) / threads * threads);
    auto multiply = [&](int64_t unit) {
        isa.conv_multiply(call, {all * unit / units, all * (unit + 1) / units}, packed);
    };
    parallel_for(units, threads, multiply);
}

void conv_filters(const FilterCall& call, int threads) {
    static thread_local Scratch scratch;
    const Rows& isa = *rows;
    const int64_t C = call.channels, K = call.filters, across = (K + kSquare - 1) / kSquare;
    const int64_t squares = (C + kSquare - 1) / kSquare * across;
    const int64_t all = call.samples * tiles(call.scale, call.height);
    const int64_t count = all * tiles(call.scale, call.width);
    // By the shape alone, so that sums are the same for any number of threads.
    const int64_t parts = std::max<int64_t>(1, std::min({kUnits / squares, count / (2 * kTiles), all}));
    const int64_t size = products(call.scale) * C * K;
    float* sums = scratch.floats(parts * size);
    std::vector<double> bias(parts * K);
    auto sum = [&](int64_t unit) {
        const int64_t part = unit / squares, square = unit % squares;
        isa.conv_filters(call, {square / across * kSquare,
                                square % across * kSquare,
                                {all * part / parts, all * (part + 1) / parts},
                                sums + part * size,
                                bias.data() + part * K});
    };
    parallel_for(parts * squares, threads, sum);
    auto finish = [&](int64_t unit) { isa.conv_finish(call, 16 * unit, sums, parts); };
    parallel_for(C / 16, threads, finish);
    for (int64_t k = 0; k < K; ++k) {
        double total = 0;
        for (int64_t part = 0; part < parts; ++part) total += bias[part * K + k];
        call.dbias[k] = float(total);
    }
}

}  // namespace bdk
