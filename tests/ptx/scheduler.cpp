// Runs the threads of each block from barrier to barrier, and answers their warp instructions.
#include <algorithm>
#include <cstdio>

#include "launch.h"

namespace ptx {

const u32* Thread::grid() const { return launch->request.grid; }
const u32* Thread::block() const { return launch->request.block; }
const u32* Thread::ctaid() const { return launch->ctaid; }
const u8* Thread::parameters() const { return launch->request.parameters; }

void Thread::jump_back() {
    if (++jumps_back > launch->request.jump_limit)
        throw Fault{"endless loop: more than " + number(launch->request.jump_limit) + " jumps back"};
}

// ---- barriers and warps ----

void Thread::wait_block(int at_site, u32 id, u32 count) {
    if (count != launch->threads.size())
        throw Fault{"a barrier of " + number(count) + " of the block's " + number(launch->threads.size()) +
                    " threads is not modelled"};
    state = kAtBarrier, site = at_site, barrier = id;
}

void Thread::wait_warp(int at_site, Collective kind, u32 members, u32 x, u8 unset_x, u32 b, u32 c) {
    if (!(members >> index % 32 & 1)) throw Fault{"the lane is not in its own member mask"};
    state = kAtWarp, site = at_site, collective = kind, mask = members, value = x, unset = unset_x,
    lane_b = b, lane_c = c;
}

void Thread::wait_matrices(int at_site, Collective kind, u32 count, bool trans, Space of, u64 at) {
    wait_warp(at_site, kind, ~0u, 0, kSet);
    matrices = count, transposed = trans, space = of, row = at;
}

// A warp instruction goes on when every member that has not exited waits at it with the same mask.
bool Launch::release_warps() {
    bool released = false;
    const u32 n = threads.size();
    for (u32 i = 0; i < n; ++i) {
        const Thread& t = threads[i];
        if (t.state != Thread::kAtWarp) continue;
        const u32 first = i / 32 * 32;
        u32 present = 0;
        bool complete = true;
        for (u32 j = first; j < std::min(first + 32, n); ++j) {
            const Thread& other = threads[j];
            if (!(t.mask >> j % 32 & 1) || other.state == Thread::kExited) continue;
            present |= 1u << j % 32;
            complete &= other.state == Thread::kAtWarp && other.site == t.site && other.mask == t.mask;
        }
        if (!complete) continue;
        answer(first, present);
        released = true;
    }
    return released;
}

void Launch::answer(u32 first, u32 present) {
    std::vector<Thread*> members;
    for (u32 lane = 0; lane < 32; ++lane)
        if (present >> lane & 1) members.push_back(&threads[first + lane]);
    const Collective kind = members[0]->collective;
    if (kind == kLoadMatrix || kind == kStoreMatrix) move_matrices(first, present);
    u32 votes = 0;
    for (Thread* t : members) votes |= u32(t->value != 0) << t->index % 32;
    for (Thread* t : members) {
        current = t;
        const u32 lane = t->index % 32, segment = t->lane_c >> 8 & 31, b = t->lane_b & 31;
        const u32 lowest = lane & segment, highest = lowest | (t->lane_c & 31 & ~segment);
        t->result_unset = t->unset;
        switch (t->collective) {
            case kWarpSync:
            case kLoadMatrix:
            case kStoreMatrix:
                break;
            case kUp:
            case kDown:
            case kBfly:
            case kIdx: {
                const u32 j = t->collective == kUp     ? lane - b
                              : t->collective == kDown ? lane + b
                              : t->collective == kBfly ? lane ^ b
                                                       : lowest | (b & ~segment);
                t->inside = t->collective == kUp ? s32(j) >= s32(highest) : s32(j) <= s32(highest);
                const u32 from = t->inside ? j : lane;
                if (!(present >> from & 1))
                    throw Fault{"shuffle from lane " + number(from) + ", which takes no part in it"};
                t->result = threads[first + from].value;
                t->result_unset = threads[first + from].unset;
                break;
            }
            case kAll:
                t->result = votes == present;
                break;
            case kAny:
                t->result = votes != 0;
                break;
            case kUni:
                t->result = votes == present || !votes;
                break;
            case kBallot:
                t->result = votes;
                break;
            default:
                t->result = members[0]->value;
                for (const Thread* other : members) {
                    const u32 a = t->result, x = other->value;
                    t->result_unset |= other->unset;
                    if (other == members[0]) continue;
                    t->result = t->collective == kAdd         ? a + x
                                : t->collective == kMin       ? std::min(a, x)
                                : t->collective == kMax       ? std::max(a, x)
                                : t->collective == kMinSigned ? u32(std::min(s32(a), s32(x)))
                                : t->collective == kMaxSigned ? u32(std::max(s32(a), s32(x)))
                                : t->collective == kAnd       ? a & x
                                : t->collective == kOr        ? a | x
                                                              : a ^ x;
                }
        }
    }
    // Only bar.warp.sync orders memory; shuffles, votes and reductions do not.
    if (kind == kWarpSync) {
        ++time;
        for (Thread* t : members)
            for (u32 lane = 0; lane < 32; ++lane)
                if (present >> lane & 1) t->seen[lane] = time;
    }
    for (Thread* t : members) t->state = Thread::kReady;
}

// Matrices of 8 x 8 elements of 16 bits. Lane 8 k + i names row i of matrix k, 16 bytes. In matrix k a lane
// holds elements (lane / 4, 2 (lane % 4)) and the next of that row; with .trans, the same places of the
// transpose.
void Launch::move_matrices(u32 first, u32 present) {
    Thread* lanes = &threads[first];
    const bool loads = lanes->collective == kLoadMatrix;
    current = lanes;
    if (present != ~0u) throw Fault{"a matrix instruction without all 32 lanes of the warp"};
    for (u32 k = 0; k < lanes->matrices; ++k) {
        b16 matrix[8][8];
        u8 unset[8][8];
        for (u32 i = 0; loads && i < 8; ++i) {
            current = &lanes[8 * k + i];
            current->read(current->space, kRead, current->row, 2, 8, matrix[i], unset[i]);
        }
        for (u32 lane = 0; lane < 32; ++lane) {
            Thread& t = lanes[lane];
            if (loads) t.elements[k] = 0, t.elements_unset[k] = kSet;
            for (u32 half = 0; half < 2; ++half) {
                u32 row = lane / 4, column = lane % 4 * 2 + half;
                if (t.transposed) std::swap(row, column);
                if (loads) {
                    t.elements[k] |= u32(matrix[row][column]) << 16 * half;
                    t.elements_unset[k] |= unset[row][column];
                } else {
                    matrix[row][column] = t.elements[k] >> 16 * half;
                    unset[row][column] = t.elements_unset[k];
                }
            }
        }
        for (u32 i = 0; !loads && i < 8; ++i) {
            current = &lanes[8 * k + i];
            current->write(current->space, current->row, 2, 8, matrix[i], unset[i]);
        }
    }
}

// Nobody can run and no warp instruction is complete: the whole block waits at one barrier, or there is a
// fault.
void Launch::release_block() {
    u32 waiting = 0, exited = 0;
    for (Thread& t : threads) {
        waiting += t.state == Thread::kAtBarrier;
        exited += t.state == Thread::kExited;
        if (t.state != Thread::kExited && (!current || current->state == Thread::kExited)) current = &t;
    }
    const Thread& first = *current;
    if (waiting && waiting + exited < threads.size()) {
        for (Thread& t : threads)
            if (t.state == Thread::kAtWarp) current = &t;
        throw Fault{"deadlock: the warp instruction waits for lanes that wait at a block barrier"};
    }
    if (!waiting)
        throw Fault{"deadlock: lanes of a warp wait at different instructions or with different masks"};
    if (exited)
        throw Fault{"skipped barrier: " + number(exited) + " of " + number(threads.size()) +
                    " threads exited before it"};
    for (const Thread& t : threads)
        if (t.site != first.site || t.barrier != first.barrier)
            throw Fault{"divergent barrier: thread " + number(t.index) + " waits at another one"};
    ++time;
    for (Thread& t : threads) {
        t.state = Thread::kReady;
        t.seen_block = time;
        std::fill(std::begin(t.seen), std::end(t.seen), time);
    }
}

std::vector<u32> Launch::order(u32 n) {
    std::vector<u32> indices(n);
    for (u32 i = 0; i < n; ++i) indices[i] = request.order == kDescending ? n - 1 - i : i;
    if (request.order == kRandom)
        for (u32 i = n; i > 1; --i) {
            random = random * 6364136223846793005 + 1442695040888963407;
            std::swap(indices[i - 1], indices[(random >> 33) % i]);
        }
    return indices;
}

void Launch::run_block() {
    const u32* size = request.block;
    const u32 n = threads.size();
    shared_unset.assign(shared.size(), kShared);
    shared_shadow.assign(shared.size(), Shadow());
    for (u32 i = 0; i < n; ++i) {
        Thread fresh{};
        fresh.launch = this, fresh.index = i;
        fresh.tid[0] = i % size[0], fresh.tid[1] = i / size[0] % size[1],
        fresh.tid[2] = i / (size[0] * size[1]);
        fresh.local.resize(kernel.local_bytes);
        fresh.local_unset.assign(kernel.local_bytes, kLocal);
        threads[i] = std::move(fresh);
        kernel.reset(&registers[i * kernel.register_bytes]);
    }
    for (;;) {
        for (u32 i : order(n)) {
            current = &threads[i];
            if (current->state == Thread::kReady) kernel.run(*current, &registers[i * kernel.register_bytes]);
        }
        if (std::all_of(threads.begin(), threads.end(),
                        [](const Thread& t) { return t.state == Thread::kExited; }))
            return;
        if (!release_warps()) release_block();
    }
}

std::string Launch::place(const Thread& t) const {
    const auto triple = [](const u32* v) {
        return "(" + number(v[0]) + ", " + number(v[1]) + ", " + number(v[2]) + ")";
    };
    return " [block " + triple(ctaid) + ", thread " + triple(t.tid) + "]";
}

}  // namespace ptx

// -1, or the statement that failed, with what it did in `message`.
extern "C" int ptx_launch(const ptx::Request* request, char* message, size_t size) {
    using namespace ptx;
    Launch launch(*request);
    const u32* grid = request->grid;
    try {
        for (u32 i : launch.order(grid[0] * grid[1] * grid[2])) {
            launch.ctaid[0] = i % grid[0], launch.ctaid[1] = i / grid[0] % grid[1],
            launch.ctaid[2] = i / (grid[0] * grid[1]);
            launch.first_thread = i * launch.threads.size() + 1;
            launch.time = 1;
            launch.run_block();
        }
    } catch (const Fault& fault) {
        const Thread& t = *launch.current;
        snprintf(message, size, "%s%s", fault.message.c_str(), launch.place(t).c_str());
        return t.statement;
    }
    return -1;
}
