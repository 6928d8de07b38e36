// One launch: its request, its memory with who touched it last, and the threads of the block that runs.
#pragma once
#include <cstdlib>
#include <memory>

#include "runtime.h"

namespace ptx {

// Who touched a byte, and when: the thread's number in the grid plus 1 (0 is nobody), the block's barrier
// count.
struct Stamp {
    u32 thread, time;
};

// The last writer and two readers since, where an atomic before the last one counts as a reader. Of three
// readers the two kept are of different warps where they can be: then one of them races with a writer of any
// warp.
struct Shadow {
    Stamp writer, reader, other;
};

struct Free {
    void operator()(void* p) const { free(p); }
};

struct Buffer {
    u64 begin, end;
    bool readonly;
    std::unique_ptr<Shadow[], Free> shadow;
};

inline std::string number(u64 x) { return std::to_string(x); }

enum Order : u32 { kAscending, kDescending, kRandom };

// Filled by the caller; the same layout as `_Request` in executor.py.
struct Request {
    const u8* parameters;
    const u64* buffers;  // begin, end, read-only; three words each
    u64 seed, jump_limit;
    u32 grid[3], block[3], buffer_count, dynamic_shared, order;
};

struct Launch {
    const Request& request;
    u32 ctaid[3] = {}, time = 1, first_thread = 1;  // the block's: barriers passed, its first thread's number
    std::vector<Thread> threads;
    std::vector<u8> registers, shared, shared_unset;
    std::vector<Shadow> shared_shadow;
    std::vector<Buffer> buffers;
    Thread* current = nullptr;
    u64 random;

    explicit Launch(const Request& r) : request(r), random(r.seed * 2 + 1) {
        const u32 n = r.block[0] * r.block[1] * r.block[2];
        threads.resize(n);
        registers.resize(n * kernel.register_bytes);
        const size_t bytes = (kernel.shared_bytes + 15) / 16 * 16 + r.dynamic_shared;
        shared.resize(r.dynamic_shared ? bytes : kernel.shared_bytes);
        for (u32 i = 0; i < r.buffer_count; ++i)
            add(r.buffers[3 * i], r.buffers[3 * i + 1], r.buffers[3 * i + 2]);
        for (u32 i = 0; i < kernel.variable_count; ++i) {
            const u64 begin = reinterpret_cast<u64>(kernel.variables[i].bytes);
            add(begin, begin + kernel.variables[i].size, kernel.variables[i].readonly);
        }
    }

    void add(u64 begin, u64 end, bool readonly) {
        Shadow* shadow = readonly ? nullptr : static_cast<Shadow*>(calloc(end - begin + 1, sizeof(Shadow)));
        if (!readonly && !shadow) throw std::bad_alloc();
        buffers.push_back({begin, end, readonly, std::unique_ptr<Shadow[], Free>(shadow)});
    }

    Buffer& find(u64 at, u64 bytes, Access access);
    bool ordered(const Thread& t, Stamp stamp) const;
    void keep(Shadow& shadow, Stamp stamp) const;
    void touch(const Thread& t, Shadow& shadow, Access access, bool same_value, const char* where) const;
    std::vector<u32> order(u32 n);
    void run_block();
    bool release_warps();
    void answer(u32 first, u32 mask);
    void move_matrices(u32 first, u32 present);
    void release_block();
    std::string place(const Thread& t) const;
};

}  // namespace ptx
