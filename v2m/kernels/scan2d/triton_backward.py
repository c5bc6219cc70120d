"""The backward kernel of the scan of a grid: the parts of a line from the last to the first, each recomputed forward.

A program takes the block of channels and the lines that `triton_forward` gave it. From the state before a part (kept
by the forward, zero for the first) it runs the recurrence again and holds every second state in registers, then walks
back:

    g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1},   dB_t = sum over channels of g_t delta_t u_t,   ...

(README.md derives the rest). Sums over channels end in a buffer with one row for each token and block, sums over tokens
in one with a row for each program; `triton.py` adds the rows in a fixed order. No atomics: the same bits every time.

`opaque` is 0, which the compiler does not know. Adding it makes an offset a new one, computed where it is used; else
one register pair for every tensor would hold its address from the first use in a chunk to the last, or all along. And
a branch on it that is never taken makes a value be ready at that place. `tests/test_scan2d_triton.py` holds the
outcome: no register is spilled in the forms that V2M and Vim use.
"""

import triton
import triton.language as tl

from v2m.kernels.scan2d.triton_forward import (
    FIXED,
    LOG2E,
    ONE,
    load_row,
    load_state,
    load_steps,
    place,
    softplus,
    store_row,
    tile_offsets,
    walk,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in x's dtype."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def over_channels(values, PADDED: tl.constexpr, CHANNELS: tl.constexpr):
    """Sum [N, channels] over the channels: [N].

    A warp's lanes hold channels, its registers states. So the partners of an exchange split the states between them:
    each keeps one half, sends the other, and goes on with half the values. That is N + log(lanes / N) exchanges,
    where a plain sum along the lanes makes N log(lanes).
    """
    values = tl.reshape(values, (PADDED, 1, CHANNELS))
    for level in tl.static_range(6):
        if (PADDED >> level) > 1 and (CHANNELS >> level) > 1:
            pairs = tl.reshape(values, (2, PADDED >> (level + 1), 1 << level, 2, CHANNELS >> (level + 1)))
            low, high = tl.split(tl.permute(pairs, (1, 2, 3, 4, 0)))  # [N / 2, done, 2, channels / 2]
            lower = (tl.arange(0, 2) == 0)[None, None, :, None]
            bits = tl.int64 if values.dtype == tl.float64 else tl.int32
            sent = tl.where(lower, high, low).to(bits, bitcast=True)
            received = tl.xor_sum(sent, 2, keep_dims=True) ^ sent  # the partner's
            values = tl.where(lower, low, high) + received.to(values.dtype, bitcast=True)
            values = tl.reshape(values, (PADDED >> (level + 1), 2 << level, CHANNELS >> (level + 1)))
    return tl.reshape(tl.trans(tl.sum(values, 2)), (PADDED,))


@triton.jit
def gather(total, rows, offset, value, KIND: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr):
    """Add a token's gradient to B or C [N, channels] to where it belongs; return the running sum."""
    if KIND == FIXED:
        total += value
    elif KIND != ONE:
        tl.store(rows + offset + tl.arange(0, STATES), over_channels(value, STATES, CHANNELS))
    return total


@triton.jit
def adjoint(
    g, dA, dB, dC, h, A2, B, C, xs, dts, grads, inputs, decays, dB_rows, dC_rows, sums, opaque,
    FIRST: tl.constexpr, KIND_B: tl.constexpr, KIND_C: tl.constexpr,
    PADDED: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Some of the states through STEPS steps, forward from h, then back.

    xs, dts, grads: u, delta and the gradient of <C, h>, a row for each step. Returns the running sums g, dA, dB, dC,
    and inputs, decays with what these states add to the gradient of delta_t u_t, and (over ln 2) to that of delta_t by
    way of the decay.
    """
    # Every second state is kept; the one between is recomputed on the way back, from a decay needed there anyway.
    kept = ()
    for i in tl.static_range(STEPS):
        if i % 2 == 0:
            kept = kept + (h,)
        B_i = load_state(B, i * PADDED, KIND_B, STATES)
        h = h * tl.exp2(A2 * dts[i][None, :]) + B_i * (dts[i] * xs[i])[None, :]
    tl.debug_barrier()
    after = h
    new_inputs = ()
    new_decays = ()
    for i in tl.static_range(STEPS - 1, -1, -1):
        dC = gather(dC, dC_rows, i * PADDED, after * grads[i][None, :], KIND_C, STATES, CHANNELS)
        g += load_state(C, i * PADDED, KIND_C, STATES) * grads[i][None, :]
        dBu = tl.sum(g * load_state(B, i * PADDED, KIND_B, STATES), 0)
        new_inputs = (dBu if FIRST else inputs[i] + dBu,) + new_inputs
        dB = gather(dB, dB_rows, i * PADDED, g * (dts[i] * xs[i])[None, :], KIND_B, STATES, CHANNELS)
        if i % 2 == 1 or i == STEPS - 1:
            decay = tl.exp2(A2 * dts[i][None, :])
            before = kept[i // 2]
            if i % 2 == 1:
                earlier = tl.exp2(A2 * dts[i - 1][None, :])
                before *= earlier
                before += load_state(B, (i - 1) * PADDED, KIND_B, STATES) * (dts[i - 1] * xs[i - 1])[None, :]
        else:
            decay = earlier
            before = kept[i // 2]
        g *= decay
        product = g * before
        dA += product * dts[i][None, :]
        slope = tl.sum(product * A2, 0)
        new_decays = (slope if FIRST else decays[i] + slope,) + new_decays
        after = before
        if i % 2 == 0:
            # Never taken. Else ptxas leaves the sums to the end of the loop and holds every product until then.
            if opaque != 0:
                tl.store(sums, dA)
    return g, dA, dB, dC, new_inputs, new_decays


@triton.jit
def read_inputs(u, delta, bias, step, mask, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr):
    """u and delta of STEPS steps, two tuples of rows; the pointers are at the first."""
    us = load_steps(u, step, mask, STEPS, EVEN)
    deltas = load_steps(delta, step, mask, STEPS, EVEN)
    xs = ()
    dts = ()
    for i in tl.static_range(STEPS):
        xs = xs + (us[i].to(bias.dtype),)
        dt = deltas[i].to(bias.dtype) + bias
        if SOFTPLUS:
            dt = softplus(dt)
        dts = dts + (dt,)
    return xs, dts


@triton.jit
def block_of(pointer, offset, tile_offset, KIND: tl.constexpr):
    """B or C of a block of states: a pointer to its rows, its tile, or anything for the constant 1."""
    if KIND == ONE:
        block = pointer
    elif KIND == FIXED:
        block = tl.load(pointer + tile_offset)
    else:
        block = pointer + offset
    return block


@triton.jit
def advance(h, A2, B, xs, dts, KIND_B: tl.constexpr, PADDED: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr):
    """The state STEPS steps later, from the state h before the first."""
    for i in tl.static_range(STEPS):
        h = h * tl.exp2(A2 * dts[i][None, :]) + load_state(B, i * PADDED, KIND_B, STATES) * (dts[i] * xs[i])[None, :]
    return h


@triton.jit
def chunk_backward(
    g, dA, dB, dC, dbias, part, kept, behind, at, opaque, A, B, C, tile, bias, u, delta, dy, du, ddelta,
    dB_rows, dC_rows, rows, sums, step, mask,
    SOFTPLUS: tl.constexpr, KIND_B: tl.constexpr, KIND_C: tl.constexpr, EVEN: tl.constexpr,
    STATES: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """STEPS steps from the one at offset `at` on: stores their gradients, returns the running sums.

    The state before them, or, if `behind`, that of STEPS steps earlier, is at `part`, or zero unless `kept`. `tile`:
    offset of this block of channels in A, and in B and C where they are fixed; `rows`, `sums`: of the first step's row
    of B and C where they vary, and of their partial gradients.
    """
    PADDED: tl.constexpr = STATES * BLOCKS
    TILE: tl.constexpr = STATES * CHANNELS
    at += opaque
    hs = ()
    for k in tl.static_range(BLOCKS):
        h = tl.zeros((STATES, CHANNELS), bias.dtype)
        if kept:
            h = tl.load(part + k * TILE)
        hs = hs + (h,)
    if behind:
        earlier = at - STEPS * step
        xs, dts = read_inputs(u + earlier, delta + earlier, bias, step, mask, SOFTPLUS, EVEN, STEPS)
        new_hs = ()
        for k in tl.static_range(BLOCKS):
            A_k = tl.load(A + tile + k * TILE) * LOG2E
            B_k = block_of(B, rows + (k * STATES - STEPS * PADDED), tile + k * TILE, KIND_B)
            new_hs = new_hs + (advance(hs[k], A_k, B_k, xs, dts, KIND_B, PADDED, STATES, STEPS),)
        hs = new_hs
    at += opaque & 2
    xs, dts = read_inputs(u + at, delta + at, bias, step, mask, SOFTPLUS, EVEN, STEPS)
    dys = load_steps(dy + at, step, mask, STEPS, EVEN)
    grads = ()
    for i in tl.static_range(STEPS):
        grads = grads + (dys[i].to(bias.dtype),)
    inputs = ()
    decays = ()
    # A block of states at a time, so that those of a whole chunk fit into the registers.
    new_g = ()
    new_dA = ()
    new_dB = ()
    new_dC = ()
    for k in tl.static_range(BLOCKS):
        A_k = tl.load(A + tile + k * TILE) * LOG2E
        B_k = block_of(B, rows + k * STATES, tile + k * TILE, KIND_B)
        C_k = block_of(C, rows + k * STATES, tile + k * TILE, KIND_C)
        g_k, dA_k, dB_k, dC_k, inputs, decays = adjoint(
            g[k], dA[k], dB[k], dC[k], hs[k], A_k, B_k, C_k, xs, dts, grads, inputs, decays,
            dB_rows + sums + k * STATES, dC_rows + sums + k * STATES, A + tile + k * TILE, opaque,
            k == 0, KIND_B, KIND_C, PADDED, STATES, CHANNELS, STEPS,
        )  # fmt: skip
        new_g = new_g + (g_k,)
        new_dA = new_dA + (dA_k,)
        new_dB = new_dB + (dB_k,)
        new_dC = new_dC + (dC_k,)
    # delta is read again (the cache has it) rather than held in registers all along.
    at += opaque & 1
    for i in tl.static_range(STEPS):
        slope = decays[i] * LN2 + inputs[i] * xs[i]
        if SOFTPLUS:
            slope *= sigmoid(load_row(delta + at, mask, EVEN).to(bias.dtype) + bias)
        dbias += slope
        store_row(du + at, inputs[i] * dts[i], mask, EVEN)
        store_row(ddelta + at, slope, mask, EVEN)
        at += step
    return new_g, new_dA, new_dB, new_dC, dbias


@triton.jit(do_not_specialize=["opaque", "directions", "height", "columns", "spots", "splits"])
def scan_backward(
    dy_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, bias_ptr, saved_ptr,
    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dbias_ptr,
    u_batch, u_group, width, height, columns, spots, opaque, groups, blocks, splits, directions,
    PADDED: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, KIND_B: tl.constexpr, KIND_C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of channels along some lines of one group, its states in BLOCKS tiles.

    dA, and dB, dC where fixed: a tile [PADDED, channels] for each batch element, share of the lines and block; dB, dC
    where they vary: a row of PADDED for each token and block, in the order of the scan; dbias: a row (groups, width)
    for each batch element and share. du and ddelta are dense, whatever the strides of u.
    """
    STATES: tl.constexpr = PADDED // BLOCKS
    TILE: tl.constexpr = STATES * CHANNELS
    batch, split, group, row, channel, mask = place(groups, blocks, splits, width, 0, CHANNELS)
    lines, length, line_step, step, first = walk(directions, group, height, columns, width)
    tile = tile_offsets(row, opaque, STATES, PADDED, CHANNELS)
    kind = A_ptr.dtype.element_ty
    bias = tl.zeros((CHANNELS,), kind)
    dbias = bias
    if bias_ptr is not None:
        bias = load_row(bias_ptr + group * width + channel, mask, EVEN)
    zeros = ()
    for _ in tl.static_range(BLOCKS):
        zeros = zeros + (tl.zeros((STATES, CHANNELS), kind),)
    dA = zeros
    dB = zeros
    dC = zeros
    share = (lines + splits - 1) // splits
    for line in range(split * share, tl.minimum(lines, (split + 1) * share)):
        # Computed for every line: else they would be in registers all along.
        batch, split, group, row, channel, mask = place(groups, blocks, splits, width, opaque & line, CHANNELS)
        lines, length, line_step, step, first = walk(directions, group, height, columns, width)
        programs = tl.cast(groups * blocks, tl.int64)  # of a batch element and share
        tokens = tl.cast(height, tl.int64) * columns
        whole = (batch * groups + group) * tokens * width
        u = u_ptr + (batch * u_batch + group * u_group - whole)  # so that one offset serves all tensors
        parts = spots // lines  # of a line
        # Behind the last step of the line.
        at = whole + channel + first + line * line_step + length * step
        end = tl.cast(line + 1, tl.int64) * length
        rows = ((batch * groups + group) * tokens + end) * PADDED  # of B and C
        sums = ((batch * programs + row) * tokens + end) * PADDED  # of their partial gradients
        chunks = length // STEPS
        halves = tl.maximum(chunks - 1, 0) // 2  # parts that are kept before whole chunks
        part = saved_ptr + (batch * spots + line * parts + halves) * programs * (PADDED * CHANNELS) + tile
        for halving in tl.static_range(1, 6):
            if STEPS >> halving > 0:
                if length & (STEPS >> halving):
                    part += programs * (PADDED * CHANNELS)
        part -= programs * (PADDED * CHANNELS)
        g = zeros
        # The forward's last parts, a half, a quarter ... of STEPS: the shortest came last.
        for halving in tl.static_range(5, 0, -1):
            if STEPS >> halving > 0:
                if length & (STEPS >> halving):
                    at -= (STEPS >> halving) * step
                    rows -= (STEPS >> halving) * PADDED
                    sums -= (STEPS >> halving) * PADDED
                    g, dA, dB, dC, dbias = chunk_backward(
                        g, dA, dB, dC, dbias, part, True, False, at, opaque, A_ptr, B_ptr, C_ptr, tile,
                        bias, u, delta_ptr, dy_ptr, du_ptr, ddelta_ptr, dB_ptr, dC_ptr, rows, sums, step, mask,
                        SOFTPLUS, KIND_B, KIND_C, EVEN, STATES, BLOCKS, CHANNELS, STEPS >> halving,
                    )  # fmt: skip
                    part -= programs * (PADDED * CHANNELS)
        for done in range(chunks):
            chunk = chunks - 1 - done
            at -= STEPS * step
            rows -= STEPS * PADDED
            sums -= STEPS * PADDED
            g, dA, dB, dC, dbias = chunk_backward(
                g, dA, dB, dC, dbias, part, chunk > 1, chunk % 2 == 1, at, opaque & done, A_ptr, B_ptr, C_ptr, tile,
                bias, u, delta_ptr, dy_ptr, du_ptr, ddelta_ptr, dB_ptr, dC_ptr, rows, sums, step, mask,
                SOFTPLUS, KIND_B, KIND_C, EVEN, STATES, BLOCKS, CHANNELS, STEPS,
            )  # fmt: skip
            if chunk % 2 == 0:
                part -= programs * (PADDED * CHANNELS)

    # Computed a second time: else these, too, would be in registers all along.
    batch, split, group, row, channel, mask = place(groups, blocks, splits, width, opaque, CHANNELS)
    share_row = batch * splits + split
    tile = tile_offsets(share_row * (groups * blocks) + row, opaque, STATES, PADDED, CHANNELS)
    for k in tl.static_range(BLOCKS):
        tl.store(dA_ptr + tile + k * TILE, dA[k])
        if KIND_B == FIXED:
            tl.store(dB_ptr + tile + k * TILE, dB[k])
        if KIND_C == FIXED:
            tl.store(dC_ptr + tile + k * TILE, dC[k])
    if bias_ptr is not None:
        store_row(dbias_ptr + (share_row * groups + group) * width + channel, dbias, mask, EVEN)
