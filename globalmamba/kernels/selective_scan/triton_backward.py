"""The selective scan's backward kernel: the parts of a sequence from the last to the first, each recomputed forward.

A program takes the block of channels that `triton_forward` gave it. From the state before a part (kept by the
forward) it runs the recurrence again and holds every second state in registers, then walks back:

    g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1},   dB_t = sum over channels of g_t delta_t u_t,   ...

(README.md derives the rest). Sums over channels end in a buffer with one row for each block, sums over time in one
with a row for each sequence; `triton.py` adds the rows in a fixed order. No atomics: the same bits every time.
"""

import triton
import triton.language as tl

from globalmamba.kernels.selective_scan.triton_forward import (
    LOG2E,
    load_row,
    load_state,
    load_steps,
    load_tile,
    place,
    sigmoid,
    softplus,
    store_row,
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
def again(step, opaque, USE: tl.constexpr):
    """The same step, which the compiler takes for another one.

    Else it would keep the addresses of a first use in registers until the second, and spill what is needed between.
    """
    return step + (opaque & USE) * 64


@triton.jit
def adjoint(
    g, dA, dB, dC, h, t, opaque, A2, B, C, xs, dts, grads, outs, inputs, decays, dB_rows, dC_rows, row_step,
    FIRST: tl.constexpr, FIXED_B: tl.constexpr, FIXED_C: tl.constexpr,
    STATES: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Some of the states through STEPS steps from step t on, forward from h, then back.

    xs, dts, grads: u, delta and the gradient of <C, h>, a row for each step. Returns the running sums g, dA, dB, dC,
    and outs, inputs, decays with what these states add to a step's <C_t, h_t>, to the gradient of delta_t u_t, and
    (over ln 2) to that of delta_t by way of the decay.
    """
    # Every second state is kept; the one between is recomputed on the way back, from a decay needed there anyway.
    kept = ()
    at = t * row_step
    for i in tl.static_range(STEPS):
        if i % 2 == 0:
            kept = kept + (h,)
        B_i = load_state(B, at, FIXED_B)
        h = h * tl.exp2(A2 * dts[i][None, :]) + B_i * (dts[i] * xs[i])[None, :]
        at += row_step
    row_step = again(row_step, opaque, 8)
    at = (t + STEPS - 1) * row_step
    tl.debug_barrier()
    after = h
    new_outs = ()
    new_inputs = ()
    new_decays = ()
    for i in tl.static_range(STEPS - 1, -1, -1):
        C_i = load_state(C, at, FIXED_C)
        out = tl.sum(after * C_i, 0)
        new_outs = (out if FIRST else outs[i] + out,) + new_outs
        dC_i = after * grads[i][None, :]
        if FIXED_C:
            dC += dC_i
        else:
            tl.store(dC_rows + at, over_channels(dC_i, STATES, CHANNELS))
        g += C_i * grads[i][None, :]
        dBu = tl.sum(g * load_state(B, at, FIXED_B), 0)
        new_inputs = (dBu if FIRST else inputs[i] + dBu,) + new_inputs
        dB_i = g * (dts[i] * xs[i])[None, :]
        if FIXED_B:
            dB += dB_i
        else:
            tl.store(dB_rows + at, over_channels(dB_i, STATES, CHANNELS))
        if i % 2 == 1 or i == STEPS - 1:
            decay = tl.exp2(A2 * dts[i][None, :])
            before = kept[i // 2]
            if i % 2 == 1:
                earlier = tl.exp2(A2 * dts[i - 1][None, :])
                before *= earlier
                before += load_state(B, at - row_step, FIXED_B) * (dts[i - 1] * xs[i - 1])[None, :]
        else:
            decay = earlier
            before = kept[i // 2]
        g *= decay
        product = g * before
        dA += product * dts[i][None, :]
        slope = tl.sum(product * A2, 0)
        new_decays = (slope if FIRST else decays[i] + slope,) + new_decays
        after = before
        at -= row_step
    return g, dA, dB, dC, new_outs, new_inputs, new_decays


@triton.jit
def read_inputs(
    u, delta, bias, u_step, delta_step, mask, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr
):
    """u and delta of STEPS steps, two tuples of rows; the pointers are at the first."""
    us = load_steps(u, u_step, mask, STEPS, EVEN)
    deltas = load_steps(delta, delta_step, mask, STEPS, EVEN)
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
def advance(h, A2, B, t, xs, dts, row_step, FIXED_B: tl.constexpr, STEPS: tl.constexpr):
    """The state STEPS steps later, from the state h before step t."""
    at = t * row_step
    for i in tl.static_range(STEPS):
        h = h * tl.exp2(A2 * dts[i][None, :]) + load_state(B, at, FIXED_B) * (dts[i] * xs[i])[None, :]
        at += row_step
    return h


@triton.jit
def chunk_backward(
    g, dA, dB, dC, dD, dbias, part, behind, t, opaque, A, B, C, D, bias, u, delta, z, dy, du, ddelta, dz,
    dB_rows, dC_rows, u_step, delta_step, z_step, dy_step, out_step, row_step, width, mask, inner,
    SOFTPLUS: tl.constexpr, FIXED_B: tl.constexpr, FIXED_C: tl.constexpr, EVEN: tl.constexpr, PLAIN: tl.constexpr,
    STATES: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """STEPS steps from step t on: stores their gradients, returns the running sums.

    The state before them is at `part`, or, if `behind`, that of STEPS steps earlier.
    """
    u_step += opaque * 16
    delta_step += opaque * 16
    dy_step += opaque * 16
    z_step += opaque * 16
    out_step += opaque * 16
    row_step += opaque * 64
    width += opaque * 16
    state = tl.arange(0, STATES)
    hs = ()
    for k in tl.static_range(BLOCKS):
        hs = hs + (load_tile(part + (k * STATES + state)[:, None] * width, inner[k], PLAIN),)
    if behind:
        u_old = u + (t - STEPS) * u_step
        delta_old = delta + (t - STEPS) * delta_step
        xs, dts = read_inputs(u_old, delta_old, bias, u_step, delta_step, mask, SOFTPLUS, EVEN, STEPS)
        new_hs = ()
        for k in tl.static_range(BLOCKS):
            A_k = load_tile(A + (k * STATES + state)[:, None] * width, inner[k], PLAIN) * LOG2E
            B_k = B + k * STATES
            if FIXED_B:
                B_k = load_tile(B + (k * STATES + state)[:, None] * width, inner[k], PLAIN)
            h = advance(hs[k], A_k, B_k, t - STEPS, xs, dts, row_step, FIXED_B, STEPS)
            new_hs = new_hs + (h,)
        hs = new_hs
    u_step = again(u_step, opaque, 1)
    delta_step = again(delta_step, opaque, 1)
    row_step = again(row_step, opaque, 1)
    u_t = u + t * u_step
    delta_t = delta + t * delta_step
    xs, dts = read_inputs(u_t, delta_t, bias, u_step, delta_step, mask, SOFTPLUS, EVEN, STEPS)
    dys = load_steps(dy + t * dy_step, dy_step, mask, STEPS, EVEN)
    zs = dys
    if z is not None:
        zs = load_steps(z + t * z_step, z_step, mask, STEPS, EVEN)
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
        row_step = again(row_step, opaque, 2 << k)
        width = again(width, opaque, 2 << k)
        A_k = load_tile(A + (k * STATES + state)[:, None] * width, inner[k], PLAIN) * LOG2E
        B_k = B + k * STATES
        C_k = C + k * STATES
        if FIXED_B:
            B_k = load_tile(B + (k * STATES + state)[:, None] * width, inner[k], PLAIN)
        if FIXED_C:
            C_k = load_tile(C + (k * STATES + state)[:, None] * width, inner[k], PLAIN)
        g_k, dA_k, dB_k, dC_k, outs, inputs, decays = adjoint(
            g[k], dA[k], dB[k], dC[k], hs[k], t, opaque, A_k, B_k, C_k, xs, dts, grads, outs, inputs, decays,
            dB_rows + k * STATES, dC_rows + k * STATES, row_step, k == 0, FIXED_B, FIXED_C, STATES, CHANNELS, STEPS,
        )  # fmt: skip
        new_g = new_g + (g_k,)
        new_dA = new_dA + (dA_k,)
        new_dB = new_dB + (dB_k,)
        new_dC = new_dC + (dC_k,)
    # Read again (the cache has them) rather than held in registers all along.
    delta_step = again(delta_step, opaque, 16)
    delta_t = delta + t * delta_step
    dy_step = again(dy_step, opaque, 16)
    dy_t = dy + t * dy_step
    z_t = z
    if z is not None:
        z_step = again(z_step, opaque, 16)
        z_t = z + t * z_step
    du += t * out_step
    ddelta += t * out_step
    if z is not None:
        dz += t * out_step
    for i in tl.static_range(STEPS):
        dD += grads[i] * xs[i]
        slope = decays[i] * LN2 + inputs[i] * xs[i]
        if SOFTPLUS:
            slope *= sigmoid(load_row(delta_t, mask, EVEN).to(dD.dtype) + bias)
            delta_t += delta_step
        dbias += slope
        store_row(du, grads[i] * D + inputs[i] * dts[i], mask, EVEN)
        store_row(ddelta, slope, mask, EVEN)
        du += out_step
        ddelta += out_step
        if z is not None:
            gate = load_row(z_t, mask, EVEN).to(dD.dtype)
            grad = load_row(dy_t, mask, EVEN).to(dD.dtype)
            z_t += z_step
            dy_t += dy_step
            s = sigmoid(gate)
            slope = s * (1.0 + gate * (1.0 - s))
            store_row(dz, grad * (outs[i] + D * xs[i]) * slope, mask, EVEN)
            dz += out_step
    return new_g, new_dA, new_dB, new_dC, dD, dbias


@triton.jit(do_not_specialize=["last_channel", "last_state", "reverse", "opaque", "length", "parts"])
def scan_backward(
    dy_ptr, dlast_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, saved_ptr,
    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbias_ptr,
    dy_batch, dy_channel, dy_time, u_batch, u_channel, u_time, delta_batch, delta_channel, delta_time,
    z_batch, z_channel, z_time, out_batch, out_channel, out_time, last_batch, last_channel, last_state,
    width, length, parts, opaque, groups, blocks, group_width, B_share, C_share, reverse, groups_per_direction,
    N: tl.constexpr, PADDED: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, FIXED_B: tl.constexpr, FIXED_C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of channels of one sequence, its states in BLOCKS tiles.

    out_*: the strides of du, ddelta and dz. dA, and dB, dC where fixed: one row (N, width) for each sequence, strided
    like `saved`; dB, dC else: a row (L, PADDED) for each sequence and block; dD, dbias: a row (width) for each
    sequence.
    """
    STATES: tl.constexpr = PADDED // BLOCKS
    PLAIN: tl.constexpr = EVEN and N == PADDED
    batch, group, row, channel, mask, direction = place(
        groups, blocks, group_width, reverse, groups_per_direction, 0, CHANNELS
    )
    state = tl.arange(0, STATES)
    at_last = batch * last_batch + channel[None, :] * last_channel + state[:, None] * last_state
    inside = channel[None, :]
    if PADDED > 1:
        inside += opaque  # addresses of unknown alignment are not read in vectors of channels
    kind = A_ptr.dtype.element_ty
    first = tl.where(direction > 0, 0, length - 1).to(tl.int64)
    u = u_ptr + batch * u_batch + channel * u_channel + first * u_time
    delta = delta_ptr + batch * delta_batch + channel * delta_channel + first * delta_time
    dy = dy_ptr + batch * dy_batch + channel * dy_channel + first * dy_time
    at_out = batch * out_batch + channel * out_channel + first * out_time
    du = du_ptr + at_out
    ddelta = ddelta_ptr + at_out
    z = None
    dz = None
    z_step = direction
    if z_ptr is not None:
        z = z_ptr + batch * z_batch + channel * z_channel + first * z_time
        dz = dz_ptr + at_out
        z_step = direction * z_time
    u_step = direction * u_time
    delta_step = direction * delta_time
    dy_step = direction * dy_time
    out_step = direction * out_time
    row_step = direction * PADDED  # of packed B and C, and of the rows of dB and dC
    rows = ((batch * (groups * blocks) + row) * length + first) * PADDED + state
    B_row = ((batch * (groups // B_share) + group // B_share) * length + first) * PADDED + state
    C_row = ((batch * (groups // C_share) + group // C_share) * length + first) * PADDED + state

    D = tl.zeros((CHANNELS,), kind)
    bias = D
    dD = D
    dbias = D
    if D_ptr is not None:
        D = load_row(D_ptr + channel, mask, EVEN)
    if bias_ptr is not None:
        bias = load_row(bias_ptr + channel, mask, EVEN)
    A = A_ptr + inside
    B = B_ptr + inside if FIXED_B else B_ptr + B_row
    C = C_ptr + inside if FIXED_C else C_ptr + C_row
    g = ()
    inner = ()
    zeros = ()
    for k in tl.static_range(BLOCKS):
        inner = inner + (mask[None, :] & (k * STATES + state < N)[:, None],)
        zeros = zeros + (tl.zeros((STATES, CHANNELS), kind),)
        if dlast_ptr is not None:
            g = g + (load_tile(dlast_ptr + at_last + k * STATES * last_state, inner[k], PLAIN),)
        else:
            g = g + (zeros[k],)
    dA = zeros
    dB = zeros
    dC = zeros
    part = saved_ptr + (batch * parts + parts - 1) * N * width + inside
    # The forward's last parts, a half, a quarter ... of STEPS: the shortest came last.
    for halving in tl.static_range(5, 0, -1):
        if STEPS >> halving > 0:
            if length & (STEPS >> halving):
                t = tl.cast(length // (STEPS >> (halving - 1)) * (STEPS >> (halving - 1)), tl.int64)
                g, dA, dB, dC, dD, dbias = chunk_backward(
                    g, dA, dB, dC, dD, dbias, part, False, t, opaque, A, B, C, D, bias, u, delta, z, dy, du, ddelta, dz,
                    dB_ptr + rows, dC_ptr + rows, u_step, delta_step, z_step, dy_step, out_step,
                    row_step, width, mask, inner, SOFTPLUS, FIXED_B, FIXED_C, EVEN, PLAIN, STATES, BLOCKS,
                    CHANNELS, STEPS >> halving,
                )  # fmt: skip
                part -= N * width
    changing = opaque
    for chunk in range(length // STEPS):
        chunk_number = length // STEPS - 1 - chunk
        t = tl.cast(chunk_number, tl.int64) * STEPS
        changing = opaque & chunk
        g, dA, dB, dC, dD, dbias = chunk_backward(
            g, dA, dB, dC, dD, dbias, part, chunk_number % 2 == 1, t, changing, A, B, C, D, bias,
            u, delta, z, dy, du, ddelta, dz, dB_ptr + rows, dC_ptr + rows,
            u_step, delta_step, z_step, dy_step, out_step, row_step, width, mask, inner,
            SOFTPLUS, FIXED_B, FIXED_C, EVEN, PLAIN, STATES, BLOCKS, CHANNELS, STEPS,
        )  # fmt: skip
        if chunk_number % 2 == 0:
            part -= N * width

    # Computed a second time, from what only the loop has left: else these, too, would be in registers all along.
    batch, group, row, channel, mask, direction = place(
        groups, blocks, group_width, reverse, groups_per_direction, changing, CHANNELS
    )
    inside = channel[None, :]
    if PADDED > 1:
        inside += opaque
    width += changing
    state = tl.arange(0, STATES)
    for k in tl.static_range(BLOCKS):
        sums = batch * N * width + inside + (k * STATES + state)[:, None] * width
        inner_k = mask[None, :] & (k * STATES + state < N)[:, None]
        tl.store(dA_ptr + sums, dA[k], mask=inner_k)
        if FIXED_B:
            tl.store(dB_ptr + sums, dB[k], mask=inner_k)
        if FIXED_C:
            tl.store(dC_ptr + sums, dC[k], mask=inner_k)
    if D_ptr is not None:
        store_row(dD_ptr + batch * width + channel, dD, mask, EVEN)
    if bias_ptr is not None:
        store_row(dbias_ptr + batch * width + channel, dbias, mask, EVEN)
