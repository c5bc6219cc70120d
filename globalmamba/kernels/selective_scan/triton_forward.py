"""The selective scan's forward kernel: sequential in time, parallel over channels.

A program takes one sequence and one block of channels and walks the steps; its states are a tile [N, channels] in
registers, a thread holding all states of a channel where N <= 16. Tiles are written [N, channels], not
[channels, N]: Triton spreads the last axis over the lanes of a warp first, so sums over the states stay inside a
thread, and what belongs to a channel (softplus, gate) is computed once. README.md has the derivation and the
figures.

`triton.py` lays out what the programs read again and again: A and what else belongs to a channel and a state as tiles
[N, channels], one for each block of channels; B and C as rows of N, step after step in the order of the scan. N and
channels are padded with zeros. Inside a chunk every address is then a pointer and a constant.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) in x's dtype, relative error 2e-7 in float32 also where the result is tiny."""
    v = tl.exp2(-tl.abs(x) * LOG2E)
    if x.dtype == tl.float64:
        # log(1 + v) v / ((1 + v) - 1) undoes the rounding of 1 + v (Kahan).
        w = 1.0 + v
        log1p = tl.where(w == 1.0, v, tl.log(w) * (v / tl.where(w == 1.0, 1.0, w - 1.0)))
    else:
        # log(1 + v) / v on [0, 1], minimax in relative error: 5e-9.
        p = -0.003244052915 * v + 0.01985164769
        p = p * v - 0.0569600131
        p = p * v + 0.1060371925
        p = p * v - 0.1530564235
        p = p * v + 0.1967596201
        p = p * v - 0.2495413968
        p = p * v + 0.3332996327
        p = p * v - 0.4999990248
        log1p = v * (p * v + 0.9999999953)
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in x's dtype."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def place(groups, blocks, group_width, reverse, groups_per_direction, opaque, CHANNELS: tl.constexpr):
    """This program's sequence, group, row among all blocks, channels, their mask, and direction (1 or -1).

    All are int64, for what is computed from them: tensors may have more than 2^31 elements.
    """
    program = tl.program_id(0) + opaque  # x is the one grid axis that holds 2^31 programs
    row = program % (groups * blocks)
    group = row // blocks
    inside = (row % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    channel = tl.cast(group, tl.int64) * group_width + inside
    back = (reverse >> (group // groups_per_direction)) & 1
    batch = tl.cast(program // (groups * blocks), tl.int64)
    direction = tl.cast(1 - 2 * back, tl.int64)
    return batch, tl.cast(group, tl.int64), tl.cast(row, tl.int64), channel, inside < group_width, direction


@triton.jit
def tile_offsets(row, opaque, STATES: tl.constexpr, PADDED: tl.constexpr, CHANNELS: tl.constexpr):
    """Where the first STATES states of a block of channels are among packed tiles: [STATES, channels].

    `opaque` is 0, which the compiler does not know: addresses of unknown alignment are read one by one. Known to be
    aligned, they would be read in vectors of channels, and Triton would give the whole loop a layout that suits these
    few accesses. With one state that layout is the right one.
    """
    state, lane = tl.arange(0, STATES), tl.arange(0, CHANNELS)
    at = row * (PADDED * CHANNELS) + state[:, None] * CHANNELS + lane[None, :]
    if PADDED > 1:
        at += opaque
    return at


@triton.jit
def load_row(pointer, mask, EVEN: tl.constexpr):
    """A value for every channel, zero beyond the last one."""
    if EVEN:
        row = tl.load(pointer)
    else:
        row = tl.load(pointer, mask=mask, other=0.0)
    return row


@triton.jit
def load_steps(pointer, step, mask, STEPS: tl.constexpr, EVEN: tl.constexpr):
    """A chunk's values as a tuple of STEPS rows; `pointer` is at the first."""
    rows = ()
    for _ in tl.static_range(STEPS):
        rows = rows + (load_row(pointer, mask, EVEN),)
        pointer += step
    return rows


@triton.jit
def load_state(pointer, offset, FIXED: tl.constexpr):
    """B or C of a step as [N, 1]; the tile [N, channels] itself if FIXED."""
    if FIXED:
        matrix = pointer
    else:
        matrix = tl.load(pointer + offset)[:, None]
    return matrix


@triton.jit
def store_row(pointer, row, mask, EVEN: tl.constexpr):
    """Store a value for every channel, nothing beyond the last one."""
    if EVEN:
        tl.store(pointer, row)
    else:
        tl.store(pointer, row, mask=mask)


@triton.jit
def chunk_forward(
    h, at, A2, B, C, D, bias, u, delta, z, y, step, mask,
    SOFTPLUS: tl.constexpr, FIXED_B: tl.constexpr, FIXED_C: tl.constexpr, EVEN: tl.constexpr,
    PADDED: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """STEPS steps from the one at offset `at` on: stores y, returns the state after them [N, channels]."""
    # Loads stand before the arithmetic, so that they are in flight together.
    us = load_steps(u + at, step, mask, STEPS, EVEN)
    deltas = load_steps(delta + at, step, mask, STEPS, EVEN)
    zs = us
    if z is not None:
        zs = load_steps(z + at, step, mask, STEPS, EVEN)
    for i in tl.static_range(STEPS):
        B_i = load_state(B, i * PADDED, FIXED_B)
        C_i = load_state(C, i * PADDED, FIXED_C)
        x = us[i].to(A2.dtype)
        dt = deltas[i].to(A2.dtype)
        if bias is not None:
            dt += bias
        if SOFTPLUS:
            dt = softplus(dt)
        h = h * tl.exp2(A2 * dt[None, :]) + B_i * (dt * x)[None, :]
        out = tl.sum(h * C_i, 0)
        if D is not None:
            out += D * x
        if z is not None:
            gate = zs[i].to(A2.dtype)
            out *= gate * sigmoid(gate)
        store_row(y + at, out, mask, EVEN)
        at += step
    return h


@triton.jit(do_not_specialize=["reverse", "opaque", "length", "parts"])
def scan_forward(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, y_ptr, last_ptr, saved_ptr,
    batch_stride, channel_stride, time_stride, width, length, parts, opaque,
    groups, blocks, group_width, B_share, C_share, reverse, groups_per_direction,
    N: tl.constexpr, PADDED: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, FIXED_B: tl.constexpr, FIXED_C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Scan one block of channels of one sequence; y, the last state, and if asked states for the backward.

    Those are the ones before every second chunk of STEPS steps, and before each of the shorter chunks at the end.
    *_stride: of u, delta, z and y alike. *_share: how many of the program's groups read one group of B or C. EVEN:
    blocks fill every group of channels.
    """
    batch, group, row, channel, mask, direction = place(
        groups, blocks, group_width, reverse, groups_per_direction, 0, CHANNELS
    )
    tile = tile_offsets(row, opaque, PADDED, PADDED, CHANNELS)
    A2 = tl.load(A_ptr + tile) * LOG2E
    D = None
    bias = None
    if D_ptr is not None:
        D = load_row(D_ptr + channel, mask, EVEN)
    if bias_ptr is not None:
        bias = load_row(bias_ptr + channel, mask, EVEN)

    step = direction * time_stride
    first = tl.where(direction > 0, 0, length - 1).to(tl.int64)
    at = batch * batch_stride + channel * channel_stride + first * time_stride
    state = tl.arange(0, PADDED)
    if FIXED_B:
        B = tl.load(B_ptr + tile)
    else:
        B = B_ptr + (batch * (groups // B_share) + group // B_share) * length * PADDED + state
    if FIXED_C:
        C = tl.load(C_ptr + tile)
    else:
        C = C_ptr + (batch * (groups // C_share) + group // C_share) * length * PADDED + state

    h = tl.zeros((PADDED, CHANNELS), A2.dtype)
    part = saved_ptr
    if saved_ptr is not None:
        part = saved_ptr + batch * parts * (groups * blocks) * (PADDED * CHANNELS) + tile
    for chunk in range(length // STEPS):
        if saved_ptr is not None:
            if chunk % 2 == 0:
                tl.store(part, h)
                part += groups * blocks * (PADDED * CHANNELS)
        h = chunk_forward(
            h, at, A2, B, C, D, bias, u_ptr, delta_ptr, z_ptr, y_ptr, step, mask,
            SOFTPLUS, FIXED_B, FIXED_C, EVEN, PADDED, STEPS,
        )  # fmt: skip
        at += STEPS * step
        if not FIXED_B:
            B += STEPS * PADDED
        if not FIXED_C:
            C += STEPS * PADDED
    # What does not fill a chunk, in chunks of half its steps, a quarter ...
    for halving in tl.static_range(1, 6):
        if STEPS >> halving > 0:
            if length & (STEPS >> halving):
                if saved_ptr is not None:
                    tl.store(part, h)
                    part += groups * blocks * (PADDED * CHANNELS)
                h = chunk_forward(
                    h, at, A2, B, C, D, bias, u_ptr, delta_ptr, z_ptr, y_ptr, step, mask,
                    SOFTPLUS, FIXED_B, FIXED_C, EVEN, PADDED, STEPS >> halving,
                )  # fmt: skip
                at += (STEPS >> halving) * step
                if not FIXED_B:
                    B += (STEPS >> halving) * PADDED
                if not FIXED_C:
                    C += (STEPS >> halving) * PADDED
    last = (batch * width + channel[None, :]) * N + state[:, None]
    tl.store(last_ptr + last, h, mask=mask[None, :] & (state < N)[:, None])
