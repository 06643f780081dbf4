"""kernels.py and fused.py beside dql.py: in Triton's interpreter, in float64; on a GPU the tests named cuda.

float64 leaves no room: what is equal to 1e-9 after many updates computes the same function. What the interpreter does
not have (machine code, blocks that run at once, TF32, capture) the cuda tests check, and compiling ahead of time.
"""

import copy
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import dql
from dql import Args, Batch, DiffusionQL, Draws
from fast_sampler import FastSampler, FastUpdate, make_steps, replicate, unstack
from fast_sampler import states_of as states_of_seeds

pytest.importorskip("triton")
from fused import FusedDiffusionQL

ROOT = Path(__file__).resolve().parents[1]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not in use")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

if not torch.cuda.is_available():
    from triton.runtime import interpreter

    # checking every sum of integers for overflow takes half of the interpreter's time
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


@pytest.fixture(autouse=True)
def float64():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_agent(seed: int = 0, state_dim: int = 5, action_dim: int = 3, width: int = 32, device="cpu", **args):
    """An agent with narrow networks."""
    torch.manual_seed(seed)
    args = {"env_id": "halfcheetah-medium-v2", "batch_size": 13, "num_updates": 1000, "compile": False, **args}
    agent = DiffusionQL(state_dim, action_dim, Args(seed=seed, device=device, **args))
    if width != 256:
        agent.policy.trunk = dql.mlp(action_dim + dql.TIME_DIM + state_dim, *3 * [width]).append(dql.Mish())
        agent.policy.output = nn.Linear(width, action_dim)
        agent.critic.q1, agent.critic.q2 = (dql.mlp(state_dim + action_dim, *3 * [width], 1) for _ in range(2))
        agent.policy_ema = copy.deepcopy(agent.policy).requires_grad_(False)
        agent.critic_target = copy.deepcopy(agent.critic).requires_grad_(False)
        agent.policy_opt = agent.adam(agent.policy, agent.args.learning_rate)
        agent.critic_opt = agent.adam(agent.critic, agent.critic_learning_rate)
    averages = [agent.policy_ema, agent.critic_target] if agent.has_critics else [agent.policy_ema]
    with torch.no_grad():  # unlike in a new agent, weights and averages differ
        for p in (p for average in averages for p in average.parameters()):
            p.add_(0.1 * torch.randn_like(p))
    return agent


def pair(K: int = 1, **args) -> tuple[DiffusionQL, FusedDiffusionQL]:
    """The same K agents, each with its own eta, by replicate and by the kernels."""
    eta = args.pop("eta", 1.0)
    agents = [make_agent(seed, eta=eta * (1 + seed / 2), **args) for seed in range(K)]
    return replicate(agents), FusedDiffusionQL(replicate(agents))


def generators(K: int, device="cpu") -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(k) for k in range(K)]


def random_batch(agent, seed: int) -> Batch:
    g, K, B = torch.Generator().manual_seed(seed), len(agent.eta), agent.args.batch_size
    S, A = agent.state_dim, agent.action_dim
    normal, uniform = (lambda *shape: torch.randn(*shape, generator=g)), torch.rand(K, B, generator=g)
    batch = Batch(normal(K, B, S), normal(K, B, A).clamp(-1, 1), normal(K, B), normal(K, B, S), (uniform < 0.2) * 1.0)
    return Batch(*(x.to(agent.device) for x in batch))


def states_of(agent) -> list[torch.Tensor]:
    return [x for x in tree_leaves(agent.state_dict()) if isinstance(x, torch.Tensor)]


def worst(got, wanted) -> float:
    """The largest relative difference between tensors, by norm."""
    pairs = list(zip(got, wanted, strict=True))
    assert pairs and all(a.shape == b.shape for a, b in pairs)
    return max(((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item() for a, b in pairs)


# ----------------------------------------------------------------------------- kernels, one or a few at a time


@on_cpu
@pytest.mark.parametrize("shape", [{}, {"action_dim": 24, "state_dim": 60, "batch_size": 33, "width": 16}])
def test_layers_and_their_gradients(shape):
    """Hidden layers of critics and targets in one launch each; the first's gradients, beside autograd."""
    many, fused = pair(K=2, **shape)
    net, rows, B = fused.critic, fused.critic_rows, many.args.batch_size
    batch, next_action = random_batch(many, 0), torch.randn(2, rows.constants["RP"], many.action_dim)
    inputs = (batch.action, next_action, batch.state, batch.next_state, torch.zeros(2, B, dtype=torch.int64))
    BP, RP = rows.constants["BP"], rows.constants["RP"]
    net.forward(rows, inputs, net.weight(0)[1], 0, BP, RP)
    dq = torch.randn(4, BP, 1)
    dq[:, B:] = 0
    net.backward(rows, 0, BP, dq)
    net.weight_gradients(rows, dq, batch.action, batch.state, inputs[-1])
    for k in range(2):
        for n, name in enumerate(("q1", "q2")):
            q, target = (copy.deepcopy(getattr(getattr(many, c), name)) for c in ("critic", "critic_target"))
            for p in (*q.parameters(), *target.parameters()):
                p.data = p.data[k]
            h, of_second = torch.cat([batch.state[k], batch.action[k]], -1), rows.h[2 * k + n, :, BP : BP + B]
            h2 = torch.cat([batch.next_state[k], next_action[k, :B]], -1)
            for l in range(3):  # noqa: E741
                z = q[2 * l](h)
                h, h2 = q[2 * l + 1](z), target[2 * l + 1](target[2 * l](h2))
                (slope,) = torch.autograd.grad(h.sum(), z, retain_graph=True)
                got = rows.h[2 * k + n, l, :B], rows.slope[2 * k + n, l, :B], of_second[l]
                assert worst(got, (h, slope, h2)) < 1e-13
            grads = torch.autograd.grad((q[6](h) * dq[2 * k + n, :B]).sum(), list(q.parameters()))
            part = net.partial.sum(0)[2 * k + n]
            offsets = [x for layer in zip(net.w, net.b, strict=True) for x in layer]
            got = [part[at : at + g.numel()].view(g.shape) for at, g in zip(offsets, grads, strict=True)]
            assert worst(got, grads) < 1e-12


@on_cpu
@pytest.mark.parametrize("shape", [{}, {"action_dim": 24, "state_dim": 60, "num_steps": 2}, {"num_steps": 1}])
def test_chains_and_imitation(shape):
    """The actions of both chains and L_d: start, time_forward, reverse_step and the layers."""
    many, fused = pair(K=2, **shape)
    batch, draws = random_batch(many, 0), many.draw(generators(2))
    c, B = fused.rows.constants, many.args.batch_size
    fused.denoise(fused.rows, batch.state, batch.next_state, draws.policy_noise, draws.next_noise, batch.action,
                  draws.bc_noise, draws.bc_step)  # fmt: skip
    for k in range(2):
        one = make_agent(**shape)
        one.load_state_dict(unstack(many.state_dict(), k))
        action = one.policy.sample(batch.state[k], draws.policy_noise[k])
        next_action = one.policy_ema.sample(batch.next_state[k], draws.next_noise[k])
        bc = one.policy.bc_loss(batch.action[k], batch.state[k], draws.bc_step[k], draws.bc_noise[k])
        at = c["X_SECOND"]
        got = fused.rows.x[k, :B], fused.rows.x[k, at : at + B], fused.bc_sums[k].sum() / (B * many.action_dim)
        assert worst(got, (action, next_action, bc)) < 1e-12


@on_cpu
@pytest.mark.parametrize("coin", [0.2, 0.8])
@pytest.mark.parametrize("max_q_backup", [False, True])
def test_gradients(coin, max_q_backup):
    """Both networks' gradients before clipping, and their norms, of each coin: every kernel up to adam."""
    many, fused = pair(K=2, max_q_backup=max_q_backup, num_steps=2, grad_norm=0.0)
    fused.critic.lr.zero_()  # the policy's gradient is of the critics as they are
    fused.policy.lr.zero_()
    batch, draws = random_batch(many, 0), many.draw(generators(2))
    draws = draws._replace(coin=torch.tensor([coin, 1 - coin]))
    fused.update(batch, draws)
    for name, net in (("critic", fused.critic), ("policy", fused.policy)):
        grads, norm, *_ = getattr(many, f"{name}_gradient")(batch, draws)
        offsets = [p.storage_offset() for p in getattr(fused.many, name).parameters()]
        got = [net.grad[:, at : at + g[0].numel()].view(g.shape) for at, g in zip(offsets, grads, strict=True)]
        assert worst(got, grads) < 1e-12
        assert worst([net.squares.sum(1).sqrt()], [norm]) < 1e-12


@on_cpu
@pytest.mark.parametrize("largest", [0.0, 1e-2, 1e3])
def test_optimizer(largest):
    """sum_parts and adam beside torch's clipping, Adam and lerp, of two replicas whose norms differ, for five steps."""
    _, fused = pair(K=2)
    net, count = fused.policy, torch.tensor(0)
    begun = net.weights.clone()
    wanted = [nn.Parameter(begun[0, k].clone()) for k in range(2)]
    averages, adams = [begun[1, k].clone() for k in range(2)], [torch.optim.Adam([p], lr=1e-2) for p in wanted]
    net.lr.fill_(1e-2)
    for step in range(5):
        count.fill_(step)
        net.partial.normal_().mul_(torch.tensor([1e-3, 1.0])[:, None])
        net.descend(count, largest, 0.1, 2, 2)
        net.steps += 1
        for k in range(2):
            wanted[k].grad = net.partial[:, k, : net.constants["SIZE"]].sum(0)
            nn.utils.clip_grad_norm_([wanted[k]], largest or math.inf)
            adams[k].step()
            if step in (2, 4):
                averages[k].lerp_(wanted[k].detach(), 0.1)
    assert worst(net.weights[0], wanted) < 1e-12
    assert worst(net.weights[1], averages) < 1e-12


# ----------------------------------------------------------------------------- whole updates, and acting

CASES = {
    "one agent": (100, {}),
    "three replicas": (8, {"K": 3, "average_from": 3, "average_every": 2}),
    "Max-Q": (4, {"max_q_backup": True, "num_steps": 2}),
    "cloning": (12, {"K": 2, "eta": 0.0}),
    "N = 1, decay, no clipping": (12, {"num_steps": 1, "grad_norm": 0.0, "lr_decay": True, "num_updates": 20}),
    "N = 2, A = 24, S = 60": (6, {"num_steps": 2, "action_dim": 24, "state_dim": 60, "batch_size": 33}),
    "A = 6, the average moves, gradients are clipped": (
        10, {"action_dim": 6, "batch_size": 16, "average_from": 4, "average_every": 3, "grad_norm": 0.05, "K": 2,
             "num_steps": 2},
    ),
    "several tiles of columns": (2, {"width": 128, "num_steps": 1}),
    "one step": (8, {"K": 2, "one_step_gradient": True, "num_steps": 3, "batch_size": 20}),
    "one step, Max-Q, decay": (
        4, {"one_step_gradient": True, "max_q_backup": True, "num_steps": 2, "lr_decay": True, "num_updates": 9}
    ),
    "A = 1, large tiles of rows": (2, {"K": 4, "action_dim": 1, "batch_size": 70, "num_steps": 1}),
}  # fmt: skip


@on_cpu
@pytest.mark.parametrize("case", CASES)
def test_updates_equal_eager_ones(case):
    """Losses of each update and, after all, networks, averages, Adam's states, learning rates and counts."""
    updates, args = CASES[case]
    many, fused = pair(**args)
    drawn = generators(len(many.eta))
    for step in range(updates):
        batch, draws = random_batch(many, step), many.draw(drawn)
        wanted, got = many.update(batch, draws), fused.update(batch, draws)
        assert worst(got, wanted) < 1e-9
    assert worst(states_of(fused), states_of(many)) < 1e-9
    assert fused.step == updates


@on_cpu
@pytest.mark.parametrize("args", [{"K": 2}, {"eval_average": True}, {"eval_candidates": 1}, {"eval_temperature": 0.0},
                                  {"eta": 0.0}])  # fmt: skip
def test_acting_equals_eager_acting(args):
    many, fused = pair(num_steps=2, **{"eval_candidates": None if "eta" in args else 20, **args})
    K = len(many.eta)
    states = torch.randn(K * 3, many.state_dim)
    draws = many.draw_act(len(states), generators(K))
    assert worst([fused.act(states, draws)], [many.act(states, draws)]) < 1e-12


@on_cpu
def test_checkpoints_are_interchangeable():
    """A state of either path continues in the other."""
    many, fused = pair(K=2, num_steps=1)
    other, other_fused = pair(K=2, num_steps=1)
    drawn = generators(2)
    batch, draws = random_batch(many, 0), many.draw(drawn)
    many.update(batch, draws)
    fused.update(batch, draws)
    other.load_state_dict(copy.deepcopy(fused.state_dict()))
    other_fused.load_state_dict(copy.deepcopy(many.state_dict()))
    batch, draws = random_batch(many, 1), many.draw(drawn)
    for agent in (many, other, other_fused):
        agent.update(batch, draws)
    assert worst(states_of(other), states_of(many)) < 1e-9
    assert worst(states_of(other_fused), states_of(many)) < 1e-9


# ----------------------------------------------------------------------------- random numbers


def data(rows: int, state_dim: int = 5, action_dim: int = 3, device="cpu") -> Batch:
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g).to(device)  # noqa: E731
    actions = normal(rows, action_dim).clamp(-1, 1)
    return Batch(normal(rows, state_dim), actions, torch.arange(rows) * 1.0, normal(rows, state_dim), normal(rows) * 0)


def drawn_by(fused: FusedDiffusionQL, seeds: list[int], step: int, rows: int = 7) -> Draws:
    """What train_step draws, and the index, without the update."""
    fused.step.fill_(step)
    fused.update = lambda batch, draws: None
    fused.train_step(data(rows, fused.state_dim), [torch.Generator().manual_seed(s) for s in seeds])
    return Draws(*(x.clone() for x in fused.draws)), fused.index.clone()


@on_cpu
def test_draws_are_distributed_as_they_should():
    _, fused = pair(K=2, batch_size=2000, width=16)
    draws, index = drawn_by(fused, [0, 1], 0)
    for noise in (draws.next_noise, draws.bc_noise, draws.policy_noise):
        x = noise.flatten()
        n = len(x)
        for power, moment, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
            assert abs((x**power).mean() - moment) < 5 * deviation / n**0.5
        assert len(x.unique()) > 0.99 * n  # 31 random bits: a few coincide
        below = torch.special.ndtr(x.sort().values) - torch.arange(n) / n
        assert below.abs().max() < 2.5 / n**0.5  # Kolmogorov and Smirnov
    for numbers, values in ((draws.bc_step, 5), (index, 7)):
        counts = torch.bincount(numbers.flatten(), minlength=values)
        assert len(counts) == values and ((counts - 4000 / values) ** 2 * values / 4000).sum() < 30  # chi-squared
    assert worst([fused.batch[2]], [index]) == 0  # gather: rewards are the rows' numbers
    assert worst([fused.batch[0], fused.batch[3]], [data(7).state[index], data(7).next_state[index]]) == 0
    assert worst([fused.batch[1]], [data(7).action[index]]) == 0


@on_cpu
def test_draws_are_fresh_by_step_and_replica_and_repeat():
    _, fused = pair(K=3)
    _, alone = pair(K=1)
    draws, index = drawn_by(fused, [3, 4, 5], 7)
    again, index_again = drawn_by(fused, [3, 4, 5], 7)
    later, index_later = drawn_by(fused, [3, 4, 5], 8)
    of_one, index_of_one = drawn_by(alone, [4], 7)
    assert all(torch.equal(*x) for x in zip((*draws, index), (*again, index_again), strict=True))
    for x, y, z in zip((*draws, index), (*later, index_later), (*of_one, index_of_one), strict=True):
        assert torch.equal(x[1], z[0])
        assert not torch.equal(x, y) and not torch.equal(x[0], x[1])
    flat = torch.cat([draws.next_noise.flatten(), draws.policy_noise.flatten(), draws.bc_noise.flatten()])
    assert len(flat.unique()) == len(flat)
    coins = torch.stack([drawn_by(alone, [3], step)[0].coin for step in range(200)]).flatten()
    assert 0.42 < coins.mean() < 0.58 and 0.38 < (coins > 0.5).double().mean() < 0.62
    assert coins.min() >= 0 and coins.max() < 1


@on_cpu
def test_acting_noise():
    """Gumbel's and normal numbers; fresh in each call, the same after seed_acting."""
    _, fused = pair(K=2, eval_candidates=200, num_steps=1, width=16)
    states = torch.randn(2 * 2, 5)
    first, own = fused.act_fresh(states, generators(2)).clone(), fused.actor(2, 200)
    noise, gumbel = own.noise.clone(), own.gumbel.clone()
    second = fused.act_fresh(states, generators(2)).clone()
    assert not torch.equal(first, second) and not torch.equal(noise, own.noise)
    fused.seed_acting([0, 1])
    assert torch.equal(fused.act_fresh(states, generators(2)), first)
    n = gumbel.numel()
    assert abs(gumbel.mean() - 0.5772) < 5 * 1.283 / n**0.5 and abs(gumbel.std() - 1.283) < 0.2
    assert abs(noise.mean()) < 5 / noise.numel() ** 0.5 and abs(noise.std() - 1) < 0.05
    assert not torch.equal(noise[0], noise[1])


@on_cpu
def test_a_replica_of_many_is_that_agent_alone_and_resumes():
    """train_step, by seed: three agents, the second of them alone, and new ones that continue from a checkpoint."""
    agents, dataset = [make_agent(k, num_steps=1) for k in range(3)], data(50)
    many, alone = FusedDiffusionQL(replicate(agents)), FusedDiffusionQL(replicate(agents[1:2]))
    for step in range(4):
        if step == 2:
            resumed = FusedDiffusionQL(replicate(agents))
            resumed.load_state_dict(copy.deepcopy(many.state_dict()))
        losses = many.train_step(dataset, generators(3))
        assert worst([losses[1]], alone.train_step(dataset, generators(3)[1:2])) < 1e-12
        if step >= 2:
            assert torch.equal(resumed.train_step(dataset, generators(3)), losses)
    assert worst(states_of(alone), [x[1:2] if x.dim() else x for x in states_of(many)]) < 1e-12


@on_cpu
def test_a_run_takes_the_kernels():
    """make_steps with --fused: trying leaves no trace, states fit the eager agent, a seed begins new noise."""
    tiny = {"batch_size": 8, "num_steps": 2, "hidden_dim": 16, "eval_episodes": 2, "eval_candidates": 3}
    args = dql.with_settings(Args(device="cpu", fused=True, cudagraphs=True, compile=False, **tiny))
    eager, acting = DiffusionQL(5, 2, args), generators(1)
    before = copy.deepcopy(eager.state_dict())
    agents, updates, act = make_steps(args, [eager], data(40, 5, 2), generators(1), acting)
    (state,) = states_of_seeds(agents, 1)
    leaves = zip(tree_leaves(before), tree_leaves(state), strict=True)
    assert all(torch.equal(a, b) for a, b in leaves if isinstance(a, torch.Tensor))
    assert updates(3).shape == (1, 7)
    (state,) = states_of_seeds(agents, 1)
    eager.load_state_dict(state)
    assert eager.step == 3 and not torch.equal(before["critic"]["q1.0.weight"], eager.critic.q1[0].weight)
    states, found = torch.randn(2, 5), []
    for seed in (5, None, 6, 5):
        if seed is not None:
            acting[0].manual_seed(seed)
        found.append(act(states))
    assert torch.equal(found[0], found[3]) and not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# ----------------------------------------------------------------------------- launches, compiling


def launches(monkeypatch, K: int, states: int = 0, **args) -> Counter:
    """How often each kernel is launched in a training step or in acting, at HalfCheetah's shapes."""
    agents = [make_agent(k, 17, 6, 256, batch_size=256, **args) for k in range(K)]
    agent, found = FusedDiffusionQL(replicate(agents)), Counter()
    monkeypatch.setattr("fused.launch", lambda kernel, *rest, **constants: found.update([kernel.fn.__name__]))
    if states:
        agent.act_fresh(torch.zeros(K * states, 17), generators(K))
    else:
        agent.train_step(data(1000, 17, 6), generators(K))
    monkeypatch.undo()
    return found


def test_an_update_has_at_most_ninety_launches(monkeypatch):
    one = launches(monkeypatch, 1)
    assert one.total() <= 90 and launches(monkeypatch, 5) == one
    assert launches(monkeypatch, 1, eta=0.0).total() <= 20
    assert launches(monkeypatch, 1, states=10).total() <= 30


@on_cpu
def test_kernels_compile_without_spills():
    """For a GPU, ahead of time: the kernels of an update at HalfCheetah's shapes."""
    path = Path(sys.modules["triton"].__file__).parent / "backends/nvidia/bin/ptxas"
    if not path.exists():
        pytest.skip("this triton has no ptxas")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "bench/compile_kernels.py", "--arch", "90", "--replicas", "1", "--quick"]
    told = subprocess.run(command, env=env, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr


# ----------------------------------------------------------------------------- on a GPU


@pytest.fixture
def float32():
    torch.set_default_dtype(torch.float32)


def on_device(K: int = 1, **args) -> tuple[DiffusionQL, FusedDiffusionQL]:
    agents = [make_agent(k, 17, 6, 256, "cuda", batch_size=256, **args) for k in range(K)]
    return replicate(agents), FusedDiffusionQL(replicate(agents))


@on_gpu
@pytest.mark.parametrize("args", [{}, {"K": 5}, {"max_q_backup": True}, {"eta": 0.0}])
def test_cuda_updates_equal_eager_ones(float32, args):
    """Ten updates, each from the same state: Adam, which amplifies what rounding differs, would add it up."""
    many, fused = on_device(**args)
    drawn = generators(len(many.eta), "cuda")
    for step in range(10):
        fused.load_state_dict(copy.deepcopy(many.state_dict()))
        batch, draws = random_batch(many, step), many.draw(drawn)
        batch = Batch(*(x.float() for x in batch))
        assert worst(fused.update(batch, draws), many.update(batch, draws)) < 1e-4
        for name in ("policy_opt", "critic_opt"):
            got, wanted = (tree_leaves([s["exp_avg"] for s in x.state_dict()[name]["state"].values()])
                           for x in (fused, many))  # fmt: skip
            assert worst(got, wanted) < 1e-3


@on_gpu
def test_cuda_acting_equals_eager_acting(float32):
    many, fused = on_device(K=2)
    states = torch.randn(20, 17, device="cuda")
    draws = many.draw_act(20, generators(2, "cuda"))
    same = (fused.act(states, draws) - many.act(states, draws)).abs().amax(1) < 1e-4
    assert same.sum() >= 19  # Q of two candidates may be equal up to rounding


@on_gpu
@pytest.mark.parametrize("K", [1, 5])
def test_cuda_graph_has_the_bits_of_launches_and_repeats(float32, K):
    dataset, results = data(1000, 17, 6, "cuda"), []
    dataset = Batch(*(x.float().cuda() for x in dataset))
    for captured in (True, True, False):
        _, fused = on_device(K)
        g = generators(K, "cuda")
        if captured:
            FastUpdate(fused, dataset, g)(50)
        else:
            for _ in range(50):
                fused.train_step(dataset, g)
        results.append([x.clone() for x in states_of(fused)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@on_gpu
def test_cuda_captured_acting(float32):
    _, fused = on_device(K=2)
    g, states = generators(2, "cuda"), torch.randn(20, 17, device="cuda")
    sampler = FastSampler(fused, 10, g)
    fused.seed_acting([0, 1])
    first, second = sampler(states), sampler(states)
    assert not torch.equal(first, second)
    fused.seed_acting([0, 1])
    assert torch.equal(sampler(states), first)
