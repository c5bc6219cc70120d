// Vectors of the width that the compiler was given (64, 32 or 16 bytes) and the scan's functions on them.
// float is fast; double takes the same templates with the C library's functions, lane by lane, so that a float64
// gradient check runs the real kernel.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

// Functions of a tile stay apart: calls cost nothing there, and inlined everywhere they take the compiler minutes.
#define APART __attribute__((noinline))

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
    typedef float Vec __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t Int __attribute__((vector_size(VECTOR_BYTES)));
    typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
    typedef uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
};
template <>
struct Lanes<double> {
    typedef double Vec __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t Int __attribute__((vector_size(VECTOR_BYTES)));
};
template <class T>
using Vec = typename Lanes<T>::Vec;
template <class T>
constexpr int LANES = VECTOR_BYTES / sizeof(T);
using Vf = Vec<float>;
using Vd = Vec<double>;

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class T>
inline Vec<T> get(const T* from) {
    return *reinterpret_cast<const Vec<T>*>(from);
}
template <class T>
inline void put(T* to, Vec<T> value) {
    *reinterpret_cast<Vec<T>*>(to) = value;
}

// ---- exponentials --------------------------------------------------------------------------------------------

template <class F>
APART Vd each(Vd x, F function) {
    for (int i = 0; i < LANES<double>; ++i) x[i] = function(x[i]);
    return x;
}

inline Vf horner(Vf, float last) { return Vf{} + last; }
template <class... Rest>
inline Vf horner(Vf x, float first, Rest... rest) {
    return horner(x, rest...) * x + first;
}

// 2^f for f in [-0.5, 0.5], relative error 2.0e-9; exactly 1 at 0, so that a decay near 1 has no bias.
inline Vf exp2_centred(Vf f) {
    return horner(f, 1.0f, 6.93147203e-01f, 2.40226479e-01f, 5.55033247e-02f, 9.61843736e-03f,
                  1.33988744e-03f, 1.53533618e-04f);
}

// Adding 1.5 * 2^23 leaves the nearest integer in the low bits of a float.
constexpr float ROUND = 12582912.0f;

// The larger, the smaller of both; NaN where x is, which needs the order of the instructions' operands.
#if defined(__AVX512F__)
inline Vf at_least(float low, Vf x) { return (Vf)_mm512_max_ps(_mm512_set1_ps(low), (__m512)x); }
inline Vf at_most(float high, Vf x) { return (Vf)_mm512_min_ps(_mm512_set1_ps(high), (__m512)x); }
#elif defined(__AVX2__)
inline Vf at_least(float low, Vf x) { return (Vf)_mm256_max_ps(_mm256_set1_ps(low), (__m256)x); }
inline Vf at_most(float high, Vf x) { return (Vf)_mm256_min_ps(_mm256_set1_ps(high), (__m256)x); }
#elif defined(__SSE2__)
inline Vf at_least(float low, Vf x) { return (Vf)_mm_max_ps(_mm_set1_ps(low), (__m128)x); }
inline Vf at_most(float high, Vf x) { return (Vf)_mm_min_ps(_mm_set1_ps(high), (__m128)x); }
#else
inline Vf at_least(float low, Vf x) { return x < low ? Vf{} + low : x; }
inline Vf at_most(float high, Vf x) { return x > high ? Vf{} + high : x; }
#endif
inline Vd at_least(double low, Vd x) { return x < low ? Vd{} + low : x; }

inline Vf times_power(Vf value, Vf rounded) {
    typedef Lanes<float>::Int Int;
    return bit_cast<Vf>(bit_cast<Int>(value) + (bit_cast<Int>(rounded) << 23));
}

// 2^x, the decay of one step: the one function inside the loop over the states.
#if defined(__AVX512DQ__)
inline Vf decay(Vf x) {
    // The nearest whole number, not the one below: a decay near 1 then comes from a rest near 0, where the roundings
    // of the polynomial vanish, and x - rest is exact. From a rest near 1 they would all but repeat, step after step.
    const Vf rest = (Vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (Vf)_mm512_scalef_ps((__m512)exp2_centred(rest), (__m512)(x - rest));
}
#else
inline Vf decay(Vf x) {
    x = at_most(128.0f,
                at_least(-126.0f, x));  // whole numbers, so that the ends are 2^-126 and infinity exactly
    const Vf rounded = x + ROUND;
    const Vf value = times_power(exp2_centred(x - (rounded - ROUND)), rounded);
    return x == -126.0f ? Vf{} : value;
}
#endif
inline Vd decay(Vd x) {
    return each(x, [](double v) { return std::exp2(v); });
}

// e^-|x|, the argument reduced by ln 2 in two parts (the first times a whole number is exact).
inline Vf exp_minus_size(Vf x) {
    typedef Lanes<float>::Int Int;
    constexpr float LEAST = -87.3f;  // below it 0, or a large gate would be multiplied by what the clamp leaves
    x = at_least(LEAST, bit_cast<Vf>(bit_cast<Int>(x) | INT32_MIN));
    const Vf rounded = x * 1.44269504f + ROUND;
    const Vf whole = rounded - ROUND;
    const Vf rest = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
    const Vf value = times_power(exp2_centred(rest * 1.44269504f), rounded);
    return x == LEAST ? Vf{} : value;
}
inline Vd exp_minus_size(Vd x) {
    return each(x, [](double v) { return std::exp(-std::fabs(v)); });
}

// log(1 + e^x) from e = e^-|x|; the logarithm's relative error on [0, 1] is 5e-9.
inline Vf softplus(Vf x, Vf e) {
    const Vf log1p_over_e = horner(e, 1.0f, -0.49999933f, 0.33330511f, -0.24958587f, 0.19695401f,
                                   -0.15355397f, 0.10680557f, -0.05766445f, 0.02020459f, -0.00331847f);
    return at_least(0.0f, x) + e * log1p_over_e;
}
inline Vd softplus(Vd x, Vd e) {
    e = each(e, [](double v) { return std::log1p(v); });
    return x > 20.0 ? x : at_least(0.0, x) + e;  // the identity above 20, as torch has it
}

// 1 / (1 + e^-x) and one minus it, neither by cancellation, from e = e^-|x|.
template <class T>
struct Sigmoid {
    Vec<T> value, rest;
    Sigmoid(Vec<T> x, Vec<T> e) {
        const Vec<T> large = T(1) / (T(1) + e), small = e * large;
        value = x < T(0) ? small : large;
        rest = x < T(0) ? large : small;
    }
};

// ---- shuffles ------------------------------------------------------------------------------------------------

// Lanes whose number has the bit S come from the other row: one stage of a transposition of LANES rows, in which
// bit S of a row's number changes place with bit S of a lane's. HIGH gives the row with the bit, else the one without.
template <class T, int S, bool HIGH, size_t... L>
inline Vec<T> exchange(Vec<T> x, Vec<T> y, std::index_sequence<L...>) {
    constexpr int W = LANES<T>;
#if defined(__clang__)
    return __builtin_shufflevector(x, y, (int(L & S ? W + L - (HIGH ? 0 : S) : L + (HIGH ? S : 0)))...);
#else
    typedef typename Lanes<T>::Int Int;
    return __builtin_shuffle(x, y, Int{(int(L & S ? W + L - (HIGH ? 0 : S) : L + (HIGH ? S : 0)))...});
#endif
}

template <class T, int S>
inline void transpose_from(Vec<T>* rows) {
    constexpr int W = LANES<T>;
    constexpr auto lanes = std::make_index_sequence<W>{};
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
        if (i & S) continue;
        const Vec<T> low = exchange<T, S, false>(rows[i], rows[i + S], lanes);
        rows[i + S] = exchange<T, S, true>(rows[i], rows[i + S], lanes);
        rows[i] = low;
    }
    if constexpr (S > 1) transpose_from<T, S / 2>(rows);
}
template <class T>
inline void transpose(Vec<T>* rows) {
    transpose_from<T, LANES<T> / 2>(rows);
}

// Lane i of the result is the sum over the lanes of rows[i], added in the same order whatever i is.
template <class T, int S = LANES<T> / 2>
inline Vec<T> row_sums(Vec<T>* rows) {
    constexpr auto lanes = std::make_index_sequence<LANES<T>>{};
#pragma GCC unroll 16
    for (int i = 0; i < S; ++i)
        rows[i] = exchange<T, S, false>(rows[i], rows[i + S], lanes) +
                  exchange<T, S, true>(rows[i], rows[i + S], lanes);
    if constexpr (S > 1) return row_sums<T, S / 2>(rows);
    return rows[0];
}
