// The forward scan of one task.
#pragma once

#include <array>

#include "cpu_block.h"

namespace {

template <class T, int S, class MB, class MC>
APART void scan_tile(const Walk& walk, const T* delta, const T* input, T* y, const T* A, MB B, MC C, T* state,
                     Ahead<T> ahead) {
    constexpr int W = LANES<T>;
    Vec<T> a[S], h[S];
    B.template open<S>();
    C.template open<S>();
    for (int s = 0; s < S; ++s) a[s] = get(A + s * W), h[s] = get(state + s * W);
    for (int i = 0, j = walk.first; i < walk.steps; ++i, j += walk.next) {
        ahead.fetch(i);
        const Vec<T> d = get(delta + j * W), x = get(input + j * W);
        Vec<T> sum{};  // of these states alone: one long sum over many states would lose accuracy
        for (int s = 0; s < S; ++s) {
            h[s] = decay(d * a[s]) * h[s] + B.times(x, j, s);
            sum += C.times(h[s], j, s);
        }
        add<T>(y + j * W, sum);
    }
    for (int s = 0; s < S; ++s) put(state + s * W, h[s]);
}

template <class T>
struct Forward {
    static constexpr int W = LANES<T>;
    Block<T> block;
    T *u, *delta, *input, *y;

    Forward(const Scan& scan, int64_t task, Arena& arena) : block(scan, task, arena) {
        for (T** buffer : {&u, &delta, &input, &y}) *buffer = arena.take<T>(STEPS * W);
    }

    void run() {
        const Scan& scan = block.scan;
        const int size = block.vectors * block.padded * W;
        block.read_parameters();
        for (int64_t line = 0; line < scan.lines; ++line) {
            for (int i = 0; i < size; i += W) put(block.state + i, Vec<T>{});
            for (int64_t tile = 0; tile < tiles_of(scan); ++tile) run_tile(Walk(scan, line, tile, block.back));
        }
    }

  private:
    void run_tile(const Walk& walk) {
        const Scan& scan = block.scan;
        block.read_tile_matrices(walk);
        const bool last_tile = walk.tile + 1 == tiles_of(scan);
        const Walk next(scan, walk.line + last_tile, last_tile ? 0 : walk.tile + 1, block.back);
        for (int v = 0; v < block.vectors; ++v) {
            if (scan.saved.data && walk.tile)
                write(block.state_of(v), W, block.kept(v, walk), block.lanes(v), int(scan.state));
            const bool same = v + 1 < block.vectors;
            vector(walk, v, look_ahead(same ? walk : next, same ? v + 1 : 0));
        }
    }

    // The inputs and outputs of the vector to come.
    std::array<Ahead<T>, 4> look_ahead(const Walk& walk, int v) const {
        const Scan& scan = block.scan;
        const Ahead<T> nothing(scan.u.data);
        return {block.ahead(scan.u, v, walk), block.ahead(scan.delta, v, walk), block.ahead(scan.y, v, walk), nothing};
    }

    APART void prepare(const Walk& walk, int v, const std::array<Ahead<T>, 4>& ahead) {
        const Scan& scan = block.scan;
        const int lanes = block.lanes(v);
        read(u, W, block.steps(scan.u, v, walk), lanes, walk.steps);
        read(delta, W, block.steps(scan.delta, v, walk), lanes, walk.steps);
        const Vec<T> bias = get(block.bias + v * W);
        const bool softplus_too = scan.softplus;
        for (int i = 0; i < walk.steps * W; i += W) {
            for (int k = state_blocks(scan.state); k < 3; ++k) ahead[k].fetch(i / W);
            Vec<T> x = get(delta + i) + bias;
            if (softplus_too) x = softplus(x, exp_minus_size(x));
            put(delta + i, x);
            put(input + i, x * get(u + i));
            put(y + i, Vec<T>{});
        }
    }

    void vector(const Walk& walk, int v, const std::array<Ahead<T>, 4>& ahead) {
        const Scan& scan = block.scan;
        prepare(walk, v, ahead);
        with_kinds(scan, [&](auto kind_B, auto kind_C) {
            each_state_block(int(scan.state), [&](int n, int number, auto count) {
                const int64_t at = (v * block.padded + n) * W;
                const Matrix<T, kind_B> B(block.B, block.tile_B, at, n, block.padded);
                const Matrix<T, kind_C> C(block.C, block.tile_C, at, n, block.padded);
                scan_tile<T, count>(walk, delta, input, y, block.A + at, B, C, block.state + at, ahead[number % 4]);
            });
        });
        write(y, W, block.steps(scan.y, v, walk), block.lanes(v), walk.steps);
    }
};

}  // namespace
