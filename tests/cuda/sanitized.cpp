// Every kernel on memory of exactly its operands' sizes, for the address and undefined-behaviour sanitizers,
// and against the rows of the CPU: the same bits, or the exit status is 1.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "bdk/half.h"
#include "cpu/rows.h"
#include "cuda/launch.h"

using namespace bdk;

namespace {

using Memory = std::vector<uint8_t>;

constexpr int64_t kArms = 2, kRows = 3, kSlots = 2;

std::mt19937 generator(0);

struct Tensors {
    cuda::Shape shape;
    bool channels_last;

    int64_t pixels() const { return shape.height * shape.width; }
    int64_t elements() const { return shape.channels * pixels(); }

    View view(Memory& memory, Type type) const {
        const auto [n, c, h, w] = shape;
        return {
            memory.data(), type, !channels_last, elements(), channels_last ? 1 : h * w, channels_last ? c : 1,
            h * w,         w};
    }
    View shared(Memory& memory, Type type) const {
        return {memory.data(), type, true, 0, pixels(), 1, pixels(), shape.width};
    }
};

size_t size_of(Type type) { return type == Type::float32 ? 4 : type == Type::byte ? 1 : 2; }

Memory random(int64_t count, Type type) {
    Memory memory(size_of(type) * count);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) {
        const float v = normal(generator);
        const uint16_t half =
            uint16_t(type == Type::bfloat16 ? narrow<Scalar>(Bfloat16{}, v) : narrow<Scalar>(Float16{}, v));
        if (type == Type::float32) memcpy(&memory[4 * i], &v, 4);
        if (type == Type::byte) memory[i] = uint8_t(i * 37);
        if (size_of(type) == 2) memcpy(&memory[2 * i], &half, 2);
    }
    return memory;
}

void expect(bool same, const char* op, const Tensors& t) {
    if (same) return;
    const auto [n, c, h, w] = t.shape;
    printf("%s differs at %ld x %ld x %ld x %ld, channels-last %d\n", op, n, c, h, w, t.channels_last);
    exit(1);
}

template <class Run>
void each_sample(const Tensors& t, Run run) {
    for (int64_t sample = 0; sample < t.shape.samples; ++sample) run(Span{sample, 0, t.elements()});
}

struct Indices {
    std::vector<int64_t> arm, arm_inside, row, seeds;

    explicit Indices(int64_t samples) {
        for (int64_t i = 0; i < samples; ++i) {
            arm.push_back(i % kArms);
            arm_inside.push_back((i + 1) % kArms);
            row.push_back(i % kRows);
            seeds.push_back(int64_t(generator()) << 31);
        }
    }
};

void check_normal(const Tensors& t, Type type) {
    const Indices indices(t.shape.samples);
    const int64_t all = t.shape.samples * t.elements();
    Memory memory[2] = {Memory(size_of(type) * all), Memory(size_of(type) * all)};
    const auto call = [&](Memory& out) {
        return NormalCall{t.view(out, type), indices.seeds.data(), {indices.row.data(), 1}, 5};
    };
    cuda::normal(t.shape, call(memory[0]), {});
    each_sample(t, [&](Span span) { BASELINE.normal(call(memory[1]), span); });
    expect(memory[0] == memory[1], "normal", t);
}

void check_step(const Tensors& t, Type type, Type m_type, bool options) {
    const Indices indices(t.shape.samples);
    const int64_t all = t.shape.samples * t.elements();
    Memory table = random(kArms * kRows * STEP_COLUMNS, Type::float32);
    auto* columns = reinterpret_cast<float*>(table.data());
    for (int row = 0; row < kArms * kRows; ++row)
        for (int k = 0; k < STORES; ++k)
            columns[row * STEP_COLUMNS + Step::STORE + k * STORE_COLUMNS + Store::SLOT] =
                float((row + k) % 3 - 1);
    Memory m = random(all, m_type), trigger = random(t.elements(), Type::float32),
           region = random(all, Type::byte);
    for (uint8_t& inside : region) inside &= 1;
    Memory x[2], history[2];
    x[0] = x[1] = random(all, type);
    history[0] = history[1] = random(kSlots * all, Type::float32);
    const auto call = [&](int which) {
        StepCall c{};
        c.x_t = c.out = t.view(x[which], type);
        c.m = t.view(m, m_type);
        c.table = {columns, kArms, kRows, STEP_COLUMNS};
        c.arm = indices.arm.data();
        c.seeds = indices.seeds.data();
        c.step = {indices.row.data(), 1};
        if (options) {
            c.trigger = t.shared(trigger, Type::float32);
            c.region = Tensors{t.shape, false}.view(region, Type::byte);
            c.arm_inside = indices.arm_inside.data();
            c.slots = kSlots;
            c.stores = true;
            for (int j = 0; j < kSlots; ++j) {
                c.history[j] = t.view(history[which], Type::float32);
                c.history[j].data = history[which].data() + sizeof(float) * all * j;
            }
        }
        return c;
    };
    int64_t bad_row = 7;
    cuda::fused_step(t.shape, call(0), &bad_row, {});
    each_sample(t, [&](Span span) { BASELINE.step(call(1), span); });
    expect(x[0] == x[1] && history[0] == history[1] && bad_row == 7, "fused_step", t);
}

void check_training(const Tensors& t, Type x0_type, Type type, bool options) {
    const Indices indices(t.shape.samples);
    const int64_t all = t.shape.samples * t.elements();
    Memory table = random(kArms * kRows * NOISING_COLUMNS, Type::float32), x0 = random(all, x0_type);
    Memory target = random(t.elements(), Type::float32), trigger = random(t.elements(), Type::float32);
    Memory mask = random(t.elements(), Type::float32), region = random(t.elements(), Type::byte);
    Memory prediction = random(all, type);
    auto* columns = reinterpret_cast<float*>(table.data());
    for (int row = 0; row < kArms * kRows; ++row) {
        float& weight = columns[row * NOISING_COLUMNS + Noising::W];
        weight = std::abs(weight);  // a sum without cancellation can be compared
    }
    for (uint8_t& inside : region) inside &= 1;
    const std::vector<uint8_t> flips(t.shape.samples, 1);
    const auto fill = [&](auto& c) {
        c.x0 = t.view(x0, x0_type);
        c.table = {columns, kArms, kRows, NOISING_COLUMNS};
        c.t = indices.row.data();
        c.arm = indices.arm.data();
        c.seeds = indices.seeds.data();
        if (!options) return;
        c.trigger = t.shared(trigger, Type::float32);
        c.mask = t.shared(mask, Type::float32);
        c.region = t.shared(region, Type::byte);
        c.arm_inside = indices.arm_inside.data();
        c.flip = reinterpret_cast<const bool*>(flips.data());
    };

    Memory out[2] = {Memory(prediction.size()), Memory(prediction.size())};
    NoisingCall noising{};
    fill(noising);
    if (options) noising.target = t.shared(target, Type::float32);
    noising.out = t.view(out[0], type);
    cuda::fused_noising(t.shape, noising, {});
    noising.out = t.view(out[1], type);
    each_sample(t, [&](Span span) { BASELINE.noising(noising, span); });
    expect(out[0] == out[1], "fused_noising", t);

    LossCall loss{};
    fill(loss);
    loss.prediction = t.view(prediction, type);
    loss.scale = 0.5f;
    loss.gradient = t.view(out[0], type);
    std::vector<float> losses(t.shape.samples);
    std::vector<double> parts(t.shape.samples * ((t.elements() + cuda::kLossPart - 1) / cuda::kLossPart));
    cuda::fused_loss(t.shape, loss, losses.data(), parts.data(), {});
    loss.gradient = t.view(out[1], type);
    each_sample(t, [&](Span span) {
        const double sum = BASELINE.loss(loss, span);
        expect(std::abs(losses[span.sample] - sum) <= 1e-6 * sum, "the loss", t);
    });
    expect(out[0] == out[1], "the gradient", t);
}

}  // namespace

int main() {
    const Type floats[] = {Type::float32, Type::bfloat16, Type::float16};
    for (const cuda::Shape& shape :
         {cuda::Shape{2, 3, 8, 16}, cuda::Shape{3, 3, 5, 7}, cuda::Shape{1, 1, 1, 1}})
        for (const bool channels_last : {false, true})
            for (const bool options : {false, true})
                for (const Type type : floats) {
                    const Tensors t{shape, channels_last};
                    check_normal(t, type);
                    for (const Type m : floats) check_step(t, type, m, options);
                    for (const Type x0 : {Type::float32, Type::byte}) check_training(t, x0, type, options);
                }
}
