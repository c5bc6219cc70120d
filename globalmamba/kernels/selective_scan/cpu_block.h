// What forward and backward share: the arguments, a task's block of channels, a tile's steps, B and C.
#pragma once

#include <initializer_list>

#include "../tasks.h"

// Mirrored, field by field, by cpu.py. Axes: u, delta, z, y, dy and their gradients (batch, channel, step); A, and B or
// C where fixed, (channel, state); B and C else (batch, group, state, step); last, dlast (batch, channel, state);
// saved (batch, tile, state, channel); rows (batch, row, channel) with the rows of dA, then of dB and of dC where
// fixed, dD, the bias; parts_B, parts_C (task, state, step).
struct Scan {
    int64_t batch, width, length, state;
    int64_t segments, blocks;    // of channels: segments share a direction and groups, blocks split a segment
    int64_t groups_B, groups_C;  // 0 where fixed
    int64_t softplus;
    const uint8_t* reverse;  // one a segment
    Tensor u, delta, A, B, C, D, z, bias;
    Tensor y, last, saved;
    Tensor dy, dlast, du, ddelta, dz, rows, parts_B, parts_C;
    char* scratch;
    int64_t scratch_bytes;  // of one thread
};

namespace {

// A tile's place: logical steps [tile * STEPS, ...) stand at positions from `position` on; first and next walk them.
struct Walk {
    int64_t position;
    int steps, first, next;
    Walk(const Scan& scan, int64_t tile, bool back) {
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
    int64_t task, batch, first;     // channel
    int channels, vectors, padded;  // states, to whole vectors
    int group_B, group_C;
    bool back;
    T *A, *B, *C, *D, *bias, *state;  // of a vector: padded * W, D and bias W
    T *tile_B, *tile_C;               // [step][padded]

    static int vectors_of(const Scan& scan) {
        const int64_t share = scan.width / scan.segments, all = (share + W - 1) / W;
        return int((all + scan.blocks - 1) / scan.blocks);
    }

    Block(const Scan& scan, int64_t task, Arena& arena) : scan(scan), task(task) {
        const int64_t segment = task / scan.blocks % scan.segments, share = scan.width / scan.segments;
        batch = task / scan.blocks / scan.segments;
        vectors = vectors_of(scan);
        const int64_t skip = task % scan.blocks * vectors * W, left = share - skip;
        first = segment * share + skip;
        channels = left < 0 ? 0 : int(left < vectors * W ? left : vectors * W);
        padded = int((scan.state + W - 1) / W * W);
        group_B = int(segment * scan.groups_B / scan.segments);
        group_C = int(segment * scan.groups_C / scan.segments);
        back = scan.reverse[segment];
        for (T** matrix : {&A, &B, &C, &state}) *matrix = arena.take<T>(vectors * padded * W);
        for (T** row : {&D, &bias}) *row = arena.take<T>(vectors * W);
        for (T** tile : {&tile_B, &tile_C}) *tile = arena.take<T>(STEPS * padded);
        vectors = (channels + W - 1) / W;
    }

    int lanes(int v) const { return channels - v * W < W ? channels - v * W : W; }
    int64_t channel(int v) const { return first + v * W; }

    // (batch, channel, step) from a position on.
    Plane steps(const Tensor& t, int v, int64_t position) const {
        const int64_t offset = batch * t.stride[0] + channel(v) * t.stride[1] + position * t.stride[2];
        return {t.data, t.type, offset, t.stride[1], t.stride[2]};
    }
    Ahead<T> ahead(const Tensor& t, int v, const Walk& walk) const {
        return t.data ? Ahead<T>(steps(t, v, walk.position), back) : Ahead<T>(scan.u.data);
    }
    // (channel, state) or (batch, channel, state).
    Plane matrix(const Tensor& t, int v) const {
        return {t.data, t.type, channel(v) * t.stride[0], t.stride[0], t.stride[1]};
    }
    Plane states(const Tensor& t, int v) const {
        return {t.data, t.type, batch * t.stride[0] + channel(v) * t.stride[1], t.stride[1], t.stride[2]};
    }
    // (batch, tile, state, channel).
    Plane kept(int v, int64_t tile) const {
        const Tensor& t = scan.saved;
        return {t.data, t.type, batch * t.stride[0] + tile * t.stride[1] + channel(v), 1, t.stride[2]};
    }

    APART void read_parameters() {
        const int states = int(scan.state);
        for (int v = 0; v < vectors; ++v) {
            T* matrix_A = A + v * padded * W;
            read(matrix_A, W, matrix(scan.A, v), lanes(v), states);
            for (int n = 0; n < states; ++n) put(matrix_A + n * W, get(matrix_A + n * W) * T(LOG2_E));
            if (!scan.groups_B) read(B + v * padded * W, W, matrix(scan.B, v), lanes(v), states);
            if (!scan.groups_C) read(C + v * padded * W, W, matrix(scan.C, v), lanes(v), states);
            for (auto [row, tensor] : {std::pair{D, &scan.D}, std::pair{bias, &scan.bias}}) {
                put(row + v * W, Vec<T>{});
                const Plane plane{tensor->data, tensor->type, channel(v) * tensor->stride[0],
                                  tensor->stride[0], 0};
                if (tensor->data) read(row + v * W, W, plane, lanes(v), 1);
            }
        }
    }

    void read_tile_matrices(int64_t position, int steps) {
        const auto plane = [&](const Tensor& t, int group) {
            const int64_t offset = batch * t.stride[0] + group * t.stride[1] + position * t.stride[3];
            return Plane{t.data, t.type, offset, t.stride[2], t.stride[3]};
        };
        if (scan.groups_B) read(tile_B, padded, plane(scan.B, group_B), int(scan.state), steps);
        if (scan.groups_C) read(tile_C, padded, plane(scan.C, group_C), int(scan.state), steps);
    }
};

int64_t tiles_of(const Scan& scan) { return (scan.length + STEPS - 1) / STEPS; }

// B or C of the states in hand: vectors of channels where fixed, else one number a step for all channels. `sum`
// takes the gradient: [state] where fixed, else [step][state] over the block's vectors, its lanes still apart.
template <class T, bool FIXED>
struct Matrix {
    static constexpr int W = LANES<T>;
    const T* data;
    int64_t pitch;
    T* sum;
    Vec<T> fixed[STATES], gradient[STATES];

    Matrix(const T* data, int64_t pitch, T* sum = nullptr) : data(data), pitch(pitch), sum(sum) {}
    template <int S>
    void open() {
        if constexpr (FIXED)
            for (int s = 0; s < S; ++s) fixed[s] = get(data + s * W), gradient[s] = Vec<T>{};
    }
    auto at(int j, int s) const {
        if constexpr (FIXED)
            return fixed[s];
        else
            return data[j * pitch + s];
    }
    void collect(int j, int s, Vec<T> value) {
        if constexpr (FIXED)
            gradient[s] += value;
        else
            add<T>(sum + (j * STATES + s) * W, value);
    }
    template <int S>
    void close() {
        if constexpr (FIXED)
            for (int s = 0; s < S; ++s) add<T>(sum + s * W, gradient[s]);
    }
};

template <class F>
void with_fixed(const Scan& scan, F&& function) {
    using Yes = std::true_type;
    using No = std::false_type;
    if (scan.groups_B)
        scan.groups_C ? function(No{}, No{}) : function(No{}, Yes{});
    else
        scan.groups_C ? function(Yes{}, No{}) : function(Yes{}, Yes{});
}

}  // namespace
