// What forward and backward share: the arguments, a task's block of channels, a tile's steps, B and C.
#pragma once

#include <initializer_list>

#include "../tasks.h"

// Mirrored, field by field, by cpu.py: the groups of one axis, whose lines (rows or columns) are sequences. Axes: u,
// delta, y, dy and their gradients (batch, group, channel, line, step); A, and B or C where fixed, (group, channel,
// state); B and C where variable (batch, group, state, line, step); bias (group, channel). saved (sequence, later tile,
// state, channel) with a sequence for every batch element, group and line; rows (batch, group, row, channel) with the
// rows of dA, then of dB and of dC where fixed, then the bias; parts_B, parts_C (task, state, line, step).
struct Scan {
    int64_t batch, groups, width, lines, length, state;
    int64_t blocks;          // of channels, in a group
    int64_t kind_B, kind_C;  // a Kind
    int64_t softplus;
    const uint8_t* reverse;  // one a group
    Tensor u, delta, A, B, C, bias;
    Tensor y, saved;
    Tensor dy, du, ddelta, rows, parts_B, parts_C;
    char* scratch;
    int64_t scratch_bytes;  // of one thread
};

namespace {

enum Kind : int { ONE, FIXED, VARIABLE };  // constant 1, one a channel and state, one a state and step

int64_t tiles_of(const Scan& scan) { return (scan.length + STEPS - 1) / STEPS; }

// A tile's place: logical steps [tile * STEPS, ...) of a line stand at positions from `position` on; first and next
// walk them.
struct Walk {
    int64_t line, tile, position;
    int steps, first, next;
    Walk(const Scan& scan, int64_t line, int64_t tile, bool back) : line(line), tile(tile) {
        const int64_t start = tile * STEPS, left = scan.length - start;
        steps = int(left < STEPS ? left : STEPS);
        position = back ? scan.length - start - steps : start;
        first = back ? steps - 1 : 0;
        next = back ? -1 : 1;
    }
};

template <class T>
struct Block {
    static constexpr int W = LANES<T>;
    const Scan& scan;
    int64_t task, batch, group, first;  // channel
    int channels, vectors, padded;      // states, to whole vectors
    bool back;
    T *A, *B, *C, *bias, *state;  // of a vector: padded * W, bias W
    T *tile_B, *tile_C;           // [step][padded]

    static int vectors_of(const Scan& scan) {
        const int64_t all = (scan.width + W - 1) / W;
        return int((all + scan.blocks - 1) / scan.blocks);
    }

    Block(const Scan& scan, int64_t task, Arena& arena) : scan(scan), task(task) {
        group = task / scan.blocks % scan.groups;
        batch = task / scan.blocks / scan.groups;
        vectors = vectors_of(scan);
        first = task % scan.blocks * vectors * W;
        const int64_t left = scan.width - first;
        channels = left < 0 ? 0 : int(left < vectors * W ? left : vectors * W);
        padded = int((scan.state + W - 1) / W * W);
        back = scan.reverse[group];
        for (T** matrix : {&A, &B, &C, &state}) *matrix = arena.take<T>(vectors * padded * W);
        bias = arena.take<T>(vectors * W);
        for (T** tile : {&tile_B, &tile_C}) *tile = arena.take<T>(STEPS * padded);
        vectors = (channels + W - 1) / W;
    }

    int lanes(int v) const { return channels - v * W < W ? channels - v * W : W; }
    int64_t channel(int v) const { return first + v * W; }

    // (batch, group, channel, line, step) from a position on.
    Plane steps(const Tensor& t, int v, const Walk& walk) const {
        const int64_t offset = batch * t.stride[0] + group * t.stride[1] + channel(v) * t.stride[2] +
                               walk.line * t.stride[3] + walk.position * t.stride[4];
        return {t.data, t.type, offset, t.stride[2], t.stride[4]};
    }
    Ahead<T> ahead(const Tensor& t, int v, const Walk& walk) const {
        return Ahead<T>(steps(t, v, walk), back);
    }
    // (group, channel, state).
    Plane matrix(const Tensor& t, int v) const {
        return {t.data, t.type, group * t.stride[0] + channel(v) * t.stride[1], t.stride[1], t.stride[2]};
    }
    // (sequence, later tile, state, channel); the state before a line's first tile is zero.
    Plane kept(int v, const Walk& walk) const {
        const int64_t sequence = (batch * scan.groups + group) * scan.lines + walk.line;
        const int64_t row = (sequence * (tiles_of(scan) - 1) + walk.tile - 1) * scan.state;
        return {scan.saved.data, scan.saved.type, row * scan.width + channel(v), 1, scan.width};
    }

    APART void read_parameters() {
        const int states = int(scan.state);
        for (int v = 0; v < vectors; ++v) {
            T* matrix_A = A + v * padded * W;
            read(matrix_A, W, matrix(scan.A, v), lanes(v), states);
            for (int n = 0; n < states; ++n) put(matrix_A + n * W, get(matrix_A + n * W) * T(LOG2_E));
            if (scan.kind_B == FIXED) read(B + v * padded * W, W, matrix(scan.B, v), lanes(v), states);
            if (scan.kind_C == FIXED) read(C + v * padded * W, W, matrix(scan.C, v), lanes(v), states);
            put(bias + v * W, Vec<T>{});
            const Tensor& b = scan.bias;
            const Plane plane{b.data, b.type, group * b.stride[0] + channel(v) * b.stride[1], b.stride[1], 0};
            if (b.data) read(bias + v * W, W, plane, lanes(v), 1);
        }
    }

    void read_tile_matrices(const Walk& walk) {
        const auto plane = [&](const Tensor& t) {
            const int64_t offset = batch * t.stride[0] + group * t.stride[1] + walk.line * t.stride[3] +
                                   walk.position * t.stride[4];
            return Plane{t.data, t.type, offset, t.stride[2], t.stride[4]};
        };
        if (scan.kind_B == VARIABLE) read(tile_B, padded, plane(scan.B), int(scan.state), walk.steps);
        if (scan.kind_C == VARIABLE) read(tile_C, padded, plane(scan.C), int(scan.state), walk.steps);
    }

    T* state_of(int v) const { return state + v * padded * W; }
};

// B or C of the states in hand: 1, vectors of channels where fixed, else one number a step for all channels. `sum`
// takes the gradient: [state] where fixed, [step][state] over the block's vectors, its lanes still apart, else.
template <class T, Kind KIND>
struct Matrix {
    static constexpr int W = LANES<T>;
    const T* data;
    int64_t pitch;
    T* sum;
    Vec<T> fixed[STATES], gradient[STATES];

    Matrix(const T* all, const T* tile, int64_t at, int n, int64_t pitch, T* all_sum = nullptr, T* tile_sum = nullptr)
        : data(KIND == FIXED ? all + at : tile + n), pitch(pitch), sum(KIND == FIXED ? all_sum + at : tile_sum) {}
    template <int S>
    void open() {
        if constexpr (KIND == FIXED)
            for (int s = 0; s < S; ++s) fixed[s] = get(data + s * W), gradient[s] = Vec<T>{};
    }
    Vec<T> times(Vec<T> value, int j, int s) const {
        if constexpr (KIND == ONE)
            return value;
        else if constexpr (KIND == FIXED)
            return value * fixed[s];
        else
            return value * data[j * pitch + s];
    }
    void collect(int j, int s, Vec<T> x, Vec<T> y) {
        if constexpr (KIND == FIXED)
            gradient[s] += x * y;
        else if constexpr (KIND == VARIABLE)
            add<T>(sum + (j * STATES + s) * W, x * y);
    }
    template <int S>
    void close() {
        if constexpr (KIND == FIXED)
            for (int s = 0; s < S; ++s) add<T>(sum + s * W, gradient[s]);
    }
};

template <class F>
void with_kind(int64_t kind, F&& function) {
    if (kind == ONE)
        function(std::integral_constant<Kind, ONE>{});
    else if (kind == FIXED)
        function(std::integral_constant<Kind, FIXED>{});
    else
        function(std::integral_constant<Kind, VARIABLE>{});
}
template <class F>
void with_kinds(const Scan& scan, F&& function) {
    with_kind(scan.kind_B, [&](auto B) { with_kind(scan.kind_C, [&](auto C) { function(B, C); }); });
}

}  // namespace
