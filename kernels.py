"""Triton kernels for the networks, the denoising chain and the Q values of K agents at once; fused.py launches them.

Networks lie in flat buffers (role, net, parameters): role 0 is trained, role 1 its moving average (the target); nets
are the K policies, or the 2 K critics. A launch has two sections of rows. The first is of role 0 and keeps what the
gradients need; the second is of role 1 (in acting, of the role that acts) and keeps nothing.
A batch of B rows takes BP, a multiple of a tile: rows beyond B hold finite numbers that nobody reads, and their
gradients are 0. The first section has slots of BP rows: slot i is denoising step i, slot N the imitation loss.
In a kernel, what is written in capitals is a constant of the compiled code.
"""

import inspect

import triton
import triton.language as tl


def kernel(function):
    """triton.jit: what is in capitals is constant; integers that vary from launch to launch are not specialised on."""
    names = inspect.signature(function).parameters
    function.__annotations__ = {name: tl.constexpr for name in names if name.isupper()}
    jitted = triton.jit(function, do_not_specialize=[n for n in ("first", "tiles", "i", "rows") if n in names])
    if hasattr(jitted, "rewrite"):  # Triton's interpreter runs a copy, without annotations
        jitted.rewrite().__annotations__ = function.__annotations__
    return jitted


# ----------------------------------------------------------------------------- layers


@kernel
def mish_and_slope(z):
    """Mish and its derivative from one exponential, without cancellation: n / (n + 2) is tanh(log(1 + e^z))."""
    e = tl.exp(tl.minimum(z, 20.0))
    n = e * (e + 2)
    d = n + 2
    return z * (n / d), n / d + 4 * z * e * (e + 1) / (d * d)


@kernel
def first_layer(action, action2, state, state2, bc_step, bias, w, h, slope, first, tiles, i, action_stride,
                action2_stride, BIAS_STRIDE, W_STRIDE, H_STRIDE, SLOPE_STRIDE, NETS, SHIFT, SECOND, IMITATION, B, BP, R,
                COPIES, A, S, A_AT, S_AT, IN, HID, BM, BN, PREC):  # fmt: skip
    """h, slope = mish([action, state] W^T + bias); W's columns of the action begin at A_AT, those of the state at S_AT.

    bias has a row for each denoising step (what the time embedding adds) or, for critics, one. action is read at h's
    row, action2 (K, R, A) at its own; COPIES adjacent rows of the second section share a state2.
    """
    m, n, g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k, lane, cols = g // NETS, tl.arange(0, BM), n * BN + tl.arange(0, BN)
    if m < tiles:
        row, net = first + m * BM, g
        r = row % BP + lane
        inside = r < B
        x = action + k * action_stride + (row + lane) * A
        s = state + (k * B + r) * S
        step = tl.load(bc_step + k * B + r, mask=inside & (row >= IMITATION), other=i).to(tl.int32)
    else:
        row, net = SECOND + (m - tiles) * BM, g + SHIFT
        r = (m - tiles) * BM + lane
        inside = r < R
        x = action2 + k * action2_stride + r * A
        s = state2 + (k * (R // COPIES) + r // COPIES) * S
        step = r * 0 + i
    z = tl.load(bias + net * BIAS_STRIDE + step[:, None] * HID + cols[None, :])
    for c0 in range(0, A + S, 32):
        c = c0 + tl.arange(0, 32)
        of_action = inside[:, None] & (c < A)[None, :]
        of_state = inside[:, None] & ((c >= A) & (c < A + S))[None, :]
        v = tl.load(x[:, None] + c[None, :], mask=of_action, other=0.0)
        v += tl.load(s[:, None] + (c - A)[None, :], mask=of_state, other=0.0)
        at = cols[None, :] * IN + tl.where(c < A, A_AT + c, S_AT - A + c)[:, None]
        u = tl.load(w + net * W_STRIDE + at, mask=(c < A + S)[:, None], other=0.0)
        z = tl.dot(v, u, z, input_precision=PREC, out_dtype=z.dtype)
    y, dy = mish_and_slope(z)
    at = (row + lane)[:, None] * HID + cols[None, :]
    tl.store(h + g * H_STRIDE + at, y)
    if m < tiles:
        tl.store(slope + g * SLOPE_STRIDE + at, dy)


@kernel
def layer(x, w, b, h, slope, first, tiles, W_STRIDE, H_STRIDE, SLOPE_STRIDE, SHIFT, SECOND, HID, BM, BN, BK, STAGES,
          PREC):  # fmt: skip
    """h, slope = mish(x W^T + b), W (HID, HID) as in nn.Linear."""
    m, n, g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if m < tiles:
        row, net = first + m * BM, g
    else:
        row, net = SECOND + (m - tiles) * BM, g + SHIFT
    rows, cols = row + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    x, w = x + g * H_STRIDE + rows[:, None] * HID, w + net * W_STRIDE + cols[None, :] * HID
    z = tl.zeros((BM, BN), h.dtype.element_ty) + tl.load(b + net * W_STRIDE + cols)[None, :]
    for k in tl.range(0, HID, BK, num_stages=STAGES):
        ks = k + tl.arange(0, BK)
        z = tl.dot(tl.load(x + ks[None, :]), tl.load(w + ks[:, None]), z, input_precision=PREC, out_dtype=z.dtype)
    y, dy = mish_and_slope(z)
    at = rows[:, None] * HID + cols[None, :]
    tl.store(h + g * H_STRIDE + at, y)
    if m < tiles:
        tl.store(slope + g * SLOPE_STRIDE + at, dy)


@kernel
def layer_backward(dy, w, slope, dz, first, dy_stride, W_STRIDE, SLOPE_STRIDE, OUT, HID, BM, BN, BK, STAGES, PREC):
    """A layer's gradient before Mish, dz = (dy W) slope, from that of the next layer's OUT outputs, dy."""
    m, n, g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, cols = first + m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    dy, w = dy + g * dy_stride + rows[:, None] * OUT, w + g * W_STRIDE + cols[None, :]
    acc = tl.zeros((BM, BN), dz.dtype.element_ty)
    for k in tl.range(0, OUT, BK, num_stages=STAGES):
        ks = k + tl.arange(0, BK)
        if OUT % BK == 0:
            a, b = tl.load(dy + ks[None, :]), tl.load(w + ks[:, None] * HID)
        else:
            a = tl.load(dy + ks[None, :], mask=ks[None, :] < OUT, other=0.0)
            b = tl.load(w + ks[:, None] * HID, mask=ks[:, None] < OUT, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PREC, out_dtype=acc.dtype)
    at = g * SLOPE_STRIDE + rows[:, None] * HID + cols[None, :]
    tl.store(dz + at, acc * tl.load(slope + at))


@kernel
def weight_gradient(dy, h, out, dy_stride, DY_LAYER, H_STRIDE, H_LAYER, PART_STRIDE, PART_LAYER, W_AT, B_AT, TRAINED,
                    OUT, HID, TO, T, BR, PREC):  # fmt: skip
    """dW = dy^T h and db = sum of dy, dy (.., OUT), over the rows of program_id(1), into its own part of out."""
    t, part, g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts, across = tl.num_programs(1), HID // T
    per_layer = tl.cdiv(OUT, TO) * across
    which, t = t // per_layer, t % per_layer
    o, c = t // across * TO + tl.arange(0, TO), t % across * T + tl.arange(0, T)
    dy, h = dy + g * dy_stride + which * DY_LAYER + o[:, None], h + g * H_STRIDE + which * H_LAYER + c[None, :]
    acc, total = tl.zeros((TO, T), out.dtype.element_ty), tl.zeros((TO,), out.dtype.element_ty)
    each = tl.cdiv(tl.cdiv(TRAINED, parts), BR) * BR
    for r0 in tl.range(0, each, BR, num_stages=3):
        rows = part * each + r0 + tl.arange(0, BR)
        a = tl.load(dy + rows[None, :] * OUT, mask=(rows < TRAINED)[None, :] & (o < OUT)[:, None], other=0.0)
        b = tl.load(h + rows[:, None] * HID, mask=(rows < TRAINED)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PREC, out_dtype=acc.dtype)
        total += tl.sum(a, 1)
    out += (part * tl.num_programs(2) + g) * PART_STRIDE + which * PART_LAYER
    tl.store(out + W_AT + o[:, None] * HID + c[None, :], acc, mask=(o < OUT)[:, None])
    if t % across == 0:
        tl.store(out + B_AT + o, total, mask=o < OUT)


@kernel
def first_weight_gradient(dz, action, state, bc_step, out, action_stride, SLOPE_STRIDE, PART_STRIDE, W_AT, BIAS_AT,
                          TRAINED, NETS, IMITATION, B, BP, A, S, STEPS, A_AT, S_AT, IN, HID, T, BR, PREC):  # fmt: skip
    """The same for `first_layer`: dz^T [action, state, one-hot step], of which the last is its bias's, (HID, STEPS)."""
    t, part, g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts, across, k = tl.num_programs(1), tl.cdiv(A + S + STEPS, 32), g // NETS
    o, c = t // across * T + tl.arange(0, T), t % across * 32 + tl.arange(0, 32)
    acc = tl.zeros((T, 32), out.dtype.element_ty)
    each = tl.cdiv(tl.cdiv(TRAINED, parts), BR) * BR
    for r0 in range(0, each, BR):
        rows = part * each + r0 + tl.arange(0, BR)
        r, inside = rows % BP, (rows < TRAINED) & (rows % BP < B)
        a = tl.load(dz + g * SLOPE_STRIDE + rows[None, :] * HID + o[:, None], mask=inside[None, :], other=0.0)
        of_bc = rows >= IMITATION
        step = tl.load(bc_step + k * B + r, mask=inside & of_bc, other=0).to(tl.int32)
        step = tl.where(of_bc, step, rows // BP)
        of_action = inside[:, None] & (c < A)[None, :]
        of_state = inside[:, None] & ((c >= A) & (c < A + S))[None, :]
        b = tl.load(action + k * action_stride + rows[:, None] * A + c[None, :], mask=of_action, other=0.0)
        b += tl.load(state + (k * B + r)[:, None] * S + (c - A)[None, :], mask=of_state, other=0.0)
        b += (step[:, None] == (c - A - S)[None, :]).to(b.dtype)
        acc = tl.dot(a, b, acc, input_precision=PREC, out_dtype=acc.dtype)
    of_w = W_AT + o[:, None] * IN + tl.where(c < A, A_AT + c, S_AT - A + c)[None, :]
    at = tl.where((c < A + S)[None, :], of_w, BIAS_AT + o[:, None] * STEPS + (c - A - S)[None, :])
    tl.store(out + (part * tl.num_programs(2) + g) * PART_STRIDE + at, acc, mask=(c < A + S + STEPS)[None, :])


# ----------------------------------------------------------------------------- the denoising chain


@kernel
def small_product(a, b):
    return tl.dot(a, b, input_precision="ieee", out_dtype=a.dtype)


@kernel
def time_embedding(sinusoid, w, STEPS, STEPS2, E):
    """t = W_2 h + b_2, h = mish(W_1 wave + b_1) of all steps, (STEPS2, E); W_2, wave, h, slope for gradients."""
    i, j, e = tl.arange(0, STEPS2), tl.arange(0, E), tl.arange(0, 2 * E)
    wave = tl.load(sinusoid + i[:, None] * E + j[None, :], mask=(i < STEPS)[:, None], other=0.0)
    z = small_product(wave, tl.load(w + e[None, :] * E + j[:, None])) + tl.load(w + 2 * E * E + e)[None, :]
    h, slope = mish_and_slope(z)
    w += 2 * E * E + 2 * E
    w2 = tl.load(w + j[:, None] * (2 * E) + e[None, :])
    return small_product(h, tl.trans(w2)) + tl.load(w + 2 * E * E + j)[None, :], w2, wave, h, slope


@kernel
def time_forward(sinusoid, w, table, SHIFT, W_STRIDE, W_AT, B_AT, STEPS, STEPS2, E, IN, HID, T):
    """What time embedding and bias add to the first layer, (2 K, STEPS, HID); W's columns of time begin at W_AT."""
    g, i, j = tl.program_id(1) + SHIFT, tl.arange(0, STEPS2), tl.arange(0, E)
    cols = tl.program_id(0) * T + tl.arange(0, T)
    w += g * W_STRIDE
    t, _w2, _wave, _h, _slope = time_embedding(sinusoid, w, STEPS, STEPS2, E)
    u = small_product(t, tl.load(w + W_AT + cols[None, :] * IN + j[:, None])) + tl.load(w + B_AT + cols)[None, :]
    tl.store(table + (g * STEPS + i[:, None]) * HID + cols[None, :], u, mask=(i < STEPS)[:, None])


@kernel
def time_backward(sinusoid, w, out, W_STRIDE, PART_STRIDE, PARTS, BIAS_AT, W_AT, B_AT, STEPS, STEPS2, E, IN, HID, T):
    """From the table's gradient, in PARTS parts of out at BIAS_AT, that of all that time_forward reads; into part 0."""
    g, i, j, e = tl.program_id(0), tl.arange(0, STEPS2), tl.arange(0, E), tl.arange(0, 2 * E)
    w += g * W_STRIDE
    mine = out + g * PART_STRIDE
    t, w2, wave, h, slope = time_embedding(sinusoid, w, STEPS, STEPS2, E)
    dt = tl.zeros((STEPS2, E), out.dtype.element_ty)
    for c in range(0, HID, T):
        cols = c + tl.arange(0, T)
        du = tl.zeros((STEPS2, T), out.dtype.element_ty)
        for part in range(PARTS):
            at = (part * tl.num_programs(0) + g) * PART_STRIDE + BIAS_AT + cols[None, :] * STEPS + i[:, None]
            du += tl.load(out + at, mask=(i < STEPS)[:, None], other=0.0)
        at = W_AT + cols[:, None] * IN + j[None, :]
        dt += small_product(du, tl.load(w + at))
        tl.store(mine + at, small_product(tl.trans(du), t))
        tl.store(mine + B_AT + cols, tl.sum(du, 0))
    dz = small_product(dt, w2) * slope
    tl.store(mine + e[:, None] * E + j[None, :], small_product(tl.trans(dz), wave))
    tl.store(mine + 2 * E * E + e, tl.sum(dz, 0))
    mine += 2 * E * E + 2 * E
    tl.store(mine + j[:, None] * (2 * E) + e[None, :], small_product(tl.trans(dt), h))
    tl.store(mine + 2 * E * E + j, tl.sum(dt, 0))


@kernel
def start(x, noise, noise2, action, bc_noise, bc_step, scale, count, lr, lr2, tiles, noise_stride, noise2_stride,
          bc_stride, X_STRIDE, X_SECOND, IMITATION, B, BP, R, A, A2, UPDATES, RATE, RATE2, RM):  # fmt: skip
    """The inputs of the first denoising step (noise) and of the imitation loss (noisy actions, Eq. 2).

    UPDATES > 0: both learning rates follow half a cosine, from RATE and RATE2 to 0 after so many updates.
    """
    m, k, a = tl.program_id(0), tl.program_id(1), tl.arange(0, A2)
    x, in_a = x + k * X_STRIDE, (a < A)[None, :]
    if m < tiles:
        r = m * RM + tl.arange(0, RM)
        at, inside = r[:, None] * A + a[None, :], (r < B)[:, None] & in_a
        step = tl.load(bc_step + k * B + r, mask=r < B, other=0)
        noisy = tl.load(scale + 2 * step)[:, None] * tl.load(action + k * B * A + at, mask=inside, other=0.0)
        noisy += tl.load(scale + 2 * step + 1)[:, None] * tl.load(bc_noise + k * bc_stride + at, mask=inside, other=0.0)
        tl.store(x + IMITATION * A + at, tl.load(noise + k * noise_stride + at, mask=inside, other=0.0), mask=in_a)
        tl.store(x + (IMITATION + BP) * A + at, noisy, mask=in_a)
    else:
        r = (m - tiles) * RM + tl.arange(0, RM)
        at = r[:, None] * A + a[None, :]
        drawn = tl.load(noise2 + k * noise2_stride + at, mask=(r < R)[:, None] & in_a, other=0.0)
        tl.store(x + X_SECOND * A + at, drawn, mask=in_a)
    if UPDATES > 0:  # noqa: SIM102 (this is decided when compiling)
        if (m == 0) & (k == 0):
            share = 0.5 * (1 + tl.cos(tl.load(count).to(tl.float64) * (3.141592653589793 / UPDATES)))
            tl.store(lr, (RATE * share).to(lr.dtype.element_ty))
            tl.store(lr2, (RATE2 * share).to(lr2.dtype.element_ty))


@kernel
def reverse_step(h, w, b, x, noise, noise2, bc_noise, bc_step, scale, coefficients, free, deps, sums, first, tiles, i,
                 noise_stride, noise2_stride, bc_stride, H_STRIDE, W_STRIDE, X_STRIDE, TRAINED, SHIFT, SECOND, X_SECOND,
                 IMITATION, ONE_STEP, LIMIT, B, BP, R, A, A2, HID, RM, BK, STAGES, PREC):  # fmt: skip
    """The noise predictor's output layer and what follows: a^i -> a^(i-1), or L_d's gradient and sum of squares.

    Slot i + 1 of x holds the input of step i, slot 0 the actions. free: 1 where no clipping stops the gradient.
    ONE_STEP: slot 0's actions are those that L_d's noise predictions estimate (--one-step-gradient).
    """
    m, k = tl.program_id(0), tl.program_id(1)
    lane, a = tl.arange(0, RM), tl.arange(0, A2)
    in_a = (a < A)[None, :]
    if m < tiles:
        row, net = first + m * RM, k
    else:
        row, net = SECOND + (m - tiles) * RM, k + SHIFT
    rows, x = row + lane, x + k * X_STRIDE + a[None, :]
    h, w = h + k * H_STRIDE + rows[:, None] * HID, w + net * W_STRIDE + a[None, :] * HID
    eps = tl.zeros((RM, A2), x.dtype.element_ty) + tl.load(b + net * W_STRIDE + a, mask=a < A, other=0.0)[None, :]
    for k0 in tl.range(0, HID, BK, num_stages=STAGES):
        ks = k0 + tl.arange(0, BK)
        u = tl.load(w + ks[:, None], mask=in_a, other=0.0)
        eps = tl.dot(tl.load(h + ks[None, :]), u, eps, input_precision=PREC, out_dtype=eps.dtype)
    if (m < tiles) & (row >= IMITATION):
        r = rows - IMITATION
        inside = (r < B)[:, None] & in_a
        wanted = tl.load(bc_noise + k * bc_stride + r[:, None] * A + a[None, :], mask=inside, other=0.0)
        error = tl.where(inside, eps - wanted, 0.0)
        tl.store(deps + (k * TRAINED + rows[:, None]) * A + a[None, :], error * (2 / (B * A)), mask=in_a)
        tl.store(sums + k * (BP // RM) + (row - IMITATION) // RM, tl.sum(error * error))
        if ONE_STEP:
            step = tl.load(bc_step + k * B + r, mask=r < B, other=0)
            noisy = tl.load(x + (rows + BP)[:, None] * A, mask=in_a, other=0.0)
            a0 = (noisy - tl.load(scale + 2 * step + 1)[:, None] * eps) / tl.load(scale + 2 * step)[:, None]
            clipped = tl.minimum(tl.maximum(a0, -LIMIT), LIMIT)
            stops = clipped != a0
            tl.store(x + r[:, None] * A, clipped, mask=in_a)
            tl.store(free + (k * TRAINED + rows[:, None]) * A + a[None, :], tl.where(stops, 0.0, 1.0), mask=in_a)
    else:
        if m < tiles:
            r = row % BP + lane
            drawn, source, target = r < B, rows + BP, rows
            z = noise + k * noise_stride
        else:
            r = (m - tiles) * RM + lane
            drawn, source, target = r < R, X_SECOND + r, X_SECOND + r
            z = noise2 + k * noise2_stride
        c = coefficients + i * 5
        old = tl.load(x + source[:, None] * A, mask=in_a, other=0.0)
        a0 = tl.load(c) * old - tl.load(c + 1) * eps
        clipped = tl.minimum(tl.maximum(a0, -LIMIT), LIMIT)
        new = tl.load(c + 2) * clipped + tl.load(c + 3) * old
        if i > 0:
            there = drawn[:, None] & in_a
            new += tl.load(c + 4) * tl.load(z + r[:, None] * A + a[None, :], mask=there, other=0.0)
        final = tl.minimum(tl.maximum(new, -LIMIT), LIMIT)
        stops = (clipped != a0) | ((i == 0) & (final != new))  # at step 0 the old action has weight 0
        tl.store(x + target[:, None] * A, tl.where(i == 0, final, new), mask=in_a)
        if m < tiles:
            tl.store(free + (k * TRAINED + rows[:, None]) * A + a[None, :], tl.where(stops, 0.0, 1.0), mask=in_a)


@kernel
def to_action(dz, w, q, coin, eta, bc_step, scale, coefficients, free, dx, deps, i, FROM_Q, ONE_STEP, SLOPE_STRIDE,
              W_STRIDE, TRAINED, B, BP, B2, A, A2, A_AT, IN, HID, RM, BK, STAGES, PREC):  # fmt: skip
    """dx, the loss's gradient by the action that step i made, and deps, by the noise that step i predicted.

    From the first layer of the critic that the coin chose (Eq. 3; dz is of its sum), or of the predictor at step i - 1.
    TRAINED is the policy's. ONE_STEP: it is added to L_d's own gradient by the noise, in deps.
    """
    m, k = tl.program_id(0), tl.program_id(1)
    rows, a = m * RM + tl.arange(0, RM), tl.arange(0, A2)
    in_a = (a < A)[None, :]
    if FROM_Q:
        q1_is_maximised = tl.load(coin + k) > 0.5
        net, row = 2 * k + tl.where(q1_is_maximised, 0, 1), rows
    else:
        net, row = k, (i - 1) * BP + rows
    acc = tl.zeros((RM, A2), dx.dtype.element_ty)
    for k0 in tl.range(0, HID, BK, num_stages=STAGES):
        ks = k0 + tl.arange(0, BK)
        u = tl.load(w + net * W_STRIDE + ks[:, None] * IN + A_AT + a[None, :], mask=in_a, other=0.0)
        v = tl.load(dz + net * SLOPE_STRIDE + row[:, None] * HID + ks[None, :])
        acc = tl.dot(v, u, acc, input_precision=PREC, out_dtype=acc.dtype)
    dx += (k * BP + rows[:, None]) * A + a[None, :]
    free += (k * TRAINED + i * BP + rows[:, None]) * A + a[None, :]
    if FROM_Q:
        r = tl.arange(0, B2)
        other = tl.load(q + (2 * k + tl.where(q1_is_maximised, 1, 0)) * BP + r, mask=r < B, other=0.0)
        acc *= -tl.load(eta + k) / tl.sum(tl.abs(other))
    else:
        c = coefficients + (i - 1) * 5
        through = tl.load(c + 2) * tl.load(c) * tl.load(free - BP * A, mask=in_a, other=0.0) + tl.load(c + 3)
        acc += through * tl.load(dx, mask=in_a, other=0.0)
    deps += (k * TRAINED + i * BP + rows[:, None]) * A + a[None, :]
    if ONE_STEP:
        step = tl.load(bc_step + k * B + rows, mask=rows < B, other=0)
        m_step = tl.load(scale + 2 * step + 1) / tl.load(scale + 2 * step)
        of_eps = tl.load(deps, mask=in_a, other=0.0) - m_step[:, None] * tl.load(free, mask=in_a, other=0.0) * acc
    else:
        c = coefficients + i * 5
        of_eps = -tl.load(c + 1) * tl.load(c + 2) * tl.load(free, mask=in_a, other=0.0) * acc
    tl.store(dx, acc, mask=in_a)
    tl.store(deps, of_eps, mask=in_a)


# ----------------------------------------------------------------------------- Q


@kernel
def q_of(h, w, b, HID, RM, T):
    """The output layer of a critic: h points to RM rows (HID,) -> (RM,)."""
    q = tl.zeros((RM,), w.dtype.element_ty) + tl.load(b)
    for c in range(0, HID, T):
        cols = c + tl.arange(0, T)
        q += tl.sum(tl.load(h[:, None] + cols[None, :]) * tl.load(w + cols)[None, :], 1)
    return q


@kernel
def q_backward(dq, w, slope, dz, HID, T):
    """The gradient before the last Mish from that of q, (RM,)."""
    for c in range(0, HID, T):
        cols = c + tl.arange(0, T)
        at = cols[None, :]
        tl.store(dz[:, None] + at, dq[:, None] * tl.load(w + cols)[None, :] * tl.load(slope[:, None] + at))


@kernel
def critic_losses(h, w, b, slope, reward, done, dq, dz, sums, H_STRIDE, W_STRIDE, SLOPE_STRIDE, SECOND, SHIFT, GAMMA, B,
                  BP, COPIES, HID, RM, T):  # fmt: skip
    """Eq. 4 for RM transitions: shares of the loss and of the mean target, the gradient by both Q, and dz."""
    m, k = tl.program_id(0), tl.program_id(1)
    r = m * RM + tl.arange(0, RM)
    inside, known, tiles = r < B, tl.minimum(r, B - 1), tl.num_programs(0)
    h, w, b = h + 2 * k * H_STRIDE, w + 2 * k * W_STRIDE, b + 2 * k * W_STRIDE
    lowest = tl.full((RM,), float("inf"), h.dtype.element_ty)
    for net in range(2):
        best = tl.full((RM,), float("-inf"), h.dtype.element_ty)
        at = (net + SHIFT) * W_STRIDE
        for c in range(COPIES):
            rows = h + net * H_STRIDE + (SECOND + known * COPIES + c) * HID
            best = tl.maximum(best, q_of(rows, w + at, b + at, HID, RM, T))
        lowest = tl.minimum(lowest, best)
    goes_on = 1 - tl.load(done + k * B + known)
    target = tl.load(reward + k * B + known) + goes_on * GAMMA * lowest
    loss = tl.zeros((RM,), h.dtype.element_ty)
    for net in range(2):
        at = net * W_STRIDE
        error = tl.where(inside, q_of(h + net * H_STRIDE + r * HID, w + at, b + at, HID, RM, T) - target, 0.0)
        loss += error * error
        tl.store(dq + (2 * k + net) * BP + r, error * (2 / B))
        at_rows = (2 * k + net) * SLOPE_STRIDE + r * HID
        q_backward(error * (2 / B), w + at, slope + at_rows, dz + at_rows, HID, T)
    tl.store(sums + 2 * k * tiles + m, tl.sum(loss))
    tl.store(sums + (2 * k + 1) * tiles + m, tl.sum(tl.where(inside, target, 0.0)))


@kernel
def q_values(h, w, b, slope, q, dz, GRADIENT, H_STRIDE, W_STRIDE, SLOPE_STRIDE, SHIFT, B, HID, RM, T):
    """q (2 K, rows) and, if GRADIENT, that of its sum before the last Mish, dz; otherwise of the second role."""
    m, g = tl.program_id(0), tl.program_id(1)
    r = m * RM + tl.arange(0, RM)
    net = g if GRADIENT else g + SHIFT
    w, b = w + net * W_STRIDE, b + net * W_STRIDE
    tl.store(q + g * tl.num_programs(0) * RM + r, q_of(h + g * H_STRIDE + r * HID, w, b, HID, RM, T))
    if GRADIENT:
        at = g * SLOPE_STRIDE + r * HID
        q_backward(tl.where(r < B, 1.0, 0.0).to(w.dtype.element_ty), w, slope + at, dz + at, HID, T)


@kernel
def choose(q, gumbel, x, out, count, gumbel_stride, X_STRIDE, TEMPERATURE, RP, COPIES, COPIES2, A, A2):
    """Of the COPIES candidates x of a state, the one of largest min Q + TEMPERATURE gumbel -> out; counts the call."""
    e, k = tl.program_id(0), tl.program_id(1)
    c, a = tl.arange(0, COPIES2), tl.arange(0, A2)
    inside, at = c < COPIES, e * COPIES + c
    q1 = tl.load(q + 2 * k * RP + at, mask=inside, other=0.0)
    q2 = tl.load(q + (2 * k + 1) * RP + at, mask=inside, other=0.0)
    value = tl.minimum(q1, q2) + TEMPERATURE * tl.load(gumbel + k * gumbel_stride + at, mask=inside, other=0.0)
    best = e * COPIES + tl.argmax(tl.where(inside, value, float("-inf")), 0)
    action = tl.load(x + k * X_STRIDE + best * A + a, mask=a < A)
    tl.store(out + (k * tl.num_programs(0) + e) * A + a, action, mask=a < A)
    if (e == 0) & (k == 0):
        tl.store(count, tl.load(count) + 1)
