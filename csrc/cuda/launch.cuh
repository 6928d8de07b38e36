// Launching: which kernel serves a call, how many threads it gets.
#pragma once

#include <initializer_list>

#include "launch.h"
#include "runtime.h"
#include "tensor.cuh"

namespace bdk::cuda {

// Small blocks: an image of 3 x 32 x 32 is 6 of them, or 3 where a thread makes 8 elements, with no thread
// idle.
constexpr int kThreads = 128;
constexpr int64_t kMostBlocks = 65535;  // in y and in z

inline Divider divider(int64_t divisor) {
    const uint64_t d = divisor < 1 ? 1 : uint64_t(divisor);
    return {d, d == 1 ? 0 : ~uint64_t(0) / d + 1};
}

inline Size size_of(const Shape& shape) {
    const int64_t pixels = shape.height * shape.width, elements = shape.channels * pixels;
    constexpr int64_t kMost = int64_t(1) << 32;  // of Divider; the noise of a sample ends at 2^34
    if (elements > kMost) refuse("the number of elements of one sample", elements, kMost);
    return {shape.samples, elements, divider(pixels), divider(shape.width)};
}

// Whether these tensors can be moved a vector of `width` elements at a time. Absent ones can.
inline bool whole(const Size& size, int width, std::initializer_list<const View*> views) {
    bool all = size.elements % width == 0;
    for (const View* view : views)
        all = all && (view->data == nullptr ||
                      (view->contiguous && reinterpret_cast<uintptr_t>(view->data) % 16 == 0));
    return all;
}

inline int64_t quotient_up(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

template <class... A>
void launch(void (*kernel)(A...), dim3 grid, Stream stream, A... arguments) {
    void* addresses[] = {&arguments...};
    check(cudaLaunchKernel(kernel, grid, dim3(kThreads), addresses, 0,
                           static_cast<cudaStream_t>(stream.handle)));
}

// One thread for each `width` elements of each sample.
inline dim3 grid_of(const Size& size, int width) {
    const int64_t y = size.samples < kMostBlocks ? size.samples : kMostBlocks;
    return dim3(unsigned(quotient_up(size.elements, int64_t(width) * kThreads)), unsigned(y),
                unsigned(quotient_up(size.samples, y)));
}

}  // namespace bdk::cuda
