// Between tensors of any stride and type and the scratch of a tile: STEPS steps at most, one vector of channels.
#pragma once

#include "simd.h"

constexpr int STEPS = 32;  // of a tile: a tile of all that the loops touch stays in the first-level cache

enum class Type : int64_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

struct Tensor {
    char* data;  // null where the argument is None
    Type type;
    int64_t stride[5];  // in elements
};

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// ---- conversions ---------------------------------------------------------------------------------------------

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float widen(Float16 x) {
    const uint32_t magnitude = x.bits & 0x7fff, exponent = magnitude >> 10;
    float value = float(magnitude) * 0x1p-24f;  // denormal
    if (exponent) value = bit_cast<float>((magnitude << 13) + ((exponent == 31 ? 224u : 112u) << 23));
    return x.bits & 0x8000 ? -value : value;
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, Bfloat16* to) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    *to = {uint16_t(x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline void narrow(float x, Float16* to) {
    const uint32_t sign = bit_cast<uint32_t>(x) >> 31 << 15, magnitude = bit_cast<uint32_t>(x) & 0x7fffffff;
    uint32_t bits;
    if (magnitude > 0x7f800000)
        bits = 0x7e00;
    else if (magnitude >= 0x477ff000)  // 65520 and above round to infinity
        bits = 0x7c00;
    else if (magnitude < 0x38800000)  // below 2^-14 the step is 2^-24
        bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p24f + ROUND) & 0x7ff;
    else
        bits = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    *to = {uint16_t(bits | sign)};
}

template <class T, class E>
inline Vec<T> load_some(const E* from, int64_t step, int count) {
    Vec<T> value{};
    for (int i = 0; i < count; ++i) value[i] = widen(from[i * step]);
    return value;
}
template <class T, class E>
inline void store_some(E* to, int64_t step, Vec<T> value, int count) {
    for (int i = 0; i < count; ++i) narrow(value[i], to + i * step);
}

template <class T>
inline Vec<T> load(const T* from) {
    Vec<T> value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
template <class T>
inline void store(T* to, Vec<T> value) {
    std::memcpy(to, &value, sizeof value);
}

template <class T>
inline Vf load(const Bfloat16* from) {
    Lanes<float>::Half half;
    std::memcpy(&half, from, sizeof half);
    return bit_cast<Vf>(__builtin_convertvector(half, Lanes<float>::Bits) << 16);
}
template <class T>
inline void store(Bfloat16* to, Vf value) {
    typedef Lanes<float>::Bits Bits;
    const Bits bits = bit_cast<Bits>(value);
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const auto half = __builtin_convertvector(value != value ? Bits{} + 0x7fc0 : rounded, Lanes<float>::Half);
    std::memcpy(to, &half, sizeof half);
}

#if defined(__AVX512F__)
template <class T>
inline Vf load(const Float16* from) {
    return (Vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}
template <class T>
inline void store(Float16* to, Vf value) {
    _mm256_storeu_si256((__m256i*)to,
                        _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
template <class T>
inline Vf load(const Float16* from) {
    return (Vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}
template <class T>
inline void store(Float16* to, Vf value) {
    _mm_storeu_si128((__m128i*)to,
                     _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
template <class T>
inline Vf load(const Float16* from) {
    return load_some<float>(from, 1, LANES<float>);
}
template <class T>
inline void store(Float16* to, Vf value) {
    store_some<float>(to, 1, value, LANES<float>);
}
#endif

// ---- planes --------------------------------------------------------------------------------------------------

// Two axes of a tensor: rows (channels or states) by columns (steps or states).
struct Plane {
    char* data;
    Type type;
    int64_t offset, row, column;  // in elements
};

// The cache lines of a tile to come. Its rows stand too far apart for the machine to guess, and lines asked for all at
// once would fill its buffers: so the loops over the steps ask for one a step, into the second-level cache.
template <class T>
struct Ahead {
    static constexpr int LINE = 64, ROWS = LANES<T>;
    const char* data;
    int64_t row = 0, column = 0;  // in bytes
    int rows = 1;

    explicit Ahead(const char* anything) : data(anything) {}
    Ahead(const Plane& plane, bool back) {
        constexpr int64_t SIZES[] = {4, 8, 2, 2};
        const int64_t size = SIZES[int64_t(plane.type)];
        data = plane.data + plane.offset * size;
        if (plane.column == 1) {
            // Of a row that begins inside a line, the tile before has asked for the first line or the last.
            rows = ROWS, row = plane.row * size, column = LINE, data += back ? 0 : LINE - 1;
        } else {
            rows = STEPS, row = plane.column * size;
        }
    }
    void fetch(int step) const {
        __builtin_prefetch(data + (step & (rows - 1)) * row + (step >= ROWS) * column, 0, 2);
    }
};

// to[c * pitch + r] = from[r * line + c] for a square of LANES rows; zero from the counts of rows and columns on.
template <class T, class E>
APART void read_edge(T* to, int64_t pitch, const E* from, int64_t line, int rows, int columns) {
    constexpr int W = LANES<T>;
    for (int c = 0; c < W; ++c)
        put(to + c * pitch, c < columns ? load_some<T>(from + c, line, rows) : Vec<T>{});
}
template <class T, class E>
APART void read_square(T* to, int64_t pitch, const E* from, int64_t line) {
    constexpr int W = LANES<T>;
    Vec<T> rows[W];
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) rows[r] = load<T>(from + r * line);
    transpose<T>(rows);
#pragma GCC unroll 16
    for (int c = 0; c < W; ++c) put(to + c * pitch, rows[c]);
}
template <class T, class E>
APART void write_square(const T* from, int64_t pitch, E* to, int64_t line) {
    constexpr int W = LANES<T>;
    Vec<T> rows[W];
#pragma GCC unroll 16
    for (int c = 0; c < W; ++c) rows[c] = get(from + c * pitch);
    transpose<T>(rows);
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) store<T>(to + r * line, rows[r]);
}

// to[column * pitch + row] = from[row, column]. Rows up to the next multiple of LANES are set to zero; columns up to
// the next multiple of LANES may be written.
template <class T, class E>
APART void read_typed(T* to, int64_t pitch, const Plane& from, int rows, int columns) {
    constexpr int W = LANES<T>;
    const E* data = reinterpret_cast<const E*>(from.data) + from.offset;
    for (int first = 0; first < rows; first += W, data += W * from.row, to += W) {
        const int count = rows - first < W ? rows - first : W;
        if (from.column == 1) {
            for (int c = 0; c < columns; c += W) {
                if (count == W && columns - c >= W)
                    read_square<T, E>(to + c * pitch, pitch, data + c, from.row);
                else
                    read_edge<T, E>(to + c * pitch, pitch, data + c, from.row, count, columns - c);
            }
        } else if (from.row == 1 && count == W) {
            for (int c = 0; c < columns; ++c) put(to + c * pitch, load<T>(data + c * from.column));
        } else {
            for (int c = 0; c < columns; ++c)
                put(to + c * pitch, load_some<T>(data + c * from.column, from.row, count));
        }
    }
}

// to[row, column] = from[column * pitch + row].
template <class T, class E>
APART void write_typed(const T* from, int64_t pitch, const Plane& to, int rows, int columns) {
    constexpr int W = LANES<T>;
    E* data = reinterpret_cast<E*>(to.data) + to.offset;
    for (int first = 0; first < rows; first += W, data += W * to.row, from += W) {
        const int count = rows - first < W ? rows - first : W;
        int c = 0;
        if (to.column == 1 && count == W)
            for (; c + W <= columns; c += W) write_square<T, E>(from + c * pitch, pitch, data + c, to.row);
        else if (to.row == 1 && count == W)
            for (; c < columns; ++c) store<T>(data + c * to.column, get(from + c * pitch));
        for (; c < columns; ++c) store_some<T>(data + c * to.column, to.row, get(from + c * pitch), count);
    }
}

inline void read(float* to, int64_t pitch, const Plane& from, int rows, int columns) {
    if (from.type == Type::FLOAT32) return read_typed<float, float>(to, pitch, from, rows, columns);
    if (from.type == Type::BFLOAT16) return read_typed<float, Bfloat16>(to, pitch, from, rows, columns);
    read_typed<float, Float16>(to, pitch, from, rows, columns);
}
inline void read(double* to, int64_t pitch, const Plane& from, int rows, int columns) {
    read_typed<double, double>(to, pitch, from, rows, columns);
}
inline void write(const float* from, int64_t pitch, const Plane& to, int rows, int columns) {
    if (to.type == Type::FLOAT32) return write_typed<float, float>(from, pitch, to, rows, columns);
    if (to.type == Type::BFLOAT16) return write_typed<float, Bfloat16>(from, pitch, to, rows, columns);
    write_typed<float, Float16>(from, pitch, to, rows, columns);
}
inline void write(const double* from, int64_t pitch, const Plane& to, int rows, int columns) {
    write_typed<double, double>(from, pitch, to, rows, columns);
}
