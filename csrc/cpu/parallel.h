// Work over threads, on the thread pool that the process already has.
//
// torch brings its own OpenMP runtime, whose workers spin between regions; a second runtime would fight it
// for the cores. So none is linked: the binding hands over the address of torch's GOMP_parallel. Without one,
// std::thread serves.
#pragma once

#include <cstdint>

namespace bdk {

void use_gomp_parallel(uintptr_t address);

// Calls body(context, unit) for each unit of 0 .. units - 1, in any order, on up to `threads` threads.
void parallel(int64_t units, int threads, void (*body)(void*, int64_t), void* context);

template <class Body>
void parallel_for(int64_t units, int threads, Body& body) {
    parallel(
        units, threads, [](void* context, int64_t unit) { (*static_cast<Body*>(context))(unit); }, &body);
}

}  // namespace bdk
