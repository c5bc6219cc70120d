// The backward scan of one task: the states of a tile once more, then the adjoint
//
//     g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1},   dC_t = dy_t h_t,   dB_t = g_t delta_t u_t,
//     du_t = delta_t <g_t, B_t>,   ddelta_t = u_t <g_t, B_t> + <g_t exp(delta_t A) h_{t-1}, A>,
//     dA = sum over t of g_t exp(delta_t A) h_{t-1} delta_t.
#pragma once

#include "cpu_block.h"

namespace {

// Per step and channel of one vector. from_B is the sum over the states of g B, from_A the one of
// g exp(delta A) h_{t-1} A log2(e).
template <class T>
struct Columns {
    T *u, *delta, *slope, *input, *dy, *from_B, *from_A;
};

// Per step and state of the states in hand; `state` starts with the one before the tile.
template <class T>
struct Trace {
    T *decay, *state;
};

template <class T, int S, class MB>
APART void trace_tile(const Walk& walk, const Columns<T>& at, const T* A, MB B, const T* start,
                      const Trace<T>& trace, Ahead<T> ahead) {
    constexpr int W = LANES<T>;
    Vec<T> a[S], h[S];
    B.template open<S>();
    for (int s = 0; s < S; ++s) a[s] = get(A + s * W), put(trace.state + s * W, h[s] = get(start + s * W));
    for (int i = 0, j = walk.first; i < walk.steps; ++i, j += walk.next) {
        ahead.fetch(i);
        const Vec<T> d = get(at.delta + j * W), x = get(at.input + j * W);
        for (int s = 0; s < S; ++s) {
            const Vec<T> e = decay(d * a[s]);
            h[s] = e * h[s] + B.times(x, j, s);
            put(trace.decay + (i * S + s) * W, e);
            put(trace.state + ((i + 1) * S + s) * W, h[s]);
        }
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
        const Vec<T> d = get(at.delta + j * W), x = get(at.input + j * W), dy = get(at.dy + j * W);
        Vec<T> from_B = get(at.from_B + j * W), from_A = get(at.from_A + j * W);
        for (int s = 0; s < S; ++s) {
            C.collect(j, s, dy, h[s]);
            g[s] += C.times(dy, j, s);
            B.collect(j, s, g[s], x);
            from_B += B.times(g[s], j, s);
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
    T *start, *sum_A, *sum_B, *sum_C, *sum_bias, *tile_sum_B, *tile_sum_C;

    Backward(const Scan& scan, int64_t task, Arena& arena) : block(scan, task, arena) {
        const int vectors = Block<T>::vectors_of(scan);
        auto& c = columns;
        for (T** buffer : {&c.u, &c.delta, &c.slope, &c.input, &c.dy, &c.from_B, &c.from_A})
            *buffer = arena.take<T>(vectors * STEPS * W);
        for (T** buffer : {&start, &sum_A, &sum_B, &sum_C})
            *buffer = arena.take<T>(vectors * block.padded * W);
        sum_bias = arena.take<T>(vectors * W);
        for (T** buffer : {&trace.decay, &trace.state}) *buffer = arena.take<T>((STEPS + 1) * STATES * W);
        for (T** buffer : {&tile_sum_B, &tile_sum_C}) *buffer = arena.take<T>(STEPS * STATES * W);
    }

    void run() {
        const Scan& scan = block.scan;
        block.read_parameters();
        const int size = block.vectors * block.padded * W;
        for (T* sum : {sum_A, sum_B, sum_C}) clear(sum, size);
        clear(sum_bias, block.vectors * W);
        for (int64_t line = 0; line < scan.lines; ++line) {
            clear(block.state, size);  // holds the gradient to the state after the tile
            for (int64_t tile = tiles_of(scan) - 1; tile >= 0; --tile) run_tile(Walk(scan, line, tile, block.back));
        }
        write_sums();
    }

  private:
    static void clear(T* data, int size) {
        for (int i = 0; i < size; i += W) put(data + i, Vec<T>{});
    }
    Columns<T> of(int v) const {
        const int skip = v * STEPS * W;
        const auto& c = columns;
        return {c.u + skip,  c.delta + skip,  c.slope + skip, c.input + skip,
                c.dy + skip, c.from_B + skip, c.from_A + skip};
    }

    void run_tile(const Walk& walk) {
        const Scan& scan = block.scan;
        block.read_tile_matrices(walk);
        for (int v = 0; v < block.vectors; ++v) {
            T* before = start + v * block.padded * W;
            if (walk.tile)
                read(before, W, block.kept(v, walk), block.lanes(v), int(scan.state));
            else
                clear(before, block.padded * W);
            prepare(walk, v);
        }
        const Walk next(scan, walk.line + !walk.tile, (walk.tile ? walk.tile : tiles_of(scan)) - 1, block.back);
        with_kinds(scan, [&](auto kind_B, auto kind_C) {
            each_state_block(int(scan.state), [&](int n, int number, auto count) {
                states<kind_B, kind_C, count>(walk, n, number, next);
            });
        });
        for (int v = 0; v < block.vectors; ++v) finish(walk, v);
    }

    // Read what the tile of a vector needs.
    APART void prepare(const Walk& walk, int v) {
        const Scan& scan = block.scan;
        const Columns<T> at = of(v);
        const int lanes = block.lanes(v);
        read(at.u, W, block.steps(scan.u, v, walk), lanes, walk.steps);
        read(at.delta, W, block.steps(scan.delta, v, walk), lanes, walk.steps);
        read(at.dy, W, block.steps(scan.dy, v, walk), lanes, walk.steps);
        const Vec<T> bias = get(block.bias + v * W);
        const bool softplus_too = scan.softplus;
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
            put(at.from_B + i, Vec<T>{});
            put(at.from_A + i, Vec<T>{});
        }
    }

    // Pass `count` states from n on over the tile of every vector.
    template <Kind B, Kind C, int S>
    void states(const Walk& walk, int n, int number, const Walk& next) {
        const Scan& scan = block.scan;
        const Tensor* const reads[] = {&scan.u, &scan.delta, &scan.dy};
        const Tensor* const writes[] = {&scan.du, &scan.ddelta};
        if (B == VARIABLE) clear(tile_sum_B, STEPS * STATES * W);
        if (C == VARIABLE) clear(tile_sum_C, STEPS * STATES * W);
        for (int v = 0; v < block.vectors; ++v) {
            const int64_t at = (v * block.padded + n) * W;
            const Matrix<T, B> of_B(block.B, block.tile_B, at, n, block.padded, sum_B, tile_sum_B);
            const Matrix<T, C> of_C(block.C, block.tile_C, at, n, block.padded, sum_C, tile_sum_C);
            const Columns<T> columns = of(v);
            const Ahead<T> read = block.ahead(*reads[number % 3], v, next),
                           write = block.ahead(*writes[number % 2], v, walk);
            trace_tile<T, S>(walk, columns, block.A + at, of_B, start + at, trace, read);
            adjoint_tile<T, S>(walk, columns, block.A + at, of_B, of_C, block.state + at, sum_A + at, trace, write);
        }
        if (B == VARIABLE) write_lane_sums(scan.parts_B, tile_sum_B, walk, n, S);
        if (C == VARIABLE) write_lane_sums(scan.parts_C, tile_sum_C, walk, n, S);
    }

    APART void write_lane_sums(const Tensor& parts, T* sums, const Walk& walk, int n, int count) {
        const Scan& scan = block.scan;
        for (int s = 0; s < count; ++s) {
            const int64_t line = (block.task * scan.state + n + s) * scan.lines + walk.line;
            T* to = reinterpret_cast<T*>(parts.data) + line * scan.length + walk.position;
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
        Vec<T> bias{};
        for (int i = 0; i < walk.steps * W; i += W) {
            const Vec<T> from_B = get(at.from_B + i);
            const Vec<T> ddelta = (get(at.u + i) * from_B + get(at.from_A + i) * T(LN_2)) * get(at.slope + i);
            put(at.from_B + i, get(at.delta + i) * from_B);
            put(at.from_A + i, ddelta);
            bias += ddelta;
        }
        add<T>(sum_bias + v * W, bias);
        write(at.from_B, W, block.steps(scan.du, v, walk), lanes, walk.steps);
        write(at.from_A, W, block.steps(scan.ddelta, v, walk), lanes, walk.steps);
    }

    void write_sums() {
        const Tensor& t = block.scan.rows;
        for (int v = 0; v < block.vectors; ++v) {
            const int64_t at = v * block.padded * W;
            int64_t row = 0;
            const auto put_rows = [&](const T* from, int64_t count) {
                const int64_t offset = block.batch * t.stride[0] + block.group * t.stride[1] + row * t.stride[2];
                write(from, W, {t.data, t.type, offset + block.channel(v), 1, t.stride[2]}, block.lanes(v), int(count));
                row += count;
            };
            put_rows(sum_A + at, block.scan.state);
            if (block.scan.kind_B == FIXED) put_rows(sum_B + at, block.scan.state);
            if (block.scan.kind_C == FIXED) put_rows(sum_C + at, block.scan.state);
            put_rows(sum_bias + v * W, 1);
        }
    }
};

}  // namespace
