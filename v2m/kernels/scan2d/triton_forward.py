"""The forward kernel of the scan of a grid: sequential along a line, parallel over lines and channels.

A program takes one batch element, one group, one block of channels and some lines (rows or columns), one after the
other; its states are a tile [N, channels] in registers, a thread holding all states of a channel where N <= 16. Tiles
are written [N, channels], not [channels, N]: Triton spreads the last axis over the lanes of a warp first, so sums over
the states stay inside a thread, and what belongs to a channel (the softplus) is computed once. Which way a group walks
is two bits: rows and columns, there and back, are the same code with other strides.

`triton.py` lays out what the programs read again and again: A as tiles [N, channels], one for each block of channels; B
and C, where they vary, as rows of N, token after token in the order of the scan. N and channels are padded with zeros.
Inside a chunk every such address is then a pointer and a constant. u, delta and y are channels last.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Kinds of B and C: constant 1, one for each channel and state, one for each token and state.
ONE = tl.constexpr(0)
FIXED = tl.constexpr(1)


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
def place(groups, blocks, splits, width, opaque, CHANNELS: tl.constexpr):
    """This program's batch element, share of the lines, group, row among all blocks, channels and their mask.

    All but the share are int64, for what is computed from them: tensors may have more than 2^31 elements.
    """
    program = tl.program_id(0) + opaque  # x is the one grid axis that holds 2^31 programs
    row = program % (groups * blocks)
    rest = program // (groups * blocks)
    channel = tl.cast((row % blocks) * CHANNELS, tl.int64) + tl.arange(0, CHANNELS)
    batch = tl.cast(rest // splits, tl.int64)
    return (batch, rest % splits, tl.cast(row // blocks, tl.int64), tl.cast(row, tl.int64), channel, channel < width)


@triton.jit
def walk(directions, group, height, columns, width):
    """Lines and steps of a group, the elements from line to line and from step to step, and those to the first step."""
    code = (directions >> (2 * group)) & 3
    down = code >= 2
    lines = tl.where(down, columns, height)
    length = tl.where(down, height, columns)
    line_step = tl.cast(tl.where(down, 1, columns), tl.int64) * width
    step = tl.cast(tl.where(down, columns, 1), tl.int64) * width
    back = (code & 1) == 1
    first = tl.where(back, (length - 1) * step, 0)
    return lines, length, line_step, tl.where(back, -step, step), first


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
def load_state(pointer, offset, KIND: tl.constexpr, STATES: tl.constexpr):
    """B or C of a token as [N, 1]; the tile [N, channels] itself if FIXED; 1 if it is the constant."""
    if KIND == ONE:
        matrix = 1.0
    elif KIND == FIXED:
        matrix = pointer
    else:
        matrix = tl.load(pointer + offset + tl.arange(0, STATES))[:, None]
    return matrix


@triton.jit
def store_row(pointer, row, mask, EVEN: tl.constexpr):
    """Store a value for every channel, nothing beyond the last one."""
    if EVEN:
        tl.store(pointer, row)
    else:
        tl.store(pointer, row, mask=mask)


@triton.jit
def matrix_of(pointer, batch, groups, group, tokens, tile, KIND: tl.constexpr, PADDED: tl.constexpr):
    """What `load_state` takes as its pointer, for the first token of a group."""
    if KIND == ONE:
        matrix = pointer
    elif KIND == FIXED:
        matrix = tl.load(pointer + tile)
    else:
        matrix = pointer + (batch * groups + group) * tokens * PADDED
    return matrix


@triton.jit
def moved(matrix, tokens, KIND: tl.constexpr, PADDED: tl.constexpr):
    """B or C so many tokens later; what does not vary stays."""
    if KIND == ONE or KIND == FIXED:
        later = matrix
    else:
        later = matrix + tokens * PADDED
    return later


@triton.jit
def chunk_forward(
    h, at, A2, B, C, bias, u, delta, y, step, mask,
    SOFTPLUS: tl.constexpr, KIND_B: tl.constexpr, KIND_C: tl.constexpr, EVEN: tl.constexpr,
    PADDED: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """STEPS steps from the one at offset `at` on: stores y, returns the state after them [N, channels]."""
    # Loads stand before the arithmetic, so that they are in flight together.
    us = load_steps(u + at, step, mask, STEPS, EVEN)
    deltas = load_steps(delta + at, step, mask, STEPS, EVEN)
    for i in tl.static_range(STEPS):
        B_i = load_state(B, i * PADDED, KIND_B, PADDED)
        C_i = load_state(C, i * PADDED, KIND_C, PADDED)
        dt = deltas[i].to(A2.dtype)
        if bias is not None:
            dt += bias
        if SOFTPLUS:
            dt = softplus(dt)
        h = h * tl.exp2(A2 * dt[None, :]) + B_i * (dt * us[i].to(A2.dtype))[None, :]
        store_row(y + at, tl.sum(h * C_i, 0), mask, EVEN)
        at += step
    return h


@triton.jit(do_not_specialize=["opaque", "directions", "height", "columns", "spots", "splits"])
def scan_forward(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, bias_ptr, y_ptr, saved_ptr,
    u_batch, u_group, width, height, columns, spots, opaque, groups, blocks, splits, directions,
    PADDED: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, KIND_B: tl.constexpr, KIND_C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Scan one block of channels along some lines of one group; y and, if asked, states for the backward.

    Those are the ones before every second chunk of STEPS steps but the first, and before each of the shorter chunks at
    the end of a line; there are `spots` places for all lines of a group. u_batch, u_group: strides of u. EVEN: blocks
    fill the channels.
    """
    batch, split, group, row, channel, mask = place(groups, blocks, splits, width, 0, CHANNELS)
    lines, length, line_step, step, first = walk(directions, group, height, columns, width)
    tile = tile_offsets(row, opaque, PADDED, PADDED, CHANNELS)
    A2 = tl.load(A_ptr + tile) * LOG2E
    bias = None
    if bias_ptr is not None:
        bias = load_row(bias_ptr + group * width + channel, mask, EVEN)
    tokens = tl.cast(height, tl.int64) * columns
    whole = (batch * groups + group) * tokens * width
    u = u_ptr + (batch * u_batch + group * u_group - whole)  # so that one offset serves all tensors
    B_all = matrix_of(B_ptr, batch, groups, group, tokens, tile, KIND_B, PADDED)
    C_all = matrix_of(C_ptr, batch, groups, group, tokens, tile, KIND_C, PADDED)
    TILE: tl.constexpr = PADDED * CHANNELS
    share = (lines + splits - 1) // splits
    parts = spots // lines  # of a line
    for line in range(split * share, tl.minimum(lines, (split + 1) * share)):
        at = whole + channel + first + line * line_step
        B = moved(B_all, tl.cast(line, tl.int64) * length, KIND_B, PADDED)
        C = moved(C_all, tl.cast(line, tl.int64) * length, KIND_C, PADDED)
        part = saved_ptr
        if saved_ptr is not None:
            part = saved_ptr + (batch * spots + line * parts) * (groups * blocks) * TILE + tile
        h = tl.zeros((PADDED, CHANNELS), A2.dtype)
        for chunk in range(length // STEPS):
            if saved_ptr is not None:
                if (chunk % 2 == 0) & (chunk > 0):
                    tl.store(part, h)
                    part += groups * blocks * TILE
            h = chunk_forward(
                h, at, A2, B, C, bias, u, delta_ptr, y_ptr, step, mask,
                SOFTPLUS, KIND_B, KIND_C, EVEN, PADDED, STEPS,
            )  # fmt: skip
            at += STEPS * step
            B = moved(B, STEPS, KIND_B, PADDED)
            C = moved(C, STEPS, KIND_C, PADDED)
        # What does not fill a chunk, in chunks of half its steps, a quarter ...
        for halving in tl.static_range(1, 6):
            if STEPS >> halving > 0:
                if length & (STEPS >> halving):
                    if saved_ptr is not None:
                        tl.store(part, h)
                        part += groups * blocks * TILE
                    h = chunk_forward(
                        h, at, A2, B, C, bias, u, delta_ptr, y_ptr, step, mask,
                        SOFTPLUS, KIND_B, KIND_C, EVEN, PADDED, STEPS >> halving,
                    )  # fmt: skip
                    at += (STEPS >> halving) * step
                    B = moved(B, STEPS >> halving, KIND_B, PADDED)
                    C = moved(C, STEPS >> halving, KIND_C, PADDED)
