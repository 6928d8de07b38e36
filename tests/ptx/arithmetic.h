// Values of PTX and the operations on them that C++ does not have, to the bit.
//
// Floats are IEEE, round to nearest even, subnormals kept, no contraction; a NaN that an operation makes is
// PTX's canonical one. Signed overflow wraps (compiled with -fwrapv).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;

struct Fault {
    std::string message;
};

template <class To, class From>
To of_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

struct f16 {
    _Float16 value;
    f16() = default;
    template <class F>
    explicit f16(F from) : value(static_cast<_Float16>(from)) {}
    operator f32() const { return value; }
};

struct bf16 {
    u16 bits;
    bf16() = default;
    explicit bf16(f32 from) {
        const u32 word = of_bits<u32>(from);
        bits = from != from ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
    }
    operator f32() const { return of_bits<f32>(u32(bits) << 16); }
};

template <int Bytes>
struct Word;
template <>
struct Word<1> {
    using type = u8;
};
template <>
struct Word<2> {
    using type = u16;
};
template <>
struct Word<4> {
    using type = u32;
};
template <>
struct Word<8> {
    using type = u64;
};
template <class T>
using Bits = typename Word<sizeof(T)>::type;

template <class T>
constexpr bool is_float = std::is_same_v<T, f16> || std::is_same_v<T, bf16> || std::is_floating_point_v<T>;
template <class T>
constexpr int width = 8 * sizeof(T);

// ---- integers ----

template <class T>
T mul_hi(T a, T b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return Wide(a) * Wide(b) >> width<T>;
}

template <class T>
T divide(T a, T b) {
    if (b == 0) throw Fault{"integer division by zero"};
    return b == T(-1) && std::is_signed_v<T> ? T(-a) : T(a / b);
}

template <class T>
T remainder(T a, T b) {
    if (b == 0) throw Fault{"integer division by zero"};
    return b == T(-1) && std::is_signed_v<T> ? T(0) : T(a % b);
}

template <class T>
T shift_left(T a, u32 by) {
    return by >= width<T> ? 0 : T(a << by);
}

template <class T>
T shift_right(T a, u32 by) {
    return by >= width<T> ? (a < 0 ? T(-1) : T(0)) : T(a >> by);
}

inline u32 funnel_left(u32 low, u32 high, u32 by) { return u32((u64(high) << 32 | low) << by >> 32); }
inline u32 funnel_right(u32 low, u32 high, u32 by) { return u32((u64(high) << 32 | low) >> by); }

template <class T>
u32 leading_zeros(T a) {
    u32 n = 0;
    while (n < width<T> && !(a >> (width<T> - 1 - n) & 1)) ++n;
    return n;
}

template <class T>
T reverse_bits(T a) {
    T r = 0;
    for (int i = 0; i < width<T>; ++i) r |= (a >> i & 1) << (width<T> - 1 - i);
    return r;
}

// bfe: `length` bits of `a` from bit `at`, filled up with the sign for a signed type.
template <class T>
T extract(T a, u32 at, u32 length) {
    at &= 255, length &= 255;
    const u32 top = at + length - 1 < width<T> - 1u ? at + length - 1 : width<T> - 1;
    const bool sign = std::is_signed_v<T> && length && (a >> top & 1);
    Bits<T> r = 0;
    for (u32 i = 0; i < width<T>; ++i) {
        const bool inside = i < length && at + i < width<T>;
        r |= Bits<T>(inside ? a >> (at + i) & 1 : sign) << i;
    }
    return T(r);
}

// bfi: the low `length` bits of `a` put into `b` at bit `at`.
template <class T>
T insert(T a, T b, u32 at, u32 length) {
    at &= 255, length &= 255;
    for (u32 i = 0; i < length && at + i < width<T>; ++i)
        b = (b & ~(T(1) << (at + i))) | (a >> i & 1) << (at + i);
    return b;
}

inline u32 permute(u32 a, u32 b, u32 selector) {
    u32 r = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 choice = selector >> (4 * i) & 15;
        u32 byte = (u64(b) << 32 | a) >> (8 * (choice & 7)) & 255;
        if (choice & 8) byte = byte & 128 ? 255 : 0;
        r |= byte << (8 * i);
    }
    return r;
}

// lop3: bit i of the result is bit (a_i b_i c_i) of the table.
inline u32 logic3(u32 a, u32 b, u32 c, u32 table) {
    u32 r = 0;
    for (int i = 0; i < 8; ++i)
        if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return r;
}

// ---- floats ----

template <class F>
F canonical(F x) {
    constexpr Bits<F> nan = Bits<F>(~Bits<F>(0)) >> 1;
    return x != x ? of_bits<F>(nan) : x;
}

template <class F>
F set_sign(F x, bool negative) {
    constexpr Bits<F> sign = Bits<F>(1) << (width<F> - 1);
    const Bits<F> bits = of_bits<Bits<F>>(x);
    return of_bits<F>(Bits<F>(negative ? bits | sign : bits & ~sign));
}

template <class F>
bool negative(F x) {
    return of_bits<Bits<F>>(x) >> (width<F> - 1);
}

// min, max: a NaN loses to a number; -0 < +0.
template <class F>
F lesser(F a, F b) {
    if (a != a) return b;
    if (b != b) return a;
    return a < b || (a == b && negative(a)) ? a : b;
}

template <class F>
F greater(F a, F b) {
    if (a != a) return b;
    if (b != b) return a;
    return a > b || (a == b && !negative(a)) ? a : b;
}

template <class F>
F lesser_nan(F a, F b) {
    return a != a || b != b ? canonical(of_bits<F>(Bits<F>(-1))) : lesser(a, b);
}

template <class F>
F greater_nan(F a, F b) {
    return a != a || b != b ? canonical(of_bits<F>(Bits<F>(-1))) : greater(a, b);
}

// min, max of the magnitudes, with the sign of the product.
template <class F>
F xor_sign(F (*choose)(F, F), F a, F b) {
    return set_sign(choose(set_sign(a, false), set_sign(b, false)), negative(a) != negative(b));
}

// fma of a 16-bit float: the double sum is rounded to odd, so that rounding it again is rounding once.
template <class F>
F fma16(F a, F b, F c) {
    const f64 product = f64(f32(a)) * f32(b), addend = f32(c), sum = product + addend;
    const f64 part = sum - product, rest = (product - (sum - part)) + (addend - part);
    u64 bits = of_bits<u64>(sum);
    if (std::isfinite(sum) && rest != 0 && !(bits & 1)) bits += (rest > 0) == (sum > 0) ? 1 : -1;
    const f64 odd = of_bits<f64>(bits);
    f32 narrow = f32(odd);
    u32 word = of_bits<u32>(narrow);
    if (std::isfinite(odd) && f64(narrow) != odd) {
        if (std::fabs(f64(narrow)) > std::fabs(odd)) --word;
        word |= 1;
    }
    return F(of_bits<f32>(word));
}

// Two floats in one word: an operation on the low halves, and on the high ones.
template <class F, class Op, class... Word>
auto both(Op op, Word... words) {
    const Bits<F> low = of_bits<Bits<F>>(canonical(op(of_bits<F>(Bits<F>(words))...)));
    const Bits<F> high = of_bits<Bits<F>>(canonical(op(of_bits<F>(Bits<F>(words >> width<F>))...)));
    return std::common_type_t<Word...>(high) << width<F> | low;
}

inline f32 flush(f32 x) {
    return std::fabs(x) < std::numeric_limits<f32>::min() ? std::copysign(0.0f, x) : x;
}
inline f32 saturate(f32 x) { return x != x || x <= 0 ? 0.0f : x > 1 ? 1.0f : x; }

// ---- conversions ----

enum Rounding { rn, rz, rm, rp };

// `exact` in the format F: the nearest, then one step back where it lies on the wrong side.
template <class F>
F narrow(long double exact, Rounding mode) {
    F nearest;
    if constexpr (std::is_same_v<F, bf16>)
        nearest = bf16(f32(exact));  // a bf16 is only ever made of a float32
    else
        nearest = F(exact);
    const long double got = nearest;
    const bool down = got > exact && (mode == rm || (mode == rz && exact > 0));
    const bool up = got < exact && (mode == rp || (mode == rz && exact < 0));
    const Bits<F> bits = of_bits<Bits<F>>(nearest);
    if (down) return of_bits<F>(Bits<F>(negative(nearest) ? bits + 1 : bits - 1));
    if (up) return of_bits<F>(Bits<F>(negative(nearest) ? bits - 1 : bits + 1));
    return nearest;
}

template <class F>
F integral(F x, Rounding mode) {
    const f64 wide = x;
    return F(mode == rn   ? std::nearbyint(wide)
             : mode == rz ? std::trunc(wide)
             : mode == rm ? std::floor(wide)
                          : std::ceil(wide));
}

// Float to integer: out of range is the nearest bound; NaN is 0, or the top bit alone where either side has
// 64 bits.
template <class To, class From>
To to_integer(From from, Rounding mode) {
    const f64 x = integral(f64(from), mode);
    if (x != x) return sizeof(To) == 8 || sizeof(From) == 8 ? To(Bits<To>(1) << (width<To> - 1)) : To(0);
    if (x >= std::ldexp(1.0, std::numeric_limits<To>::digits)) return std::numeric_limits<To>::max();
    if (x <= f64(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
    return To(x);
}

template <class To, class From>
To clamp_integer(From from) {
    const __int128 x = from, low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max();
    return To(x < low ? low : x > high ? high : x);
}

}  // namespace ptx
