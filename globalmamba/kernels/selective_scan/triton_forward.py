"""The selective scan's forward kernel: sequential in time, parallel over channels.

A program takes one sequence and one block of channels and walks the steps; its states are a tile [N, channels] in
registers, a thread holding all states of a channel where N <= 16. Tiles are written [N, channels], not
[channels, N]: Triton spreads the last axis over the lanes of a warp first, so sums over the states stay inside a
thread, and what belongs to a channel (softplus, gate) is computed once. README.md has the derivation and the
figures.

B and C come packed (`triton.py`): float32, N padded with zeros to a power of two, (batch, group, L, N).
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

    What offsets are computed from is int64: tensors may have more than 2^31 elements. The direction is not: a step's
    stride fits 32 bits, or is 64 bits wide by itself.
    """
    program = tl.program_id(0) + opaque  # x is the one grid axis that holds 2^31 programs
    row = program % (groups * blocks)
    group = row // blocks
    inside = (row % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    channel = tl.cast(group, tl.int64) * group_width + inside
    back = (reverse >> (group // groups_per_direction)) & 1
    batch = tl.cast(program // (groups * blocks), tl.int64)
    direction = tl.cast(1 - 2 * back, tl.int32)
    return batch, tl.cast(group, tl.int64), tl.cast(row, tl.int64), channel, inside < group_width, direction


@triton.jit
def load_row(pointer, mask, EVEN: tl.constexpr):
    """A value for every channel, zero beyond the last one."""
    if EVEN:
        return tl.load(pointer)
    return tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def load_tile(pointer, mask, PLAIN: tl.constexpr):
    """[N, channels], zero where masked."""
    if PLAIN:
        return tl.load(pointer)
    return tl.load(pointer, mask=mask, other=0.0)


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
        return pointer
    return tl.load(pointer + offset)[:, None]


@triton.jit
def store_row(pointer, row, mask, EVEN: tl.constexpr):
    """Store a value for every channel, nothing beyond the last one."""
    if EVEN:
        tl.store(pointer, row)
    else:
        tl.store(pointer, row, mask=mask)


@triton.jit
def chunk_forward(
    h, t, opaque, A2, B, C, D, bias, u, delta, z, y, u_step, delta_step, z_step, y_step, row_step, mask,
    SOFTPLUS: tl.constexpr, FIXED_B: tl.constexpr, FIXED_C: tl.constexpr, EVEN: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """STEPS steps from step t on: stores y, returns the state after them [N, channels]."""
    u_step += opaque * 16
    delta_step += opaque * 16
    z_step += opaque * 16
    y_step += opaque * 16
    row_step += opaque * 64
    y += t * y_step
    at = t * row_step
    # Loads stand before the arithmetic, so that they are in flight together.
    us = load_steps(u + t * u_step, u_step, mask, STEPS, EVEN)
    deltas = load_steps(delta + t * delta_step, delta_step, mask, STEPS, EVEN)
    zs = us
    if z is not None:
        zs = load_steps(z + t * z_step, z_step, mask, STEPS, EVEN)
    for i in tl.static_range(STEPS):
        B_i = load_state(B, at, FIXED_B)
        C_i = load_state(C, at, FIXED_C)
        at += row_step
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
        store_row(y, out, mask, EVEN)
        y += y_step
    return h


@triton.jit(
    do_not_specialize=["A_channel", "A_state", "last_channel", "last_state", "reverse", "opaque", "length"]
)
def scan_forward(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, y_ptr, last_ptr, saved_ptr,
    u_batch, u_channel, u_time, delta_batch, delta_channel, delta_time, z_batch, z_channel, z_time,
    y_batch, y_channel, y_time, A_channel, A_state, last_batch, last_channel, last_state,
    saved_batch, saved_state,
    length, opaque, groups, blocks, group_width, B_share, C_share, reverse, groups_per_direction,
    N: tl.constexpr, PADDED: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, FIXED_B: tl.constexpr, FIXED_C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Scan one block of channels of one sequence; y, the last state, and if asked states for the backward.

    Those are the ones before every second chunk of STEPS steps, and before each of the shorter chunks at the end.
    *_share: how many of the program's groups read one group of B or C. EVEN: blocks fill every group of channels.
    The strides of A, the last state and the kept states are not specialised: were they known to be contiguous, Triton
    would give the whole loop a layout that suits these few accesses. With N = 1 that layout is the right one.
    """
    batch, group, _, channel, mask, direction = place(
        groups, blocks, group_width, reverse, groups_per_direction, 0, CHANNELS
    )
    state = tl.arange(0, PADDED)
    inner = mask[None, :] & (state < N)[:, None]
    PLAIN: tl.constexpr = EVEN and N == PADDED
    at = channel[None, :] * A_channel + state[:, None] * A_state
    if PADDED == 1:
        at = channel[None, :] + state[:, None]
        last_channel = 1
    A2 = load_tile(A_ptr + at, inner, PLAIN) * LOG2E
    D = None
    bias = None
    if D_ptr is not None:
        D = load_row(D_ptr + channel, mask, EVEN)
    if bias_ptr is not None:
        bias = load_row(bias_ptr + channel, mask, EVEN)

    first = tl.where(direction > 0, 0, length - 1).to(tl.int64)
    u = u_ptr + batch * u_batch + channel * u_channel + first * u_time
    delta = delta_ptr + batch * delta_batch + channel * delta_channel + first * delta_time
    y = y_ptr + batch * y_batch + channel * y_channel + first * y_time
    z = None
    z_step = direction
    if z_ptr is not None:
        z = z_ptr + batch * z_batch + channel * z_channel + first * z_time
        z_step = direction * z_time
    u_step = direction * u_time
    delta_step = direction * delta_time
    y_step = direction * y_time
    if FIXED_B:
        B = load_tile(B_ptr + at, inner, PLAIN)
    else:
        B = B_ptr + ((batch * (groups // B_share) + group // B_share) * length + first) * PADDED + state
    if FIXED_C:
        C = load_tile(C_ptr + at, inner, PLAIN)
    else:
        C = C_ptr + ((batch * (groups // C_share) + group // C_share) * length + first) * PADDED + state
    row_step = direction * PADDED  # of packed B and C

    h = tl.zeros((PADDED, CHANNELS), A2.dtype)
    part = saved_ptr
    if saved_ptr is not None:
        part = saved_ptr + batch * saved_batch + channel[None, :]
        if PADDED > 1:
            part += opaque  # an address of unknown alignment is not stored in vectors of channels
    for chunk in range(length // STEPS):
        t = tl.cast(chunk, tl.int64) * STEPS
        changing = opaque & chunk
        if saved_ptr is not None:
            if chunk % 2 == 0:
                tl.store(part + state[:, None] * (saved_state + changing), h, mask=inner)
                part += N * saved_state
        h = chunk_forward(
            h, t, changing, A2, B, C, D, bias, u, delta, z, y, u_step, delta_step, z_step, y_step, row_step, mask,
            SOFTPLUS, FIXED_B, FIXED_C, EVEN, STEPS,
        )  # fmt: skip
    # What does not fill a chunk, in chunks of half its steps, a quarter ...
    for halving in tl.static_range(1, 6):
        if STEPS >> halving > 0:
            if length & (STEPS >> halving):
                if saved_ptr is not None:
                    tl.store(part + state[:, None] * saved_state, h, mask=inner)
                    part += N * saved_state
                t = tl.cast(length // (STEPS >> (halving - 1)) * (STEPS >> (halving - 1)), tl.int64)
                h = chunk_forward(
                    h, t, opaque, A2, B, C, D, bias, u, delta, z, y, u_step, delta_step, z_step, y_step, row_step,
                    mask, SOFTPLUS, FIXED_B, FIXED_C, EVEN, STEPS >> halving,
                )  # fmt: skip
    last = last_ptr + batch * last_batch + channel[None, :] * last_channel + state[:, None] * last_state
    tl.store(last, h, mask=inner)
