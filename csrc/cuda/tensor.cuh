// Tensors as one thread sees them: 4 or 8 consecutive elements of a sample, in logical C, H, W order, as
// float32.
//
// Whole: every tensor of the call is contiguous, its samples start on 16 bytes, and a sample is a multiple of
// what a thread makes. Such a thread moves 16 bytes at a time (8 of an 8-bit tensor). All else goes element
// by element: channels-last, odd sizes, the few elements at the end of a sample.
#pragma once

#include <type_traits>

#include "bdk/calls.h"
#include "bdk/half.h"

namespace bdk::cuda {

struct Any {};  // in the place of an element type: the type, like the layout, is known at run time

template <class T>
constexpr bool kIsAny = std::is_same_v<T, Any>;

template <class... T>
constexpr int kElements = (... || (sizeof(T) < 4 && !kIsAny<T>)) ? 8 : 4;

// n / divisor for n < 2^32, by one multiplication: reciprocal = ceil(2^64 / divisor).
struct Divider {
    uint64_t divisor, reciprocal;

    __device__ int64_t quotient(int64_t n) const {
        return divisor == 1 ? n : int64_t(__umul64hi(reciprocal, uint64_t(n)));
    }
};

struct Size {
    int64_t samples, elements;  // elements of one sample: C H W
    Divider pixels, width;      // H W, and W
};

// `count` elements of sample `sample` from logical element `first` on; `flip` mirrors each row of pixels.
struct At {
    int64_t sample, first;
    int count;
    bool flip = false;
};

// Block (x, y, z) works on one sample, so that its row, its seed and its arm are the same in all threads.
template <int kWidth>
__device__ At this_thread(const Size& size) {
    const int64_t sample = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
    const int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWidth;
    const int64_t left = sample < size.samples ? size.elements - first : 0;
    return {sample, first, left < 0 ? 0 : left < kWidth ? int(left) : kWidth};
}

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(uint8_t v) { return float(v); }
__device__ inline float to_float(Bfloat16 v) { return widen<Scalar>(v, v.bits); }
__device__ inline float to_float(Float16 v) {
#ifdef __CUDA_ARCH__
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
#else
    return widen<Scalar>(v, v.bits);
#endif
}

template <class T>
__device__ T from_float(float v) {
    if constexpr (std::is_same_v<T, float>) {
        return v;
    } else {
        T half;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        if constexpr (std::is_same_v<T, Float16>)
            asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(v));
        else
            asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half.bits) : "f"(v));
#else
        half.bits = uint16_t(narrow<Scalar>(T{}, v));
#endif
        return half;
    }
}

// 16 bytes at once. Written as an assignment, nvcc 13 splits some of them (a store into the history) in four.
__device__ inline void store_chunk(void* to, uint4 v) {
#ifdef __CUDA_ARCH__
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(v.x),
                 "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
#else
    *static_cast<uint4*>(to) = v;
#endif
}

// kWidth elements, moved in chunks of 16 bytes; bytes, which are only read, in one of 4 or 8.
template <class T, int kWidth>
struct Vector {
    static constexpr int kBytes = kWidth * int(sizeof(T));
    using Chunk = std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint2, uint4>>;
    static constexpr int kPerChunk = int(sizeof(Chunk) / sizeof(T));
    T value[kWidth];

    __device__ void load(const T* from) {
        for (int i = 0; i < kWidth; i += kPerChunk) {
            const Chunk chunk = *reinterpret_cast<const Chunk*>(from + i);
            memcpy(value + i, &chunk, sizeof chunk);
        }
    }
    __device__ void store(T* to) const {
        for (int i = 0; i < kWidth; i += kPerChunk) {
            uint4 chunk;
            memcpy(&chunk, value + i, sizeof chunk);
            store_chunk(to + i, chunk);
        }
    }
};

// Where the i-th element of a thread lies, from the start of its sample.
__device__ inline int64_t offset(const View& view, const Size& size, const At& at, int i) {
    const int64_t channel = size.pixels.quotient(at.first + i);
    int64_t pixel = at.first + i - channel * view.pixels;
    if (at.flip) {
        const int64_t column = pixel - size.width.quotient(pixel) * view.width;
        pixel += view.width - 1 - 2 * column;
    }
    return channel * view.channel_stride + pixel * view.pixel_stride;
}

template <bool kWhole, class T, int kWidth>
__device__ void load(const View& view, const Size& size, const At& at, float (&out)[kWidth]) {
    if constexpr (kIsAny<T>) {
        switch (view.type) {
            case Type::bfloat16:
                return load<kWhole, Bfloat16>(view, size, at, out);
            case Type::float16:
                return load<kWhole, Float16>(view, size, at, out);
            case Type::byte:
                return load<kWhole, uint8_t>(view, size, at, out);
            default:
                return load<kWhole, float>(view, size, at, out);
        }
    } else {
        const T* sample = static_cast<const T*>(view.data) + at.sample * view.sample_stride;
        if constexpr (kWhole) {
            int64_t first = at.first;
            if (at.flip) {
                const int64_t row = size.width.quotient(first) * view.width;
                first = 2 * row + view.width - kWidth - first;
            }
            Vector<T, kWidth> vector;
            vector.load(sample + first);
            for (int i = 0; i < kWidth; ++i)
                out[i] = to_float(at.flip ? vector.value[kWidth - 1 - i] : vector.value[i]);
        } else {
            for (int i = 0; i < kWidth; ++i) {
                out[i] = 0;
                if (i < at.count) out[i] = to_float(sample[offset(view, size, at, i)]);
            }
        }
    }
}

// No op writes bytes.
template <bool kWhole, class T, int kWidth>
__device__ void store(const View& view, const Size& size, const At& at, const float (&in)[kWidth]) {
    if constexpr (kIsAny<T>) {
        switch (view.type) {
            case Type::bfloat16:
                return store<kWhole, Bfloat16>(view, size, at, in);
            case Type::float16:
                return store<kWhole, Float16>(view, size, at, in);
            default:
                return store<kWhole, float>(view, size, at, in);
        }
    } else {
        T* sample = static_cast<T*>(view.data) + at.sample * view.sample_stride;
        if constexpr (kWhole) {
            Vector<T, kWidth> vector;
            for (int i = 0; i < kWidth; ++i) vector.value[i] = from_float<T>(in[i]);
            vector.store(sample + at.first);
        } else {
            for (int i = 0; i < kWidth; ++i)
                if (i < at.count) sample[offset(view, size, at, i)] = from_float<T>(in[i]);
        }
    }
}

// The row of a table; a whole one is read 16 bytes at a time. One that the table has not is never read: its
// columns are NaN.
template <int kColumns, bool kWhole>
__device__ Row<Scalar, kColumns> load_row(const Table& table, int64_t arm, int64_t index) {
    const bool known = uint64_t(arm) < uint64_t(table.arms) && uint64_t(index) < uint64_t(table.rows);
    const float* row = table.row(known ? arm : 0, known ? index : 0);
    float value[kColumns];
    if (!known) {
        for (float& column : value) column = NAN;
    } else if constexpr (kWhole) {
        for (int c = 0; c < kColumns; c += 4) {
            const float4 four = __ldg(reinterpret_cast<const float4*>(row + c));
            memcpy(&value[c], &four, sizeof four);
        }
    } else {
        for (int c = 0; c < kColumns; ++c) value[c] = __ldg(row + c);
    }
    return Row<Scalar, kColumns>(value);
}

// The row, or the two rows, of a sample: `at(region)` is the row of one element.
template <int kColumns, bool kRegion, bool kWhole>
struct SampleRows {
    const Row<Scalar, kColumns> outside, inside;

    __device__ SampleRows(const Table& table, const int64_t* arm, const int64_t* arm_inside, int64_t sample,
                          int64_t index)
        : outside(load_row<kColumns, kWhole>(table, __ldg(arm + sample), index)),
          inside(kRegion ? load_row<kColumns, kWhole>(table, __ldg(arm_inside + sample), index) : outside) {}

    __device__ decltype(auto) at(float region) const {
        if constexpr (kRegion)
            return MixedRow<Scalar, kColumns, bool>{outside, inside, region != 0.0f};
        else
            return (outside);
    }
};

// The normals of a thread's elements.
template <int kWidth>
__device__ void normals(int64_t seed, uint32_t step, uint32_t stream, const At& at, float (&z)[kWidth]) {
    const Key<Scalar> key(seed);
    for (int g = 0; g < kWidth / 4; ++g) {
        uint32_t w[4];
        words<Scalar>(key, uint32_t(at.first / 4 + g), step, stream, w);
        float four[4];
        box_muller<Scalar>(w, four);
        for (int i = 0; i < 4; ++i) z[4 * g + i] = four[i];
    }
}

}  // namespace bdk::cuda
