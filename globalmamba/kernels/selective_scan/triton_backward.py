"""The selective scan's backward kernel: the parts of a sequence from the last to the first, each recomputed forward.

A program takes the block of channels that `triton_forward` gave it. From the state before a part (kept by the
forward) it runs the recurrence again and holds every second state in registers, then walks back:

    g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1},   dB_t = sum over channels of g_t delta_t u_t,   ...

(README.md derives the rest). Sums over channels end in a buffer with one row for each block, sums over time in one
with a row for each sequence; `triton.py` adds the rows in a fixed order. No atomics: the same bits every time.

All 255 registers of a thread are in use, and none is spilled, because of `opaque`, which is 0 and which the compiler
does not know. Adding it makes an offset a new one, computed where it is used; else one register pair for every tensor
would hold its address from the first use in a chunk to the last, or all along. And a branch on it that is never taken
makes a value be ready at that place. `tests/test_selective_scan_triton.py` holds the outcome.
"""

import triton
import triton.language as tl

from globalmamba.kernels.selective_scan.triton_forward import (
    LOG2E,
    load_row,
    load_state,
    load_steps,
    place,
    sigmoid,
    softplus,
    store_row,
    tile_offsets,
)

LN2 = tl.constexpr(0.6931471805599453)


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
def adjoint(
    g, dA, dB, dC, h, A2, B, C, xs, dts, grads, outs, inputs, decays, dB_rows, dC_rows, sums, opaque,
    FIRST: tl.constexpr, FIXED_B: tl.constexpr, FIXED_C: tl.constexpr,
    PADDED: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Some of the states through STEPS steps, forward from h, then back.

    xs, dts, grads: u, delta and the gradient of <C, h>, a row for each step. Returns the running sums g, dA, dB, dC,
    and outs, inputs, decays with what these states add to a step's <C_t, h_t>, to the gradient of delta_t u_t, and
    (over ln 2) to that of delta_t by way of the decay.
    """
    # Every second state is kept; the one between is recomputed on the way back, from a decay needed there anyway.
    kept = ()
    for i in tl.static_range(STEPS):
        if i % 2 == 0:
            kept = kept + (h,)
        B_i = load_state(B, i * PADDED, FIXED_B)
        h = h * tl.exp2(A2 * dts[i][None, :]) + B_i * (dts[i] * xs[i])[None, :]
    tl.debug_barrier()
    after = h
    new_outs = ()
    new_inputs = ()
    new_decays = ()
    for i in tl.static_range(STEPS - 1, -1, -1):
        C_i = load_state(C, i * PADDED, FIXED_C)
        out = tl.sum(after * C_i, 0)
        new_outs = (out if FIRST else outs[i] + out,) + new_outs
        dC_i = after * grads[i][None, :]
        if FIXED_C:
            dC += dC_i
        else:
            tl.store(dC_rows + i * PADDED, over_channels(dC_i, STATES, CHANNELS))
        g += C_i * grads[i][None, :]
        dBu = tl.sum(g * load_state(B, i * PADDED, FIXED_B), 0)
        new_inputs = (dBu if FIRST else inputs[i] + dBu,) + new_inputs
        dB_i = g * (dts[i] * xs[i])[None, :]
        if FIXED_B:
            dB += dB_i
        else:
            tl.store(dB_rows + i * PADDED, over_channels(dB_i, STATES, CHANNELS))
        if i % 2 == 1 or i == STEPS - 1:
            decay = tl.exp2(A2 * dts[i][None, :])
            before = kept[i // 2]
            if i % 2 == 1:
                earlier = tl.exp2(A2 * dts[i - 1][None, :])
                before *= earlier
                before += load_state(B, (i - 1) * PADDED, FIXED_B) * (dts[i - 1] * xs[i - 1])[None, :]
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
    return g, dA, dB, dC, new_outs, new_inputs, new_decays


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
def advance(h, A2, B, xs, dts, FIXED_B: tl.constexpr, PADDED: tl.constexpr, STEPS: tl.constexpr):
    """The state STEPS steps later, from the state h before the first."""
    for i in tl.static_range(STEPS):
        h = h * tl.exp2(A2 * dts[i][None, :]) + load_state(B, i * PADDED, FIXED_B) * (dts[i] * xs[i])[None, :]
    return h


@triton.jit
def chunk_backward(
    g, dA, dB, dC, dD, dbias, part, behind, at, opaque, A, B, C, D, bias, u, delta, z, dy, du, ddelta, dz,
    dB_rows, dC_rows, sums, step, mask,
    SOFTPLUS: tl.constexpr, FIXED_B: tl.constexpr, FIXED_C: tl.constexpr, EVEN: tl.constexpr,
    STATES: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """STEPS steps from the one at offset `at` on: stores their gradients, returns the running sums.

    The state before them is at `part`, or, if `behind`, that of STEPS steps earlier.
    """
    PADDED: tl.constexpr = STATES * BLOCKS
    TILE: tl.constexpr = STATES * CHANNELS
    at += opaque
    hs = ()
    for k in tl.static_range(BLOCKS):
        hs = hs + (tl.load(part + k * TILE),)
    if behind:
        earlier = at - STEPS * step
        xs, dts = read_inputs(u + earlier, delta + earlier, bias, step, mask, SOFTPLUS, EVEN, STEPS)
        new_hs = ()
        for k in tl.static_range(BLOCKS):
            A_k = tl.load(A + k * TILE) * LOG2E
            B_k = B + (k * STATES - STEPS * PADDED)
            if FIXED_B:
                B_k = tl.load(B + k * TILE)
            new_hs = new_hs + (advance(hs[k], A_k, B_k, xs, dts, FIXED_B, PADDED, STEPS),)
        hs = new_hs
    at += opaque & 2
    xs, dts = read_inputs(u + at, delta + at, bias, step, mask, SOFTPLUS, EVEN, STEPS)
    dys = load_steps(dy + at, step, mask, STEPS, EVEN)
    zs = dys
    if z is not None:
        zs = load_steps(z + at, step, mask, STEPS, EVEN)
    grads = ()
    outs = ()
    inputs = ()
    decays = ()
    for i in tl.static_range(STEPS):
        grad = dys[i].to(dD.dtype)
        if z is not None:
            gate = zs[i].to(dD.dtype)
            grad *= gate * sigmoid(gate)
        grads = grads + (grad,)
    # A block of states at a time, so that those of a whole chunk fit into the registers.
    new_g = ()
    new_dA = ()
    new_dB = ()
    new_dC = ()
    for k in tl.static_range(BLOCKS):
        A_k = tl.load(A + k * TILE) * LOG2E
        B_k = B + k * STATES
        C_k = C + k * STATES
        if FIXED_B:
            B_k = tl.load(B + k * TILE)
        if FIXED_C:
            C_k = tl.load(C + k * TILE)
        g_k, dA_k, dB_k, dC_k, outs, inputs, decays = adjoint(
            g[k], dA[k], dB[k], dC[k], hs[k], A_k, B_k, C_k, xs, dts, grads, outs, inputs, decays,
            dB_rows + k * STATES, dC_rows + k * STATES, sums + k * TILE, opaque,
            k == 0, FIXED_B, FIXED_C, PADDED, STATES, CHANNELS, STEPS,
        )  # fmt: skip
        new_g = new_g + (g_k,)
        new_dA = new_dA + (dA_k,)
        new_dB = new_dB + (dB_k,)
        new_dC = new_dC + (dC_k,)
    # delta, z and dy are read again (the cache has them) rather than held in registers all along.
    at += opaque & 1
    for i in tl.static_range(STEPS):
        dD += grads[i] * xs[i]
        slope = decays[i] * LN2 + inputs[i] * xs[i]
        if SOFTPLUS:
            slope *= sigmoid(load_row(delta + at, mask, EVEN).to(dD.dtype) + bias)
        dbias += slope
        store_row(du + at, grads[i] * D + inputs[i] * dts[i], mask, EVEN)
        store_row(ddelta + at, slope, mask, EVEN)
        if z is not None:
            gate = load_row(z + at, mask, EVEN).to(dD.dtype)
            grad = load_row(dy + at, mask, EVEN).to(dD.dtype)
            s = sigmoid(gate)
            slope = s * (1.0 + gate * (1.0 - s))
            store_row(dz + at, grad * (outs[i] + D * xs[i]) * slope, mask, EVEN)
        at += step
    return new_g, new_dA, new_dB, new_dC, dD, dbias


@triton.jit(do_not_specialize=["reverse", "opaque", "length", "parts"])
def scan_backward(
    dy_ptr, dlast_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, saved_ptr,
    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbias_ptr,
    batch_stride, channel_stride, time_stride, width, length, parts, opaque,
    groups, blocks, group_width, B_share, C_share, reverse, groups_per_direction,
    N: tl.constexpr, PADDED: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, FIXED_B: tl.constexpr, FIXED_C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of channels of one sequence, its states in BLOCKS tiles.

    *_stride: of u, delta, z, dy, du, ddelta and dz alike. dA, and dB, dC where fixed: a tile [PADDED, channels] for
    each sequence and block; dB, dC else: a row (L, PADDED) for each, in the order of the scan; dD, dbias: a row (width)
    for each sequence.
    """
    STATES: tl.constexpr = PADDED // BLOCKS
    TILE: tl.constexpr = STATES * CHANNELS
    batch, group, row, channel, mask, direction = place(
        groups, blocks, group_width, reverse, groups_per_direction, 0, CHANNELS
    )
    programs = tl.cast(groups * blocks, tl.int64)  # of a sequence
    tile = tile_offsets(row, opaque, STATES, PADDED, CHANNELS)
    state = tl.arange(0, STATES)
    kind = A_ptr.dtype.element_ty
    step = direction * time_stride
    behind_last = tl.where(direction > 0, length, -1).to(tl.int64)
    at = batch * batch_stride + channel * channel_stride + behind_last * time_stride
    dB_rows = dB_ptr + (batch * programs + row + 1) * length * PADDED + state
    dC_rows = dC_ptr + (batch * programs + row + 1) * length * PADDED + state
    D = tl.zeros((CHANNELS,), kind)
    bias = D
    dD = D
    dbias = D
    if D_ptr is not None:
        D = load_row(D_ptr + channel, mask, EVEN)
    if bias_ptr is not None:
        bias = load_row(bias_ptr + channel, mask, EVEN)
    A = A_ptr + tile
    if FIXED_B:
        B = B_ptr + tile
    else:
        B = B_ptr + (batch * (groups // B_share) + group // B_share + 1) * length * PADDED + state
    if FIXED_C:
        C = C_ptr + tile
    else:
        C = C_ptr + (batch * (groups // C_share) + group // C_share + 1) * length * PADDED + state
    g = ()
    zeros = ()
    for k in tl.static_range(BLOCKS):
        zeros = zeros + (tl.zeros((STATES, CHANNELS), kind),)
        if dlast_ptr is not None:
            last = (batch * width + channel[None, :]) * N + opaque + (k * STATES + state)[:, None]
            inner = mask[None, :] & (k * STATES + state < N)[:, None]
            g = g + (tl.load(dlast_ptr + last, mask=inner, other=0.0),)
        else:
            g = g + (zeros[k],)
    dA = zeros
    dB = zeros
    dC = zeros
    sums = dA_ptr + tile_offsets(batch * programs + row, opaque, STATES, PADDED, CHANNELS)
    part = saved_ptr + (batch * parts + parts - 1) * programs * (PADDED * CHANNELS) + tile
    # The forward's last parts, a half, a quarter ... of STEPS: the shortest came last.
    for halving in tl.static_range(5, 0, -1):
        if STEPS >> halving > 0:
            if length & (STEPS >> halving):
                at -= (STEPS >> halving) * step
                if not FIXED_B:
                    B -= (STEPS >> halving) * PADDED
                if not FIXED_C:
                    C -= (STEPS >> halving) * PADDED
                dB_rows -= (STEPS >> halving) * PADDED
                dC_rows -= (STEPS >> halving) * PADDED
                g, dA, dB, dC, dD, dbias = chunk_backward(
                    g, dA, dB, dC, dD, dbias, part, False, at, opaque, A, B, C, D, bias, u_ptr, delta_ptr, z_ptr,
                    dy_ptr, du_ptr, ddelta_ptr, dz_ptr, dB_rows, dC_rows, sums, step, mask,
                    SOFTPLUS, FIXED_B, FIXED_C, EVEN, STATES, BLOCKS, CHANNELS, STEPS >> halving,
                )  # fmt: skip
                part -= programs * (PADDED * CHANNELS)
    for chunk in range(length // STEPS):
        chunk_number = length // STEPS - 1 - chunk
        at -= STEPS * step
        if not FIXED_B:
            B -= STEPS * PADDED
        if not FIXED_C:
            C -= STEPS * PADDED
        dB_rows -= STEPS * PADDED
        dC_rows -= STEPS * PADDED
        g, dA, dB, dC, dD, dbias = chunk_backward(
            g, dA, dB, dC, dD, dbias, part, chunk_number % 2 == 1, at, opaque & chunk, A, B, C, D, bias, u_ptr,
            delta_ptr, z_ptr, dy_ptr, du_ptr, ddelta_ptr, dz_ptr, dB_rows, dC_rows, sums, step, mask,
            SOFTPLUS, FIXED_B, FIXED_C, EVEN, STATES, BLOCKS, CHANNELS, STEPS,
        )  # fmt: skip
        if chunk_number % 2 == 0:
            part -= programs * (PADDED * CHANNELS)

    # Computed a second time: else these, too, would be in registers all along.
    batch, group, row, channel, mask, direction = place(
        groups, blocks, group_width, reverse, groups_per_direction, opaque, CHANNELS
    )
    tile = tile_offsets(batch * (groups * blocks) + row, opaque, STATES, PADDED, CHANNELS)
    for k in tl.static_range(BLOCKS):
        tl.store(dA_ptr + tile + k * TILE, dA[k])
        if FIXED_B:
            tl.store(dB_ptr + tile + k * TILE, dB[k])
        if FIXED_C:
            tl.store(dC_ptr + tile + k * TILE, dC[k])
    if D_ptr is not None:
        store_row(dD_ptr + batch * width + channel, dD, mask, EVEN)
    if bias_ptr is not None:
        store_row(dbias_ptr + batch * width + channel, dbias, mask, EVEN)
