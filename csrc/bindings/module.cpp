// bdkernels._native: addresses and shapes in, ValueError out. Knows neither torch nor NumPy;
// bdkernels/native.py calls it.
//
// A tensor is (address, format), format = 2 type + channels_last; an image shared or not is (address,
// images); an absent tensor has address 0. Plain arguments and pairs: a call costs about a microsecond.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bdk/philox.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace bdk {
namespace {

using Address = uintptr_t;
using Tensor = std::pair<Address, int>;
using Image = std::pair<Address, int64_t>;
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t>;
using TableShape = std::tuple<int64_t, int64_t, int64_t>;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

View view(const Shape& shape, const Tensor& tensor) {
    const auto [n, c, h, w] = shape;
    const bool channels_last = tensor.second % 2 != 0;
    return {pointer<void>(tensor.first), Type(tensor.second / 2), !channels_last, c * h * w,
            channels_last ? 1 : h * w,   channels_last ? c : 1,   h * w,          w};
}

View image(const Shape& shape, const Image& image, Type type = Type::float32) {
    View v = view(shape, {image.first, 2 * int(type)});
    if (image.second == 1) v.sample_stride = 0;
    return v;
}

Extent extent(const Shape& shape, int threads) {
    const auto [n, c, h, w] = shape;
    return {n, c * h * w, threads};
}

Table table(Address address, const TableShape& shape) {
    const auto [arms, rows, columns] = shape;
    return {pointer<const float>(address), arms, rows, columns};
}

const int64_t* integers(Address address) { return pointer<const int64_t>(address); }

void bind_normal(const Shape& shape, const Tensor& out, Address seeds, Address step, int step_stride,
                 uint32_t stream, int threads) {
    normal(extent(shape, threads),
           {view(shape, out), integers(seeds), {integers(step), step_stride}, stream});
}

// fused_step on the same tensors again and again: what a call brings is m and which of `steps` it is.
class FusedStep {
  public:
    FusedStep(const Shape& shape, const Tensor& x_t, const Tensor& out, const Tensor& history, int slots,
              bool stores, Address rows, const TableShape& rows_shape, Address arm, Address arm_inside,
              Address steps, int64_t count, int step_stride, Address seeds, const Image& trigger,
              const Image& region, Address bad_row, int threads)
        : shape_(shape),
          extent_(extent(shape, threads)),
          call_{view(shape, x_t),
                {},
                view(shape, out),
                image(shape, trigger),
                image(shape, region, Type::byte),
                {},
                slots,
                stores,
                table(rows, rows_shape),
                integers(arm),
                integers(arm_inside),
                integers(seeds),
                {integers(steps), step_stride}},
          steps_(integers(steps)),
          count_(count),
          bad_row_(pointer<int64_t>(bad_row)) {
        for (int j = 0; j < slots; ++j) {
            const Address offset = sizeof(float) * extent_.samples * extent_.elements * j;
            call_.history[j] = view(shape, {history.first + offset, history.second});
        }
    }

    void operator()(Address m, int format, int64_t k) {
        if (k < 0 || k >= count_)
            throw std::invalid_argument("step " + std::to_string(k) + " was asked for: expected 0 to " +
                                        std::to_string(count_ - 1));
        StepCall call = call_;
        call.m = view(shape_, {m, format});
        call.step.data = steps_ + k * (call.step.stride == 0 ? 1 : extent_.samples);
        fused_step(extent_, call, bad_row_);
    }

  private:
    Shape shape_;
    Extent extent_;
    StepCall call_;
    const int64_t* steps_;
    int64_t count_;
    int64_t* bad_row_;
};

void bind_noising(const Shape& shape, const Tensor& x0, const Tensor& out, Address t, Address arm,
                  Address arm_inside, Address seeds, Address rows, const TableShape& rows_shape,
                  const Image& target, const Image& trigger, const Image& mask, const Image& region,
                  Address flip, int threads) {
    fused_noising(extent(shape, threads),
                  {view(shape, x0), view(shape, out), image(shape, target), image(shape, trigger),
                   image(shape, mask), image(shape, region, Type::byte), table(rows, rows_shape), integers(t),
                   integers(arm), integers(arm_inside), integers(seeds), pointer<const bool>(flip)});
}

void bind_loss(const Shape& shape, const Tensor& prediction, const Tensor& x0, const Tensor& gradient,
               Address losses, Address t, Address arm, Address arm_inside, Address seeds, Address rows,
               const TableShape& rows_shape, const Image& trigger, const Image& mask, const Image& region,
               Address flip, float scale, int threads) {
    fused_loss(extent(shape, threads),
               {view(shape, x0), view(shape, prediction), view(shape, gradient), image(shape, trigger),
                image(shape, mask), image(shape, region, Type::byte), table(rows, rows_shape), integers(t),
                integers(arm), integers(arm_inside), integers(seeds), pointer<const bool>(flip), scale},
               pointer<float>(losses));
}

void bind_group_norm(Address x, Address out, Address shift, int64_t shift_stride, Address weight,
                     Address bias, Address statistics, const Shape& shape, int64_t groups, float eps,
                     bool silu, Address dy, Address dx, Address dweight, Address dbias, int threads) {
    const auto [n, c, h, w] = shape;
    group_norm(n, threads,
               {pointer<const float>(x), pointer<float>(out), pointer<const float>(shift), shift_stride,
                pointer<const float>(weight), pointer<const float>(bias), pointer<float>(statistics), h * w,
                c, groups, eps, silu, pointer<const float>(dy), pointer<float>(dx), pointer<float>(dweight),
                pointer<float>(dbias)});
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
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.def("normal", bind_normal, unlocked);
    py::class_<FusedStep>(m, "FusedStep")
        .def(py::init<const Shape&, const Tensor&, const Tensor&, const Tensor&, int, bool, Address,
                      const TableShape&, Address, Address, Address, int64_t, int, Address, const Image&,
                      const Image&, Address, int>())
        .def("__call__", &FusedStep::operator(), unlocked);
    m.def("fused_noising", bind_noising, unlocked);
    m.def("fused_loss", bind_loss, unlocked);
    m.def("group_norm", bind_group_norm, unlocked);
    m.def("philox", philox_words);
    m.def("columns", columns);
    m.def("isa", isa);
    m.def("isas", isas);
    m.def("set_isa", set_isa);
    m.def("use_gomp_parallel", use_gomp_parallel);
}

}  // namespace
}  // namespace bdk
