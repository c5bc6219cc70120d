// The short convolution of a grid and its SiLU on a CPU, called through ctypes by cpu.py.
//
//     out_t = silu(b + sum_k w_k x_{t-K+1+k}),   t along a row or column, in the direction of the group
//
// A task is one batch element, one source and a few vectors of channels. Every line is walked once: the last K tokens
// stay in registers, so the grid is read where it lies and no step is special. The backward computes the sums again
// and keeps the gradients of the last K tokens in registers too. The groups that read a source are done one after the
// other by its task; what tasks share, the gradients of weights and biases, each writes into rows of its own, which
// cpu.py adds in a fixed order.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

// Mirrored, field by field, by cpu.py. x, dx (batch, source, height, width, channel); out, dout (batch, group, height,
// width, channel); weight (group, kernel, channel); bias (group, channel); rows (batch, group, kernel + 1, channel).
// All dense but x, out and dout, whose channels are.
struct Conv {
    int64_t batch, sources, groups, height, width, channels, kernel, is_double;
    int64_t x_stride[4], out_stride[4], dout_stride[4];  // of all axes but the channels
    const uint8_t* directions;                           // of the groups: right, left, down, up
    const void *x, *weight, *bias;
    void* out;
    const void* dout;
    void *dx, *rows;
};

namespace {

constexpr int VECTORS = 4;  // of a task

template <class T>
struct Lanes {
    typedef T Type __attribute__((vector_size(VECTOR_BYTES)));
};
template <class T>
using Vec = typename Lanes<T>::Type;
template <class T>
constexpr int LANES = VECTOR_BYTES / sizeof(T);

// e^x: 2^whole times a polynomial in the rest, which interpolates at seven Chebyshev nodes (relative error 3e-9).
inline Vec<float> exponential(Vec<float> x) {
    typedef int32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
    constexpr float MOST = 87.0f;
    x = x < -MOST ? Vec<float>{} - MOST : x;  // NaN passes both
    x = x > MOST ? Vec<float>{} + MOST : x;
    const Vec<float> rounded = x * 1.44269504f + 12582912.0f;  // the whole number stands in the low bits
    const Vec<float> whole = rounded - 12582912.0f;
    const Vec<float> r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
    const Vec<float> high = 8.375134774e-3f + r * 1.394111890e-3f;
    const Vec<float> middle = 1.666641541e-1f + r * (4.166635277e-2f + r * high);
    const Vec<float> p = 1.0f + r * (1.000000038f + r * (5.000000047e-1f + r * middle));
    Bits bits, power;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&power, &rounded, sizeof power);
    bits += power << 23;
    Vec<float> value;
    std::memcpy(&value, &bits, sizeof value);
    // Infinity above, so that the gate of a very negative number is 0 and not a clamped fraction of it.
    return x == MOST ? Vec<float>{} + INFINITY : value;
}
// Lane by lane: float64 is there for gradient checks.
inline Vec<double> exponential(Vec<double> x) {
    for (int i = 0; i < LANES<double>; ++i) x[i] = std::exp(x[i]);
    return x;
}
template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
    return T(1) / (T(1) + exponential(-x));
}

// A vector of `count` channels, zero behind them.
template <class T>
inline Vec<T> load(const T* from, int count) {
    Vec<T> value{};
    if (count == LANES<T>)
        std::memcpy(&value, from, sizeof value);
    else
        std::memcpy(&value, from, count * sizeof(T));
    return value;
}
template <class T>
inline void store(T* to, Vec<T> value, int count) {
    if (count == LANES<T>)
        std::memcpy(to, &value, sizeof value);
    else
        std::memcpy(to, &value, count * sizeof(T));
}

// The lines of a grid in a direction: where line i begins in a tensor of these strides, and the step along it.
struct Walk {
    bool column, back;
    int64_t lines, length;
    Walk(const Conv& conv, uint8_t direction) : column(direction >= 2), back(direction & 1) {
        lines = column ? conv.width : conv.height;
        length = column ? conv.height : conv.width;
    }
    int64_t step(int64_t row, int64_t pixel) const { return (back ? -1 : 1) * (column ? row : pixel); }
    int64_t begin(int64_t line, int64_t row, int64_t pixel) const {
        return line * (column ? pixel : row) + (back ? (length - 1) * (column ? row : pixel) : 0);
    }
};

template <class T, int K>
struct Task {
    const Conv& conv;
    const int64_t batch, source, channel;
    const int count;
    const int64_t row = conv.width * conv.channels, plane = conv.height * row;  // of the dense tensors

    const T* x() const {
        return static_cast<const T*>(conv.x) + batch * conv.x_stride[0] + source * conv.x_stride[1] + channel;
    }
    void parameters(int64_t group, Vec<T>* w, Vec<T>& offset) const {
        const T* from = static_cast<const T*>(conv.weight) + group * K * conv.channels + channel;
        for (int k = 0; k < K; ++k) w[k] = load(from + k * conv.channels, count);
        offset = load(static_cast<const T*>(conv.bias) + group * conv.channels + channel, count);
    }
    // Moves the window on by a token and returns what the convolution gives there.
    static Vec<T> convolved(Vec<T>* window, Vec<T> next, const Vec<T>* w, Vec<T> offset) {
        for (int k = 0; k + 1 < K; ++k) window[k] = window[k + 1];
        window[K - 1] = next;
        for (int k = 0; k < K; ++k) offset += w[k] * window[k];
        return offset;
    }

    void forward(int64_t group) {
        const Walk walk(conv, conv.directions[group]);
        Vec<T> w[K], offset;
        parameters(group, w, offset);
        T* out = static_cast<T*>(conv.out) + batch * conv.out_stride[0] + group * conv.out_stride[1] + channel;
        const int64_t from_step = walk.step(conv.x_stride[2], conv.x_stride[3]);
        const int64_t to_step = walk.step(conv.out_stride[2], conv.out_stride[3]);
        for (int64_t line = 0; line < walk.lines; ++line) {
            const T* from = x() + walk.begin(line, conv.x_stride[2], conv.x_stride[3]);
            T* to = out + walk.begin(line, conv.out_stride[2], conv.out_stride[3]);
            Vec<T> window[K] = {};
            for (int64_t t = 0; t < walk.length; ++t, from += from_step, to += to_step) {
                const Vec<T> sum = convolved(window, load(from, count), w, offset);
                store(to, sum * sigmoid<T>(sum), count);
            }
        }
    }

    // The gradient to x is written by the first group of a source and added to by the others.
    void backward(int64_t group, bool first) {
        const Walk walk(conv, conv.directions[group]);
        Vec<T> w[K], offset, dw[K] = {}, doffset{};
        parameters(group, w, offset);
        const T* dout = static_cast<const T*>(conv.dout) + batch * conv.dout_stride[0] + group * conv.dout_stride[1];
        T* dx = static_cast<T*>(conv.dx) + (batch * conv.sources + source) * plane + channel;
        const int64_t x_step = walk.step(conv.x_stride[2], conv.x_stride[3]);
        const int64_t d_step = walk.step(conv.dout_stride[2], conv.dout_stride[3]);
        const int64_t to_step = walk.step(row, conv.channels);
        for (int64_t line = 0; line < walk.lines; ++line) {
            const T* from = x() + walk.begin(line, conv.x_stride[2], conv.x_stride[3]);
            const T* slope = dout + channel + walk.begin(line, conv.dout_stride[2], conv.dout_stride[3]);
            T* to = dx + walk.begin(line, row, conv.channels);
            // given[k] gathers the gradient of the token K - 1 - k steps back.
            Vec<T> window[K] = {}, given[K] = {};
            for (int64_t t = 0; t < walk.length + K - 1; ++t) {
                for (int k = 0; k + 1 < K; ++k) given[k] = given[k + 1];
                given[K - 1] = Vec<T>{};
                if (t < walk.length) {
                    const Vec<T> sum = convolved(window, load(from + t * x_step, count), w, offset);
                    const Vec<T> gate = sigmoid<T>(sum);
                    const Vec<T> d = load(slope + t * d_step, count) * gate * (T(1) + sum * (T(1) - gate));
                    for (int k = 0; k < K; ++k) dw[k] += d * window[k], given[k] += d * w[k];
                    doffset += d;
                }
                if (t >= K - 1) {
                    T* at = to + (t - K + 1) * to_step;
                    store(at, first ? given[0] : given[0] + load(at, count), count);
                }
            }
        }
        T* rows = static_cast<T*>(conv.rows) + (batch * conv.groups + group) * (K + 1) * conv.channels + channel;
        for (int k = 0; k < K; ++k) store(rows + k * conv.channels, dw[k], count);
        store(rows + K * conv.channels, doffset, count);
    }
};

struct Job {
    const Conv& conv;
    bool back;
    std::atomic<int64_t> next{0};
};

template <class T, int K>
void work(Job& job) {
    const Conv& conv = job.conv;
    constexpr int64_t BLOCK = VECTORS * LANES<T>;
    const int64_t blocks = (conv.channels + BLOCK - 1) / BLOCK, readers = conv.groups / conv.sources;
    for (int64_t task; (task = job.next++) < conv.batch * conv.sources * blocks;) {
        const int64_t source = task / blocks % conv.sources, begin = task % blocks * BLOCK;
        const int64_t end = std::min(begin + BLOCK, conv.channels);
        for (int64_t channel = begin; channel < end; channel += LANES<T>) {
            const int count = int(std::min<int64_t>(LANES<T>, end - channel));
            Task<T, K> own{conv, task / blocks / conv.sources, source, channel, count};
            for (int64_t reader = 0; reader < readers; ++reader) {
                const int64_t group = source * readers + reader;
                job.back ? own.backward(group, reader == 0) : own.forward(group);
            }
        }
    }
}

template <class T>
void dispatch(Job& job) {
    switch (job.conv.kernel) {
        case 2: return work<T, 2>(job);
        case 3: return work<T, 3>(job);
        case 4: return work<T, 4>(job);
    }
}

void entry(void* job) {
    Job& own = *static_cast<Job*>(job);
    own.conv.is_double ? dispatch<double>(own) : dispatch<float>(own);
}

}  // namespace

extern "C" void visrep_short_conv(const Conv* conv, int back, int threads,
                                  void (*parallel)(void (*)(void*), void*, unsigned, unsigned)) {
    Job job{*conv, back != 0};
    parallel && threads > 1 ? parallel(entry, &job, unsigned(threads), 0) : entry(&job);
}
