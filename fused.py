"""An update and acting of dql.py on a GPU in about seventy launches, by Triton kernels, for K agents at once.

Why: at these sizes a GPU waits for memory and launches, not for arithmetic. A layer is one launch here (product, bias,
Mish, and in training Mish's slope), for all networks that have the same work: the policies' chains beside those of
their averages, both critics beside both targets; and K agents are more of them, never another code path. The weight
gradients of all denoising steps and of the imitation loss are one product. Every sum has a fixed order: two runs have
the same bits. dql.py defines the mathematics; tests/test_kernels.py holds this file and kernels.py equal to it.
"""

import functools
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from kernels import (
    choose,
    critic_losses,
    first_layer,
    first_weight_gradient,
    kernel,
    layer,
    layer_backward,
    q_values,
    reverse_step,
    start,
    time_backward,
    time_forward,
    to_action,
    weight_gradient,
)

# ----------------------------------------------------------------------------- random numbers, optimizers


@kernel
def draw(key, count, normal, index, step, uniform, rows, normal_stride, NORMALS, LAST, STEPS, GUMBEL, COUNTERS):
    """All random numbers of an update, or (GUMBEL 1) of acting: Philox of the replica's key at this count.

    NORMALS normal numbers, four from each counter; then LAST rows of index and step, and a coin, or LAST of Gumbel's.
    """
    b, k = tl.program_id(0), tl.program_id(1)
    blocks = tl.cdiv(NORMALS, 4 * COUNTERS)
    seed, t, at = tl.load(key + k), tl.load(count), b * COUNTERS + tl.arange(0, COUNTERS)
    low, high = at * 0 + (t & 0x7FFFFFFF).to(tl.int32), at * 0 + (t >> 31).to(tl.int32)
    n0, n1, n2, n3 = tl.philox(seed, at, low, high, at * 0 + GUMBEL)
    u0, u1 = tl.uint_to_uniform_float(n0), tl.uint_to_uniform_float(n1)
    u2, u3 = tl.uint_to_uniform_float(n2), tl.uint_to_uniform_float(n3)
    if b < blocks:
        quarter = tl.cdiv(NORMALS, 4)
        z, inside = normal + k * normal_stride + at, at < quarter
        z0, z1 = tl.pair_uniform_to_normal(u0, u1)
        z2, z3 = tl.pair_uniform_to_normal(u2, u3)
        tl.store(z, z0, mask=inside)
        tl.store(z + quarter, z1, mask=inside & (at + quarter < NORMALS))
        tl.store(z + 2 * quarter, z2, mask=inside & (at + 2 * quarter < NORMALS))
        tl.store(z + 3 * quarter, z3, mask=inside & (at + 3 * quarter < NORMALS))
    else:
        r = at - blocks * COUNTERS
        if GUMBEL:
            tl.store(uniform + k * LAST + r, -tl.log(-tl.log(tl.maximum(u0, 1e-9))), mask=r < LAST)
        else:  # the high half of a product: equal chances up to rows / 2^32
            tl.store(index + k * LAST + r, tl.umulhi(n0, (r * 0 + rows).to(tl.uint32)).to(tl.int64), mask=r < LAST)
            tl.store(step + k * LAST + r, tl.umulhi(n1, (r * 0 + STEPS).to(tl.uint32)).to(tl.int64), mask=r < LAST)
            tl.store(uniform + k + r, u2, mask=r == 0)


@kernel
def gather(index, state, action, reward, next_state, done, to_state, to_action, to_reward, to_next, to_done, B, A, S,
           C2, RM):  # fmt: skip
    """The batch (K, B, ..) of the rows index (K, B) of a data set."""
    r, k, c = tl.program_id(0) * RM + tl.arange(0, RM), tl.program_id(1), tl.arange(0, C2)
    inside = r < B
    i, r = tl.load(index + k * B + r, mask=inside, other=0), k * B + r
    in_s, in_a = inside[:, None] & (c < S)[None, :], inside[:, None] & (c < A)[None, :]
    of_s, of_a = i[:, None] * S + c[None, :], i[:, None] * A + c[None, :]
    to_s, to_a = r[:, None] * S + c[None, :], r[:, None] * A + c[None, :]
    tl.store(to_state + to_s, tl.load(state + of_s, mask=in_s), mask=in_s)
    tl.store(to_action + to_a, tl.load(action + of_a, mask=in_a), mask=in_a)
    tl.store(to_next + to_s, tl.load(next_state + of_s, mask=in_s), mask=in_s)
    tl.store(to_reward + r, tl.load(reward + i, mask=inside), mask=inside)
    tl.store(to_done + r, tl.load(done + i, mask=inside), mask=inside)


@kernel
def sum_parts(parts, grad, squares, SIZE, STRIDE, PARTS, BLOCK):
    """grad (K, SIZE): the sum of the parts, in order. squares (K, blocks): a block's sum of squares."""
    b, k = tl.program_id(0), tl.program_id(1)
    at = b * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), grad.dtype.element_ty)
    for part in range(PARTS):
        total += tl.load(parts + (part * tl.num_programs(1) + k) * STRIDE + at, mask=at < SIZE, other=0.0)
    tl.store(grad + k * SIZE + at, total, mask=at < SIZE)
    tl.store(squares + k * tl.num_programs(0) + b, tl.sum(total * total))


@kernel
def norm_of(squares, k, BLOCKS, BLOCKS2):
    """The norm of replica k's gradient from its blocks' sums of squares."""
    block = tl.arange(0, BLOCKS2)
    return tl.sqrt(tl.sum(tl.load(squares + k * BLOCKS + block, mask=block < BLOCKS, other=0.0)))


@kernel
def adam(p, average, m, v, grad, squares, lr, steps, count, SIZE, BLOCKS, BLOCKS2, LARGEST, RATE, EVERY, FROM, BLOCK):
    """Clipping to norm LARGEST (0: none), Adam, and the average, moving by RATE every EVERY updates from FROM on."""
    b, k = tl.program_id(0), tl.program_id(1)
    at = b * BLOCK + tl.arange(0, BLOCK)
    at, inside = k * SIZE + at, at < SIZE
    # in float64: 1 - 0.999^t loses half of float32's digits when t is small
    t, count = tl.load(steps).to(tl.float64) + 1, tl.load(count)
    rate = (tl.load(lr).to(tl.float64) / (1 - tl.exp(t * -0.105360515657826301))).to(p.dtype.element_ty)
    of_v = (1 / (1 - tl.exp(t * -0.00100050033358353350))).to(p.dtype.element_ty)
    g = tl.load(grad + at, mask=inside, other=0.0)
    if LARGEST > 0:
        g *= tl.minimum(LARGEST / (norm_of(squares, k, BLOCKS, BLOCKS2) + 1e-6), 1.0)
    new_m = 0.9 * tl.load(m + at, mask=inside, other=0.0) + 0.1 * g
    new_v = 0.999 * tl.load(v + at, mask=inside, other=0.0) + 0.001 * g * g
    new_p = tl.load(p + at, mask=inside, other=0.0) - rate * new_m / (tl.sqrt(new_v * of_v) + 1e-8)
    tl.store(m + at, new_m, mask=inside)
    tl.store(v + at, new_v, mask=inside)
    tl.store(p + at, new_p, mask=inside)
    if (count >= FROM) & (count % EVERY == 0):
        old = tl.load(average + at, mask=inside, other=0.0)
        tl.store(average + at, old + RATE * (new_p - old), mask=inside)


@kernel
def finish(out, bc_sums, critic_sums, q, coin, eta, squares, critic_squares, count, steps, critic_steps, HAS_CRITICS, B,
           BP, B2, A, TILES, TILES2, BLOCKS, CRITIC_BLOCKS, BLOCKS2):  # fmt: skip
    """The losses, out (K, 7), in the order of dql.Losses; counts the update."""
    k, tile, r = tl.program_id(0), tl.arange(0, TILES2), tl.arange(0, B2)
    out, in_tiles = out + 7 * k, tile < TILES
    bc = tl.sum(tl.load(bc_sums + k * TILES + tile, mask=in_tiles, other=0.0)) / (B * A)
    q_loss = bc * 0
    if HAS_CRITICS:
        error = tl.sum(tl.load(critic_sums + 2 * k * TILES + tile, mask=in_tiles, other=0.0))
        target = tl.sum(tl.load(critic_sums + (2 * k + 1) * TILES + tile, mask=in_tiles, other=0.0))
        q1 = tl.load(q + 2 * k * BP + r, mask=r < B, other=0.0)
        q2 = tl.load(q + (2 * k + 1) * BP + r, mask=r < B, other=0.0)
        q1_is_maximised = tl.load(coin + k) > 0.5
        q_loss = -tl.sum(tl.where(q1_is_maximised, q1, q2)) / tl.sum(tl.abs(tl.where(q1_is_maximised, q2, q1)))
        tl.store(out, error / B)
        tl.store(out + 4, target / B)
        tl.store(out + 5, norm_of(critic_squares, k, CRITIC_BLOCKS, BLOCKS2))
    tl.store(out + 1, bc)
    tl.store(out + 2, q_loss)
    tl.store(out + 3, bc + tl.load(eta + k) * q_loss)
    tl.store(out + 6, norm_of(squares, k, BLOCKS, BLOCKS2))
    if k == 0:
        tl.store(count, tl.load(count) + 1)
        tl.store(steps, tl.load(steps) + 1)
        if HAS_CRITICS:
            tl.store(critic_steps, tl.load(critic_steps) + 1)


# ----------------------------------------------------------------------------- networks in flat buffers


ROW_TILE = 16  # rows of a program that holds whole rows


def launch(function, grid: tuple, *args, of: dict | None = None, **own) -> None:
    """Every launch passes here: with its own constants, and those that the kernel names of a network's or its rows'."""
    shared = {name: value for name, value in (of or {}).items() if name in function.arg_names}
    with torch.cuda.device(args[0].device) if args[0].is_cuda else nullcontext():
        function[grid](*args, **shared | own)


def up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def power(n: int) -> int:
    """The power of two at or above n, at least 16: the sizes of Triton's blocks and products."""
    return max(16, triton.next_power_of_2(n))


class Network:
    """K policies, or K pairs of critics (steps = 0), with averages and Adam's state in flat buffers.

    weights (2, K, size), role 0 trained and role 1 average; the modules' parameters become views of them. A critic's
    two nets lie one after the other: the same memory is (2, 2 K, W_STRIDE). constants: see the kernels.
    """

    def __init__(self, network: nn.Module, average: nn.Module, optimizer, trunk: tuple, state_dim: int,
                 action_dim: int, steps: int, precision: str):  # fmt: skip
        parameters = dict(network.named_parameters())
        one = next(iter(parameters.values()))
        self.K, size, at = len(one), 0, {}
        for name, p in parameters.items():
            at[name], size = size, size + up(p[0].numel(), 16)  # products read 16 bytes at a time
        nets = 1 if steps else 2
        self.groups, stride = self.K * nets, size // nets
        new = one.detach().new_zeros
        self.weights, self.m, self.v, self.grad = (new(*roles, self.K, size) for roles in ((2,), (), (), ()))
        self.steps, self.lr = new((), dtype=torch.float32), optimizer.param_groups[0]["lr"]

        def view(flat: Tensor, name: str, values: Tensor) -> Tensor:
            """The part of flat (K, size) that holds the parameter, (K, ..), filled with values."""
            part = flat[:, at[name] : at[name] + values[0].numel()].view(values.shape)
            return part.copy_(values.detach())

        for (name, p), target in zip(parameters.items(), average.parameters(), strict=True):
            state = optimizer.state[p]
            self.steps.copy_(state["step"])
            state["step"] = self.steps
            state["exp_avg"], state["exp_avg_sq"] = (
                view(flat, name, state[key]) for flat, key in ((self.m, "exp_avg"), (self.v, "exp_avg_sq"))
            )
            p.data, target.data = view(self.weights[0], name, p), view(self.weights[1], name, target)

        names = [name for name in parameters if name.startswith(trunk) and name.endswith("weight")]
        self.w = [at[name] for name in names]  # offsets of the trunk's weights and biases, the first layer's first
        self.b = [at[name.replace("weight", "bias")] for name in names]
        width, inputs = parameters[names[0]].shape[1:]
        self.layers, T, blocks = len(names) - 1, min(64, width), triton.cdiv(size, 1024)
        if width % T:
            raise ValueError(f"hidden width {width}: the kernels need 16, 32 or a multiple of 64")
        self.parts = max(1, min(4, 16 // self.groups))  # programs enough to fill a GPU
        self.partial = new(self.parts, self.groups, stride + up(steps * width, 16))
        self.squares = new(self.K, blocks)
        self.constants = {
            "A": action_dim, "A2": power(action_dim), "S": state_dim, "A_AT": 0 if steps else state_dim,
            "S_AT": inputs - state_dim if steps else 0, "IN": inputs, "HID": width, "NETS": nets,
            "STEPS": max(1, steps), "STEPS2": power(steps), "W_STRIDE": stride, "PART_STRIDE": self.partial.stride(1),
            "BIAS_STRIDE": steps * width or stride, "BIAS_AT": size if steps else self.b[0], "PARTS": self.parts,
            "SIZE": size, "STRIDE": nets * self.partial.stride(1), "BLOCK": 1024, "BLOCKS": blocks,
            "BLOCKS2": power(blocks), "T": T, "BN": min(32, width), "BK": T, "BR": min(32, width), "STAGES": 4,
            "RM": ROW_TILE, "PREC": precision,
        }  # fmt: skip

    def weight(self, j: int) -> tuple[Tensor, Tensor]:
        """Layer j's weight and bias of net 0: kernels add W_STRIDE for each further net."""
        flat = self.weights.view(-1)
        return flat[self.w[j] :], flat[self.b[j] :]

    def forward(self, rows: "Rows", inputs: tuple, bias: Tensor, first: int, n: int, n2: int, i: int = 0) -> None:
        """All hidden layers, of n rows of the first section from row first on and of n2 rows of the second.

        inputs: action, action2, state, state2, bc_step, as in `first_layer`.
        """
        c, h, slope = rows.constants, rows.h, rows.slope
        grid, tiles = ((n + n2) // c["BM"], c["HID"] // c["BN"], self.groups), n // c["BM"]
        strides = inputs[0].stride(0), inputs[1].stride(0)
        launch(first_layer, grid, *inputs, bias, self.weight(0)[0], h, slope, first, tiles, i, *strides, of=c)
        for j in range(1, self.layers):
            launch(layer, grid, h[:, j - 1], *self.weight(j), h[:, j], slope[:, j], first, tiles, of=c)

    def backward(self, rows: "Rows", first: int, n: int, d_out: Tensor | None = None) -> None:
        """dz of every hidden layer, from that of the last or, if given, from that of the output, (K, TRAINED, OUT)."""
        c, dz = rows.constants, rows.dz
        grid = n // c["BM"], c["HID"] // c["BN"], self.groups
        for j in reversed(range(self.layers - (d_out is None))):
            dy = d_out if j == self.layers - 1 else dz[:, j + 1]
            launch(layer_backward, grid, dy, self.weight(j + 1)[0], rows.slope[:, j], dz[:, j], first, dy.stride(0),
                   OUT=dy.shape[-1], BK=min(c["BK"], power(dy.shape[-1])), of=c)  # fmt: skip

    def weight_gradients(self, rows: "Rows", d_out: Tensor, action: Tensor, state: Tensor, bc_step: Tensor) -> None:
        """The trunk's gradients into `partial`, from what `backward` left and the output's, d_out (K, TRAINED, OUT)."""
        c, h, dz, OUT = rows.constants, rows.h, rows.dz, d_out.shape[-1]
        across, more = c["HID"] // c["T"], (self.parts, self.groups)
        if self.layers > 1:
            launch(weight_gradient, ((self.layers - 1) * across**2, *more), dz[:, 1:], h, self.partial, dz.stride(0),
                   DY_LAYER=dz.stride(1), PART_LAYER=self.w[2] - self.w[1], W_AT=self.w[1], B_AT=self.b[1],
                   OUT=c["HID"], TO=c["T"], of=c)  # fmt: skip
        launch(weight_gradient, (triton.cdiv(OUT, power(OUT)) * across, *more), d_out, h[:, -1], self.partial,
               d_out.stride(0), DY_LAYER=0, PART_LAYER=0, W_AT=self.w[-1], B_AT=self.b[-1], OUT=OUT, TO=power(OUT),
               of=c)  # fmt: skip
        tiles = across * triton.cdiv(c["A"] + c["S"] + c["STEPS"], 32)
        launch(first_weight_gradient, (tiles, *more), dz, action, state, bc_step, self.partial, action.stride(0),
               W_AT=self.w[0], of=c)  # fmt: skip

    def descend(self, count: Tensor, largest: float, rate: float, every: int, begin: int) -> None:
        """Sums the parts of the gradient; clips, makes Adam's step and moves the average: see `adam`."""
        c, grid = self.constants, (self.constants["BLOCKS"], self.K)
        launch(sum_parts, grid, self.partial, self.grad, self.squares, of=c)
        launch(adam, grid, *self.weights, self.m, self.v, self.grad, self.squares, self.lr, self.steps, count,
               LARGEST=largest, RATE=rate, EVERY=every, FROM=begin, of=c)  # fmt: skip


class Rows:
    """Buffers of the rows that pass a network's layers together: slots of B rows, then R rows in copies per state.

    shift: from a net to the one with the weights of the second section.
    """

    def __init__(self, net: Network, B: int, slots: int, R: int, copies: int, shift: int):
        pad = 64 if max(B, R) >= 64 else ROW_TILE
        BP, RP, new = up(B, pad), up(R, pad), net.weights.new_zeros
        trained, width = slots * BP, net.constants["HID"]
        self.h = new(net.groups, net.layers, trained + RP, width)
        self.slope, self.dz = (new(net.groups, net.layers, trained, width) for _ in range(2))
        many = pad == 64 and net.groups * (BP * (slots > 0) + RP) >= 1024  # as measured on an H200
        self.constants = net.constants | {
            "B": B, "B2": power(B), "BP": BP, "R": R, "RP": RP, "COPIES": copies, "COPIES2": power(copies),
            "BM": 64 if many else 16, "TRAINED": trained, "SECOND": trained, "SHIFT": shift,
            "IMITATION": trained - BP if net.constants["NETS"] == 1 else 1 << 30, "H_STRIDE": self.h.stride(0),
            "H_LAYER": self.h.stride(1), "SLOPE_STRIDE": self.slope.stride(0),
        }  # fmt: skip
        if net.constants["NETS"] == 1:  # actions, then each slot's inputs, then the second section's actions
            self.x = new(net.K, trained + BP * (slots > 0) + RP, net.constants["A"])
            self.constants |= {"X_STRIDE": self.x.stride(0), "X_SECOND": self.x.shape[1] - RP}


# ----------------------------------------------------------------------------- the algorithm


class FusedDiffusionQL:
    """What `fast_sampler.replicate` makes of K agents, updated and acting by the kernels above.

    many: that; its parameters and Adam's state become views of flat buffers, and stay what state_dict() reads and
    load_state_dict() writes. Given the same batch and draws, update and act do what many's do. The random numbers of
    `train_step` depend on the seeds of its generators and on the step count alone: a resumed run needs no other state.
    Those of `act_fresh` depend on the seeds and on how many calls there were since `seed_acting`.
    Products of float32 are made of three of TF32 (errors as float32's), or with tf32 of one (errors of 1e-3).
    """

    def __init__(self, many, tf32: bool = False):
        args, policy, dtype, K = many.args, many.policy, many.policy.output.weight.dtype, len(many.eta)
        self.many, self.args, self.device, self.step, self.eta = many, args, many.device, many.step, many.eta
        self.state_dim, self.action_dim, self.has_critics = many.state_dim, many.action_dim, many.has_critics
        self.state_dict, self.load_state_dict = many.state_dict, many.load_state_dict
        self.K, self.N, A, S, B = K, args.num_steps, many.action_dim, many.state_dim, args.batch_size
        on_gpu = self.device.type == "cuda" and dtype == torch.float32
        precision = ("tf32" if tf32 else "tf32x3") if on_gpu else "ieee"
        self.policy = Network(policy, many.policy_ema, many.policy_opt, ("trunk", "output"), S, A, self.N, precision)
        self.critic = Network(many.critic, many.critic_target, many.critic_opt, ("q1",), S, A, 0, precision)
        drawn = many.draw([torch.Generator(self.device)] * K)
        R = drawn.next_noise.shape[2] if self.has_critics else 0
        has_chain = self.has_critics and not args.one_step_gradient  # beside L_d's rows
        self.rows = Rows(self.policy, B, self.N + 1 if has_chain else 1, R, max(R // B, 1), K)
        self.critic_rows = Rows(self.critic, B, 1, R, max(R // B, 1), 2 * K)

        new = functools.partial(torch.zeros, dtype=dtype, device=self.device)
        integers = functools.partial(torch.zeros, dtype=torch.int64, device=self.device)
        c = self.rows.constants
        self.reverse = torch.tensor(policy.reverse, dtype=dtype, device=self.device)
        self.forward_scale, self.sinusoid = policy.forward_scale.to(dtype), policy.sinusoid.to(dtype)
        self.table = new(2 * K, self.N, c["HID"])
        self.free, self.deps, self.dx = new(K, c["TRAINED"], A), new(K, c["TRAINED"], A), new(K, c["BP"], A)
        self.q, self.dq = new(2 * K, c["BP"]), new(2 * K, c["BP"], 1)
        self.bc_sums, self.critic_sums = new(K, c["BP"] // ROW_TILE), new(K, 2, c["BP"] // ROW_TILE)
        self.losses, self.index = new(K, 7), integers(K, B)
        self.key, self.act_key, self.act_count = integers(K), integers(K), integers(())
        self.seeds = self.act_seeds = None
        self.actors = {}  # by numbers of states and candidates
        sizes = [x[0].numel() for x in (drawn.bc_noise, drawn.policy_noise, drawn.next_noise)]
        self.normals = sum(sizes if self.has_critics else sizes[:1])
        self.normal = new(K, sum(sizes))
        normal = (part.view(x.shape) for part, x in zip(
            self.normal.split(sizes, 1), (drawn.bc_noise, drawn.policy_noise, drawn.next_noise), strict=True
        ))  # fmt: skip
        fields = dict(zip(("bc_noise", "policy_noise", "next_noise"), normal, strict=True))
        self.draws = drawn._replace(**fields, bc_step=integers(K, B), coin=new(K))
        self.batch = [new(K, B, *shape) for shape in ((S,), (A,), (), (S,), ())]
        self.time = {"E": self.sinusoid.shape[1], "W_AT": self.policy.w[0] + A, "B_AT": self.policy.b[0]}

    # ------------------------------------------------------------------------- an update

    def train_step(self, dataset, generators: list[torch.Generator]) -> Tensor:
        """One iteration of Algorithm 1 on a random batch; its losses (K, 7), overwritten by the next."""
        seeds = [g.initial_seed() for g in generators]
        if seeds != self.seeds:
            self.key.copy_(torch.tensor(seeds))
            self.seeds = seeds
        c, d, B = self.rows.constants, self.draws, self.args.batch_size
        blocks = triton.cdiv(self.normals, 1024) + triton.cdiv(B, 256)
        launch(draw, (blocks, self.K), self.key, self.step, self.normal, self.index, d.bc_step, d.coin,
               len(dataset.state), self.normal.stride(0), NORMALS=self.normals, LAST=B, GUMBEL=0, COUNTERS=256,
               of=c)  # fmt: skip
        launch(gather, (c["BP"] // ROW_TILE, self.K), self.index, *dataset, *self.batch, C2=power(max(c["A"], c["S"])),
               of=c)  # fmt: skip
        self.update(type(dataset)(*self.batch), d)
        return self.losses

    def update(self, batch, draws) -> tuple[Tensor, ...]:
        """One iteration of Algorithm 1: batch and draws (K, ..), as many.update's; the fields of Losses, (K,) each."""
        args, policy, critic, rows, q_rows = self.args, self.policy, self.critic, self.rows, self.critic_rows
        c, cq, bc_step, tiles = rows.constants, q_rows.constants, draws.bc_step, rows.constants["BP"] // ROW_TILE
        self.denoise(rows, batch.state, batch.next_state, draws.policy_noise, draws.next_noise, batch.action,
                     draws.bc_noise, bc_step, args.num_updates if args.lr_decay else 0)  # fmt: skip
        if self.has_critics:
            inputs = rows.x[:, c["X_SECOND"] :], batch.state, batch.next_state, bc_step
            critic.forward(q_rows, (batch.action, *inputs), critic.weight(0)[1], 0, c["BP"], c["RP"])
            launch(critic_losses, (tiles, self.K), q_rows.h[:, -1], *critic.weight(-1), q_rows.slope[:, -1],
                   batch.reward, batch.done, self.dq, q_rows.dz[:, -1], self.critic_sums, GAMMA=args.gamma,
                   of=cq)  # fmt: skip
            critic.backward(q_rows, 0, c["BP"])
            critic.weight_gradients(q_rows, self.dq, batch.action, batch.state, bc_step)
            critic.descend(self.step, args.grad_norm, args.tau, 1, 0)
            critic.forward(q_rows, (rows.x, *inputs), critic.weight(0)[1], 0, c["BP"], 0)
            self.q_values(q_rows, self.q, c["BP"], True)
            critic.backward(q_rows, 0, c["BP"])
        chain = reversed(self.passes(rows)) if c["TRAINED"] > c["BP"] else [(0, 0, c["BP"])]
        for i, first, n in chain:
            if self.has_critics:
                net, source = (policy, rows) if i > 0 else (critic, q_rows)
                launch(to_action, (tiles, self.K), source.dz, net.weight(0)[0], self.q, draws.coin, self.eta, bc_step,
                       self.forward_scale, self.reverse, self.free, self.dx, self.deps, i, FROM_Q=i == 0,
                       ONE_STEP=args.one_step_gradient, TRAINED=c["TRAINED"], of=source.constants)  # fmt: skip
            policy.backward(rows, first, n, self.deps)
        policy.weight_gradients(rows, self.deps, rows.x[:, c["BP"] :], batch.state, bc_step)
        launch(time_backward, (self.K,), self.sinusoid, policy.weights, policy.partial, **self.time, of=c)
        policy.descend(self.step, args.grad_norm, 1 - args.average_decay, args.average_every, args.average_from)
        blocks = critic.constants["BLOCKS"]
        launch(finish, (self.K,), self.losses, self.bc_sums, self.critic_sums, self.q, draws.coin, self.eta,
               policy.squares, critic.squares, self.step, policy.steps, critic.steps, HAS_CRITICS=self.has_critics,
               TILES=tiles, TILES2=power(tiles), CRITIC_BLOCKS=blocks,
               BLOCKS2=power(max(blocks, c["BLOCKS"])), of=c)  # fmt: skip
        return self.losses.unbind(1)

    def passes(self, rows: Rows) -> list[tuple[int, int, int]]:
        """(i, first row, number of rows) of each pass of the first section; the first pass has L_d's rows too."""
        BP, trained, last = rows.constants["BP"], rows.constants["TRAINED"], self.N - 1
        if trained == BP and not rows.constants["RP"]:  # cloning: L_d alone
            return [(0, 0, BP)]
        if trained == BP:  # --one-step-gradient: L_d, and the second section's chain
            return [(i, 0, BP * (i == last)) for i in reversed(range(self.N))]
        return [(i, i * BP, (trained > 0) * BP * (2 if i == last else 1)) for i in reversed(range(self.N))]

    def denoise(self, rows: Rows, state: Tensor, state2: Tensor, noise: Tensor, noise2: Tensor, action: Tensor,
                bc_noise: Tensor, bc_step: Tensor, decay_over: int = 0) -> None:  # fmt: skip
        """The chains of both sections, and L_d: from noise (K, N + 1, .., A) to actions, in rows.x."""
        policy, x, c = self.policy, rows.x, rows.constants
        training, RP = c["TRAINED"] > 0, c["RP"]
        tiles, tiles2, first_lr = training * c["BP"] // ROW_TILE, RP // ROW_TILE, self.args.learning_rate
        launch(start, (tiles + tiles2, self.K), x, noise, noise2, action, bc_noise, bc_step, self.forward_scale,
               self.step, policy.lr, self.critic.lr, tiles, noise.stride(0), noise2.stride(0), bc_noise.stride(0),
               UPDATES=decay_over, RATE=first_lr, RATE2=self.many.critic_learning_rate, of=c)  # fmt: skip
        both = training and RP > 0  # roles; otherwise the one that the rows have
        launch(time_forward, (c["HID"] // c["T"], self.K * (1 + both)), self.sinusoid, policy.weights, self.table,
               SHIFT=0 if training else c["SHIFT"], **self.time, of=c)  # fmt: skip
        inputs = x[:, training * c["BP"] :], x[:, c["X_SECOND"] :], state, state2, bc_step
        for i, first, n in self.passes(rows):
            policy.forward(rows, inputs, self.table, first, n, RP, i)
            push, push2 = noise[:, self.N - i], noise2[:, self.N - i]
            launch(reverse_step, (n // ROW_TILE + tiles2, self.K), rows.h[:, -1], *policy.weight(-1), x, push, push2,
                   bc_noise, bc_step, self.forward_scale, self.reverse, self.free, self.deps, self.bc_sums, first,
                   n // ROW_TILE, i, push.stride(0), push2.stride(0), bc_noise.stride(0),
                   LIMIT=self.many.policy.max_action, ONE_STEP=self.args.one_step_gradient, of=c)  # fmt: skip

    def q_values(self, rows: Rows, q: Tensor, n: int, gradient: bool) -> None:
        """Q of n rows into q (2 K, n): of the critics, with the gradient of their sum in dz, or of their targets."""
        launch(q_values, (n // ROW_TILE, 2 * self.K), rows.h[:, -1], *self.critic.weight(-1), rows.slope[:, -1], q,
               rows.dz[:, -1], GRADIENT=gradient, of=rows.constants)  # fmt: skip

    # ------------------------------------------------------------------------- acting

    def seed_acting(self, seeds: list[int]) -> None:
        """Begins the noise of `act_fresh` anew, from a seed for each replica."""
        self.act_key.copy_(torch.tensor(seeds))
        self.act_count.zero_()
        self.act_seeds = seeds

    def reseed(self, generators: list[torch.Generator]) -> None:
        """Follows generators that were seeded anew: a captured graph cannot look at them."""
        seeds = [g.initial_seed() for g in generators]
        if seeds != self.act_seeds:
            self.seed_acting(seeds)

    def act_fresh(self, states: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Actions (K E, A) for states (K E, S), replica by replica, with fresh noise; overwritten by the next."""
        self.reseed(generators)
        own = self.actor(len(states) // self.K, self.args.eval_candidates)
        noise, gumbel, normals, last = own.noise, own.gumbel, own.noise[0].numel(), own.gumbel[0].numel()
        launch(draw, (triton.cdiv(normals, 1024) + triton.cdiv(last, 256), self.K), self.act_key, self.act_count, noise,
               self.index, self.index, gumbel, 1, normals, NORMALS=normals, LAST=last, STEPS=1, GUMBEL=1,
               COUNTERS=256)  # fmt: skip
        return self.act(states, own)

    def actor(self, E: int, C: int) -> SimpleNamespace:
        """The buffers of acting in E states with C candidates, which live as long as the agent: graphs use them."""
        if (E, C) not in self.actors:
            self.actors[E, C] = self.new_actor(E, C)
        return self.actors[E, C]

    def new_actor(self, E: int, C: int) -> SimpleNamespace:
        K, A, new = self.K, self.action_dim, self.table.new_zeros
        rows = Rows(self.policy, 1, 0, E * C, C, K * self.args.eval_average)
        return SimpleNamespace(
            rows=rows, q_rows=Rows(self.critic, 1, 0, E * C, C, 2 * K), q=new(2 * K, rows.constants["RP"]),
            out=new(K * E, A), noise=new(K, self.N + 1, E * C, A), gumbel=new(K, E, C),
        )  # fmt: skip

    def act(self, states: Tensor, draws) -> Tensor:
        """Actions (K E, A) for states (K E, S): of C candidates each, one drawn from the softmax of min target Q."""
        E, C = draws.gumbel.shape[1:]
        own = self.actor(E, C)
        x, RP = own.rows.x, own.rows.constants["RP"]
        self.denoise(own.rows, states, states, draws.noise, draws.noise, x, x, self.index)
        if C > 1:
            self.critic.forward(own.q_rows, (x, x, states, states, self.index), self.critic.weight(0)[1], 0, 0, RP)
            self.q_values(own.q_rows, own.q, RP, False)
        launch(choose, (E, self.K), own.q, draws.gumbel, x, own.out, self.act_count, draws.gumbel.stride(0),
               TEMPERATURE=self.args.eval_temperature, of=own.rows.constants)  # fmt: skip
        return own.out
