// The ops as Python calls them, for both modules: addresses and shapes in, a call out. Knows neither torch
// nor NumPy.
//
// Plain numbers and pairs, so that a call costs about a microsecond.
// A tensor is (address, format), format = 2 type + channels_last; an image shared or not is (address,
// images); an absent tensor has address 0.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bdk/calls.h"

namespace bdk {

using Address = uintptr_t;
using Tensor = std::pair<Address, int>;
using Image = std::pair<Address, int64_t>;
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t>;
using TableShape = std::tuple<int64_t, int64_t, int64_t>;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

inline View view(const Shape& shape, const Tensor& tensor) {
    const auto [n, c, h, w] = shape;
    const bool channels_last = tensor.second % 2 != 0;
    return {pointer<void>(tensor.first), Type(tensor.second / 2), !channels_last, c * h * w,
            channels_last ? 1 : h * w,   channels_last ? c : 1,   h * w,          w};
}

inline View image(const Shape& shape, const Image& image, Type type = Type::float32) {
    View v = view(shape, {image.first, 2 * int(type)});
    if (image.second == 1) v.sample_stride = 0;
    return v;
}

inline Table table(Address address, const TableShape& shape) {
    const auto [arms, rows, columns] = shape;
    return {pointer<const float>(address), arms, rows, columns};
}

inline const int64_t* integers(Address address) { return pointer<const int64_t>(address); }

// `Backend` has the ops, and `Place`: what says where they run.
template <class Backend>
struct Bindings {
    using Place = typename Backend::Place;

    static void normal(const Shape& shape, const Tensor& out, Address seeds, Address step, int step_stride,
                       uint32_t stream, const Place& place) {
        Backend::normal(shape, {view(shape, out), integers(seeds), {integers(step), step_stride}, stream},
                        place);
    }

    // fused_step on the same tensors again and again: what a call brings is m, which of `steps` it is, and
    // where it runs.
    class FusedStep {
      public:
        FusedStep(const Shape& shape, const Tensor& x_t, const Tensor& out, const Tensor& history, int slots,
                  bool stores, Address rows, const TableShape& rows_shape, Address arm, Address arm_inside,
                  Address steps, int64_t count, int step_stride, Address seeds, const Image& trigger,
                  const Image& region, Address bad_row)
            : shape_(shape),
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
              count_(count),
              bad_row_(pointer<int64_t>(bad_row)) {
            const auto [n, c, h, w] = shape;
            for (int j = 0; j < slots; ++j)
                call_.history[j] =
                    view(shape, {history.first + sizeof(float) * n * c * h * w * j, history.second});
        }

        void operator()(Address m, int format, int64_t k, const Place& place) {
            if (k < 0 || k >= count_)
                throw std::invalid_argument("step " + std::to_string(k) + " was asked for: expected 0 to " +
                                            std::to_string(count_ - 1));
            StepCall call = call_;
            call.m = view(shape_, {m, format});
            call.step.data += k * (call.step.stride == 0 ? 1 : std::get<0>(shape_));
            Backend::fused_step(shape_, call, bad_row_, place);
        }

      private:
        Shape shape_;
        StepCall call_;
        int64_t count_;
        int64_t* bad_row_;
    };

    static void fused_noising(const Shape& shape, const Tensor& x0, const Tensor& out, Address t, Address arm,
                              Address arm_inside, Address seeds, Address rows, const TableShape& rows_shape,
                              const Image& target, const Image& trigger, const Image& mask,
                              const Image& region, Address flip, const Place& place) {
        Backend::fused_noising(
            shape,
            {view(shape, x0), view(shape, out), image(shape, target), image(shape, trigger),
             image(shape, mask), image(shape, region, Type::byte), table(rows, rows_shape), integers(t),
             integers(arm), integers(arm_inside), integers(seeds), pointer<const bool>(flip)},
            place);
    }

    static void fused_loss(const Shape& shape, const Tensor& prediction, const Tensor& x0,
                           const Tensor& gradient, Address losses, Address parts, Address t, Address arm,
                           Address arm_inside, Address seeds, Address rows, const TableShape& rows_shape,
                           const Image& trigger, const Image& mask, const Image& region, Address flip,
                           float scale, const Place& place) {
        Backend::fused_loss(
            shape,
            {view(shape, x0), view(shape, prediction), view(shape, gradient), image(shape, trigger),
             image(shape, mask), image(shape, region, Type::byte), table(rows, rows_shape), integers(t),
             integers(arm), integers(arm_inside), integers(seeds), pointer<const bool>(flip), scale},
            pointer<float>(losses), pointer<double>(parts), place);
    }

    static void define(pybind11::module_& m) {
        const pybind11::call_guard<pybind11::gil_scoped_release> unlocked;
        m.def("normal", normal, unlocked);
        // Of this module alone: two may be loaded.
        pybind11::class_<FusedStep>(m, "FusedStep", pybind11::module_local())
            .def(pybind11::init<const Shape&, const Tensor&, const Tensor&, const Tensor&, int, bool, Address,
                                const TableShape&, Address, Address, Address, int64_t, int, Address,
                                const Image&, const Image&, Address>())
            .def("__call__", &FusedStep::operator(), unlocked);
        m.def("fused_noising", fused_noising, unlocked);
        m.def("fused_loss", fused_loss, unlocked);
    }
};

}  // namespace bdk
