// What a translated kernel sees: registers that know whether they were set, its thread, and checked memory.
//
// A kernel is a resumable function: `run(thread, registers)` goes on at `case thread.resume` and returns at a
// barrier, at a warp instruction or at the end. So the scheduler runs a block's threads one after another, in
// any order it likes.
#pragma once
#include <vector>

#include "arithmetic.h"

namespace ptx {

// Where an undefined value came from; values made of undefined ones carry the union.
enum Unset : u8 { kSet = 0, kRegister = 1, kShared = 2, kLocal = 4 };

template <class U>
struct Register {
    U bits = U();
    u8 unset = kRegister;
};

// The low bytes of a register as a T.
template <class T, class U>
T get(const Register<U>& from) {
    if constexpr (std::is_same_v<U, bool>)
        return from.bits;
    else
        return of_bits<T>(Bits<T>(from.bits));
}

// Integers are extended to the register's width; a float that is not a number becomes the canonical one.
template <class T, class U, class V>
void put(Register<U>& to, V value, u8 unset) {
    if constexpr (std::is_same_v<U, bool>)
        to.bits = value;
    else if constexpr (is_float<T>)
        to.bits = of_bits<Bits<T>>(canonical(T(value)));
    else
        to.bits = static_cast<U>(static_cast<T>(value));
    to.unset = unset;
}

enum Space { kGlobal, kSharedSpace, kLocalSpace, kGeneric };
// Generic addresses of shared and local memory: windows that no host pointer falls into.
constexpr u64 kSharedWindow = 0x7100000000000000, kLocalWindow = 0x7200000000000000,
              kWindowMask = 0xff00000000000000;

enum Access { kRead, kReadOnlyRead, kWrite, kAtomic };
enum Collective {
    kWarpSync,
    kUp,
    kDown,
    kBfly,
    kIdx,
    kAll,
    kAny,
    kUni,
    kBallot,
    kAdd,
    kMin,
    kMax,
    kMinSigned,
    kMaxSigned,
    kAnd,
    kOr,
    kXor,
    kLoadMatrix,
    kStoreMatrix
};

struct Launch;

struct Thread {
    Launch* launch;
    u32 tid[3], index;
    int resume = 0, statement = 0;
    enum { kReady, kAtBarrier, kAtWarp, kExited } state = kReady;

    // What it waits with, and the answer.
    int site = 0;
    Collective collective = kWarpSync;
    u32 barrier = 0, mask = 0, value = 0, lane_b = 0, lane_c = 0, result = 0;
    u8 unset = kSet, result_unset = kSet;
    bool inside = false;

    // ldmatrix, stmatrix: the address of the row that this lane names, and its two elements of each matrix.
    Space space = kGeneric;
    u64 row = 0;
    u32 matrices = 0, elements[4] = {};
    u8 elements_unset[4] = {};
    bool transposed = false;

    // What other threads did before these times, it has seen: its warp by lane, the rest of the block.
    u32 seen[32] = {}, seen_block = 0;
    u64 jumps_back = 0;
    std::vector<u8> local, local_unset;

    void exit() { state = kExited; }
    void jump_back();
    void wait_block(int site, u32 barrier, u32 threads);
    void wait_warp(int site, Collective kind, u32 mask, u32 value, u8 unset, u32 lane_b = 0, u32 lane_c = 0);
    void wait_matrices(int site, Collective kind, u32 count, bool transposed, Space space, u64 row);

    const u32* grid() const;
    const u32* block() const;
    const u32* ctaid() const;
    const u8* parameters() const;

    // Bytes at an address after every check; `unset` gets one flag an element on a read, and is stored on a
    // write.
    void read(Space space, Access access, u64 at, u32 element, u32 count, void* to, u8* unset);
    void write(Space space, u64 at, u32 element, u32 count, const void* from, const u8* unset);
    void atomic_read(Space space, u64 at, u32 size, void* to);
    void atomic_write(Space space, u64 at, u32 size, const void* from, u8 unset);
};

// A value that decides what is done (an address, a predicate, a mask) must be defined.
void require(u8 unset, const char* what);

inline bool test(const Register<bool>& predicate) {
    require(predicate.unset, "a predicate");
    return predicate.bits;
}

template <class U>
u64 address(const Register<U>& from) {
    require(from.unset, "an address");
    return from.bits;
}

template <class T, int N>
struct Vector {
    Bits<T> value[N];
    u8 unset[N];
};

template <class T, int N>
Vector<T, N> load(Thread& t, Space space, Access access, u64 at) {
    Vector<T, N> v;
    t.read(space, access, at, sizeof(T), N, v.value, v.unset);
    return v;
}

struct Variable {
    u8* bytes;
    u64 size;
    bool readonly;
};

// The one kernel of a translated module.
struct KernelInfo {
    void (*run)(Thread&, void* registers);
    void (*reset)(void* registers);
    size_t register_bytes;
    u32 shared_bytes, local_bytes;
    const Variable* variables;
    u32 variable_count;
};
extern const KernelInfo kernel;

}  // namespace ptx
