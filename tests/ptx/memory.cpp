// Checked memory: bounds, alignment, read-only buffers, undefined values, and races.
#include "launch.h"

namespace ptx {

namespace {

constexpr u32 kAtomicMark = 1u << 31;  // on the writer of a stamp

const char* deed(Access access) { return access == kWrite ? "store" : access == kAtomic ? "atomic" : "load"; }

}  // namespace

Buffer& Launch::find(u64 at, u64 bytes, Access access) {
    Buffer* nearest = nullptr;
    for (Buffer& b : buffers) {
        if (at >= b.begin && at < b.end && bytes <= b.end - at) return b;
        if (b.begin <= at && (!nearest || b.begin > nearest->begin)) nearest = &b;
    }
    const std::string what =
        std::string("out of bounds: ") + deed(access) + " of " + number(bytes) + " bytes at ";
    if (!nearest) throw Fault{what + "an address below every buffer"};
    throw Fault{what + "byte " + number(at - nearest->begin) + " of a buffer of " +
                number(nearest->end - nearest->begin)};
}

bool Launch::ordered(const Thread& t, Stamp stamp) const {
    const u32 who = (stamp.thread & ~kAtomicMark) - first_thread;
    if (who == t.index) return true;
    if (who >= threads.size()) return false;  // another block
    return stamp.time < (who / 32 == t.index / 32 ? t.seen[who % 32] : t.seen_block);
}

// A stamp takes one of the two places for readers.
void Launch::keep(Shadow& shadow, Stamp stamp) const {
    const u32 before = shadow.reader.thread & ~kAtomicMark, now = stamp.thread & ~kAtomicMark;
    const bool same_warp = (before - first_thread) / 32 == (now - first_thread) / 32;
    if (before != now && !(same_warp && shadow.other.thread)) shadow.other = shadow.reader;
    shadow.reader = stamp;
}

void Launch::touch(const Thread& t, Shadow& shadow, Access access, bool same_value, const char* where) const {
    const bool reading = access == kRead || access == kReadOnlyRead;
    for (const Stamp* stamp : {&shadow.writer, &shadow.reader, &shadow.other}) {
        const bool writer = stamp == &shadow.writer, atomic = stamp->thread & kAtomicMark;
        const bool harmless = atomic ? access == kAtomic : writer ? same_value : reading;
        if (!stamp->thread || harmless || ordered(t, *stamp)) continue;
        const u32 who = (stamp->thread & ~kAtomicMark) - 1, n = threads.size();
        throw Fault{std::string("race in ") + where + " memory: " + deed(access) + " of bytes that thread " +
                    number(who % n) + " of block " + number(who / n) +
                    (writer || atomic ? " wrote" : " read") + ", with no barrier between"};
    }
    const u32 me = first_thread + t.index;
    const bool after_atomic = shadow.writer.thread & kAtomicMark;
    if (reading)
        keep(shadow, {me, time});
    else if (access == kAtomic && after_atomic)  // one of several that may come in any order
        keep(shadow, shadow.writer), shadow.writer = {me | kAtomicMark, time};
    else
        shadow = {{access == kAtomic ? me | kAtomicMark : me, time}, {}, {}};
}

namespace {

// The bytes of one access: in shared, local or global memory, with their shadows where there are any.
struct Span {
    u8 *bytes, *unset;
    Shadow* shadow;
    const char* where;
};

Span span(Thread& t, Space space, Access access, u64 at, u64 size) {
    Launch& launch = *t.launch;
    if (space == kGeneric) {
        const u64 window = at & kWindowMask;
        space = window == kSharedWindow ? kSharedSpace : window == kLocalWindow ? kLocalSpace : kGlobal;
        if (space != kGlobal) at &= ~kWindowMask;
    }
    if (at % size)
        throw Fault{"misaligned: " + std::string(deed(access)) + " of " + number(size) + " bytes, " +
                    number(at % size) + " past a multiple"};
    if (space == kGlobal) {
        Buffer& b = launch.find(at, size, access);
        if (b.readonly && access >= kWrite) throw Fault{std::string(deed(access)) + " to a read-only buffer"};
        Shadow* shadow = b.readonly ? nullptr : &b.shadow[at - b.begin];
        if (access == kReadOnlyRead && shadow && shadow->writer.thread)
            throw Fault{"ld.global.nc of memory that this launch has written"};
        return {reinterpret_cast<u8*>(at), nullptr, shadow, "global"};
    }
    const bool is_shared = space == kSharedSpace;
    std::vector<u8>& memory = is_shared ? launch.shared : t.local;
    if (at > memory.size() || size > memory.size() - at)
        throw Fault{"out of bounds: " + std::string(deed(access)) + " of " + number(size) +
                    " bytes at byte " + number(at) + " of " + (is_shared ? "shared" : "local") +
                    " memory of " + number(memory.size())};
    if (is_shared) return {&memory[at], &launch.shared_unset[at], &launch.shared_shadow[at], "shared"};
    return {&memory[at], &t.local_unset[at], nullptr, "local"};
}

}  // namespace

void Thread::read(Space space, Access access, u64 at, u32 element, u32 count, void* to, u8* unset_of) {
    const u32 size = element * count;
    const Span s = span(*this, space, access, at, size);
    memset(unset_of, kSet, count);
    for (u32 i = 0; i < size; ++i) {
        if (s.shadow) launch->touch(*this, s.shadow[i], access, false, s.where);
        if (s.unset) unset_of[i / element] |= s.unset[i];
    }
    memcpy(to, s.bytes, size);
}

void Thread::write(Space space, u64 at, u32 element, u32 count, const void* from, const u8* unset_of) {
    const u32 size = element * count;
    const Span s = span(*this, space, kWrite, at, size);
    const bool is_shared = s.shadow && s.unset;
    for (u32 i = 0; i < size; ++i) {
        // Threads that hold the same element may all store it to shared memory: compilers do that.
        const bool same_value = is_shared && s.bytes[i] == static_cast<const u8*>(from)[i];
        if (s.shadow) launch->touch(*this, s.shadow[i], kWrite, same_value, s.where);
        if (s.unset)
            s.unset[i] = unset_of[i / element];
        else
            require(unset_of[i / element], "a stored value");
    }
    memcpy(s.bytes, from, size);
}

void Thread::atomic_read(Space space, u64 at, u32 size, void* to) {
    const Span s = span(*this, space, kAtomic, at, size);
    for (u32 i = 0; i < size; ++i) {
        if (s.shadow) launch->touch(*this, s.shadow[i], kAtomic, false, s.where);
        if (s.unset) require(s.unset[i], "memory that an atomic changes");
    }
    memcpy(to, s.bytes, size);
}

void Thread::atomic_write(Space space, u64 at, u32 size, const void* from, u8 unset_from) {
    require(unset_from, "an atomic's operand");
    memcpy(span(*this, space, kAtomic, at, size).bytes, from, size);
}

void require(u8 unset, const char* what) {
    if (unset == kSet) return;
    std::string origin;
    for (const auto& [bit, name] :
         {std::pair(kRegister, "a register"), {kShared, "shared memory"}, {kLocal, "local memory"}})
        if (unset & bit) origin += (origin.empty() ? "" : " and ") + std::string(name);
    throw Fault{std::string("uninitialised: ") + what + " depends on " + origin +
                " that nothing has written"};
}

}  // namespace ptx
