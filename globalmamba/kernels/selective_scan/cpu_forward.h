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
            h[s] = decay(d * a[s]) * h[s] + x * B.at(j, s);
            sum += h[s] * C.at(j, s);
        }
        add<T>(y + j * W, sum);
    }
    for (int s = 0; s < S; ++s) put(state + s * W, h[s]);
}

template <class T>
struct Forward {
    static constexpr int W = LANES<T>;
    Block<T> block;
    T *u, *delta, *input, *y, *z;

    Forward(const Scan& scan, int64_t task, Arena& arena) : block(scan, task, arena) {
        for (T** buffer : {&u, &delta, &input, &y, &z}) *buffer = arena.take<T>(STEPS * W);
    }

    void run() {
        const Scan& scan = block.scan;
        const int states = int(scan.state);
        block.read_parameters();
        for (int i = 0; i < block.vectors * block.padded * W; i += W) put(block.state + i, Vec<T>{});
        for (int64_t tile = 0; tile < tiles_of(scan); ++tile) {
            const Walk walk(scan, tile, block.back);
            block.read_tile_matrices(walk.position, walk.steps);
            for (int v = 0; v < block.vectors; ++v) {
                if (scan.saved.data) write(state(v), W, block.kept(v, tile), block.lanes(v), states);
                const bool same_tile = v + 1 < block.vectors;
                const Walk after = same_tile ? walk : Walk(scan, tile + 1, block.back);
                vector(walk, v, look_ahead(after, same_tile ? v + 1 : 0));
            }
        }
        for (int v = 0; v < block.vectors; ++v)
            write(state(v), W, block.states(scan.last, v), block.lanes(v), states);
    }

  private:
    T* state(int v) const { return block.state + v * block.padded * W; }

    // The inputs and outputs of the vector to come.
    std::array<Ahead<T>, 4> look_ahead(const Walk& walk, int v) const {
        const Scan& scan = block.scan;
        const auto of = [&](const Tensor& tensor) { return block.ahead(tensor, v, walk); };
        return {of(scan.u), of(scan.delta), of(scan.y), of(scan.z)};
    }

    APART void prepare(const Walk& walk, int v, const std::array<Ahead<T>, 4>& ahead) {
        const Scan& scan = block.scan;
        const int lanes = block.lanes(v);
        read(u, W, block.steps(scan.u, v, walk.position), lanes, walk.steps);
        read(delta, W, block.steps(scan.delta, v, walk.position), lanes, walk.steps);
        if (scan.z.data) read(z, W, block.steps(scan.z, v, walk.position), lanes, walk.steps);
        const Vec<T> skip = get(block.D + v * W), bias = get(block.bias + v * W);
        const bool softplus_too = scan.softplus, gate = scan.z.data;
        for (int i = 0; i < walk.steps * W; i += W) {
            for (int k = state_blocks(scan.state); k < 4; ++k) ahead[k].fetch(i / W);
            Vec<T> x = get(delta + i) + bias;
            if (softplus_too) x = softplus(x, exp_minus_size(x));
            put(delta + i, x);
            put(input + i, x * get(u + i));
            put(y + i, skip * get(u + i));
            if (gate) put(z + i, get(z + i) * Sigmoid<T>(get(z + i), exp_minus_size(get(z + i))).value);
        }
    }

    void vector(const Walk& walk, int v, const std::array<Ahead<T>, 4>& ahead) {
        const Scan& scan = block.scan;
        prepare(walk, v, ahead);
        with_fixed(scan, [&](auto fixed_B, auto fixed_C) {
            each_state_block(int(scan.state), [&](int n, int number, auto count) {
                const int64_t at = (v * block.padded + n) * W;
                const Matrix<T, fixed_B> B(fixed_B ? block.B + at : block.tile_B + n, block.padded);
                const Matrix<T, fixed_C> C(fixed_C ? block.C + at : block.tile_C + n, block.padded);
                scan_tile<T, count>(walk, delta, input, y, block.A + at, B, C, block.state + at,
                                    ahead[number % 4]);
            });
        });
        for (int i = 0; i < walk.steps * W && scan.z.data; i += W) put(y + i, get(y + i) * get(z + i));
        write(y, W, block.steps(scan.y, v, walk.position), block.lanes(v), walk.steps);
    }
};

}  // namespace
