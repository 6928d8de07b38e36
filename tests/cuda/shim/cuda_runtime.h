// What csrc/cuda needs of CUDA, on a CPU: with it g++ compiles the kernels as they are, one fiber a thread.
//
// Blocks run one after another, the threads of a block in turns: each until it waits for others, at
// __syncthreads or a shuffle. BDK_SHIM_ORDER in the environment says in which order: 0 ascending, 1
// descending, 2 shuffled, threads and blocks alike. With BDK_SHIM_LAST only the last block of a grid runs.
// BDK_SHIM_DRIVER is the version of the driver, 0 for none; the runtime's where absent.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __shared__ static  // blocks run one after another

struct uint2 {
    alignas(8) uint32_t x;
    uint32_t y;
};
struct uint4 {
    alignas(16) uint32_t x;
    uint32_t y, z, w;
};
struct float4 {
    alignas(16) float x;
    float y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace shim {

constexpr int kWarp = 32;

extern dim3 thread, block, block_size, grid_size;

void run(dim3 grid, dim3 block, const std::function<void()>& thread);
void wait_for_block();
uint64_t exchange(uint64_t mine, int lanes_up);  // among the threads of a warp

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}

}  // namespace shim

#define threadIdx shim::thread
#define blockIdx shim::block
#define blockDim shim::block_size
#define gridDim shim::grid_size

inline void __syncthreads() { shim::wait_for_block(); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)a * b >> 64); }

template <class T>
T __ldg(const T* from) {
    return *from;
}
inline double __shfl_down_sync(unsigned, double v, int lanes) {
    uint64_t bits;
    memcpy(&bits, &v, sizeof bits);
    bits = shim::exchange(bits, lanes);
    memcpy(&v, &bits, sizeof v);
    return v;
}
inline long long atomicMin(long long* at, long long v) {
    const long long before = *at;
    if (v < before) *at = v;
    return before;
}

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorStubLibrary = 34,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorUnsupportedPtxVersion = 222,
    cudaErrorSystemNotReady = 802,
    cudaErrorSystemDriverMismatch = 803,
};
using cudaStream_t = struct Stream*;

#define CUDART_VERSION 13000

cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
const char* cudaGetErrorString(cudaError_t error);

template <class... A>
cudaError_t cudaLaunchKernel(void (*kernel)(A...), dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t) {
    shim::run(grid, block, [&] { shim::call(kernel, arguments, std::index_sequence_for<A...>{}); });
    return cudaSuccess;
}
