// The backward scan of one task: the states of a tile once more, then the adjoint
//
//     g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1},   dC_t = dy_t h_t,   dB_t = g_t delta_t u_t,
//     du_t = delta_t <g_t, B_t> + D dy_t,   ddelta_t = u_t <g_t, B_t> + <g_t exp(delta_t A) h_{t-1}, A>,
//     dA = sum over t of g_t exp(delta_t A) h_{t-1} delta_t.
#pragma once

#include "cpu_block.h"

namespace {

// Per step and channel of one vector. With silu(z) = z sigmoid(z): gated is dy silu(z), gate_slope dy silu'(z).
// from_B is the sum over the states of g B, from_A the one of g exp(delta A) h_{t-1} A log2(e).
template <class T>
struct Columns {
    T *u, *delta, *slope, *input, *y, *gated, *gate_slope, *from_B, *from_A;
};

// Per step and state of the states in hand; `state` starts with the one before the tile.
template <class T>
struct Trace {
    T *decay, *state;
};

template <class T, int S, class MB, class MC>
APART void trace_tile(const Walk& walk, const Columns<T>& at, const T* A, MB B, MC C, const T* start,
                      const Trace<T>& trace, Ahead<T> ahead) {
    constexpr int W = LANES<T>;
    Vec<T> a[S], h[S];
    B.template open<S>();
    C.template open<S>();
    for (int s = 0; s < S; ++s) a[s] = get(A + s * W), put(trace.state + s * W, h[s] = get(start + s * W));
    for (int i = 0, j = walk.first; i < walk.steps; ++i, j += walk.next) {
        ahead.fetch(i);
        const Vec<T> d = get(at.delta + j * W), x = get(at.input + j * W);
        Vec<T> sum{};
        for (int s = 0; s < S; ++s) {
            const Vec<T> e = decay(d * a[s]);
            h[s] = e * h[s] + x * B.at(j, s);
            sum += h[s] * C.at(j, s);
            put(trace.decay + (i * S + s) * W, e);
            put(trace.state + ((i + 1) * S + s) * W, h[s]);
        }
        add<T>(at.y + j * W, sum);
    }
}

template <class T, int S, class MB, class MC>
APART void adjoint_tile(const Walk& walk, const Columns<T>& at, const T* A, MB B, MC C, T* carry, T* sum_A,
                        const Trace<T>& trace, Ahead<T> ahead) {
    constexpr int W = LANES<T>;
    Vec<T> a[S], g[S], h[S], dA[S] = {};
    B.template open<S>();
    C.template open<S>();
    for (int s = 0; s < S; ++s) {
        a[s] = get(A + s * W), g[s] = get(carry + s * W);
        h[s] = get(trace.state + (walk.steps * S + s) * W);
    }
    for (int i = walk.steps - 1, j = walk.first + i * walk.next; i >= 0; --i, j -= walk.next) {
        ahead.fetch(i);
        const Vec<T> d = get(at.delta + j * W), x = get(at.input + j * W), dy = get(at.gated + j * W);
        Vec<T> from_B = get(at.from_B + j * W), from_A = get(at.from_A + j * W);
        for (int s = 0; s < S; ++s) {
            C.collect(j, s, dy * h[s]);
            g[s] += dy * C.at(j, s);
            B.collect(j, s, g[s] * x);
            from_B += g[s] * B.at(j, s);
            g[s] *= get(trace.decay + (i * S + s) * W);
            h[s] = get(trace.state + (i * S + s) * W);
            const Vec<T> through = g[s] * h[s];
            from_A += through * a[s];
            dA[s] += through * d;
        }
        put(at.from_B + j * W, from_B);
        put(at.from_A + j * W, from_A);
    }
    for (int s = 0; s < S; ++s) {
        put(carry + s * W, g[s]);
        add<T>(sum_A + s * W, dA[s]);
    }
    B.template close<S>();
    C.template close<S>();
}

template <class T>
struct Backward {
    static constexpr int W = LANES<T>;
    Block<T> block;
    Columns<T> columns;  // of vector 0; the other vectors follow
    Trace<T> trace;
    T *start, *sum_A, *sum_B, *sum_C, *sum_D, *sum_bias, *tile_sum_B, *tile_sum_C;

    Backward(const Scan& scan, int64_t task, Arena& arena) : block(scan, task, arena) {
        const int vectors = Block<T>::vectors_of(scan);
        auto& c = columns;
        for (T** buffer :
             {&c.u, &c.delta, &c.slope, &c.input, &c.y, &c.gated, &c.gate_slope, &c.from_B, &c.from_A})
            *buffer = arena.take<T>(vectors * STEPS * W);
        for (T** buffer : {&start, &sum_A, &sum_B, &sum_C})
            *buffer = arena.take<T>(vectors * block.padded * W);
        for (T** buffer : {&sum_D, &sum_bias}) *buffer = arena.take<T>(vectors * W);
        for (T** buffer : {&trace.decay, &trace.state}) *buffer = arena.take<T>((STEPS + 1) * STATES * W);
        for (T** buffer : {&tile_sum_B, &tile_sum_C}) *buffer = arena.take<T>(STEPS * STATES * W);
    }

    void run() {
        const Scan& scan = block.scan;
        block.read_parameters();
        const int size = block.vectors * block.padded * W;
        for (T* sum : {sum_A, sum_B, sum_C, block.state}) clear(sum, size);
        for (T* sum : {sum_D, sum_bias}) clear(sum, block.vectors * W);
        for (int v = 0; v < block.vectors && scan.dlast.data; ++v)
            read(carry(v), W, block.states(scan.dlast, v), block.lanes(v), int(scan.state));
        for (int64_t tile = tiles_of(scan) - 1; tile >= 0; --tile) {
            const Walk walk(scan, tile, block.back);
            block.read_tile_matrices(walk.position, walk.steps);
            for (int v = 0; v < block.vectors; ++v) {
                read(start + v * block.padded * W, W, block.kept(v, tile), block.lanes(v), int(scan.state));
                prepare(walk, v);
            }
            with_fixed(scan, [&](auto fixed_B, auto fixed_C) {
                each_state_block(int(scan.state), [&](int n, int number, auto count) {
                    states<fixed_B, fixed_C, count>(walk, n, number, Walk(scan, tile - 1, block.back));
                });
            });
            for (int v = 0; v < block.vectors; ++v) finish(walk, v);
        }
        write_sums();
    }

  private:
    static void clear(T* data, int size) {
        for (int i = 0; i < size; i += W) put(data + i, Vec<T>{});
    }
    T* carry(int v) const { return block.state + v * block.padded * W; }
    Columns<T> of(int v) const {
        const int skip = v * STEPS * W;
        const auto& c = columns;
        return {c.u + skip,     c.delta + skip,      c.slope + skip,  c.input + skip, c.y + skip,
                c.gated + skip, c.gate_slope + skip, c.from_B + skip, c.from_A + skip};
    }

    // Read what the tile of a vector needs.
    APART void prepare(const Walk& walk, int v) {
        const Scan& scan = block.scan;
        const Columns<T> at = of(v);
        const int lanes = block.lanes(v);
        read(at.u, W, block.steps(scan.u, v, walk.position), lanes, walk.steps);
        read(at.delta, W, block.steps(scan.delta, v, walk.position), lanes, walk.steps);
        read(at.gated, W, block.steps(scan.dy, v, walk.position), lanes, walk.steps);
        if (scan.z.data) read(at.gate_slope, W, block.steps(scan.z, v, walk.position), lanes, walk.steps);
        const Vec<T> skip = get(block.D + v * W), bias = get(block.bias + v * W);
        const bool softplus_too = scan.softplus, gate = scan.z.data;
        for (int i = 0; i < walk.steps * W; i += W) {
            Vec<T> x = get(at.delta + i) + bias, slope = Vec<T>{} + T(1);
            if (softplus_too) {
                const Vec<T> e = exp_minus_size(x);
                slope = x > T(20) ? slope : Sigmoid<T>(x, e).value;
                x = softplus(x, e);
            }
            put(at.slope + i, slope);
            put(at.delta + i, x);
            put(at.input + i, x * get(at.u + i));
            put(at.y + i, skip * get(at.u + i));
            put(at.from_B + i, Vec<T>{});
            put(at.from_A + i, Vec<T>{});
            if (!gate) continue;
            const Vec<T> z = get(at.gate_slope + i), dy = get(at.gated + i);
            const Sigmoid<T> share(z, exp_minus_size(z));
            put(at.gated + i, dy * (z * share.value));
            put(at.gate_slope + i, dy * (share.value * (T(1) + z * share.rest)));
        }
    }

    // Pass `count` states from n on over the tile of every vector.
    template <bool FIXED_B, bool FIXED_C, int S>
    void states(const Walk& walk, int n, int number, const Walk& next) {
        const Scan& scan = block.scan;
        const Tensor* const reads[] = {&scan.u, &scan.delta, &scan.dy, &scan.z};
        const Tensor* const writes[] = {&scan.du, &scan.ddelta, &scan.dz, &scan.dz};
        if (!FIXED_B) clear(tile_sum_B, STEPS * STATES * W);
        if (!FIXED_C) clear(tile_sum_C, STEPS * STATES * W);
        for (int v = 0; v < block.vectors; ++v) {
            const int64_t at = (v * block.padded + n) * W;
            const Matrix<T, FIXED_B> B(FIXED_B ? block.B + at : block.tile_B + n, block.padded,
                                       FIXED_B ? sum_B + at : tile_sum_B);
            const Matrix<T, FIXED_C> C(FIXED_C ? block.C + at : block.tile_C + n, block.padded,
                                       FIXED_C ? sum_C + at : tile_sum_C);
            const Columns<T> columns = of(v);
            const Ahead<T> read = block.ahead(*reads[number % 4], v, next),
                           write = block.ahead(*writes[number % 4], v, walk);
            trace_tile<T, S>(walk, columns, block.A + at, B, C, start + at, trace, read);
            adjoint_tile<T, S>(walk, columns, block.A + at, B, C, block.state + at, sum_A + at, trace, write);
        }
        if (!FIXED_B) write_lane_sums(scan.parts_B, tile_sum_B, walk, n, S);
        if (!FIXED_C) write_lane_sums(scan.parts_C, tile_sum_C, walk, n, S);
    }

    APART void write_lane_sums(const Tensor& parts, T* sums, const Walk& walk, int n, int count) {
        for (int s = 0; s < count; ++s) {
            T* to = reinterpret_cast<T*>(parts.data) + block.task * parts.stride[0] +
                    (n + s) * parts.stride[1] + walk.position;
            for (int j = 0; j < walk.steps; j += W) {
                Vec<T> rows[W];
                for (int r = 0; r < W; ++r) rows[r] = get(sums + ((j + r) * STATES + s) * W);
                store_some<T>(to + j, 1, row_sums<T>(rows), walk.steps - j < W ? walk.steps - j : W);
            }
        }
    }

    // Put a vector's gradients together, in the place of what they need, and write them.
    APART void finish(const Walk& walk, int v) {
        const Scan& scan = block.scan;
        const Columns<T> at = of(v);
        const int lanes = block.lanes(v);
        const Vec<T> skip = get(block.D + v * W);
        Vec<T> D{}, bias{};
        for (int i = 0; i < walk.steps * W; i += W) {
            const Vec<T> u = get(at.u + i), from_B = get(at.from_B + i), dy = get(at.gated + i);
            const Vec<T> ddelta = (u * from_B + get(at.from_A + i) * T(LN_2)) * get(at.slope + i);
            put(at.from_B + i, skip * dy + get(at.delta + i) * from_B);
            put(at.from_A + i, ddelta);
            D += dy * u;
            bias += ddelta;
            if (scan.z.data) put(at.gate_slope + i, get(at.gate_slope + i) * get(at.y + i));
        }
        add<T>(sum_D + v * W, D);
        add<T>(sum_bias + v * W, bias);
        write(at.from_B, W, block.steps(scan.du, v, walk.position), lanes, walk.steps);
        write(at.from_A, W, block.steps(scan.ddelta, v, walk.position), lanes, walk.steps);
        if (scan.z.data) write(at.gate_slope, W, block.steps(scan.dz, v, walk.position), lanes, walk.steps);
    }

    void write_sums() {
        const Tensor& t = block.scan.rows;
        for (int v = 0; v < block.vectors; ++v) {
            const int64_t at = v * block.padded * W;
            int64_t row = 0;
            const auto put_rows = [&](const T* from, int64_t count) {
                const int64_t offset = block.batch * t.stride[0] + row * t.stride[1] + block.channel(v);
                write(from, W, {t.data, t.type, offset, 1, t.stride[1]}, block.lanes(v), int(count));
                row += count;
            };
            put_rows(sum_A + at, block.scan.state);
            if (!block.scan.groups_B) put_rows(sum_B + at, block.scan.state);
            if (!block.scan.groups_C) put_rows(sum_C + at, block.scan.state);
            put_rows(sum_D + v * W, 1);
            put_rows(sum_bias + v * W, 1);
        }
    }
};

}  // namespace
