// bdkernels._native, which bdkernels/native.py calls: the ops on a CPU.
#include "bdk/philox.h"
#include "bindings.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace bdk {
namespace {

struct Cpu {
    using Place = int;  // how many threads

    static Extent extent(const Shape& shape, int threads) {
        const auto [n, c, h, w] = shape;
        return {n, c * h * w, threads};
    }
    static void normal(const Shape& shape, const NormalCall& call, int threads) {
        bdk::normal(extent(shape, threads), call);
    }
    static void fused_step(const Shape& shape, const StepCall& call, int64_t* bad_row, int threads) {
        bdk::fused_step(extent(shape, threads), call, bad_row);
    }
    static void fused_noising(const Shape& shape, const NoisingCall& call, int threads) {
        bdk::fused_noising(extent(shape, threads), call);
    }
    static void fused_loss(const Shape& shape, const LossCall& call, float* losses, double* parts,
                           int threads) {
        bdk::fused_loss(extent(shape, threads), call, losses, parts);
    }
};

void bind_group_norm(Address x, Address out, Address shift, int64_t shift_stride, Address weight,
                     Address bias, Address statistics, const Shape& shape, int64_t groups, float eps,
                     bool silu, Address dy, Address rest, Address dx, Address dweight, Address dbias,
                     int threads) {
    const auto [n, c, h, w] = shape;
    group_norm(n, threads,
               {pointer<const float>(x), pointer<float>(out), pointer<const float>(shift), shift_stride,
                pointer<const float>(weight), pointer<const float>(bias), pointer<float>(statistics), h * w,
                c, groups, eps, silu, pointer<const float>(dy), pointer<const float>(rest),
                pointer<float>(dx), pointer<float>(dweight), pointer<float>(dbias)});
}

Scale scale_of(int64_t side, bool doubled, bool halved) {
    return side == 1 ? Scale::point : doubled ? Scale::doubled : halved ? Scale::halved : Scale::same;
}

// `shape` is [samples, channels, height, width] of what is convolved, `side` the filters', 3 or 1.
void bind_conv(Address x, Address weight, Address bias, Address skip, Address out, const Shape& shape,
               int64_t filters, int64_t side, bool doubled, bool halved, bool turned, int threads) {
    const auto [n, c, h, w] = shape;
    conv({pointer<const float>(x), pointer<const float>(weight), pointer<const float>(bias),
          pointer<const float>(skip), pointer<float>(out), n, h, w, c, filters,
          scale_of(side, doubled, halved), turned},
         threads);
}

void bind_conv_filters(Address x, Address dy, Address dweight, Address dbias, const Shape& shape,
                       int64_t filters, int64_t side, bool doubled, int threads) {
    const auto [n, c, h, w] = shape;
    conv_filters({pointer<const float>(x), pointer<const float>(dy), pointer<float>(dweight),
                  pointer<float>(dbias), n, h, w, c, filters, scale_of(side, doubled, false)},
                 threads);
}

// The whole counter, for Random123's test vectors; the ops leave its last word zero.
Shape philox_words(const Shape& counter, int64_t seed) {
    const auto [c0, c1, c2, c3] = counter;
    uint64_t words[1][4] = {{uint64_t(c0), uint64_t(c1), uint64_t(c2), uint64_t(c3)}};
    philox<Scalar>(words, Key<Scalar>(seed));
    const auto& w = words[0];
    return {uint32_t(w[0]), uint32_t(w[1]), uint32_t(w[2]), uint32_t(w[3])};
}

py::dict columns() {
    using namespace py::literals;
    return py::dict(
        "Step"_a = py::dict("A"_a = +Step::A, "B"_a = +Step::B, "D"_a = +Step::D, "LOW0"_a = +Step::LOW0,
                            "HIGH0"_a = +Step::HIGH0, "P"_a = +Step::P, "Q"_a = +Step::Q, "S"_a = +Step::S,
                            "Z"_a = +Step::Z, "R"_a = +Step::R, "LOW"_a = +Step::LOW, "HIGH"_a = +Step::HIGH,
                            "H"_a = +Step::H, "STORE"_a = +Step::STORE),
        "Store"_a = py::dict("SLOT"_a = +Store::SLOT, "E"_a = +Store::E, "F"_a = +Store::F, "G"_a = +Store::G,
                             "J"_a = +Store::J, "K"_a = +Store::K),
        "Noising"_a = py::dict("A"_a = +Noising::A, "S"_a = +Noising::S, "M"_a = +Noising::M,
                               "C"_a = +Noising::C, "W"_a = +Noising::W),
        "HISTORY_SLOTS"_a = HISTORY_SLOTS, "STORES"_a = STORES, "STEP_COLUMNS"_a = STEP_COLUMNS,
        "STORE_COLUMNS"_a = STORE_COLUMNS, "NOISING_COLUMNS"_a = NOISING_COLUMNS);
}

PYBIND11_MODULE(_native, m) {
    Bindings<Cpu>::define(m);
    m.attr("LOSS_PART") = kLossPart;
    m.attr("MOST_CHANNELS") = kMostChannels;
    m.def("group_norm", bind_group_norm, py::call_guard<py::gil_scoped_release>());
    m.def("conv", bind_conv, py::call_guard<py::gil_scoped_release>());
    m.def("conv_filters", bind_conv_filters, py::call_guard<py::gil_scoped_release>());
    m.def("philox", philox_words);
    m.def("columns", columns);
    m.def("isa", isa);
    m.def("isas", isas);
    m.def("set_isa", set_isa);
    m.def("use_gomp_parallel", use_gomp_parallel);
}

}  // namespace
}  // namespace bdk
