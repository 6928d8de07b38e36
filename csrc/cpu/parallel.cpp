#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace bdk {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};

struct Work {
    std::atomic<int64_t> next{0};
    int64_t units;
    void (*body)(void*, int64_t);
    void* context;
};

void claim_until_done(void* data) {
    Work& work = *static_cast<Work*>(data);
    for (int64_t unit; (unit = work.next.fetch_add(1, std::memory_order_relaxed)) < work.units;)
        work.body(work.context, unit);
}

}  // namespace

void use_gomp_parallel(uintptr_t address) { gomp_parallel = reinterpret_cast<GompParallel>(address); }

void parallel(int64_t units, int threads, void (*body)(void*, int64_t), void* context) {
    Work work{{0}, units, body, context};
    threads = int(std::min<int64_t>(threads, units));
    if (threads <= 1) {
        claim_until_done(&work);
    } else if (const GompParallel region = gomp_parallel) {
        region(claim_until_done, &work, unsigned(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int i = 1; i < threads; ++i) others.emplace_back(claim_until_done, &work);
        claim_until_done(&work);
        for (auto& thread : others) thread.join();
    }
}

}  // namespace bdk
