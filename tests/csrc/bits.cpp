// Prints the bits that the baseline rows make of fixed inputs, one line a tensor: test_bits.py makes the same
// in Python.
#include <cstdio>
#include <vector>

#include "cpu/rows.h"

using namespace bdk;

namespace {

constexpr int64_t kWidth = 61, kHeight = 3, kElements = kWidth * kHeight;
constexpr int64_t kSeeds[2] = {0x123456789ABCDEF, -5};

View view(void* data, Type type, bool shared = false) {
    return {data, type, true, shared ? 0 : kElements, kElements, 1, kElements, kWidth};
}

template <class Run>
void for_both(Run run) {
    for (int64_t sample = 0; sample < 2; ++sample) run(Span{sample, 0, kElements});
}

// Two samples of normals, stored as `type`, from stream `stream`.
std::vector<uint8_t> normals(Type type, uint32_t stream) {
    std::vector<uint8_t> out(2 * kElements * (type == Type::float32 ? 4 : 2));
    const int64_t step = 0xFFFFFFFF;
    const NormalCall call{view(out.data(), type), kSeeds, {&step, 0}, stream};
    for_both([&](Span span) { BASELINE.normal(call, span); });
    return out;
}

void print(const char* name, const std::vector<uint8_t>& bytes) {
    printf("%s ", name);
    for (uint8_t byte : bytes) printf("%02x", byte);
    printf("\n");
}

template <class T>
std::vector<uint8_t> bytes_of(const T& value) {
    const auto* p = reinterpret_cast<const uint8_t*>(&value);
    return {p, p + sizeof value};
}

}  // namespace

int main() {
    const int64_t arm[2] = {0, 1}, row[2] = {0, 0};
    auto table = normals(Type::float32, 20);  // more than enough for two arms of one row
    auto* columns = reinterpret_cast<float*>(table.data());
    for (int a = 0; a < 2; ++a) {
        columns[a * STEP_COLUMNS + Step::LOW] = -1;
        columns[a * STEP_COLUMNS + Step::HIGH] = 1;
    }

    for (Type type : {Type::float32, Type::bfloat16, Type::float16}) print("normal", normals(type, 4));

    auto x_t = normals(Type::float16, 21), m = normals(Type::bfloat16, 22), r = normals(Type::float32, 23);
    StepCall step{view(x_t.data(), Type::float16),
                  view(m.data(), Type::bfloat16),
                  view(x_t.data(), Type::float16),
                  view(r.data(), Type::float32, true),
                  {},
                  {},
                  0,
                  false,
                  {columns, 2, 1, STEP_COLUMNS},
                  arm,
                  nullptr,
                  kSeeds,
                  {row, 1}};
    for_both([&](Span span) { BASELINE.step(step, span); });
    print("step", x_t);

    std::vector<uint8_t> bytes(2 * kElements), x_noised(8 * kElements);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = uint8_t(i * 37);
    const bool flip[2] = {false, true};
    const Table noising_table{columns, 2, 1, NOISING_COLUMNS};
    const NoisingCall noising{view(bytes.data(), Type::byte),
                              view(x_noised.data(), Type::float32),
                              {},
                              view(r.data(), Type::float32, true),
                              {},
                              {},
                              noising_table,
                              row,
                              arm,
                              nullptr,
                              kSeeds,
                              flip};
    for_both([&](Span span) { BASELINE.noising(noising, span); });
    print("noising", x_noised);

    auto prediction = normals(Type::float32, 24);
    const View in_place = view(prediction.data(), Type::float32);
    const LossCall loss{view(bytes.data(), Type::byte),
                        in_place,
                        in_place,
                        view(r.data(), Type::float32, true),
                        {},
                        {},
                        noising_table,
                        row,
                        arm,
                        nullptr,
                        kSeeds,
                        flip,
                        0.5f};
    for_both([&](Span span) { print("loss", bytes_of(float(BASELINE.loss(loss, span)))); });
    print("gradient", prediction);
}
