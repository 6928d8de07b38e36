#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

namespace shim {

dim3 thread, block, block_size, grid_size;

namespace {

constexpr size_t kStack = 64 << 10;

enum class State { ready, at_barrier, at_exchange, done };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    State state;
    uint64_t values[2];  // of this exchange and of the one before, which slower threads have yet to read
    unsigned exchanges;
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
const std::function<void()>* body;
unsigned current;

void enter() {
    (*body)();
    fibers[current].state = State::done;
    swapcontext(&fibers[current].context, &scheduler);
}

void wait(State state) {
    Fiber& fiber = fibers[current];
    fiber.state = state;
    swapcontext(&fiber.context, &scheduler);
}

std::vector<unsigned> ordered(unsigned count) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    const char* chosen = getenv("BDK_SHIM_ORDER");
    const int kind = chosen != nullptr ? atoi(chosen) : 0;
    if (kind == 1) std::reverse(order.begin(), order.end());
    if (kind == 2) std::shuffle(order.begin(), order.end(), std::mt19937(count));
    return order;
}

// Lets go those among first .. last - 1 that are in `state`, if all are.
bool release(State state, unsigned first, unsigned last) {
    for (unsigned i = first; i < last; ++i)
        if (fibers[i].state != state) return false;
    for (unsigned i = first; i < last; ++i) fibers[i].state = State::ready;
    return true;
}

void run_block(const std::vector<unsigned>& order) {
    const unsigned count = unsigned(order.size());
    for (Fiber& fiber : fibers) {
        fiber.state = State::ready;
        fiber.exchanges = 0;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    for (bool going = true; going;) {
        for (unsigned i : order) {
            if (fibers[i].state != State::ready) continue;
            current = i;
            thread.x = i;
            swapcontext(&scheduler, &fibers[i].context);
        }
        going = release(State::at_barrier, 0, count);
        for (unsigned warp = 0; warp < count; warp += kWarp)
            if (release(State::at_exchange, warp, warp + kWarp)) going = true;
    }
    for (const Fiber& fiber : fibers)
        if (fiber.state != State::done) {
            fprintf(stderr, "a thread waits for others that never come\n");
            abort();
        }
}

}  // namespace

void run(dim3 grid, dim3 size, const std::function<void()>& one_thread) {
    grid_size = grid;
    block_size = size;
    body = &one_thread;
    fibers.resize(size.x);
    const std::vector<unsigned> threads = ordered(size.x);
    const unsigned blocks = grid.x * grid.y * grid.z;
    const bool last = getenv("BDK_SHIM_LAST") != nullptr;
    for (unsigned i : last ? std::vector<unsigned>{blocks - 1} : ordered(blocks)) {
        block = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        run_block(threads);
    }
}

void wait_for_block() { wait(State::at_barrier); }

uint64_t exchange(uint64_t mine, int lanes_up) {
    const unsigned lane = current % kWarp, from = lane + lanes_up < kWarp ? current + lanes_up : current;
    const unsigned turn = fibers[current].exchanges++ % 2;
    fibers[current].values[turn] = mine;
    wait(State::at_exchange);
    return fibers[from].values[turn];
}

}  // namespace shim

cudaError_t cudaDriverGetVersion(int* version) {
    const char* chosen = getenv("BDK_SHIM_DRIVER");
    *version = chosen != nullptr ? atoi(chosen) : CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    int driver;
    (void)cudaDriverGetVersion(&driver);
    return driver < CUDART_VERSION ? cudaErrorInsufficientDriver : cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    int count;
    return cudaGetDeviceCount(&count);
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
