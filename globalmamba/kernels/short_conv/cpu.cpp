// The short convolution and its SiLU on a CPU, called through ctypes by cpu.py.
//
//     ahead_t = silu(b + sum_k w_k x_{t-K+1+k}),   back_t = silu(b' + sum_k w'_k x_{t+K-1-k})
//
// A task is one batch element. It goes through its channels a vector at a time: their column of x is copied into
// scratch that stays in the first-level cache, with K - 1 zeros before and behind, so that no step is special. The
// backward computes the sums again, so nothing is kept but x. Every task writes its gradients of weights and
// biases into rows of its own, which cpu.py adds in a fixed order.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

// Mirrored, field by field, by cpu.py. x, dx: (batch, length, width); out, dout: (batch, length, directions * width);
// weight: (directions, kernel, width); bias: (directions, width); rows: (batch, directions, kernel + 1, width). All
// dense but dout, whose last stride is 1.
struct Conv {
    int64_t batch, length, width, kernel, directions, is_double;
    int64_t dout_batch, dout_step;  // strides
    const void *x, *weight, *bias;
    void* out;
    const void* dout;
    void *dx, *rows;
};

namespace {

template <class T> struct Lanes { typedef T Type __attribute__((vector_size(VECTOR_BYTES))); };
template <class T> using Vec = typename Lanes<T>::Type;
template <class T> constexpr int LANES = VECTOR_BYTES / sizeof(T);

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
template <class T> inline Vec<T> sigmoid(Vec<T> x) { return T(1) / (T(1) + exponential(-x)); }

// A vector of `count` channels, zero behind them.
template <class T> inline Vec<T> load(const T* from, int count) {
    Vec<T> value{};
    if (count == LANES<T>)
        std::memcpy(&value, from, sizeof value);
    else
        std::memcpy(&value, from, count * sizeof(T));
    return value;
}
template <class T> inline void store(T* to, Vec<T> value, int count) {
    if (count == LANES<T>)
        std::memcpy(to, &value, sizeof value);
    else
        std::memcpy(to, &value, count * sizeof(T));
}

template <class T> using Column = std::vector<T>;  // LANES values a step

template <class T, int K> struct Task {
    static constexpr int W = LANES<T>;
    const Conv& conv;
    const int64_t batch, length = conv.length, width = conv.width;
    Column<T> x = Column<T>((length + 2 * (K - 1)) * W), slope = x;

    Vec<T> at(const Column<T>& column, int64_t step) const { return load(column.data() + step * W, W); }

    void read(int64_t channel, int count) {
        const T* from = static_cast<const T*>(conv.x) + batch * length * width + channel;
        for (int64_t t = 0; t < length; ++t) store(&x[(t + K - 1) * W], load(from + t * width, count), W);
    }

    // The taps of a direction in the order of time: sum_k taps[k] x[t + first + k] in the padded column.
    void taps(Vec<T>* to, int direction, int64_t channel, int count) const {
        const T* from = static_cast<const T*>(conv.weight) + direction * K * width + channel;
        for (int k = 0; k < K; ++k) to[direction ? K - 1 - k : k] = load(from + k * width, count);
    }
    Vec<T> bias(int direction, int64_t channel, int count) const {
        return load(static_cast<const T*>(conv.bias) + direction * width + channel, count);
    }

    void forward(int64_t channel, int count) {
        read(channel, count);
        const int64_t stride = conv.directions * width;
        for (int direction = 0; direction < conv.directions; ++direction) {
            Vec<T> w[K];
            taps(w, direction, channel, count);
            const Vec<T> offset = bias(direction, channel, count);
            const int first = direction ? K - 1 : 0;
            T* to = static_cast<T*>(conv.out) + batch * length * stride + direction * width + channel;
            for (int64_t t = 0; t < length; ++t) {
                Vec<T> sum = offset;
                for (int k = 0; k < K; ++k) sum += w[k] * at(x, t + first + k);
                store(to + t * stride, sum * sigmoid<T>(sum), count);
            }
        }
    }

    void backward(int64_t channel, int count) {
        read(channel, count);
        T* dx = static_cast<T*>(conv.dx) + batch * length * width + channel;
        for (int direction = 0; direction < conv.directions; ++direction) {
            Vec<T> w[K], dw[K] = {}, doffset{};
            taps(w, direction, channel, count);
            const Vec<T> offset = bias(direction, channel, count);
            const int first = direction ? K - 1 : 0;
            const T* dout = static_cast<const T*>(conv.dout) + batch * conv.dout_batch + direction * width + channel;
            for (int64_t t = 0; t < length; ++t) {
                Vec<T> sum = offset, window[K];
                for (int k = 0; k < K; ++k) sum += w[k] * (window[k] = at(x, t + first + k));
                const Vec<T> gate = sigmoid<T>(sum);
                const Vec<T> d = load(dout + t * conv.dout_step, count) * gate * (T(1) + sum * (T(1) - gate));
                for (int k = 0; k < K; ++k) dw[k] += d * window[k];
                doffset += d;
                store(&slope[(t + K - 1) * W], d, W);
            }
            // x[t] was read by the steps that saw it in their window: the same taps, backwards.
            for (int64_t t = 0; t < length; ++t) {
                Vec<T> sum = direction ? load(dx + t * width, count) : Vec<T>{};
                for (int k = 0; k < K; ++k) sum += w[k] * at(slope, t + K - 1 - first + K - 1 - k);
                store(dx + t * width, sum, count);
            }
            T* rows = static_cast<T*>(conv.rows) + (batch * conv.directions + direction) * (K + 1) * width + channel;
            for (int k = 0; k < K; ++k) store(rows + (direction ? K - 1 - k : k) * width, dw[k], count);
            store(rows + K * width, doffset, count);
        }
    }
};

struct Job {
    const Conv& conv;
    bool back;
    std::atomic<int64_t> next{0};
};

template <class T, int K> void work(Job& job) {
    for (int64_t batch; (batch = job.next++) < job.conv.batch;) {
        Task<T, K> task{job.conv, batch};
        for (int64_t channel = 0; channel < job.conv.width; channel += LANES<T>) {
            const int count = int(std::min<int64_t>(LANES<T>, job.conv.width - channel));
            job.back ? task.backward(channel, count) : task.forward(channel, count);
        }
    }
}

template <class T> void dispatch(Job& job) {
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
