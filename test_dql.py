"""Tests of dql.py, d4rl_tasks.py and the files they use, each part against something independent of it.

    pytest test_dql.py

Oracles: the official implementation's numbers (reference/official_update.json), steps of D4RL's own environments
(reference/classic_steps.npz), closed forms and second implementations in float64.
"""

import copy
import csv
import errno
import functools
import gc
import hashlib
import http.server
import io
import itertools
import json
import math
import operator
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import command_line
import compiling
import d4rl_tasks
import dql
import fast_sampler
import run_folder
from d4rl_tasks import TASKS, BadInput, load_dataset, make_env, make_envs, normalized_score
from dql import ActDraws, Args, Batch, DiffusionPolicy, DiffusionQL, Draws, beta_schedule
from fast_sampler import FastSampler, FastUpdate, replicate, unstack

torch.set_num_threads(1)  # the networks are small: threads would wait for each other, most of all on a busy machine

HERE = Path(__file__).parent
REFERENCE = HERE / "reference"
OFFICIAL = json.loads((REFERENCE / "official_update.json").read_text())
mujoco_wanted = pytest.mark.skipif(
    not all(map(d4rl_tasks.find_spec, ("gymnasium", "gymnasium_robotics", "mujoco"))), reason="no simulator installed"
)
RUN_PACKAGES = ("gymnasium", "gymnasium_robotics", "mujoco", "h5py", "tqdm", "tensorboard", "matplotlib")
run_wanted = pytest.mark.skipif(not all(map(d4rl_tasks.find_spec, RUN_PACKAGES)), reason="no packages for whole runs")
can_compile, gpu_compiles = (
    pytest.mark.skipif(bool(lacks), reason=f"compiling needs {lacks}")
    for lacks in map(fast_sampler.lacks_to_compile, (False, True))
)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tiny_agent(state_dim=3, action_dim=2, **args) -> DiffusionQL:
    torch.manual_seed(0)
    return DiffusionQL(state_dim, action_dim, Args(**{"device": "cpu", "batch_size": 8, **args}))


def random_batch(agent: DiffusionQL, state_dim=3, seed=0) -> Batch:
    rng, rows = np.random.default_rng(seed), agent.args.batch_size
    arrays = (
        rng.standard_normal((rows, state_dim)), np.tanh(rng.standard_normal((rows, agent.action_dim))),
        rng.standard_normal(rows), rng.standard_normal((rows, state_dim)), rng.uniform(size=rows) < 0.2,
    )  # fmt: skip
    return Batch(*(torch.as_tensor(a, dtype=torch.get_default_dtype()) for a in arrays))


def parameters(agent: DiffusionQL) -> list[torch.Tensor]:
    return [p.detach().clone() for name in ("policy", "policy_ema", "critic", "critic_target")
            for p in getattr(agent, name).parameters()]  # fmt: skip


# ----------------------------------------------------------------- equal to the official implementation


def fill_official(network: torch.nn.Module, rs: np.random.RandomState) -> None:
    """Draws weights as the official run did: uniform(-1, 1) / sqrt(fan-in), fan-in 16 for a bias, layer by layer."""
    for p in network.parameters():
        p.data.copy_(torch.as_tensor(rs.uniform(-1, 1, p.shape) / math.sqrt(p.shape[1] if p.dim() == 2 else 16)))


def official_batch(rs: np.random.RandomState, S: int, A: int, B: int) -> Batch:
    state, action = rs.standard_normal((B, S)), np.tanh(rs.standard_normal((B, A)))
    next_state, reward = rs.standard_normal((B, S)), rs.standard_normal((B, 1))[:, 0]
    done = (rs.uniform(size=(B, 1)) < 0.2)[:, 0].astype(float)
    return Batch(*map(torch.as_tensor, (state, action, reward, next_state, done)))


def official_draws(rs: np.random.RandomState, A: int, B: int, N: int, rows: int) -> Draws:
    next_noise = np.stack([rs.standard_normal((rows, A)) for _ in range(N + 1)])
    bc_step, bc_noise = rs.randint(0, N, size=(B,)), rs.standard_normal((B, A))
    policy_noise = np.stack([rs.standard_normal((B, A)) for _ in range(N + 1)])
    return Draws(*map(torch.as_tensor, (next_noise, bc_step, bc_noise, policy_noise, rs.uniform())))


@pytest.mark.parametrize("case", OFFICIAL["cases"])
def test_official_updates(case, float64):
    """Twelve updates match the official implementation's losses, actions, Q values and weight norms to 1e-9."""
    want = OFFICIAL["cases"][case]
    c = want["config"]
    S, A, B, N = (c[k] for k in "SABN")
    agent = DiffusionQL(S, A, Args(
        eta=c["eta"], grad_norm=c["gn"], learning_rate=c["lr"], max_q_backup=c["max_q_backup"], num_steps=N,
        schedule=c["schedule"], batch_size=B, tau=OFFICIAL["tau"], gamma=OFFICIAL["discount"], device="cpu",
        average_decay=OFFICIAL["ema_decay"], average_every=OFFICIAL["ema_every"], average_from=OFFICIAL["ema_start"],
    ))  # fmt: skip
    rs = np.random.RandomState(c["seed"])
    fill_official(agent.policy, rs)
    fill_official(agent.critic, rs)
    agent.policy_ema.load_state_dict(agent.policy.state_dict())
    agent.critic_target.load_state_dict(agent.critic.state_dict())

    for expected in want["losses"]:
        batch = official_batch(rs, S, A, B)
        losses = agent.update(batch, official_draws(rs, A, B, N, 10 * B if c["max_q_backup"] else B))
        got = [losses.critic, losses.bc, losses.q, losses.policy]
        names = ("critic_loss", "bc_loss", "ql_loss", "actor_loss")
        np.testing.assert_allclose(got, [expected[k] for k in names], rtol=1e-9)

    state = torch.as_tensor(rs.standard_normal((8, S)))
    noise = torch.as_tensor(np.stack([rs.standard_normal((8, A)) for _ in range(N + 1)]))
    with torch.no_grad():
        actions = agent.policy.sample(state, noise)
        q1, q2 = agent.critic(state, actions)
        target_q_min = torch.min(*agent.critic_target(state, actions))
    for name, got in {"actions": actions, "q1": q1, "q2": q2, "target_q_min": target_q_min}.items():
        np.testing.assert_allclose(got.flatten(), np.ravel(want[name]), rtol=1e-9, err_msg=name)
    parts = {"actor": "policy", "ema": "policy_ema", "critic": "critic", "critic_target": "critic_target"}
    for name, part in parts.items():
        norm = torch.cat([p.flatten() for p in getattr(agent, part).parameters()]).norm()
        assert norm.item() == pytest.approx(want["norms"][name], rel=1e-9), name


# ----------------------------------------------------------------- the diffusion policy


@pytest.mark.parametrize("case", OFFICIAL["cases"])
def test_schedules_are_the_official_ones(case):
    want = OFFICIAL["cases"][case]
    np.testing.assert_allclose(
        beta_schedule(want["config"]["schedule"], want["config"]["N"]), want["betas"], rtol=1e-14, atol=1e-16
    )


def test_schedules_by_hand():
    """Each formula as its paper writes it, one number at a time."""
    N = 5
    vp = [1 - math.exp(-0.1 / N - 0.5 * (10 - 0.1) * (2 * i - 1) / N**2) for i in range(1, N + 1)]
    linear = [1e-4 + (2e-2 - 1e-4) * i / (N - 1) for i in range(N)]
    bar = [math.cos((i / N + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(N + 1)]
    cosine = [min(1 - bar[i + 1] / bar[i], 0.999) for i in range(N)]
    for name, want in {"vp": vp, "linear": linear, "cosine": cosine}.items():
        got = beta_schedule(name, N)
        assert got.dtype == torch.float64
        np.testing.assert_allclose(got, want, rtol=1e-13)
    assert beta_schedule("vp", 1).shape == beta_schedule("cosine", 1).shape == (1,)


@pytest.mark.parametrize("schedule", ["vp", "linear", "cosine"])
def test_reverse_chain_is_bayes_rule(schedule, float64):
    """With a constant noise predictor, every reverse step samples the posterior, a product of two Gaussians."""
    N, B = 4, 6
    policy = DiffusionPolicy(3, 2, 1.0, N, schedule)
    eps = torch.tensor([0.3, -0.2])
    policy.output.weight.data.zero_()
    policy.output.bias.data.copy_(eps)
    noise = torch.randn(N + 1, B, 2, generator=torch.Generator().manual_seed(0))
    beta = beta_schedule(schedule, N).numpy()
    bar = np.cumprod(1 - beta)

    a = noise[0].numpy()
    for k, i in enumerate(reversed(range(N)), start=1):
        a0 = np.clip((a - math.sqrt(1 - bar[i]) * eps.numpy()) / math.sqrt(bar[i]), -1, 1)
        if i == 0:
            a = a0
            break
        # prior a^{i-1} | a^0 and likelihood a^i | a^{i-1}: precisions add
        precision = 1 / (1 - bar[i - 1]) + (1 - beta[i]) / beta[i]
        mean = (math.sqrt(bar[i - 1]) * a0 / (1 - bar[i - 1]) + math.sqrt(1 - beta[i]) * a / beta[i]) / precision
        a = mean + precision**-0.5 * noise[k].numpy()
    got = policy.sample(torch.zeros(B, 3), noise).detach()
    np.testing.assert_allclose(got, a, rtol=1e-10, atol=1e-12)


def test_last_noise_is_not_added_and_actions_stay_in_bounds():
    policy = DiffusionPolicy(3, 2, 0.5)
    noise = 3 * torch.randn(6, 50, 2, generator=torch.Generator().manual_seed(0))
    other = noise.clone()
    other[-1] = 9.0
    actions = policy.sample(torch.zeros(50, 3), noise)
    assert torch.equal(actions, policy.sample(torch.zeros(50, 3), other))
    assert actions.abs().max() <= 0.5 and actions.std() > 0


def test_bc_loss_is_eq_2(float64):
    """bc_loss equals Eq. 2 written out one sample at a time."""
    policy = DiffusionPolicy(3, 2, 1.0, 5, "vp")
    rng = np.random.default_rng(0)
    action, state, noise = (torch.as_tensor(rng.standard_normal((7, d))) for d in (2, 3, 2))
    step = torch.as_tensor(rng.integers(0, 5, 7))
    bar = np.cumprod(1 - beta_schedule("vp", 5).numpy())
    total = 0.0
    for a, s, i, e in zip(action, state, step, noise, strict=True):
        noisy = math.sqrt(bar[i]) * a + math.sqrt(1 - bar[i]) * e
        angle = i * torch.exp(-torch.arange(8) * math.log(10000) / 7)
        time = policy.time_mlp(torch.cat([angle.sin(), angle.cos()]))
        total += (policy.output(policy.trunk(torch.cat([noisy, time, s]))) - e).square().sum()
    assert policy.bc_loss(action, state, step, noise).item() == pytest.approx(total.item() / 14, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=can_compile)])
def test_mish_and_its_gradient(compiled, dtype):
    """x tanh(log(1 + e^x)) and its derivative are accurate to the rounding of x, even where e^x would overflow."""
    x = torch.cat([torch.linspace(-120, 120, 9601), torch.tensor([-1e30, -1e4, 0.0, 19.999, 20.001, 1e4, 1e30])])
    x = x.to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    want = torch.nn.functional.mish(exact)
    (want_slope,) = torch.autograd.grad(want.sum(), exact)
    got = (compiling.compiled(dql.Mish(), x.device) if compiled else dql.Mish())(x)
    (slope,) = torch.autograd.grad(got.sum(), x)
    rounding = 4 * torch.finfo(dtype).eps * exact.detach().abs().clamp(min=1)
    assert ((got - want).abs() <= rounding).all()
    assert ((slope - want_slope).abs() <= rounding).all()
    if not compiled and dtype == torch.float64:
        assert torch.autograd.gradcheck(dql.Mish(), x[4200:5200:50])


# ----------------------------------------------------------------- the update


def test_policy_gradient_against_finite_differences(float64):
    """Eq. 3's gradient flows through the whole reverse chain, but not through the scale of Q."""
    agent = tiny_agent(eta=1.0)
    batch, draws = random_batch(agent), agent.draw(torch.Generator().manual_seed(1))
    draws = draws._replace(coin=torch.tensor(1.0))
    bc, q = agent.policy_losses(batch, draws)
    grads = torch.autograd.grad(bc + q, list(agent.policy.parameters()))
    scale = agent.critic(batch.state, agent.policy.sample(batch.state, draws.policy_noise))[1].abs().mean()

    def loss():
        bc = agent.policy.bc_loss(batch.action, batch.state, draws.bc_step, draws.bc_noise)
        return bc - agent.critic(batch.state, agent.policy.sample(batch.state, draws.policy_noise))[0].mean() / scale

    generator = torch.Generator().manual_seed(2)
    for p, grad in zip(agent.policy.parameters(), grads, strict=True):
        direction = torch.randn(p.shape, generator=generator)
        values = []
        with torch.no_grad():
            for h in (1e-6, -2e-6):
                p.add_(direction, alpha=h)
                values.append(loss().item())
            p.add_(direction, alpha=1e-6)
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx((grad * direction).sum().item(), rel=2e-5, abs=1e-8)


def test_coin_chooses_the_critic(float64):
    """With a coin above 0.5, Q_1 is maximised and |Q_2| normalises; otherwise the two swap roles."""
    agent = tiny_agent()
    batch, draws = random_batch(agent), agent.draw(torch.Generator().manual_seed(1))
    with torch.no_grad():
        q1, q2 = agent.critic(batch.state, agent.policy.sample(batch.state, draws.policy_noise))
    for coin, up, down in ((0.51, q1, q2), (0.5, q2, q1)):
        got = agent.policy_losses(batch, draws._replace(coin=torch.tensor(coin)))[1]
        assert got.item() == pytest.approx((-up.mean() / down.abs().mean()).item(), rel=1e-12)


def test_backup_takes_the_maximum_before_the_minimum():
    """Over ten next actions each critic's maximum, then the minimum of the two; the other order would give 1, not 4."""
    agent = tiny_agent(max_q_backup=True, batch_size=2, gamma=0.5)
    q1 = torch.tensor([5.0] + 9 * [1.0] + 10 * [0.0])
    q2 = torch.tensor([1.0] + 8 * [1.0] + [4.0] + 10 * [0.0])
    agent.critic_target = lambda state, action: (q1, q2)
    batch = random_batch(agent)._replace(reward=torch.tensor([3.0, 7.0]), done=torch.tensor([0.0, 1.0]))
    draws = agent.draw(torch.Generator().manual_seed(0))
    assert draws.next_noise.shape == (6, 20, 2)
    assert agent.critic_loss(batch, draws.next_noise)[1].item() == ((3 + 0.5 * 4) + 7) / 2


def test_average_starts_and_moves_when_it_should():
    agent = tiny_agent(average_from=3, average_every=2, average_decay=0.9)
    generator, moved = torch.Generator().manual_seed(0), []
    for k in range(8):
        before = [p.clone() for p in agent.policy_ema.parameters()]
        agent.update(random_batch(agent, seed=k), agent.draw(generator))
        after = list(agent.policy_ema.parameters())
        if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            moved.append(k)
            for a, b, p in zip(after, before, agent.policy.parameters(), strict=True):
                torch.testing.assert_close(a, 0.9 * b + 0.1 * p)
    assert moved == [4, 6]


def test_targets_move_every_update():
    agent = tiny_agent(tau=0.25)
    before = [p.clone() for p in agent.critic_target.parameters()]
    agent.update(random_batch(agent), agent.draw(torch.Generator().manual_seed(0)))
    for a, b, p in zip(agent.critic_target.parameters(), before, agent.critic.parameters(), strict=True):
        torch.testing.assert_close(a, 0.75 * b + 0.25 * p)


def test_gradients_are_clipped_network_by_network():
    """Adam's first moment after one update is 0.1 of the clipped gradient."""
    agent = tiny_agent(grad_norm=0.01)
    losses = agent.update(random_batch(agent), agent.draw(torch.Generator().manual_seed(0)))
    assert losses.critic_grad_norm > 0.01 and losses.policy_grad_norm > 0.01
    for opt in (agent.policy_opt, agent.critic_opt):
        moments = torch.cat([s["exp_avg"].flatten() for s in opt.state.values()])
        assert moments.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_eta_0_is_behaviour_cloning():
    """eta 0 trains the policy as a vanishing eta does, leaves the critics unchanged, and acts with one candidate."""
    agents = [tiny_agent(eta=0.0), tiny_agent(eta=1e-30)]
    for agent in agents:
        generator = torch.Generator().manual_seed(0)
        for k in range(3):
            losses = agent.update(random_batch(agent, seed=k), agent.draw(generator))
    for p, q in zip(agents[0].policy.parameters(), agents[1].policy.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    for p, q in zip(agents[0].critic.parameters(), tiny_agent().critic.parameters(), strict=True):
        assert torch.equal(p, q)
    assert losses.bc > 0 and agents[0].args.eval_candidates == 1 and agents[1].args.eval_candidates == 50
    with pytest.raises(dql.BadInput, match="--eval-candidates"):
        tiny_agent(eta=0.0, eval_candidates=2)


def test_learning_rate_decay():
    agent = tiny_agent(lr_decay=True, num_updates=4, learning_rate=1e-3)
    rates, generator = [], torch.Generator().manual_seed(0)
    for k in range(4):
        agent.update(random_batch(agent, seed=k), agent.draw(generator))
        rates.append([opt.param_groups[0]["lr"].item() for opt in (agent.policy_opt, agent.critic_opt)])
    want = [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    np.testing.assert_allclose(rates, np.outer(want, [1e-3, 3e-4]), rtol=1e-6)


def distance(sample: torch.Tensor, cdf: Callable) -> float:
    """sqrt(n) times the Kolmogorov-Smirnov distance of n numbers from a distribution: above 2 in one of 1,500 samples."""
    x = sample.flatten().double().sort().values
    below = torch.arange(len(x)) / len(x)
    return (torch.maximum(cdf(x) - below, below + 1 / len(x) - cdf(x)).max() * math.sqrt(len(x))).item()


def far_from_uniform(sample: torch.Tensor, values: int) -> float:
    """The largest deviation of a value's count from n / values, in standard errors."""
    want = sample.numel() / values
    counts = torch.bincount(sample.flatten(), minlength=values)
    assert len(counts) == values
    return ((counts - want).abs().max() / math.sqrt(want)).item()


def test_every_draw_has_its_distribution():
    """Noise is normal, the coin uniform on [0, 1), steps uniform over all N, rows over the whole data set, and acting's
    second draw is Gumbel's; every draw is fresh."""
    agent, generator = tiny_agent(batch_size=2000), torch.Generator().manual_seed(0)
    first, second = agent.draw(generator), agent.draw(generator)
    for a, b in zip(first, second, strict=True):
        assert not torch.equal(a, b)
    normal = torch.distributions.Normal(0.0, 1.0).cdf
    for noise in (first.next_noise, first.bc_noise, first.policy_noise, agent.draw_act(20, generator).noise):
        assert distance(noise, normal) < 2
    assert distance(agent.draw_act(100, generator).gumbel, lambda x: torch.exp(-torch.exp(-x))) < 2
    assert far_from_uniform(first.bc_step, 5) < 4
    rows = torch.cat([agent.draw_index(50, generator) for _ in range(5)])
    assert far_from_uniform(rows, 50) < 4
    small = tiny_agent(batch_size=1)
    coins = torch.stack([small.draw(generator).coin for _ in range(1000)])
    assert distance(coins, lambda x: x.clamp(0, 1)) < 2


# ----------------------------------------------------------------- acting


def test_act_draws_from_the_softmax_of_min_target_q():
    """Three candidates of known Q: frequencies are right to four standard errors; temperature 0 takes the best."""
    states, q = 20_000, torch.tensor([1.0, 0.0, -1.0])
    for temperature in (1.0, 0.5, 0.0):
        agent = tiny_agent(eval_candidates=3, eval_temperature=temperature)
        agent.policy.sample = lambda state, noise: torch.arange(3.0).repeat(states)[:, None].expand(-1, 2)
        agent.critic_target = lambda state, action: (q[action[:, 0].long()], q[action[:, 0].long()] + 1)
        draws = agent.draw_act(states, torch.Generator().manual_seed(0))
        chosen = agent.act(torch.zeros(states, 3), draws)[:, 0].long()
        want = torch.softmax(q / temperature, 0) if temperature else torch.tensor([1.0, 0.0, 0.0])
        frequency = torch.bincount(chosen, minlength=3) / states
        assert ((frequency - want).abs() <= 4 * (want * (1 - want) / states).sqrt()).all(), temperature


def test_act_pairs_states_with_their_own_candidates():
    """With one candidate per state, actions are those of the chain alone; --eval-average uses the policy's average."""
    agent = tiny_agent(eval_candidates=1)
    for p in agent.policy_ema.parameters():
        p.data.mul_(2)
    state, noise = torch.randn(2, 3), torch.randn(6, 2, 2)
    draws = ActDraws(noise, torch.zeros(2, 1))
    assert torch.equal(agent.act(state, draws), agent.policy.sample(state, noise))
    agent.args.eval_average = True
    assert torch.equal(agent.act(state, draws), agent.policy_ema.sample(state, noise))


def test_bandit_finds_the_best_corner():
    """Data hold actions at four corners; the policy alone, with one candidate, learns the corner of highest reward."""
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 4, 4000)
    centers = np.array([[-0.8, 0.8], [-0.8, -0.8], [0.8, 0.8], [0.8, -0.8]])
    action = np.clip(centers[corner] + 0.05 * rng.standard_normal((4000, 2)), -1, 1)
    reward = np.array([3.0, 0.0, 1.5, 5.0])[corner] + 0.5 * rng.standard_normal(4000)
    arrays = (np.zeros((4000, 1)), action, reward, np.zeros((4000, 1)), np.ones(4000))
    data = Batch(*(torch.as_tensor(x, dtype=torch.float32) for x in arrays))
    agent = tiny_agent(1, 2, eta=2.5, batch_size=64, learning_rate=1e-3, eval_candidates=1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        index = torch.randint(4000, (64,), generator=generator)
        agent.update(Batch(*(x[index] for x in data)), agent.draw(generator))
    actions = agent.act(torch.zeros(400, 1), agent.draw_act(400, generator))
    near = torch.cdist(actions, torch.as_tensor(centers, dtype=torch.float32)) < 0.3
    assert near[:, 3].float().mean() > 0.8, near.float().mean(0)


# ----------------------------------------------------------------- evaluation


class Scripted:
    """An environment whose episode lasts seed steps; its t-th step pays the action's first number plus t, steps after
    the end pay 1,000. A state is (seed, t)."""

    def reset(self, seed: int) -> tuple[np.ndarray, dict]:
        self.seed, self.t = seed, 0
        return np.array([seed, 0.0]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        ended, even = self.t == self.seed, self.seed % 2 == 0
        reward = action[0] + self.t if self.t <= self.seed else 1000.0
        return np.array([self.seed, self.t]), reward, ended and even, ended and not even, {}


def test_evaluation_sums_the_rewards_of_each_episode():
    """Episodes of 3, 1, 4 and 2 steps, terminated or truncated; actions are ten times the state's seed."""
    shapes = []

    def act(states: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(states.shape))
        assert (states[:, 1] <= states[:, 0]).all()
        return 10 * states[:, :1]

    seeds = [3, 1, 4, 2]
    returns = dql.evaluate(act, [Scripted() for _ in seeds], seeds, torch.device("cpu"))
    assert returns.tolist() == [10 * n * n + n * (n + 1) / 2 for n in seeds]
    assert shapes == 4 * [(4, 2)], "one call a time step, always of the same shape"


# ----------------------------------------------------------------- the run


def random_file(path: Path, env_id="hopper-medium-v2", rows=600) -> Path:
    """Writes a file in D4RL's layout, with the task's dimensions and random contents."""
    h5py = pytest.importorskip("h5py")
    rng, task = np.random.default_rng(0), TASKS[env_id]
    with h5py.File(path, "w") as file:
        file["observations"] = rng.standard_normal((rows, task.state_dim)).astype(np.float32)
        file["actions"] = np.tanh(rng.standard_normal((rows, task.action_dim))).astype(np.float32)
        file["rewards"] = rng.standard_normal(rows).astype(np.float32)
        file["terminals"] = rng.uniform(size=rows) < 0.05
        file["timeouts"] = np.zeros(rows, bool)
    return path


def tiny_args(folder: Path, **changes) -> Args:
    data = folder / "hopper.hdf5"
    return Args(**{
        "env_id": "hopper-medium-v2", "dataset_path": data if data.exists() else random_file(data), "device": "cpu",
        "runs_dir": folder / "runs", "num_updates": 30, "batch_size": 16, "num_steps": 2, "eval_every": 12,
        "eval_episodes": 3, "eval_candidates": 4, "log_every": 5, **changes,
    })  # fmt: skip


TIMES = ("updates_per_second", "seconds")


def metrics(folder: Path) -> list[dict]:
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


@run_wanted
def test_a_run_writes_its_folder(tmp_path):
    summary = dql.train(tiny_args(tmp_path))
    folder = Path(summary["folder"])
    names = {p.name for p in folder.iterdir()}
    assert {"args.json", "metrics.csv", "checkpoint.pt", "curve.png", "summary.json"} < names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    rows = metrics(folder)
    assert [int(r["step"]) for r in rows] == [5, 10, 12, 15, 20, 24, 25, 30]
    assert [bool(r["score"]) for r in rows] == [False, False, True, False, False, True, False, True]
    assert summary["last"]["step"] == 30 and summary["last"]["episodes"] == 3 and summary["paper"] == (90.5, 4.6)
    assert summary["best"]["score"] == max(float(r["score"]) for r in rows if r["score"])
    assert summary["versions"]["torch"] == torch.__version__ and summary["updates_per_second"] > 0
    assert "gpu" not in summary["versions"], "it ran on the CPU"
    with open(folder / "curve.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


@run_wanted
def test_the_report_of_several_seeds(tmp_path, monkeypatch, capsys):
    data = random_file(tmp_path / "data.hdf5", "hopper-medium-v2")
    monkeypatch.setattr(sys, "argv", [
        "dql.py", "--env-id", "hopper-medium-v2", "--dataset-path", str(data), "--runs-dir", str(tmp_path), "--device",
        "cpu", "--num-seeds", "2", "--num-updates", "4", "--batch-size", "8", "--eval-episodes", "1",
    ])  # fmt: skip
    dql.main()
    out = capsys.readouterr().out
    assert "seed 0-1, 4 updates" in out and re.search(r"last +-?\d+\.\d ± \d+\.\d \(2 seeds\)", out), out


@run_wanted
@pytest.mark.parametrize("env_id", dql.SETTINGS)
def test_every_task_runs_end_to_end(env_id, tmp_path, monkeypatch, capsys):
    """The command line on a tiny file: the task's settings, whole episodes, and a printed score for the last update."""
    data = random_file(tmp_path / "data.hdf5", env_id)
    monkeypatch.setattr(sys, "argv", [
        "dql.py", "--env-id", env_id, "--dataset-path", str(data), "--runs-dir", str(tmp_path), "--device", "cpu",
        "--num-updates", "4", "--batch-size", "8", "--eval-episodes", "2", "--eval-candidates", "2", "--num-steps", "1",
    ])  # fmt: skip
    envs = []
    monkeypatch.setattr(dql, "make_envs", lambda *args: envs.extend(make_envs(*args)) or envs)
    dql.main()
    out = capsys.readouterr().out
    assert re.search(r"last +-?\d+\.\d ± \d+\.\d \(2 episodes, update 4\)", out), out
    if TASKS[env_id].family in ("halfcheetah", "antmaze", "kitchen"):  # the others may fall and end early
        assert [env.get_wrapper_attr("_elapsed_steps") for env in envs] == 2 * [TASKS[env_id].max_episode_steps]


@run_wanted
def test_a_run_can_end_with_a_video(tmp_path, monkeypatch):
    """The run writes one video file, and resuming writes it if it is missing; skipped if OpenGL cannot render."""
    try:
        make_env("hopper-medium-v2", render_mode="rgb_array").render()
    except Exception as error:  # every OpenGL backend fails in its own way
        pytest.skip(f"no rendering here: {error}")
    pytest.importorskip("moviepy")
    folder = Path(dql.train(tiny_args(tmp_path, num_updates=2, capture_video=True))["folder"])
    (video,) = folder.glob("*.mp4")
    assert video.stat().st_size > 1000 and not list(folder.glob(".part*"))
    video.unlink()  # as if the run had been killed before writing it
    dql.train(Args(resume=folder, capture_video=True, device="cpu"))
    assert video.stat().st_size > 1000


@run_wanted
def test_same_seed_same_metrics_and_other_seed_other(tmp_path):
    runs = [metrics(Path(dql.train(tiny_args(tmp_path, seed=seed))["folder"])) for seed in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@run_wanted
def test_episode_k_is_reset_with_seed_plus_100_plus_k(tmp_path, monkeypatch):
    seeds, evaluate = [], dql.evaluate

    def watched(act, envs, env_seeds, *rest):
        seeds.append(list(env_seeds))
        return evaluate(act, envs, env_seeds, *rest)

    monkeypatch.setattr(dql, "evaluate", watched)
    dql.train(tiny_args(tmp_path, seed=7, num_seeds=2, num_updates=24))
    assert seeds == 2 * [[107, 108, 109, 108, 109, 110]]


def on_call(count: int, function, do):
    """Wraps function so that its count-th call first calls do()."""
    calls = itertools.count(1)

    def called(*args):
        if next(calls) == count:
            do()
        return function(*args)

    return called


def assert_same_end(a: Path, b: Path) -> None:
    """Two runs have the same weights, optimizers, averages, generators, metrics and scores, bit for bit; not times."""
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (a, b)]
    for part in ("agents", "generators"):
        assert_states_close(states[0][part], states[1][part], rtol=0, atol=0)
    args = dql.read_args(a)
    for x, y in zip(run_folder.seed_folders(args, a), run_folder.seed_folders(args, b), strict=True):
        assert metrics(x) == metrics(y)
        own = [torch.load(folder / "checkpoint.pt", weights_only=True)["agents"] for folder in (x, y)]
        assert_states_close(*own, rtol=0, atol=0)
        scores = [json.loads((folder / "summary.json").read_text()) for folder in (x, y)]
        assert [scores[0][name] for name in ("last", "best", "offline")] == [
            scores[1][name] for name in ("last", "best", "offline")
        ]


@pytest.fixture(scope="module")
def run_left_alone(tmp_path_factory):
    """A function from a number of seeds to the arguments and folder of an uninterrupted run of 24 updates."""

    @functools.cache
    def run(num_seeds: int) -> tuple[Args, Path]:
        args = tiny_args(tmp_path_factory.mktemp("whole"), num_updates=24, num_seeds=num_seeds)
        return args, Path(dql.train(args)["folder"])

    return run


@pytest.fixture
def interruptible():
    """Enables SIGINT: background jobs start with it ignored, and a run would then ignore it too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def times_of_change(folder: Path) -> dict[Path, int]:
    """Modification times of all that a run has written, except the lock, which a mere look at the run may touch."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


@run_wanted
@pytest.mark.parametrize("num_seeds", [1, 2])
@pytest.mark.parametrize("module, name, count, step, signum", [
    (DiffusionQL, "train_step", 8, 8, signal.SIGTERM), (DiffusionQL, "act_fresh", 5, 12, signal.SIGINT),
    (run_folder, "log", 4, 15, signal.SIGTERM),
])  # fmt: skip
def test_a_stopped_run_goes_on_exactly(
    num_seeds, module, name, count, step, signum, run_left_alone, interruptible, monkeypatch, capsys, tmp_path
):
    """A signal during an update, evaluation or log stops a run; resumed, it ends exactly as if never interrupted."""
    args, whole = run_left_alone(num_seeds)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    count *= num_seeds if module is DiffusionQL else 1  # seeds take turns
    with monkeypatch.context() as patch, pytest.raises(dql.Stopped, match=f"stopped at update {step} of 24") as stop:
        patch.setattr(module, name, on_call(count, getattr(module, name), lambda: signal.raise_signal(signum)))
        dql.train(args)
    assert stop.value.signum == signum
    assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    stopped = Path(str(stop.value).split("--resume ")[1])
    assert not (stopped / "summary.json").exists()
    summary = dql.train(Args(resume=stopped, device="cpu"))
    assert_same_end(whole, stopped)

    capsys.readouterr()
    before = times_of_change(stopped)
    assert dql.train(Args(resume=stopped, device="cpu")) == json.loads(json.dumps(summary))
    assert "is finished" in capsys.readouterr().out
    assert before == times_of_change(stopped)
    copied = shutil.copytree(stopped, tmp_path / "copied")
    assert dql.train(Args(resume=copied, device="cpu"))["folder"] == str(copied)


@run_wanted
@pytest.mark.parametrize("num_seeds", [1, 2])
def test_a_run_given_more_updates_is_the_longer_run(num_seeds, run_left_alone, capsys):
    args, whole = run_left_alone(num_seeds)
    short = Path(dql.train(replace(args, num_updates=12))["folder"])
    assert dql.train(Args(resume=short, num_updates=24, device="cpu"))["num_updates"] == 24
    assert_same_end(whole, short)
    for folder in (short, *run_folder.seed_folders(args, short)):
        assert dql.read_args(folder).num_updates == 24
    capsys.readouterr()
    dql.train(Args(resume=short, device="cpu"))
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(BadInput, match=r"leave out --num-updates 20 \(the run's: 24\)"):
        dql.train(Args(resume=short, num_updates=20, device="cpu"))
    with pytest.raises(BadInput, match="it must be at least 1 and below"):
        dql.train(Args(resume=short, num_updates=2**31, device="cpu"))


@run_wanted
def test_the_end_of_a_decay_does_not_move(tmp_path):
    folder = Path(dql.train(tiny_args(tmp_path, num_updates=2, lr_decay=True))["folder"])
    with pytest.raises(BadInput, match=r"leave out --num-updates 4 .* not with --lr-decay"):
        dql.train(Args(resume=folder, num_updates=4, device="cpu"))
    (folder / "summary.json").unlink()
    args = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(args | {"num_updates": 4}))
    with pytest.raises(BadInput, match=r"not of the run of its args\.json: num_updates differ"):
        dql.train(Args(resume=folder, device="cpu"))


@run_wanted
def test_a_seed_copied_out_of_its_run_goes_on_alone(run_left_alone, interruptible, monkeypatch, tmp_path):
    """On a CPU it ends bit for bit as it does within the run, so a run's seeds can be spread over cores."""
    args, whole = run_left_alone(2)
    with monkeypatch.context() as patch, pytest.raises(dql.Stopped) as stop:
        patch.setattr(DiffusionQL, "train_step", on_call(20, DiffusionQL.train_step, lambda: signal.raise_signal(signal.SIGTERM)))
        dql.train(args)
    stopped = Path(str(stop.value).split("--resume ")[1])
    for seed in (f"seed-{args.seed}", f"seed-{args.seed + 1}"):
        shutil.copytree(stopped / seed, tmp_path / seed)
        dql.train(Args(resume=tmp_path / seed, device="cpu"))
        assert_same_end(whole / seed, tmp_path / seed)


@run_wanted
def test_a_run_killed_at_random_moments_ends_the_same(tmp_path):
    """Kills a run of one seed three times, and a run of two seeds three times."""
    out = tmp_path / "torture.json"
    command = [sys.executable, "bench/torture.py", "--kills", "3", "--cases", "one", "several", "--out", str(out)]
    subprocess.run(command, cwd=HERE, check=True, timeout=1200, capture_output=True)
    for case in json.loads(out.read_text())["kills"].values():
        assert case["kills"] == 3 and case["same"] and case["runs"] >= 1


@run_wanted
def test_a_run_without_a_checkpoint_begins_anew(tmp_path):
    whole = Path(dql.train(tiny_args(tmp_path, num_updates=6))["folder"])
    begun = run_folder.start_folder(dql.with_settings(tiny_args(tmp_path, num_updates=6)))
    dql.train(Args(resume=begun, device="cpu"))
    assert_same_end(whole, begun)


@run_wanted
def test_resume_refuses_what_is_not_the_run(tmp_path):
    h5py, args = pytest.importorskip("h5py"), tiny_args(tmp_path, num_updates=2)
    folder = Path(dql.train(args)["folder"])
    (folder / "summary.json").unlink()
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    with pytest.raises(BadInput, match=r"--eta 7.0 \(the run's: 1.0\)"):
        dql.train(Args(resume=folder, eta=7.0, device="cpu"))
    torch.save(checkpoint | {"device": "cuda"}, folder / "checkpoint.pt")
    with pytest.raises(BadInput, match="ran on cuda"):
        dql.train(Args(resume=folder, device="cpu"))
    torch.save(checkpoint | {"args": checkpoint["args"] | {"eta": 7.0}}, folder / "checkpoint.pt")
    with pytest.raises(BadInput, match=r"not of the run of its args\.json: eta differ"):
        dql.train(Args(resume=folder, device="cpu"))
    torch.save(checkpoint, folder / "checkpoint.pt")
    with h5py.File(args.dataset_path, "r+") as file:
        file["rewards"][7] += 1
    with pytest.raises(BadInput, match="data are no longer those"):
        dql.train(Args(resume=folder, device="cpu"))


@run_wanted
def test_resume_refuses_flags_with_their_default_values(run_left_alone, capsys):
    """A flag given explicitly must match the run's value even if it is the default; one that matches is accepted."""
    args, folder = run_left_alone(2)
    capsys.readouterr()
    resume = ["--resume", str(folder)]
    assert "--num-seeds 1 (the run's: 2), --log-every 1000 (the run's: 5)" in fails(
        capsys, *resume, "--num-seeds", "1", "--log-every=1000", "--no-lr-decay", "--no-compile"
    )
    same = [*resume, "--num-seeds", "2", "--dataset-path", os.path.relpath(args.dataset_path)]
    command_line.refuse_given(command_line.parse(Args, same), dql.read_args(folder), same)
    assert command_line.resumed_args(command_line.parse(Args, same), dql.read_args(folder)).dataset_path == args.dataset_path
    command_line.refuse_given(Args(resume=folder), dql.read_args(folder), ["--resume", "num-seeds"])  # a folder of that name is not a flag


@run_wanted
def test_a_forged_summary_is_no_end(run_left_alone, tmp_path):
    """A summary.json that is not a valid one of the run does not count; resuming rewrites it from the checkpoint."""
    _, whole = run_left_alone(1)
    folder = shutil.copytree(whole, tmp_path / "run")
    path, good = folder / "summary.json", json.loads((whole / "summary.json").read_text())
    forged = [{"last": {}}, {"best": []}, {"num_seeds": "x"}, {"paper": 7}, {"folder": None}, {"num_updates": 23}]
    for text in ["", "[]", "[" * 10**5, *(json.dumps(good | change) for change in forged)]:
        path.write_text(text)
        assert run_folder.finished(folder, 24) is None
    path.unlink()
    os.mkfifo(path)
    assert run_folder.finished(folder, 24) is None
    assert dql.train(Args(resume=folder, device="cpu"))["last"] == good["last"]
    assert run_folder.finished(folder, 24)["last"] == good["last"]


@run_wanted
def test_a_run_killed_between_two_files_goes_on(run_left_alone, monkeypatch):
    """A run killed while it writes a checkpoint's files, once resumed, ends exactly like an uninterrupted one."""
    args, whole = run_left_alone(2)

    def killed():
        raise KeyboardInterrupt

    for count in (2, 6):  # the evaluations at 12 and 24 write three files each: one per seed and the group's
        before = set(args.runs_dir.iterdir())
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(run_folder, "write_torch", on_call(count, run_folder.write_torch, killed))
            dql.train(args)
        (folder,) = set(args.runs_dir.iterdir()) - before
        dql.train(Args(resume=folder, device="cpu"))
        assert_same_end(whole, folder)


@run_wanted
def test_a_policy_of_another_device_acts_here(run_left_alone, tmp_path):
    """A policy trained on a GPU acts on a CPU: its generator's state, which does not fit a CPU's, is not restored."""
    _, folder = run_left_alone(1)
    other = shutil.copytree(folder, tmp_path / "run")
    checkpoint = torch.load(other / "checkpoint.pt", weights_only=True)
    states = [torch.zeros(16, dtype=torch.uint8)]
    torch.save(checkpoint | {"device": "cuda", "generators": states}, other / "checkpoint.pt")
    np.testing.assert_array_equal(
        dql.load_policy(other, device="cpu")(np.ones(11)), dql.load_policy(folder, device="cpu")(np.ones(11))
    )


@run_wanted
def test_a_summary_that_is_none_is_written_again(run_left_alone, tmp_path):
    _, folder = run_left_alone(1)
    other = shutil.copytree(folder, tmp_path / "run")
    for text in ("", "{}", '{"num_updates": 24}', "[]"):
        (other / "summary.json").write_text(text)
        dql.train(Args(resume=other, device="cpu"))
        assert_same_end(folder, other)


@run_wanted
def test_a_second_writer_is_refused(tmp_path):
    """A run is refused while another process holds its folder, but not after that process was killed."""
    folder = run_folder.start_folder(dql.with_settings(tiny_args(tmp_path, num_updates=2)))
    hold = f"import pathlib, run_folder\nwith run_folder.only_writer(pathlib.Path({str(folder)!r})): print(1); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-uc", hold], cwd=HERE, **pipes) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(BadInput, match="another process is writing"):
            dql.train(Args(resume=folder, device="cpu"))
        other.kill()
    assert dql.train(Args(resume=folder, device="cpu"))["num_updates"] == 2


@run_wanted
def test_a_full_disk_leaves_the_last_checkpoint(run_left_alone, monkeypatch):
    """When writing fails, the error is one line and the old checkpoint stays; with room again the run ends the same."""
    resource = pytest.importorskip("resource")
    args, whole = run_left_alone(1)
    with monkeypatch.context() as patch, pytest.raises(dql.Stopped) as stop:
        patch.setattr(DiffusionQL, "train_step", on_call(14, DiffusionQL.train_step, lambda: signal.raise_signal(signal.SIGTERM)))
        dql.train(args)
    folder = Path(str(stop.value).split("--resume ")[1])
    before, limits = (folder / "checkpoint.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(BadInput, match=r"cannot write .*checkpoint.pt: File too large; what was there before is"):
            dql.train(Args(resume=folder, device="cpu"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not list(folder.glob(".part*"))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(BadInput, match="cannot write TensorBoard's events"):
        patch.setattr("torch.utils.tensorboard.SummaryWriter", full)
        dql.train(Args(resume=folder, device="cpu"))
    dql.train(Args(resume=folder, device="cpu"))
    assert_same_end(whole, folder)


@run_wanted
@pytest.mark.parametrize("num_seeds", [1, 2])
def test_a_run_that_diverges_stops(num_seeds, tmp_path, monkeypatch):
    """A run stops at the next row or checkpoint; the last checkpoint is from before, and finite."""
    args = tiny_args(tmp_path, num_seeds=num_seeds, checkpoint_every=4)

    def poison():
        index = (0,) * (target.dim())
        with torch.no_grad():
            target[index] = math.nan

    make_steps = fast_sampler.make_steps

    def make_poisoned_steps(*args):
        nonlocal target
        agents, updates, act = make_steps(*args)
        target = agents[0].critic.q1[2].weight
        return agents, on_call(7, updates, poison), act

    target = None
    monkeypatch.setattr(fast_sampler, "make_steps", make_poisoned_steps)
    says = r"critic_loss, .*critic's parameters.* not finite in updates 6 to 8, seed 0; .* is of update 4\."
    with pytest.raises(dql.Diverged, match=says):
        dql.train(args)
    (folder,) = args.runs_dir.iterdir()
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["progress"]["step"] == 4
    assert all(p.isfinite().all() for state in checkpoint["agents"] for p in state["critic"].values())


@pytest.mark.parametrize("error, code, says", [
    (dql.Diverged("gone"), 3, "gone"), (dql.Stopped(signal.SIGTERM, "goes on"), 143, "goes on"),
    (dql.Stopped(signal.SIGINT, "goes on"), 130, "goes on"), (KeyboardInterrupt(), 130, "interrupted"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory"),
    (MemoryError(), 2, "out of memory"),
])  # fmt: skip
def test_exit_codes(error, code, says, monkeypatch, capsys):
    monkeypatch.setattr(dql, "train", lambda _: (_ for _ in ()).throw(error))
    monkeypatch.setattr(sys, "argv", ["dql.py"])
    with pytest.raises(SystemExit) as stop:
        dql.main()
    err = capsys.readouterr().err
    assert stop.value.code == code and err.startswith(f"dql.py: {says}") and err.count("\n") == 1


def test_q_beyond_what_rewards_allow_is_told_once(capsys):
    """The warning comes once per seed, and only beyond a margin of a twentieth of the range that rewards allow."""
    warn = run_folder.q_alarm(torch.tensor([-1.0, 2.0]), Args(gamma=0.9, seed=7))
    for values, told in (((21, -11), []), ((0, -12), [8]), ((22, -99), [7]), ((99, 99), [])):
        warn([{"step": 5, "target_q": value} for value in values])
        err = capsys.readouterr().err
        assert [int(seed) for seed in re.findall(r"seed (\d+): .* rewards allow -10 to 20\n", err)] == told
    run_folder.q_alarm(torch.ones(2), Args(gamma=1.0))([{"step": 5, "target_q": 1e9}])
    assert capsys.readouterr().err == ""


@run_wanted
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_many_evaluations_leak_nothing(tmp_path, monkeypatch):
    """Over 50 evaluations and checkpoints, environments, threads and open files stay constant from the 5th on."""
    counts, evaluations, evaluate = [], itertools.count(1), dql.evaluate

    def evaluate_and_count(*args):
        if next(evaluations) in (5, 20, 35, 50):
            gc.collect()
            models = sum(type(x).__name__ == "MjData" for x in gc.get_objects())
            counts.append((models, threading.active_count(), len(os.listdir("/proc/self/fd"))))
        return evaluate(*args)

    monkeypatch.setattr(dql, "evaluate", evaluate_and_count)
    monkeypatch.setattr(run_folder, "write_curve", lambda path, *_: path.write_bytes(b""))  # plots take half a second
    dql.train(tiny_args(tmp_path, num_updates=50, eval_every=1, eval_episodes=1, checkpoint_every=1))
    assert len(counts) == 4 and len(set(counts)) == 1, counts


@run_wanted
def test_resume_takes_whole_runs_and_another_path(tmp_path):
    """One seed of several is not resumed in its run's folder; device and --compile may change, and otherwise stay."""
    folder = Path(dql.train(tiny_args(tmp_path, num_updates=2, num_seeds=2))["folder"])
    with pytest.raises(BadInput, match="resume that"):
        dql.train(Args(resume=folder / "seed-0", device="cpu"))
    assert command_line.resumed_args(Args(resume=folder), dql.read_args(folder)).compile is False
    assert command_line.resumed_args(Args(resume=folder, compile=True), dql.read_args(folder)).compile is True
    assert command_line.resumed_args(Args(resume=folder), dql.read_args(folder)).device == "cpu"
    assert command_line.resumed_args(Args(resume=folder, device="cuda:1"), dql.read_args(folder)).device == "cuda:1"


@run_wanted
def test_load_policy(tmp_path):
    """Numpy in, numpy out; torch in, torch out; one state or many; the same seed gives the same actions."""
    folder = dql.train(tiny_args(tmp_path, num_updates=2))["folder"]
    policy, again = dql.load_policy(folder, device="cpu"), dql.load_policy(folder, device="cpu")
    states = np.random.default_rng(0).standard_normal((5, 11))
    actions = policy(states)
    assert isinstance(actions, np.ndarray) and actions.shape == (5, 3) and np.abs(actions).max() <= 1
    np.testing.assert_array_equal(actions, again(states))
    assert policy(states[0]).shape == (3,)
    assert torch.is_tensor(policy(torch.as_tensor(states))) and policy(torch.as_tensor(states)).shape == (5, 3)
    before = torch.get_rng_state()
    average, online = (dql.load_policy(folder, device="cpu", eval_candidates=1, eval_average=x) for x in (True, False))
    assert torch.equal(torch.get_rng_state(), before)
    assert not np.array_equal(average(states), online(states))
    assert not np.array_equal(online(states), dql.load_policy(folder, device="cpu")(states))
    assert policy(np.zeros((0, 11))).shape == (0, 3)
    for wrong in (np.zeros(22), np.zeros((11, 2)), 0.0):  # 22 numbers could pass for two states
        with pytest.raises(ValueError, match="have 11 numbers each"):
            policy(wrong)


def test_offline_selection_takes_the_ranked_evaluation():
    """Evaluations rank by mean loss since the one before, weighted by updates; ranks beyond the last take the worst."""
    rows = [
        {"step": 10, "bc_loss": 9.0, "score": "", "score_std": ""},
        {"step": 20, "bc_loss": 1.0, "score": 1.0, "score_std": 0.0},  # mean 5
        {"step": 30, "bc_loss": 2.0, "score": 2.0, "score_std": 0.0},  # 2
        {"step": 31, "bc_loss": 0.0, "score": "", "score_std": ""},
        {"step": 40, "bc_loss": 4.0, "score": 3.0, "score_std": 0.0},  # 3.6
    ]
    for rank, want in ((0, 2.0), (1, 3.0), (2, 1.0), (7, 1.0)):
        chosen = run_folder.select(rows, dql.with_settings(Args(offline_rank=rank)))
        assert chosen["offline"]["score"] == want and chosen["best"]["score"] == chosen["last"]["score"] == 3.0


@pytest.mark.filterwarnings("error")
def test_reward_transforms():
    data = {"observations": np.zeros((4, 2)), "actions": np.zeros((4, 1)), "next_observations": np.zeros((4, 2)),
            "rewards": np.array([0.0, 1.0, 1.0, 4.0]), "terminals": np.zeros(4, bool)}  # fmt: skip
    cpu = torch.device("cpu")
    np.testing.assert_allclose(dql.make_batch(data, "none", cpu).reward, [0, 1, 1, 4])
    np.testing.assert_allclose(dql.make_batch(data, "antmaze", cpu).reward, [-2, 2, 2, 14])
    standard = (data["rewards"] - 1.5) / np.std(data["rewards"], ddof=1)
    np.testing.assert_allclose(dql.make_batch(data, "standardize", cpu).reward, standard, rtol=1e-6)
    for rewards in ([1.0], [1.0, 1.0]):
        with pytest.raises(BadInput, match="needs several rewards that differ"):
            dql.make_batch(data | {"rewards": np.array(rewards)}, "standardize", cpu)


def test_settings_are_the_papers():
    """All twenty tasks against the official code's settings and the paper's scores."""
    reference = json.loads((REFERENCE / "paper.json").read_text())
    rewards = {"none": "none", "4 (r - 1/2)": "antmaze", "standardized": "standardize"}
    assert set(dql.SETTINGS) == set(TASKS) == {*reference["tasks"], "halfcheetah-demo-v0"}
    for env_id, want in reference["tasks"].items():
        got = dql.SETTINGS[env_id]
        for name in ("eta", "max_q_backup", "grad_norm", "offline_rank", "num_updates"):
            assert getattr(got, name) == want[name], (env_id, name)
        assert got.learning_rate == want["policy_learning_rate"] and got.reward == rewards[want["reward"]]
        assert list(got.paper) == want["paper"] and got.eval_episodes == (10 if env_id.endswith("-v2") else 100)
    common, args = reference["common"], dql.with_settings(Args(env_id="hopper-medium-v2"))
    for name in ("batch_size", "gamma", "tau", "num_steps", "schedule", "eval_candidates"):
        assert getattr(args, name) == common[name], name
    assert (args.average_every, args.average_from) == (common["average_every"], common["average_from"])
    assert (args.average_decay, args.eval_every) == (common["policy_average"], common["eval_every_updates"])
    assert common["critic_learning_rate"] == DiffusionQL.critic_learning_rate
    assert dql.with_settings(Args(env_id="hopper-medium-v2", eta=0.5)).eta == 0.5


# ----------------------------------------------------------------- the fast paths

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
FLOAT64 = {"rtol": 1e-9, "atol": 1e-11}  # for sums in another order, amplified by Adam's division over 100 updates


def assert_states_close(a, b, **tolerance) -> None:
    """Two nested states have the same keys, tensors equal within the tolerance, and otherwise equal values."""
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, **tolerance)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_states_close(a[key], b[key], **tolerance)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_states_close(x, y, **tolerance)
    else:
        assert a == b


def three_agents(**args) -> list[DiffusionQL]:
    """Agents with different weights and etas; their averages start early, and some gradients exceed grad_norm."""
    settings = {"num_steps": 2, "average_from": 2, "average_every": 3, "grad_norm": 3.0, **args}
    agents = []
    for seed, eta in enumerate((1.0, 0.3, 2.0)):
        agents.append(tiny_agent(**{"eta": eta, **settings}))
        generator = torch.Generator().manual_seed(seed)
        for name in ("policy", "critic"):
            for p in getattr(agents[-1], name).parameters():
                p.data += 0.1 * torch.randn(p.shape, generator=generator).to(p.device)
    return agents


def tiny_data(device: str, rows=40) -> Batch:
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal((rows, 3)), rng.uniform(-1, 1, (rows, 2)), 3 * rng.standard_normal(rows),
              rng.standard_normal((rows, 3)), rng.uniform(size=rows) < 0.2)  # fmt: skip
    return Batch(*(torch.as_tensor(x, dtype=torch.get_default_dtype(), device=device) for x in arrays))


def generators_of(device: str, count: int) -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(10 + k) for k in range(count)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes", [{}, {"max_q_backup": True, "lr_decay": True, "num_updates": 100}, {"eta": 0.0}])
def test_replicas_equal_single_agents(changes, device, float64):
    """100 updates of three agents at once, each with its own generator, and acting equal three single runs."""
    agents, data = three_agents(device=device, **changes), tiny_data(device)
    many, generators = replicate(agents), generators_of(device, 3)
    alone = generators_of(device, 3)
    norms = []
    for k in range(100):
        losses = many.train_step(data, generators)
        want = torch.stack([agent.train_step(data, g) for agent, g in zip(agents, alone, strict=True)])
        torch.testing.assert_close(losses, want, **FLOAT64)
        norms.append(want[:, -2:])
        if k in (0, 1, 99):
            for j, agent in enumerate(agents):
                assert_states_close(unstack(many.state_dict(), j), agent.state_dict(), **FLOAT64)
    clipped = torch.stack(norms) > 3.0
    assert clipped.any() and not clipped.all(), "the test wants both"
    assert (many.step.item(), agents[0].step.item()) == (100, 100)
    with torch.no_grad():
        states = torch.randn(3 * 5, 3, device=device)
        want = [a.act_fresh(states[5 * k :][:5], g) for k, (a, g) in enumerate(zip(agents, alone, strict=True))]
        torch.testing.assert_close(many.act_fresh(states, generators), torch.cat(want), **FLOAT64)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=can_compile)])
def test_agents_in_turn_are_single_agents(compiled, float64):
    """Agents that take turns, as on a CPU, give the losses, states and actions of single runs with equal generators."""
    agents, data = three_agents(), tiny_data("cpu")
    own, generators, alone = copy.deepcopy(agents), generators_of("cpu", 3), generators_of("cpu", 3)
    if compiled:
        for agent in own:
            agent.compile()
    args = dql.with_settings(Args(device="cpu", num_seeds=3, compile=compiled, cudagraphs=False, eval_episodes=5))
    trained, updates, act = fast_sampler.make_steps(args, own, data, generators, generators)
    tolerance = FLOAT64 if compiled else {"rtol": 0, "atol": 0}
    for n in (1, 1, 10):
        want = [sum(agent.train_step(data, g) for _ in range(n)) for agent, g in zip(agents, alone, strict=True)]
        torch.testing.assert_close(updates(n), torch.stack(want), **tolerance)
        for got, agent in zip(fast_sampler.states_of(trained, 3), agents, strict=True):
            assert_states_close(got, agent.state_dict(), **tolerance)
    states = torch.randn(3 * 5, 3)
    want = [a.act_fresh(x.clone(), g) for a, x, g in zip(agents, states.split(5), alone, strict=True)]
    torch.testing.assert_close(act(states), torch.cat(want), **tolerance)


@can_compile
def test_what_is_compiled_for_one_seed_or_eta_serves_the_next(float64):
    """torch.compile raises after compiling a function eight times, so ten agents in a row must share compiled code."""
    torch.compiler.reset()
    data, generator = tiny_data("cpu"), torch.Generator()
    for k in range(10):
        agent = tiny_agent(num_steps=2, eta=0.1 + k)
        agent.compile()
        agent.train_step(data, generator)


def test_several_agents_are_mapped_on_a_gpu_alone(monkeypatch):
    agents = [tiny_agent(), tiny_agent()]
    args, data = dql.with_settings(Args(device="cpu", num_seeds=2, compile=False, cudagraphs=False)), tiny_data("cpu")
    assert fast_sampler.make_steps(args, agents, data, [None] * 2, [None] * 2)[0] is agents
    monkeypatch.setattr(agents[0], "device", torch.device("cuda"))
    monkeypatch.setattr(fast_sampler, "replicate", lambda agents, compile: "mapped")
    assert fast_sampler.make_steps(args, agents, data, [None] * 2, [None] * 2)[0] == ["mapped"]


onednn_wanted = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")


@onednn_wanted
@pytest.mark.parametrize("shapes", [(50, 39, 256), (256, 256, 256), (7, 256, 6)])
def test_products_by_onednn(shapes):
    """x w + bias, also of transposed matrices, equals float64's up to the rounding of k float32 terms, below 1e-6 k."""
    m, k, n = shapes
    x, w, narrow, wide = torch.randn(m, k), torch.randn(k, n), torch.randn(2 * n), torch.randn(m, n)
    biases = (None, narrow[:n], narrow[::2], narrow[:1].expand(n), wide, wide.t().contiguous().t())
    for a, b in itertools.product((x, x.t().contiguous().t()), (w, w.t().contiguous().t())):
        for bias in biases:
            want = x.double() @ w.double() + (0 if bias is None else bias.double())
            got = torch.ops.diffusion_ql.product(a, b, bias)
            assert got.is_contiguous() and (got - want).abs().max() < 1e-6 * k


def test_what_becomes_of_products(monkeypatch):
    """On AMD's processors with AVX-512, float32 products of contiguous or transposed matrices, none of them thin, go to
    oneDNN; all others stay as they are, except that unscaled biases are taken out of them."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def kinds(function: Callable, *inputs: torch.Tensor) -> list[str]:
        traced = make_fx(function, tracing_mode="fake")(*inputs)
        compiling.FASTER_PRODUCTS(traced.graph)
        traced.recompile()
        torch.testing.assert_close(traced(*inputs), function(*inputs), rtol=1e-4, atol=1e-4)  # float32, of order 10
        names = [str(node.target).split(".")[1] for node in traced.graph.nodes if node.op == "call_function"]
        return [name for name in names if name in ("mm", "addmm", "add", "product")]

    x, w, wide, bias = torch.randn(64, 40), torch.randn(50, 40), torch.randn(50, 60), torch.randn(50)
    linear = torch.nn.functional.linear
    for where in ("AMD AVX512", "AMD AVX512 in halves", "Intel AVX512", "AMD AVX2"):
        monkeypatch.setattr(compiling, "instructions", lambda where=where: where)
        onednn = where == "AMD AVX512" and torch.backends.mkldnn.is_available()
        product, with_bias = (["product"], ["product"]) if onednn else (["mm"], ["mm", "add"])
        assert kinds(lambda x, w: x @ w.t(), x, w) == kinds(lambda x, w: w @ x.t(), x, w) == product
        assert kinds(linear, x, w, bias) == kinds(torch.addmm, torch.randn(64, 50), x, w.t()) == with_bias
        assert kinds(torch.addmm, torch.randn(1), x, w.t()) == ["mm", "add"]
        assert kinds(lambda x, w, b: torch.addmm(b, x, w.t(), beta=2), x, w, bias) == ["addmm"]
        assert kinds(lambda x, w: x @ w.t(), x.double(), w.double()) == ["mm"]
        assert kinds(lambda x, w: x @ w[:, :40].t(), x, wide) == ["mm"]
        assert kinds(lambda x, w: x @ w.t(), x[:31], w) == ["mm"]
        assert kinds(linear, x[:31], w, bias) == ["mm", "add"]


@pytest.mark.parametrize(
    "cpuinfo, capability, want",
    [
        ("vendor_id : AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2", "AVX512", "AMD AVX512"),
        ("vendor_id : AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17", "AVX512", "AMD AVX512 in halves"),
        ("vendor_id : AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1", "AVX2", "AMD AVX2"),
        ("AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", "AVX512", "AMD AVX512 in halves"),
        ("vendor_id : GenuineIntel\ncpu family\t: 6\nmodel\t\t: 207", "AVX512", "Intel AVX512"),
        ("", "DEFAULT", "other DEFAULT"),
    ],
)
def test_processors_are_told_apart(cpuinfo, capability, want, monkeypatch):
    monkeypatch.setattr(run_folder, "cpuinfo", lambda: cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert run_folder.instructions() == want


@pytest.fixture
def nothing_compiled():
    """Clears compiled code before and after: code for one pretended processor must not be reused for another."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@can_compile
def test_what_compiled_graphs_are_left_with(monkeypatch, nothing_compiled):
    """Loss and gradient become one graph, in which no product adds a bias and no sigmoid is computed twice."""
    counts = []

    class Counting(compiling.FasterProducts):
        def uuid(self) -> object:
            return os.urandom(8)  # or torch would take the graph from its cache, without this pass

        def __call__(self, graph: torch.fx.Graph) -> None:
            super().__call__(graph)
            kinds = torch.ops.aten.sigmoid.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default
            counts.append([len(graph.find_nodes(op="call_function", target=kind)) for kind in kinds])

    monkeypatch.setattr(compiling, "processor_vendor", lambda: "Intel")
    monkeypatch.setattr(compiling, "FASTER_PRODUCTS", Counting())
    network, x = dql.mlp(8, 8, 8), torch.randn(4, 8)
    parameters = list(network.parameters())
    compiling.compiled(lambda x: torch.autograd.grad(network(dql.Mish()(x)).square().sum(), parameters), x.device)(x)
    assert counts == [[2, 0, 5]]


@onednn_wanted
@can_compile
@pytest.mark.parametrize("processor", ["AMD AVX512", "Intel AVX512"])
def test_compiled_float32_updates(processor, monkeypatch, nothing_compiled):
    """On a CPU that passes for AMD's with AVX-512, oneDNN computes all large products of an update and of acting, and
    elsewhere none. Losses, gradients and actions equal those of eager float64: float32's rounding over some dozen
    layers is far below 1e-4 of the largest entry."""
    monkeypatch.setattr(compiling, "instructions", lambda: processor)
    monkeypatch.setattr(compiling, "processor_vendor", lambda: processor.split()[0])
    calls = Counter()

    def outcome(agent: DiffusionQL) -> list[torch.Tensor]:
        calls.clear()
        dtype, rng = torch.get_default_dtype(), np.random.RandomState(0)
        batch = Batch(*(x.to(dtype) for x in official_batch(rng, 17, 6, 256)))
        draws = Draws(*(x.to(dtype) if x.is_floating_point() else x for x in official_draws(rng, 6, 256, 5, 256)))
        with torch.profiler.profile() as profile:
            critic_grads, *critic_losses = agent.critic_gradient(batch, draws)
            policy_grads, *policy_losses = agent.policy_gradient(batch, draws)
            acting = ActDraws(torch.as_tensor(rng.standard_normal((6, 500, 6)), dtype=dtype), torch.zeros(10, 50))
            actions = agent.act(batch.state[:10], acting)
        calls.update(event.name for event in profile.events())
        return [*critic_losses, *policy_losses, actions, *critic_grads, *policy_grads]

    single = tiny_agent(17, 6, batch_size=256, grad_norm=9.0)
    state = single.state_dict()
    single.compile()
    outcome(single)  # compiling itself calls operations, which must not be counted
    got = outcome(single)
    # policy: 3 in each of 16 forward passes, 6 in each of 6 backward; critics: 4 in each of 4 forward, 8 + 4 backward
    assert calls["mkldnn::_linear_pointwise"] == (48 + 36 + 16 + 12 if processor == "AMD AVX512" else 0)
    try:
        torch.set_default_dtype(torch.float64)
        double = tiny_agent(17, 6, batch_size=256, grad_norm=9.0)
        for name in ("policy", "policy_ema", "critic", "critic_target"):
            getattr(double, name).load_state_dict(state[name])
        want = outcome(double)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


def test_replicas_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="eta 0"):
        replicate([tiny_agent(eta=0.0), tiny_agent(eta=1.0)])
    older = tiny_agent()
    older.step += 1
    with pytest.raises(ValueError, match="same number of updates"):
        replicate([tiny_agent(), older])


def test_replicas_of_a_subclass_have_its_losses():
    class Tenfold(DiffusionQL):
        def policy_losses(self, batch, draws):
            bc, q = super().policy_losses(batch, draws)
            return 10 * bc, q

    agents = [Tenfold(3, 2, agent.args) for agent in three_agents()]
    batches = [random_batch(agent) for agent in agents]
    draws = [agent.draw(torch.Generator().manual_seed(k)) for k, agent in enumerate(agents)]
    many = replicate(agents)
    together = many.update(*(type(parts[0])(*map(torch.stack, zip(*parts, strict=True))) for parts in (batches, draws)))
    alone = [agent.update(batch, of_agent).bc for agent, batch, of_agent in zip(agents, batches, draws, strict=True)]
    torch.testing.assert_close(together.bc, torch.stack(alone))


@pytest.mark.parametrize("several", [False, True])
def test_no_foreach_operation_is_compiled(several):
    """For a GPU Inductor fuses them into one kernel, in which one part would compute the norm that all others read."""
    seen = []

    def look(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    agent, generator, batch = three_agents()[0], torch.Generator(), random_batch(tiny_agent())
    if several:
        agent, generator = replicate(three_agents()), generators_of("cpu", 3)
        batch = Batch(*(torch.stack(3 * [x]) for x in batch))
    for function in (agent.critic_gradient, agent.policy_gradient):
        torch.compile(function, backend=look, fullgraph=True)(batch, agent.draw(generator))
    assert len(seen) > 100 and not [name for name in seen if "foreach" in name]


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=can_compile), pytest.param("cuda", marks=[*DEVICES[1].marks, gpu_compiles])]
)
def test_compiled_updates_equal_eager(device, float64):
    """torch.compile does not change the results of updating and acting, for one agent and for two at once."""
    data, generator = tiny_data(device), generators_of(device, 1)[0]
    agents = three_agents(device=device)[:2]
    copies = copy.deepcopy(agents)
    for agent in copies:
        agent.compile()
    compiled, many = copies[0], replicate(copies, compile=True)
    for agent in (compiled, many):
        for function in (agent.critic_gradient, agent.policy_gradient, agent.act):
            assert hasattr(function, "_torchdynamo_orig_callable")
    both, alone = generators_of(device, 2), generators_of(device, 2)
    fast, fast_many = FastUpdate(compiled, data, generator), FastUpdate(many, data, both)
    for n in (1, 1, 98):
        fast(n)
        fast_many(n)
        for agent, g in zip(agents, alone, strict=True):
            for _ in range(n):
                agent.train_step(data, g)
        assert_states_close(compiled.state_dict(), agents[0].state_dict(), **FLOAT64)
        for k, agent in enumerate(agents):
            assert_states_close(unstack(many.state_dict(), k), agent.state_dict(), **FLOAT64)
    states = torch.randn(2 * 5, 3, device=device)
    want = [agent.act_fresh(x, g) for agent, x, g in zip(agents, states.split(5), alone, strict=True)]
    torch.testing.assert_close(compiled.act_fresh(states[:5], generator), want[0], **FLOAT64)
    torch.testing.assert_close(many.act_fresh(states, both), torch.cat(want), **FLOAT64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes", [{}, {"max_q_backup": True, "lr_decay": True, "num_updates": 200}, {"eta": 0.0}])
@pytest.mark.parametrize("replicas", [1, 3])
def test_fast_update_equals_eager(replicas, changes, device, float64):
    """Building one changes nothing; 1, 1 and 98 replays give the losses and states of as many eager steps; it follows a
    state and a learning rate set from outside; and eager steps may come between replays."""
    data, eager = tiny_data(device), three_agents(device=device, **changes)[:replicas]
    agent = replicate(eager) if replicas > 1 else copy.deepcopy(eager[0])
    generators, alone = generators_of(device, replicas), generators_of(device, replicas)
    generator = generators if replicas > 1 else generators[0]

    before = copy.deepcopy(agent.state_dict())
    fast = FastUpdate(agent, data, generator)
    assert_states_close(agent.state_dict(), before, rtol=0, atol=0)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(generators, alone, strict=True))

    def check(n: int) -> None:
        sums = fast(n)
        want = sum(
            torch.stack([a.train_step(data, g) for a, g in zip(eager, alone, strict=True)]) for _ in range(n)
        )
        torch.testing.assert_close(sums.reshape(want.shape), want, **FLOAT64)
        for k, one in enumerate(eager):
            state = agent.state_dict() if replicas == 1 else unstack(agent.state_dict(), k)
            assert_states_close(state, one.state_dict(), **FLOAT64)

    check(1)
    check(1)
    after_two = copy.deepcopy(agent.state_dict())
    check(98)
    for one in (agent, *eager):
        one.policy_opt.param_groups[0]["lr"].fill_(1e-2)
    check(2)
    agent.load_state_dict(after_two)
    for k, one in enumerate(eager):
        one.load_state_dict(after_two if replicas == 1 else unstack(after_two, k))
    check(2)
    again = FastUpdate(agent, data, generator)  # captured when the optimizers already have state
    assert_states_close(again(0), torch.zeros_like(again(0)), rtol=0, atol=0)
    check(1)
    agent.train_step(data, generator)
    for one, g in zip(eager, alone, strict=True):
        one.train_step(data, g)
    check(2)


class NothingIsRead(TorchDispatchMode):
    """Fails if an operation sends values to the host or takes them from it: a GPU would wait, and a capture fail. Such
    are .item(), `if tensor`, masks as indices and torch.tensor(...). It does not see .tolist(), .numpy() and, on a CPU,
    .cpu()."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        else:
            waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        assert not waits and func is not torch.ops.aten.lift_fresh.default, f"{func} in a step that is to be captured"
        return func(*args, **(kwargs or {}))


def tensors_of(state) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("changes", [{}, {"max_q_backup": True, "lr_decay": True, "num_updates": 9}, {"eta": 0.0}])
@pytest.mark.parametrize("replicas", [1, 3])
def test_a_step_waits_for_nothing_and_stays_where_it_is(replicas, changes):
    """Training and acting meet the demands of a capture: the host reads no value, and the state keeps its memory."""
    agents, data = three_agents(**changes)[:replicas], tiny_data("cpu")
    agent = replicate(agents) if replicas > 1 else agents[0]
    generator = generators_of("cpu", replicas) if replicas > 1 else generators_of("cpu", 1)[0]
    states = torch.randn(5 * replicas, 3)
    where = [x.data_ptr() for x in tensors_of(agent.state_dict())]
    with NothingIsRead():
        for _ in range(3):
            agent.train_step(data, generator)
            agent.act_fresh(states, generator)
    assert [x.data_ptr() for x in tensors_of(agent.state_dict())] == where
    for stray in (
        lambda: states.sum().item(), lambda: bool(states.sum() > 0), lambda: torch.tensor(1.0),
        lambda: states[states > 0], lambda: states.__setitem__(states > 0, torch.ones_like(states[0, 0])),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="to be captured"), NothingIsRead():
            stray()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("replicas", [1, 3])
def test_fast_sampler_equals_act(replicas, device, float64):
    """A sampler equals agent.act with the same draws, draws anew at each call, and uses the agent's current weights."""
    agents = three_agents(device=device)[:replicas]
    agent = replicate(agents) if replicas > 1 else agents[0]
    generators, alone = generators_of(device, replicas), generators_of(device, replicas)
    sampler = FastSampler(agent, 5, generators if replicas > 1 else generators[0])
    states = torch.randn(replicas * 5, 3, device=device)
    first, second = sampler(states), sampler(states)
    for got in (first, second):
        want = [a.act_fresh(states[5 * k :][:5], g) for k, (a, g) in enumerate(zip(agents, alone, strict=True))]
        torch.testing.assert_close(got, torch.cat(want), **FLOAT64)
    assert not torch.equal(first, second)
    for g in generators:
        g.manual_seed(7)
    again = sampler(states)
    for g in generators:
        g.manual_seed(7)
    assert torch.equal(sampler(states), again), "a seed given between two calls is heeded"
    with torch.no_grad():
        for p in agent.policy.parameters():
            p.zero_()
    assert not torch.equal(sampler(states), again), "the weights of the day act"


@pytest.mark.parametrize("device", DEVICES)
def test_replays_draw_fresh_numbers(device):
    """1,000 replays of one draw have the mean and variance of a normal, and hardly ever repeat a number."""
    generator, drawn = torch.Generator(device).manual_seed(0), torch.empty(100, device=device)
    graph = fast_sampler.capture(
        lambda: drawn.copy_(torch.randn(100, generator=generator, device=device)), [generator], torch.device(device)
    )
    draws = []
    for _ in range(1000):
        graph.replay()
        draws.append(drawn.clone())
    draws = torch.stack(draws)
    assert abs(draws.mean()) < 4 / math.sqrt(1e5) and abs(draws.var() - 1) < 4 * math.sqrt(2 / 1e5)
    assert len(torch.unique(draws[:, 0])) > 990


@run_wanted
@pytest.mark.parametrize("path", ["in turn", "mapped"])
def test_several_seeds_are_the_single_runs(path, tmp_path, monkeypatch):
    """--num-seeds: each folder holds the single run of that seed, bit for bit if seeds take turns, and up to float32's
    rounding for replicas (used on a GPU); the summary has the mean and spread."""
    if path == "mapped":
        make_steps = fast_sampler.make_steps

        def mapped(args, agents, dataset, generators, eval_generators):
            if len(agents) > 1:
                agents, generators, eval_generators = [replicate(agents)], [generators], [eval_generators]
            return make_steps(args, agents, dataset, generators, eval_generators)

        monkeypatch.setattr(fast_sampler, "make_steps", mapped)
    args = tiny_args(tmp_path, num_seeds=2, seed=5, num_updates=12, eval_every=6)
    summary = dql.train(args)
    folder = Path(summary["folder"])
    scores = []
    for seed in (5, 6):
        alone = Path(dql.train(tiny_args(tmp_path, seed=seed, num_updates=12, eval_every=6))["folder"])
        own = folder / f"seed-{seed}"
        names = [{p.name.split(".1")[0] for p in path.iterdir()} - {".lock"} for path in (own, alone)]
        assert names[0] == names[1]
        for a, b in zip(metrics(own), metrics(alone), strict=True):
            for name in (*run_folder.LOSS_NAMES, "score"):
                if path == "in turn":
                    assert a[name] == b[name], name
                elif name != "score":  # in float32 each update amplifies the rounding of those before
                    assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3, abs=1e-4), name
        scores.append(json.loads((own / "summary.json").read_text())["last"]["score"])
        assert dql.load_policy(own, device="cpu")(np.zeros(11)).shape == (3,)
    assert summary["last"]["scores"] == scores
    assert summary["last"]["score"] == pytest.approx(np.mean(scores))
    assert summary["last"]["std"] == pytest.approx(np.std(scores))
    with pytest.raises(BadInput, match="seed-"):
        dql.load_policy(folder, device="cpu")


def test_paths_are_chosen_by_device_and_length(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(fast_sampler, "lacks_to_compile", lambda on_gpu: "")

    def chosen(device: torch.device, **args) -> tuple[bool, bool]:
        args = fast_sampler.choose_path(dql.with_settings(Args(**args)), device)
        return args.compile, args.cudagraphs

    assert chosen(cpu, num_updates=100) == (False, False) and chosen(cpu, num_updates=10**6) == (True, False)
    assert chosen(gpu, num_updates=100) == (False, False) and chosen(gpu, num_updates=10_000) == (False, True)
    assert chosen(gpu, num_updates=10**6) == (True, True)
    assert chosen(cpu, num_updates=2500, num_seeds=2) == (True, False) and not chosen(cpu, num_updates=4999)[0]
    assert chosen(gpu, num_updates=10**6, compile=False, cudagraphs=False) == (False, False)
    with pytest.raises(BadInput, match="--cudagraphs"):
        chosen(cpu, cudagraphs=True)
    monkeypatch.undo()
    monkeypatch.setattr(fast_sampler.shutil, "which", lambda name: None)
    assert chosen(cpu, num_updates=10**6) == (False, False)
    with pytest.raises(BadInput, match=r"--compile needs a compiler, g\+\+"):
        chosen(cpu, compile=True)


def test_a_captured_sampler_refuses_other_shapes():
    sampler = FastSampler(tiny_agent(), 5, torch.Generator())
    with pytest.raises(ValueError, match=r"\(5, 3\), not \(3,\)"):
        sampler(torch.zeros(3))


def test_a_data_file_may_be_under_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dql.with_settings(Args(dataset_path=Path("~/x.hdf5"))).dataset_path == tmp_path / "x.hdf5"


def test_flags_that_may_be_none_need_no_value():
    assert command_line.parse(Args, ["--compile", "--seed", "3"]).compile is True
    assert command_line.parse(Args, ["--no-compile"]).compile is False
    assert command_line.parse(Args, ["--cudagraphs", "False", "--max-q-backup"]).cudagraphs is False
    assert command_line.parse(Args, []).compile is None


def test_a_complaint_is_one_short_line():
    for words, line in ((["--num-updates", "x"], "Error parsing --num-updates: no type matching .* from \\['x'\\]\\."),
                        (["--schedule", "x"], "invalid choice 'x' for argument '--schedule'\\. Expected one of .*"),
                        (["--bogus"], "Unrecognized options: --bogus")):  # fmt: skip
        with pytest.raises(BadInput, match=f"^{line} \\(python dql.py --help lists the flags\\)$"):
            command_line.parse(Args, words)


FAULTS = """
import resource, torch, dql, fast_sampler
torch.set_num_threads(1)
args = dql.with_settings(dql.Args(device="cpu", batch_size=64, max_q_backup=True, compile=False, cudagraphs=False))
agent, generator = dql.make_agent(args, 0), torch.Generator()
data = dql.Batch(torch.rand(9, 17), torch.rand(9, 6), torch.rand(9), torch.rand(9, 17), torch.zeros(9))
updates = fast_sampler.make_steps(args, [agent], data, [generator], [generator])[1]
updates(10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
updates(30)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 30)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_updates_take_no_memory_from_the_system():
    """In a process of its own, for what was freed before decides when glibc gives memory back."""
    run = subprocess.run([sys.executable, "-c", FAULTS], cwd=HERE, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 80  # page faults an update: here 1 to 20, and 190 to 1,100 if glibc is left alone


# ----------------------------------------------------------------- bad input


def fails(capsys, *argv: str) -> str:
    """Runs the command line, which must end with exit code 2 and one line on stderr; returns that line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dql.py", *argv])
        with pytest.raises(SystemExit) as stop:
            dql.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error, error
    return error


@pytest.mark.parametrize("argv, says", [
    (["--env-id", "halfcheetah-medum-v2"], "halfcheetah-medium-v2"),
    (["--eta", "much"], "--eta"),
    (["--eta", "nan"], "--eta is nan, it must be"),
    (["--eta", "-1"], "--eta is -1.0, it must be"),
    (["--schedule", "sigmoid"], "'vp', 'linear', 'cosine'"),
    (["--num-steps", "0"], "--num-steps is 0, it must be at least 1"),
    (["--gamma", "1.5"], "between 0 and 1"),
    (["--batch-size"], "--batch-size"),
    (["--no-such-flag"], "--no-such-flag"),
    (["--device", "tpu9"], "--device is tpu9, it must be"),
    (["--device", "cuda:99"], "--device cuda:99 (given, found or resumed) cannot be used"),
    (["--seed", "18446744073709551616"], "below 2^31"),
    (["--dataset-path", "no-such-file.hdf5"], "no-such-file.hdf5"),
    (["--resume", "no-such-run"], "no-such-run is not the folder of a run"),
])  # fmt: skip
def test_bad_flags_get_one_line(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [
    {"reward": "standardise"}, {"schedule": "foo"}, {"env_backend": "xx"}, {"batch_size": 2.5}, {"tau": "1"},
    {"eta": "1"}, {"eta": 0.0, "eval_candidates": "5"}, {"env_id": ["a"]},
])  # fmt: skip
def test_a_value_of_another_kind_is_refused_from_python_too(wrong):
    with pytest.raises(BadInput, match="cannot be"):
        dql.with_settings(Args(**wrong))


@run_wanted
def test_a_folder_that_cannot_be_begun_is_not_left_there(tmp_path, monkeypatch):
    args = dql.with_settings(tiny_args(tmp_path, num_seeds=2))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(BadInput, match=r"No space left on device.*--runs-dir"):
        patch.setattr(Path, "write_text", full)
        run_folder.start_folder(args)
    assert list(args.runs_dir.iterdir()) == []


def test_metrics_are_named_as_losses_are():
    assert tuple(name.removesuffix("_loss") for name in run_folder.LOSS_NAMES) == dql.Losses._fields


@run_wanted
def test_events_of_updates_that_are_made_again_are_forgotten(tmp_path):
    """A run killed before its first checkpoint begins again from update 0, in the same folder."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    args = dql.with_settings(tiny_args(tmp_path, num_updates=4, log_every=2))
    folder = run_folder.start_folder(args)
    row = dict.fromkeys(run_folder.METRICS, 0.5) | {"score": "", "score_std": ""}
    for steps in ((1, 2, 3), (1,)):
        with run_folder.open_logs(args, folder, 0) as writers:
            for step in steps:
                run_folder.log(args, folder, [[row | {"step": step}]], writers, None)
        time.sleep(1.1)  # event files are read in the order of their names, which have the time in seconds
    events = accumulators.EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("losses/bc_loss")] == [1]


def test_files_of_others_come_whole(tmp_path):
    """Half-written files, of this process or of one that was killed, are removed; whole ones are moved."""
    (tmp_path / ".part-files").mkdir()
    (tmp_path / ".part-files" / "old").write_text("half")
    with pytest.raises(BadInput, match="No space left"), run_folder.files_beside(tmp_path) as beside:
        beside.mkdir()
        (beside / "video").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    with run_folder.files_beside(tmp_path) as beside:
        beside.mkdir()
        (beside / "video").write_text("whole")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


@run_wanted
def test_unwritable_run_folder_gets_one_line(capsys, tmp_path):
    """A file is where the folder should be, which stops any user, even root."""
    (tmp_path / "taken").write_text("")
    data = random_file(tmp_path / "hopper.hdf5")
    argv = ["--env-id", "hopper-medium-v2", "--dataset-path", str(data), "--runs-dir", str(tmp_path / "taken")]
    assert "--runs-dir" in fails(capsys, *argv, "--eval-episodes", "1")


@run_wanted
def test_damaged_checkpoint_gets_one_line(capsys, tmp_path):
    folder = Path(dql.train(tiny_args(tmp_path, num_updates=2))["folder"])
    whole = (folder / "checkpoint.pt").read_bytes()
    (folder / "summary.json").unlink()
    capsys.readouterr()
    (folder / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as a checkpoint" in fails(capsys, "--resume", str(folder))
    torch.save({"agents": []}, folder / "checkpoint.pt")
    assert "cannot be read as a checkpoint" in fails(capsys, "--resume", str(folder))
    other = Path(dql.train(tiny_args(tmp_path, num_updates=2, num_steps=3))["folder"])
    checkpoint = torch.load(other / "checkpoint.pt", weights_only=True)
    del checkpoint["agents"][0]["policy"]["output.bias"]
    torch.save(checkpoint, folder / "checkpoint.pt")
    capsys.readouterr()
    assert "is not of the run of its args.json" in fails(capsys, "--resume", str(folder))


def test_errors_reach_the_shell_without_a_traceback(tmp_path):
    run = [sys.executable, str(HERE / "dql.py"), "--env-id", "no-such-env"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("dql.py: unknown env id 'no-such-env'")


FAMILIES = ["halfcheetah-medium-v2", "hopper-medium-v2", "walker2d-medium-v2", "antmaze-medium-play-v0", "pen-human-v1",
            "kitchen-mixed-v0"]  # fmt: skip


def bad_input(call, *words):
    """call() must raise BadInput with a one-line message that has all these words; returns the message."""
    with pytest.raises(BadInput) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 2000
    for word in words:
        assert word in message, message
    return message


# ----------------------------------------------------------------- hostile files

WORKER = """
import contextlib, gc, hashlib, io, json, pathlib, re, resource, signal, sys, warnings
import numpy as np
import d4rl_tasks
warnings.simplefilter("ignore")

def load(path):
    return d4rl_tasks.load_dataset("hopper-medium-v2", path)

def act(folder):
    import dql

    actions = dql.load_policy(folder, device="cpu")(np.random.default_rng(0).standard_normal((9, 11)))
    dql.train(dql.Args(resume=pathlib.Path(folder), device="cpu"))
    return {"actions": actions}

resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))  # what would eat the machine ends here
for line in sys.stdin:
    signal.alarm(60)  # kills what hangs
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            arrays = {"load": load, "act": act}[sys.argv[1]](json.loads(line))
            parts = b"".join(arrays[name].tobytes() for name in sorted(arrays))
            answer = "loaded", hashlib.sha256(parts).hexdigest()
        except d4rl_tasks.BadInput as error:
            answer = "refused", str(error)
        except BaseException as error:
            answer = "traceback", repr(error)
    signal.alarm(0)
    gc.collect()  # or what this file leaves in cycles of references would count as the next one's
    gc.freeze()  # what is still there need not be looked through again
    peak = re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())  # ru_maxrss begins at pytest's
    print(json.dumps([*answer, int(peak[1]) * 1024]), flush=True)
"""


class Worker:
    """A separate process that loads the files it is given one by one: a file may crash it, hang it or use up memory."""

    def __init__(self, task: str):
        command = [sys.executable, "-c", WORKER, task]
        self.process = subprocess.Popen(command, cwd=HERE, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True)

    def __call__(self, path) -> tuple[str, str, int]:
        """(outcome, digest or message, peak memory so far in bytes)"""
        print(json.dumps(str(path)), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        return tuple(json.loads(line)) if line else ("dead", f"exit status {self.process.wait()}", 0)

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def outcomes(task: str, good, variants, right, mark: Path) -> Counter:
    """Checks that each variant (name, path, words) is refused in one line that has its file's name and the words; one
    without words may also be loaded, with the digest right(path). Memory never grows by more than twice the file and
    64 MiB: the latter for zeros, of which any file may hold 16 MiB a column (flags compress by 1000), or for what a
    first resume imports. mark, a file that a variant's code would make, never appears. Returns the outcomes' counts."""
    counts, wrong, worker = Counter(), [], Worker(task)
    kind, digest, before = worker(good)
    assert (kind, digest) == ("loaded", right(good)), digest
    for name, path, words in variants:
        kind, text, peak = worker(path)
        counts[kind] += 1
        one_line = "\n" not in text and len(text) < 2000 and all(word in text for word in (path.name, *words))
        fine = one_line if kind == "refused" else kind == "loaded" and not words and text == right(path)
        files = [path] if path.is_file() else path.glob("*") if path.is_dir() else []
        size = sum(file.stat().st_size for file in files if file.is_file())
        if not fine or peak - before > 2 * size + 2**26 or mark.exists():
            wrong.append((name, kind, text[:300], (peak - before) // 2**20, mark.exists()))
            mark.unlink(missing_ok=True)
            worker.stop()
            worker = Worker(task)  # the old one may be dead, or its peak memory too high to see the next
            before = worker(good)[2]
    worker.stop()
    assert not wrong, "\n".join(map(str, wrong))
    return counts


def broken_bytes(whole: bytes, rng: np.random.Generator, count: int):
    """Yields (name, damaged copy): cut off, or bytes, a bit, zeros or a large number written, mostly near the start."""
    for k in range(count):
        end = int(rng.choice([512, 2048, len(whole)]))
        broken, place = bytearray(whole), int(rng.integers(min(end, len(whole)) - 9))
        kind = ("cut", "bytes", "bits", "zeros", "large")[k % 5]
        if kind == "cut":
            del broken[int(rng.integers(len(whole))) :]
        elif kind == "bytes":
            for place in rng.integers(0, min(end, len(whole)), 4):
                broken[place] = rng.integers(256)
        elif kind == "bits":
            broken[place] ^= 1 << int(rng.integers(8))
        else:
            run = bytes(int(rng.integers(1, 400))) if kind == "zeros" else bytes.fromhex("ffffffffffffff7f")
            broken[place : place + len(run)] = run[: len(broken) - place]
        yield f"{kind} {k}", bytes(broken)


def wrong_columns() -> dict:
    """By name: the columns of a file, and words that its refusal must have (if none, it may be loaded)."""
    zeros, nan, inf, big = np.zeros, np.zeros((6, 11)), np.zeros(6), np.zeros((6, 11))
    nan[4, 2], inf[3], big[2, 2] = np.nan, -np.inf, 1e300
    without = {name: {k: v for k, v in rows_of(6).items() if k != name} for name in rows_of(6)}
    changes = {
        "narrow states": ("observations", zeros((6, 10)), ["(6, 10)", "(6, 11)", "hopper"]),
        "wide actions": ("actions", zeros((6, 4)), ["(6, 4)", "(6, 3)"]),
        "flat states": ("observations", zeros(66), ["(66,)"]),
        "states of three axes": ("observations", zeros((6, 11, 1)), ["(6, 11, 1)"]),
        "scalar": ("observations", np.float32(3), ["()"]),
        "short actions": ("actions", zeros((5, 3)), ["(5, 3)"]),
        "short rewards": ("rewards", zeros(5), ["(5,)"]),
        "long timeouts": ("timeouts", zeros(7, bool), ["(7,)"]),
        "two rewards": ("rewards", zeros((6, 2)), ["(6, 2)"]),
        "nan": ("observations", nan, ["of row 4", "not finite"]),
        "inf": ("rewards", inf, ["of row 3", "not finite"]),
        "more than float32": ("observations", big, ["of row 2", "not finite"]),
        "more than float16": ("rewards", np.array([0, 0, 0, np.inf, 0, 0], "f2"), ["of row 3"]),
        "nan terminal": ("terminals", np.array([0, 0, np.nan, 0, 0, 0]), ["of row 2"]),
        "nan timeout": ("timeouts", np.array([0, 0, np.nan, 0, 0, 0]), ["of row 2"]),
        "unscaled actions": ("actions", np.full((6, 3), -30.0), ["reach 30", "[-1, 1]"]),
        **{f"type {t}": ("rewards", zeros(6, t), ["numbers"]) for t in ("S1", "c8", "c16", "V3", [("a", "f4")])},
        **{f"fine {t}": ("rewards", zeros(6, t), []) for t in (">f8", "f2", "g", "u8", ">i2", "?")},
        **{f"flags {t}": ("terminals", np.arange(6).astype(t), []) for t in (">f8", "f2", "g", "u8", ">i2", "?")},
    }  # fmt: skip
    table = {name: (rows_of(6) | {key: values}, words and [key, *words])
             for name, (key, values, words) in changes.items()}  # fmt: skip
    table |= {f"no {name}": (columns, [f"has no {name}"]) for name, columns in without.items()}
    all_ends = rows_of(6) | {"timeouts": np.ones(6, bool)}
    return table | {"nothing": ({}, ["has no observations"]), "all timeouts": (all_ends, ["no transition"]),
                    "no row": (rows_of(0), ["no transition"]),
                    "one row": (rows_of(1), ["no transition"]), "two rows": (rows_of(2), [])}  # fmt: skip


def wrong_rewards(folder: Path) -> dict:
    """By name: a function that puts rewards into an open file, and words that its refusal must have."""
    import h5py

    other, rows = write(folder / "other.hdf5", rows_of(6)), {"shape": 6, "dtype": "f4"}
    os.mkfifo(folder / "fifo")
    (folder / "raw").write_bytes(bytes(24))
    layout = h5py.VirtualLayout((6,), "f4")
    layout[:] = h5py.VirtualSource(other, "rewards", (6,))
    links = {"soft": h5py.SoftLink("/actions"), "dangling": h5py.SoftLink("/no"), "itself": h5py.SoftLink("rewards"),
             "external": h5py.ExternalLink(other, "rewards"), "no file": h5py.ExternalLink("/no/file", "rewards"),
             "fifo": h5py.ExternalLink(folder / "fifo", "rewards"), "type": np.dtype("f4")}  # fmt: skip

    def bomb(file, shape, chunk):
        column = file.create_dataset("rewards", shape, "f4", chunks=(chunk,), maxshape=(None,), compression="gzip")
        zeros = zlib.compress(bytes(4 * chunk), 1)
        for start in range(0, shape, chunk):
            column.id.write_direct_chunk((start,), zeros)

    def unknown_filter(file):
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((6,))
        plan.set_filter(400, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple((6,))
        h5py.h5d.create(file.id, b"rewards", h5py.h5t.IEEE_F32LE, space, plan).write_direct_chunk((0,), bytes(24))

    def external(path):
        return lambda file: file.create_dataset("rewards", **rows, external=[(path, 0, 24)])

    return {
        **{f"link {k}": (lambda file, to=to: file.__setitem__("rewards", to), ["link"]) for k, to in links.items()},
        "group": (lambda file: file.create_group("rewards"), ["group"]),
        "void": (lambda file: file.create_dataset("rewards", data=h5py.Empty("f4")), ["void"]),
        "virtual": (lambda file: file.create_virtual_dataset("rewards", layout), ["link"]),
        **{f"outside {name}": (external(str(folder / name)), ["link"]) for name in ("raw", "fifo", "nowhere")},
        "strings": (lambda file: file.create_dataset("rewards", data=["one"] * 6), ["numbers"]),
        "ragged": (lambda file: file.create_dataset("rewards", 6, h5py.vlen_dtype(np.float32)), ["numbers"]),
        "references": (lambda file: file.create_dataset("rewards", 6, h5py.ref_dtype), ["numbers"]),
        "enumeration": (lambda file: file.create_dataset("rewards", 6, h5py.enum_dtype({"a": 1})), []),
        "rows of two": (lambda file: file.create_dataset("rewards", 6, np.dtype(("f4", 2))), ["rewards"]),
        "unknown filter": (unknown_filter, []),
        "bomb of chunks": (lambda file: bomb(file, 10**8, 10**6), ["claims 400,000,000 bytes"]),
        "bomb in a chunk": (lambda file: bomb(file, 6, 5 * 10**7), ["claims 200,000,000 bytes"]),
        **{f"claim {n:.0e} {chunks}": (lambda file, n=n, c=chunks: file.create_dataset("rewards", n, "f4", chunks=c),
                                       ["claims"]) for n in (10**7, 10**12, 2**56) for chunks in (None, (1000,))},
        "claim of pieces": (lambda file: file.create_dataset("rewards", 300_000, "f4", chunks=(1,)), ["claims"]),
        "small claim": (lambda file: file.create_dataset("rewards", 6, "f4", chunks=(3,)), []),
    }  # fmt: skip


def broken_data(folder: Path):
    """Yields (name, path, words): files that differ from D4RL's, from slightly unusual to badly damaged."""
    import h5py

    path, rest = folder / "broken.hdf5", {name: values for name, values in rows_of(6).items() if name != "rewards"}
    for name, (columns, words) in wrong_columns().items():
        yield name, write(path, columns), words
    for name, (make, words) in wrong_rewards(folder).items():
        with h5py.File(write(path, rest), "a") as file:
            make(file)
        yield name, path, words and ["rewards", *words]
    yield "zeros that a small file may hold", write(path, {
        name: np.zeros((180_000, *values.shape[1:])) for name, values in rows_of(1).items()
    }, compression="gzip"), []  # fmt: skip
    many = {name: np.zeros((10**6, *values.shape[1:])) for name, values in rows_of(1).items()}
    yield "bomb of rows", write(path, many, compression="gzip"), ["claims"]
    whole = write(path, rows_of(300), compression="gzip").read_bytes()
    path.write_bytes(whole.replace(b"\x01\0\x08\0\x01\0\x01\0deflate", b"\0\x7d\x08\0\0\0\x01\0deflate"))
    yield "missing filter", path, ["HDF5"]
    texts = {"empty": b"", "text": b"not HDF5 at all\n" * 99, "head": whole[:100], "pickle": b"\x80\x04."}
    for name, content in texts.items():
        path.write_bytes(content)
        yield name, path, ["HDF5"]
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    for name, words in {"none": ["not exist"], "folder": ["inari"], "fifo": ["not a file"], "loop": []}.items():
        yield name, folder / name, words
    yield "device", Path(os.devnull), ["not a file"]
    yield "zeros", Path("/dev/zero"), ["not a file"]
    yield "no user", Path("~no-such-user/d.hdf5"), ["not exist"]
    yield "name with a nought", Path("a\0b"), ["HDF5"]
    flags = rows_of(200) | {"timeouts": np.arange(200) % 50 == 49}
    layouts = {}, {"chunks": True}, {"compression": "gzip"}, {"compression": "lzf", "fletcher32": True}
    for seed, options in enumerate(layouts):
        whole = write(path, flags, **options).read_bytes()
        for name, content in broken_bytes(whole, np.random.default_rng(seed), 45):
            path.write_bytes(content)
            yield f"{name} {options}", path, []


def read_plainly(path: Path) -> str:
    """The digest of what plain_loop makes of the file's columns."""
    import h5py

    with h5py.File(path) as file:
        return digest(plain_loop({name: column[...] for name, column in file.items()}, 1000))


def test_broken_data_are_refused_or_read(tmp_path, capsys):
    pytest.importorskip("h5py")
    good = write(tmp_path / "good.hdf5", rows_of(300))
    counts = outcomes("load", good, broken_data(tmp_path), read_plainly, tmp_path / "mark")
    with capsys.disabled():
        print(f"\n{counts.total()} data files: {dict(counts)}")
    assert counts["refused"] > 100 and counts["loaded"] > 30


class Marker:
    """An object whose pickle runs code when it is loaded: it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


def broken_args(good: dict):
    """Yields (name, text of args.json, words that the refusal must have)."""
    wrong = {
        "num_steps": (0, -1, 2.5, True, "2", None, [2], 10**8, 10**400), "seed": (-1, 1.5, None, 2**63, "x"),
        "eta": ("1", True, math.nan, math.inf, -1.0, 10**400), "learning_rate": (0, True, "3e-4", 10**400),
        "num_seeds": (0, 1.5, True, 10**9), "schedule": ("sigmoid", 3, None, ["vp"]), "reward": ("foo", 1),
        "env_id": ("x", 3, None, ["a"], {}, "x" * 10**5, "a\nb", "\udcff"), "gamma": (None, 2, math.nan),
        "batch_size": (2.5, 10**12), "eval_candidates": (2.5, 10**12), "max_q_backup": ("x", 7), "device": (3, None),
        "compile": ("x", 1), "env_backend": ("x", None), "runs_dir": (3, None, []), "resume": (3, {}),
        "num_updates": (1.5, 10**30), "offline_rank": (0.5,), "average_from": (10**30,), "no_such_flag": (1,),
        "lr_decay": ("no",), "dataset_path": (3, "a\0b", "\ud800", "/x" * 10**4),
    }  # fmt: skip
    for name, values in wrong.items():
        for k, value in enumerate(values):
            yield f"{name} {k}", json.dumps(good | {name: value}), []
    whole = json.dumps(good)
    texts = {"empty": "", "half": whole[:100], "list": "[]", "null": "null", "number": "7", "deep": "[" * 10**5,
             "digits": whole.replace('"seed": 0', '"seed": ' + "9" * 5000), "binary": "\0\x80"}  # fmt: skip
    for name, text in texts.items():
        yield f"args {name}", text, ["not the folder of a run"]


def broken_states(good: dict, mark: Path):
    """Yields (name, checkpoint, words): every kind of wrong value in every kind of place."""
    weight, moments = ("agents", 0, "policy", "output.weight"), ("agents", 0, "policy_opt", "state", 0)
    group, row = ("agents", 0, "policy_opt", "param_groups", 0), ("progress", "history", 0, 0)
    shape = good["agents"][0]["policy"]["output.weight"].shape
    vast = torch.zeros(1, dtype=torch.float16).expand(10**6, 10**6)
    sums = good["progress"]["sums"]
    nan, whole, phase = (torch.full(shape, value) for value in (math.nan, 1, 1j))
    values = {
        weight: (vast, nan, whole, phase, nan[:2], nan[0, 0], whole.to_sparse(), None, "x", Marker(mark)),
        (*moments, "exp_avg"): (vast, phase, nan[:2], nan[0, 0], None, "x"), (*moments, "step"): (vast, "x", nan),
        (*group, "lr"): (vast, "fast", None, nan), ("agents", 0, "step"): (vast, nan, torch.tensor([2, 2])),
        ("generators", 0): (vast, torch.zeros(5056, dtype=torch.uint8), torch.zeros(3), None),
        ("agents", 0, "policy_opt"): ([1], None, {}), ("agents", 0): (None, {}, []),
        ("progress", "history"): ([], [[], []], [[{"step": 2}]], [[7]], None), (*row, "step"): (0, -2, vast, "x"),
        (*row, "score"): ("x", None, vast, []),
        ("progress", "sums"): (vast, None, nan, sums.to(torch.complex64), sums.to_sparse()),
        ("progress", "step"): (7, "x", 2.0, True), ("progress", "seconds"): ("x", None, math.nan),
        ("progress", "kept"): ("x", None), ("progress", "data"): ("x", None, vast), ("versions", "torch"): ([1], vast),
        (*row, "seconds"): ("", 10**400, True), (*row, "bc_loss"): ("", math.inf), (*row, "score_std"): ("", "x"),
        ("agents", 0, "policy_opt", "state", 1): (None, {}, {"exp_avg": 1}), ("agents", 0, "more"): (nan,),
        ("agents", 0, "critic", "q3"): (nan,),
        **{(name,): (None, 7, [], {}, "x", vast) for name in good},
    }  # fmt: skip
    for (*place, last), wrong in values.items():
        for k, value in enumerate(wrong):
            broken = copy.deepcopy(good)
            at = functools.reduce(operator.getitem, place, broken)
            at[last] = value
            free = last == "device" or (last in ("versions", "args") and value == {})
            yield f"{'.'.join(map(str, [*place, last]))} {k}", broken, [] if free else ["checkpoint.pt"]
    for place in (group, moments):
        broken = copy.deepcopy(good)
        functools.reduce(operator.getitem, place, broken).clear()
        yield f"{place[-2]} of nothing", broken, ["checkpoint.pt"]


def broken_zips(good: bytes):
    """Yields (name, bytes, words): archives with a record cut, too long, missing or larger than the file, or intact."""

    def again(change, kind=zipfile.ZIP_STORED):
        old, new = zipfile.ZipFile(io.BytesIO(good)), io.BytesIO()
        with zipfile.ZipFile(new, "w", kind) as file:
            for name in old.namelist():
                if (content := change(name, old.read(name))) is not None:
                    file.writestr(name, content)
        return new.getvalue()

    def first(content):
        return lambda name, old: content(old) if name.endswith("data/0") else old

    yield "short record", again(first(lambda old: old[:10])), ["checkpoint.pt"]
    yield "long record", again(first(lambda old: old * 3)), ["checkpoint.pt"]
    yield "no record", again(first(lambda old: None)), ["checkpoint.pt"]
    yield "record of zeros", again(first(lambda old: bytes(10**9)), zipfile.ZIP_DEFLATED), ["claims more"]
    yield "claims in the pickle", again(lambda name, old: old.replace(b"M\0\3", b"J\0\0\0\x10")), ["checkpoint.pt"]
    yield "written again", again(lambda name, old: old), []


def broken_runs(folder: Path, run: Path, mark: Path):
    """Yields (name, folder, words): runs whose args.json or checkpoint.pt was changed or is missing."""
    path, args, summary = run / "checkpoint.pt", run / "args.json", run / "summary.json"
    whole, whole_args = path.read_bytes(), args.read_text()
    good = torch.load(path, weights_only=True)
    for name, text, words in broken_args(json.loads(whole_args)):
        args.write_text(text)
        yield name, run, words
    args.write_text(whole_args)

    def contents():
        yield from broken_zips(whole)
        yield from ((*of, []) for of in broken_bytes(whole, np.random.default_rng(0), 20))
        for name, value in {"a mark": Marker(mark), "a dict": {"agents": []}, "a tensor": torch.zeros(3)}.items():
            yield f"pickle of {name}", pickle.dumps(value), ["cannot be read as a checkpoint"]
            for new in (False, True):
                file = io.BytesIO()
                torch.save(value, file, _use_new_zipfile_serialization=new)
                yield f"{name} in torch's {'new' * new} way", file.getvalue(), ["cannot be read as a checkpoint"]
        for name, value, words in broken_states(good, mark):
            file = io.BytesIO()
            torch.save(value, file)
            yield name, file.getvalue(), words

    for name, content, words in contents():
        summary.unlink(missing_ok=True)
        path.write_bytes(content)
        yield name, run, words
    for file, content in ((path, whole), (args, whole_args.encode())):
        file.unlink()
        yield f"no {file.name}", run, [file.name]
        for make in (os.mkfifo, os.mkdir):
            make(file)
            yield f"{make.__name__} {file.name}", run, [file.name]
            file.unlink() if make is os.mkfifo else file.rmdir()
        file.write_bytes(content)
    yield "no folder", folder / "no-such-run", ["not the folder of a run"]


@run_wanted
def test_broken_runs_are_refused_or_act_as_the_whole_one(tmp_path, capsys):
    """Each run is tried with load_policy, and then with --resume."""
    run, mark = Path(dql.train(tiny_args(tmp_path, num_updates=2))["folder"]), tmp_path / "mark"
    (run / "summary.json").unlink()
    actions = dql.load_policy(run, device="cpu")(np.random.default_rng(0).standard_normal((9, 11)))
    counts = outcomes("act", run, broken_runs(tmp_path, run, mark), lambda path: digest({"actions": actions}), mark)
    with capsys.disabled():
        print(f"\n{counts.total()} runs: {dict(counts)}")
    assert counts["refused"] > 150


NUMBERS = ["nan", "inf", "-inf", "1e400", "-1e400", "1e-400", "-0", "0", "0.0", "1", "7", "-1", "0.5", "1.5", "0x10",
           "1_0", "9" * 400, "9" * 5000, "2147483648", "٣", "None", "True", "False"]  # fmt: skip
WORDS = [*NUMBERS, "", " ", "\n", "─│", "\udcff", "\0", "--", "-", "-x", "@x", "{}", "auto", *TASKS, "vp", "none",
         "standardize", "d4rl", "--no-such-flag", "--=", "--help=1"]  # fmt: skip
FLAGS = [f"--{no}{f.name.replace('_', '-')}" for f in fields(Args) for no in ("", "no-")]
BOUNDS = [
    (1, 2**31 - 1, "num_updates batch_size average_every eval_every eval_episodes eval_candidates log_every"),
    (1, 10_000, "num_steps num_seeds"), (0, 2**31 - 1, "seed"), (0, 10**18 - 1, "average_from offline_rank"),
    (0.0, 1e18, "eta grad_norm eval_temperature"), (1e-300, 1e300, "learning_rate"),
    (0.0, 1.0, "gamma tau average_decay"),
]  # fmt: skip


def fuzz(check: Callable, examples: int, *strategies) -> None:
    """Calls check with examples that hypothesis draws, the same ones every time."""
    hypothesis = pytest.importorskip("hypothesis")
    hypothesis.settings(deadline=None, max_examples=examples, derandomize=True)(hypothesis.given(*strategies)(check))()


def test_any_command_line_gives_sound_arguments_or_one_line():
    st = pytest.importorskip("hypothesis.strategies")

    def check(triples):
        argv = [word for flag, by, value in triples
                for word in {"": [flag], " ": [flag, value], "=": [f"{flag}={value}"]}[by]]  # fmt: skip
        try:
            args = dql.with_settings(command_line.parse(Args, argv))
        except BadInput as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000
            return
        for low, high, names in BOUNDS:
            for name in names.split():
                value = getattr(args, name)
                assert low <= value <= high and type(value) is type(low), (name, value)
        assert args.env_id in TASKS and args.schedule in ("vp", "linear", "cosine") and args.reward is not None
        assert dql.with_settings(args) == args

    by = st.sampled_from(["", " ", "="])
    fuzz(check, 150, st.lists(st.tuples(st.sampled_from(FLAGS), by, st.sampled_from(WORDS)), max_size=5))


def test_arguments_come_back_from_the_command_line():
    st = pytest.importorskip("hypothesis.strategies")
    paths = st.text("ab/. _é", min_size=1).map(Path)
    sound = {"dataset_path": paths, "runs_dir": paths, "resume": paths, "env_id": st.sampled_from([*TASKS])}
    for low, high, names in BOUNDS:
        numbers = st.floats(low, high) if isinstance(low, float) else st.integers(low, high)
        sound |= dict.fromkeys(names.split(), numbers)
    for f in fields(Args):
        if bool in (f.type, *get_args(f.type)):
            sound[f.name] = st.booleans()

    def check(args):
        argv = []
        for f in fields(Args):
            flag, value = f"--{f.name.replace('_', '-')}", getattr(args, f.name)
            argv += [flag if value else flag.replace("--", "--no-")] if f.type is bool else [flag, str(value)]
        assert command_line.parse(Args, argv) == args

    fuzz(check, 100, st.builds(Args, **sound))


def random_pen_file(draw, st):
    """Draws (columns, HDF5 options) of a pen file with any pattern of episode ends, shapes, types and layout."""
    n, rng = draw(st.integers(2, 260)), np.random.RandomState(draw(st.integers(0, 2**32 - 1)))
    ends = st.lists(st.integers(0, n - 1), max_size=12).map(lambda rows: np.isin(np.arange(n), rows))
    columns = {"observations": rng.standard_normal((n, 45)), "actions": rng.uniform(-1, 1, (n, 24)),
               "rewards": rng.standard_normal(n), "terminals": draw(ends)}  # fmt: skip
    if draw(st.booleans()):
        columns["timeouts"] = draw(ends)
    for name in columns:
        flag = name in ("terminals", "timeouts")
        dtypes = ["?", "u1", ">i8", "f4"] if flag else ["f2", "f4", "f8", ">f4"]
        columns[name] = columns[name].astype(draw(st.sampled_from(dtypes)))
        if columns[name].ndim == 1 and draw(st.booleans()):
            columns[name] = columns[name].reshape(n, 1)
    layouts = {}, {"chunks": True}, {"compression": "gzip"}, {"compression": "lzf", "shuffle": True, "fletcher32": True}
    return columns, draw(st.sampled_from(layouts))


def test_loader_equals_a_plain_loop_on_any_file(tmp_path):
    st = pytest.importorskip("hypothesis.strategies")

    def check(drawn):
        columns, options = drawn
        path = write(tmp_path / "any.hdf5", columns, **options)
        if "timeouts" in columns and columns["timeouts"][:-1].all():
            bad_input(lambda: load_dataset("pen-human-v1", path), "no transition")
        else:
            same(load_dataset("pen-human-v1", path), plain_loop(columns, 100))

    fuzz(check, 200, st.composite(random_pen_file)(st))


# ------------------------------------------------------------------------------------------------ d4rl_tasks: the table


def test_tasks_are_those_that_d4rl_registers():
    registered = json.loads((HERE / "reference" / "d4rl_tasks.json").read_text())
    assert set(TASKS) == {*registered, "halfcheetah-demo-v0"} and len(registered) == 20
    for env_id, theirs in registered.items():
        ours = TASKS[env_id]
        assert ours.family == env_id.split("-")[0]
        assert (ours.state_dim, ours.action_dim) == (theirs["obs_dim"], theirs["act_dim"])
        assert ours.max_episode_steps == theirs["max_episode_steps"]
        assert (ours.ref_min_score, ours.ref_max_score) == (theirs["ref_min_score"], theirs["ref_max_score"])
        assert ours.url == theirs["dataset_url"]


def test_known_hashes_belong_to_the_files_of_four_tasks():
    known = {env_id: task for env_id, task in TASKS.items() if task.sha256}
    assert set(known) == {
        "kitchen-complete-v0", "hopper-medium-replay-v2", "walker2d-medium-replay-v2", "hopper-medium-expert-v2"
    }  # fmt: skip
    assert all(re.fullmatch("[0-9a-f]{64}", task.sha256) for task in known.values())
    assert known["kitchen-complete-v0"].size == 556_544


def test_normalized_score():
    assert normalized_score("halfcheetah-medium-v2", 12135.0) == pytest.approx(100, abs=1e-12)
    assert normalized_score("halfcheetah-demo-v0", -280.178953) == 0
    assert normalized_score("kitchen-complete-v0", 2.0) == 50
    np.testing.assert_allclose(normalized_score("antmaze-umaze-v0", np.array([0.0, 0.25, 1.0])), [0, 25, 100])
    # D4RL's tables: a pen return of 3076.83 is the expert's, of 96.26 the random policy's
    np.testing.assert_allclose(normalized_score("pen-cloned-v1", np.array([96.262799, 3076.8331017826877])), [0, 100])


def test_unknown_ids_are_answered_with_those_that_come_close():
    for call in (load_dataset, make_env, lambda env_id: normalized_score(env_id, 0.0)):
        bad_input(lambda call=call: call("halfcheeta-medium-v2"), "halfcheeta-medium-v2", "halfcheetah-medium-v2")
    bad_input(lambda: make_env("zzz"), "zzz", "kitchen-complete-v0", "pen-human-v1")
    bad_input(lambda: make_env("pen-human-v1", backend="gym"), "'gym'", "maintained", "d4rl")


def test_module_needs_numpy_alone():
    heavy = ["gymnasium", "gymnasium_robotics", "mujoco", "h5py", "minari", "torch", "tqdm", "gym", "d4rl"]
    code = f"import sys; sys.modules.update(dict.fromkeys({heavy})); import d4rl_tasks; print(len(d4rl_tasks.TASKS))"
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "21"


# ----------------------------------------------------------------------------------------------- d4rl_tasks: the loader

HOPPER = "hopper-medium-v2"  # 11 numbers of state, 3 of action, episodes of 1000 steps


def rows_of(n, seed=0, state_dim=11, action_dim=3):
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.standard_normal((n, state_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, action_dim)).astype(np.float32),
        "rewards": rng.standard_normal(n).astype(np.float32),
        "terminals": np.zeros(n, bool),
    }


def write(path, columns, **options):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            file.create_dataset(name, data=values, **options)
    return path


def plain_loop(columns, limit):
    """The oracle: the transitions that D4RL 1.1 keeps, chosen row by row."""
    kept, count = [], 0
    for i in range(len(columns["rewards"]) - 1):
        final = bool(columns["timeouts"][i]) if "timeouts" in columns else count == limit - 1
        if final:
            count = 0
            continue
        if columns["terminals"][i]:
            count = 0
        kept.append(i)
        count += 1
    kept = np.array(kept, int)
    return {
        "observations": columns["observations"][kept].astype(np.float32),
        "actions": columns["actions"][kept].astype(np.float32),
        "next_observations": columns["observations"][kept + 1].astype(np.float32),
        "rewards": columns["rewards"].reshape(-1)[kept].astype(np.float32),
        "terminals": columns["terminals"].reshape(-1)[kept].astype(bool),
    }


def same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, values in theirs.items():
        assert ours[name].dtype == values.dtype and ours[name].shape == values.shape, name
        np.testing.assert_array_equal(ours[name], values, err_msg=name)


HAND_MADE = [  # terminals, timeouts or None, the rows that are kept
    ("00000", None, [0, 1, 2, 3]),
    ("01000", None, [0, 1, 2, 3]),
    ("00000", "00100", [0, 1, 3]),
    ("00100", "00100", [0, 1, 3]),  # terminal and timeout: left out
    ("00100", "00010", [0, 1, 2]),
    ("00001", "00001", [0, 1, 2, 3]),  # the last row is never used, whatever it says
    ("11111", "00000", [0, 1, 2, 3]),
    ("00", None, [0]),
    ("10", "01", [0]),
]


@pytest.mark.parametrize(("terminals", "timeouts", "kept"), HAND_MADE)
def test_loader_keeps_the_rows_that_d4rl_keeps(tmp_path, terminals, timeouts, kept):
    columns = rows_of(len(terminals)) | {"terminals": np.array(list(terminals)) == "1"}
    if timeouts:
        columns["timeouts"] = np.array(list(timeouts)) == "1"
    ours = load_dataset(HOPPER, write(tmp_path / "d.hdf5", columns))
    np.testing.assert_array_equal(ours["observations"], columns["observations"][kept])
    np.testing.assert_array_equal(ours["next_observations"], columns["observations"][np.array(kept) + 1])
    np.testing.assert_array_equal(ours["actions"], columns["actions"][kept])
    np.testing.assert_array_equal(ours["rewards"], columns["rewards"][kept])
    np.testing.assert_array_equal(ours["terminals"], columns["terminals"][kept])


def test_step_count_ends_episodes_where_a_plain_count_does():
    """All 2^n patterns of terminal rows, for n up to 11 and episodes of 2 to 5 steps."""
    for n, limit in itertools.product(range(1, 12), range(2, 6)):
        for bits in itertools.product((False, True), repeat=n):
            terminals, count = np.array(bits), 0
            ours = d4rl_tasks._count_ends(terminals, limit)
            for i in range(n):
                final = count == limit - 1
                assert ours[i] == final, (bits, limit)
                count = 0 if final else 1 if bits[i] else count + 1


def test_count_ends_by_hand():
    """With episodes of 4 steps, an episode's fourth row is left out, or its third if it follows a terminal row."""
    count_ends = d4rl_tasks._count_ends
    assert np.flatnonzero(count_ends(np.zeros(12, bool), 4)).tolist() == [3, 7, 11]
    terminals = np.zeros(12, bool)
    terminals[1] = True  # the count is 1 at row 2 and 3 at row 4
    assert np.flatnonzero(count_ends(terminals, 4)).tolist() == [4, 8]
    terminals[4] = True  # terminal, but also left out: the count begins at 0 again
    assert np.flatnonzero(count_ends(terminals, 4)).tolist() == [4, 8]


def random_columns(seed):
    """(env_id, columns) of a random file, drawn with RandomState because its streams never change."""
    rng = np.random.RandomState(seed)
    env_id = [HOPPER, "kitchen-complete-v0", "pen-human-v1", "antmaze-umaze-v0"][seed % 4]
    task = TASKS[env_id]
    n = rng.randint(2, 3 * task.max_episode_steps)
    columns = {
        "observations": rng.standard_normal((n, task.state_dim)),
        "actions": rng.uniform(-1, 1, (n, task.action_dim)),
        "rewards": rng.standard_normal(n),
        "terminals": rng.uniform(size=n) < rng.choice([0, 0.001, 0.01, 0.3]),
    }
    if rng.uniform() < 0.5:
        columns["timeouts"] = rng.uniform(size=n) < rng.choice([0, 0.01, 0.3])
    for name in ("rewards", "terminals"):
        if rng.uniform() < 0.3:
            columns[name] = columns[name].reshape(n, 1)
    for name in ("observations", "actions", "rewards"):
        columns[name] = columns[name].astype(rng.choice(["f2", "f4", "f8", ">f4"]))
    columns["terminals"] = columns["terminals"].astype(rng.choice(["?", "u1", "i8", "f4"]))
    return env_id, columns | {"next_observations": np.full((n, 2), 7.0)}  # which D4RL never reads


def digest(dataset):
    parts = b"".join(dataset[name].tobytes() for name in sorted(dataset))
    return hashlib.sha256(parts).hexdigest()


@pytest.mark.parametrize("seed", range(40))
def test_loader_equals_a_plain_loop_and_d4rl_on_random_files(tmp_path, seed):
    """classic_qlearning.json has the digests of what the real d4rl.qlearning_dataset returns for the same files."""
    env_id, columns = random_columns(seed)
    path = write(tmp_path / "d.hdf5", columns, compression="gzip" if seed % 3 else None)
    ours = load_dataset(env_id, path)
    same(ours, plain_loop(columns, TASKS[env_id].max_episode_steps))
    frozen = json.loads((HERE / "reference" / "classic_qlearning.json").read_text())
    assert digest(ours) == frozen[seed]


def test_loader_reads_the_published_kitchen_file_if_it_is_there():
    path = Path(os.environ.get("D4RL_DATASET_DIR", ""), TASKS["kitchen-complete-v0"].url.rsplit("/", 1)[1])
    if not path.is_file():
        pytest.skip("set D4RL_DATASET_DIR to the folder of D4RL's files")
    data = load_dataset("kitchen-complete-v0")
    assert data["observations"].shape == (3679, 60) and data["terminals"].sum() == 18
    assert set(data["rewards"].tolist()) == {0, 1, 2, 3, 4} and np.abs(data["actions"]).max() < 1
    d4rl_tasks._verify(path, TASKS["kitchen-complete-v0"])  # its size and hash are those of the table


def test_demo_data_are_read_from_beside_the_module(tmp_path, monkeypatch):
    columns = rows_of(5, state_dim=17, action_dim=6)
    monkeypatch.setattr(d4rl_tasks, "DEMO_FILE", write(tmp_path / "demo.hdf5", columns))
    same(load_dataset("halfcheetah-demo-v0"), plain_loop(columns, 1000))
    monkeypatch.setattr(d4rl_tasks, "DEMO_FILE", tmp_path / "gone.hdf5")
    bad_input(lambda: load_dataset("halfcheetah-demo-v0"), "gone.hdf5", "does not exist")


def test_actions_a_little_beyond_one_are_read_as_d4rl_reads_them(tmp_path):
    path = write(tmp_path / "d.hdf5", rows_of(6) | {"actions": np.full((6, 3), 1.2, np.float32)})
    with pytest.warns(UserWarning, match=r"actions reach 1\.2"):
        assert load_dataset(HOPPER, path)["actions"].max() == np.float32(1.2)


def test_data_of_integers_and_single_flags_are_read(tmp_path):
    columns = rows_of(6) | {"rewards": np.arange(6), "actions": np.ones((6, 3), np.int8)}
    columns["terminals"] = np.array([0, 0, 2, 0, 0, 0])
    data = load_dataset(HOPPER, write(tmp_path / "d.hdf5", columns))
    assert data["rewards"].tolist() == [0, 1, 2, 3, 4] and data["rewards"].dtype == np.float32
    assert data["terminals"].tolist() == [False, False, True, False, False]


def test_a_million_rows_load_in_seconds_and_little_memory(tmp_path):
    n, code = 1_000_000, """
import pathlib, re, sys, time, h5py, torch, d4rl_tasks, dql
def peak():  # ru_maxrss begins at pytest's
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
device = dql.choose_device("auto")
before, start = peak(), time.process_time()
batch = dql.make_batch(d4rl_tasks.load_dataset("halfcheetah-medium-v2", sys.argv[1]), "none", device)
assert len(batch.reward) == 999_000 and batch.state.device == device
print(time.process_time() - start, (peak() - before) * 1024)"""
    columns = rows_of(n, 0, 17, 6)
    size = sum(values.nbytes for values in columns.values())
    path = write(tmp_path / "large.hdf5", columns)
    run = subprocess.run([sys.executable, "-c", code, path], cwd=HERE, capture_output=True, text=True, check=True)
    seconds, memory = map(float, run.stdout.split())
    assert seconds < 5 and memory < 3 * size, (seconds, memory / size)


# ----------------------------------------------------------------------------------------- d4rl_tasks: the environments


def classic_steps(file):
    """{task: {qpos, qvel, action, obs, next_obs, reward, done[, goal]}}, single steps of the classic stack."""
    steps = {}
    with np.load(HERE / "reference" / file) as arrays:
        for key in arrays:
            task, name = key.split("/")
            steps.setdefault(task, {})[name] = arrays[key]
    return steps


CLASSIC = classic_steps("classic_steps.npz")
CONTACTS = classic_steps("classic_contacts.npz")  # an ant at a wall, and a pen at its target


def compare_steps(env_id, steps, rows):
    """Repeats these rows' steps of the classic stack in our environment; results must agree up to rounding."""
    env = make_env(env_id)
    raw = env.unwrapped
    for i in rows:
        env.reset(seed=0)
        raw.noise = 0.0  # kitchen's observation noise, which the classic steps lack
        if env_id.startswith("pen"):
            raw.set_target(steps["goal"][i])
        elif "goal" in steps:
            raw.goal = steps["goal"][i]
        raw.set_state(steps["qpos"][i], steps["qvel"][i])
        np.testing.assert_allclose(raw.observe(), steps["obs"][i], rtol=0, atol=1e-12, err_msg=str(i))
        observation, reward, terminated, truncated, _ = env.step(steps["action"][i])
        np.testing.assert_allclose(observation, steps["next_obs"][i], rtol=0, atol=1e-11, err_msg=str(i))
        assert reward == pytest.approx(steps["reward"][i], rel=0, abs=1e-11), i
        assert (terminated, truncated) == (steps["done"][i], False), i


@mujoco_wanted
@pytest.mark.parametrize("name", CLASSIC)
def test_single_steps_are_those_of_the_classic_stack(name):
    assert len(CLASSIC[name]["qpos"]) == 60
    compare_steps(name.removesuffix("-demo"), CLASSIC[name], range(60))


@mujoco_wanted
@pytest.mark.parametrize("env_id", CONTACTS)
def test_contacts_are_those_of_the_classic_stack(env_id):
    compare_steps(env_id, CONTACTS[env_id], range(20))


@mujoco_wanted
def test_the_tasks_of_gymnasium_are_others():
    """The comparison of single steps is sensitive: HalfCheetah-v5, same rules but other masses, is far off."""
    import gymnasium

    steps, env, off = CLASSIC["halfcheetah-medium-v2"], gymnasium.make("HalfCheetah-v5"), []
    for i in range(60):
        env.reset(seed=0)
        env.unwrapped.set_state(steps["qpos"][i], steps["qvel"][i])
        off.append(np.abs(env.step(steps["action"][i])[0] - steps["next_obs"][i]).max())
    assert np.median(off) > 0.05 and max(off) > 0.2


@mujoco_wanted
@pytest.mark.parametrize("env_id", TASKS)
def test_every_task_steps_and_a_seed_begins_one_episode(env_id):
    import gymnasium

    task, env, other = TASKS[env_id], *make_envs(env_id, 2)
    assert isinstance(env, gymnasium.Env) and env.unwrapped.metadata["render_fps"] in (10, 12, 20, 50, 100, 125)
    actions = np.random.default_rng(0).uniform(-1, 1, (4, task.action_dim)).astype(np.float32)

    def episode(env, seed):
        rows = [env.reset(seed=seed)[0]]
        for action in actions:
            observation, reward, terminated, truncated, info = env.step(action)
            assert type(reward) is float and type(terminated) is bool and type(truncated) is bool and info == {}
            rows.append(np.append(observation, reward))
        return np.concatenate(rows)

    first = episode(env, 3)
    assert env.observation_space.contains(env.reset()[0]) and env.observation_space.shape == (task.state_dim,)
    assert env.action_space.contains(actions[0])
    np.testing.assert_array_equal(episode(env, 3), first)
    np.testing.assert_array_equal(episode(other, 3), first)
    assert not np.array_equal(episode(other, 4), first)


@mujoco_wanted
@pytest.mark.parametrize("env_id", FAMILIES)
def test_environments_side_by_side_are_as_if_alone(env_id, monkeypatch):
    """Environments that share a model, in turns or in threads, step like environments with their own model."""
    n, steps, task = 4, 6, TASKS[env_id]
    actions = np.random.default_rng(1).uniform(-1, 1, (n, steps, task.action_dim)).astype(np.float32)

    def start(envs):
        return [env.reset(seed=seed)[0] for seed, env in enumerate(envs)]

    def alone(i, env):
        return [np.append(*env.step(action)[:2]) for action in actions[i]]

    envs = make_envs(env_id, n)
    assert len({id(env.unwrapped.model) for env in envs}) == 1 and len({id(env.unwrapped.data) for env in envs}) == n
    first = start(envs)
    in_turns = [[np.append(*env.step(actions[i][t])[:2]) for i, env in enumerate(envs)] for t in range(steps)]
    start(envs)
    with ThreadPoolExecutor(n) as pool:
        in_threads = list(pool.map(alone, range(n), envs))
    with monkeypatch.context() as patch:
        patch.setattr(d4rl_tasks, "_model", d4rl_tasks._model.__wrapped__)  # without the cache, so each has its own
        own = make_envs(env_id, 2)
    assert own[0].unwrapped.model is not own[1].unwrapped.model
    np.testing.assert_array_equal(start(own), first[:2])
    for i, env in enumerate(own):
        expected = alone(i, env)
        np.testing.assert_array_equal([row[i] for row in in_turns], expected)
        np.testing.assert_array_equal(in_threads[i], expected)


@mujoco_wanted
@pytest.mark.parametrize("env_id", FAMILIES)
def test_actions_are_clipped_as_d4rl_clips_them(env_id):
    """An action beyond 1 has the effect, and the control cost, of the clipped action."""
    env, results = make_env(env_id), []
    for scale in (1, 7):
        env.reset(seed=0)
        action = scale * np.where(np.arange(TASKS[env_id].action_dim) % 2, 1, -1).astype(np.float32)
        results.append(env.step(action)[:2])
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@mujoco_wanted
@pytest.mark.parametrize(
    "env_id", ["halfcheetah-medium-v2", "antmaze-umaze-v0", "antmaze-large-play-v0", "kitchen-mixed-v0"]
)
def test_episodes_are_truncated_at_d4rls_length(env_id):
    env, task = make_env(env_id), TASKS[env_id]
    env.reset(seed=0)
    action = np.zeros(task.action_dim, np.float32)
    ends = [env.step(action)[2:4] for _ in range(task.max_episode_steps)]
    assert not any(terminated for terminated, _ in ends)
    assert [truncated for _, truncated in ends] == [False] * (task.max_episode_steps - 1) + [True]


@mujoco_wanted
def test_pen_is_truncated_after_100_steps_and_ends_when_it_falls():
    env, rng = make_env("pen-human-v1"), np.random.default_rng(0)
    lengths = set()
    for seed in range(10):
        env.reset(seed=seed)
        for t in range(1, 101):
            action = rng.uniform(-1, 1, 24) if seed < 8 else np.zeros(24)
            observation, reward, terminated, truncated, _ = env.step(action)
            assert terminated == (observation[26] < 0.075)
            away, likeness = np.linalg.norm(observation[39:42]), observation[33:36] @ observation[36:39]
            assert reward == pytest.approx(
                likeness - away - 5 * terminated + (10 * (likeness > 0.9) + 50 * (likeness > 0.95)) * (away < 0.075)
            )
            if terminated or truncated:
                lengths.add((t, terminated))
                break
    assert (100, False) in lengths and any(terminated for _, terminated in lengths)


@mujoco_wanted
def test_first_states_are_drawn_as_d4rl_draws_them():
    for env_id, spread in (("halfcheetah-medium-v2", 0.1), ("hopper-medium-v2", 5e-3), ("walker2d-medium-v2", 5e-3)):
        env = make_env(env_id)
        model, data = env.unwrapped.model, env.unwrapped.data
        drawn = [(env.reset(seed=seed), data.qpos - model.qpos0, data.qvel + 0)[1:] for seed in range(300)]
        qpos, qvel = map(np.array, zip(*drawn, strict=True))
        assert 0.95 * spread < np.abs(qpos).max() <= spread and abs(qpos.std() / spread - 3**-0.5) < 0.03
        # HalfCheetah's velocities are normal, the others' uniform
        assert abs(qvel.std() / spread - (1 if spread == 0.1 else 3**-0.5)) < 0.05
    env = make_env("kitchen-complete-v0")
    seen, goal = np.split(np.array([env.reset(seed=seed)[0] for seed in range(200)]), 2, axis=1)
    first = d4rl_tasks.KITCHEN_START.copy()
    first[26:] /= np.linalg.norm(first[26:])  # the kettle's quaternion, which d4rl's simulator normalizes
    robot, things = np.split(np.abs(seen - first), [9], axis=1)
    assert 0.0095 < robot.max() <= 0.01  # a tenth of franka_config.xml's 0.1
    np.testing.assert_array_less(things.max(axis=0), d4rl_tasks.KITCHEN_NOISE[9:] + 1e-12)
    assert (things.max(axis=0) > 0.9 * d4rl_tasks.KITCHEN_NOISE[9:]).all()
    assert (goal == goal[0]).all() and np.count_nonzero(goal[0]) == 9  # two of the kettle's seven numbers are 0


@mujoco_wanted
def test_pens_target_is_turned_as_in_the_classic_stack():
    """Turns are about x and y, by at most one radian; so are the classic stack's, whose quaternions have w z = x y."""
    env = make_env("pen-cloned-v1")
    turned = []
    for seed in range(300):
        observation = env.reset(seed=seed)[0]
        turned.append(observation[36:39])
    classic = CLASSIC["pen-human-v1"]["goal"]
    np.testing.assert_allclose(classic[:, 0] * classic[:, 3], classic[:, 1] * classic[:, 2], atol=1e-12)
    turned = np.array(turned)
    about_x, about_y = np.arctan2(-turned[:, 1], turned[:, 2]), np.arcsin(turned[:, 0])
    for angle in (about_x, about_y):
        assert -1 <= angle.min() < -0.97 and 0.97 < angle.max() <= 1 and abs(angle.std() - 3**-0.5) < 0.03


@mujoco_wanted
@pytest.mark.parametrize(
    ("maze", "corner"), [("umaze", (0, 8)), ("medium", (20, 20)), ("large", (32, 24))]  # the goal's cell, in metres
)
def test_antmaze_goals_and_starts(maze, corner):
    env = make_env(f"antmaze-{maze}-diverse-v0")
    raw, goals, places = env.unwrapped, [], []
    for seed in range(200):
        observation = env.reset(seed=seed)[0]
        assert np.linalg.norm(observation[3:7]) == pytest.approx(1, abs=1e-12)  # a quaternion that was drawn with noise
        places.append(observation[:2])
        goals.append(raw.goal)
    goals, places = np.array(goals), np.array(places)
    drawn = goals - corner  # the sum of draws from [0, 1] and [0, 0.5]
    assert drawn.min() >= 0 and drawn.max() <= 1.5 and abs(drawn.mean() - 0.75) < 0.05
    assert abs(drawn.std() - (1.25 / 12) ** 0.5) < 0.05
    assert np.abs(places).max() <= 0.1 and places.std() > 0.05
    env.reset()
    np.testing.assert_array_equal(raw.goal, goals[-1])  # without a seed the environment keeps its goal, as d4rl's does
    ends = set()
    for away in np.linspace(-0.6, 0.6, 41):
        env.reset(seed=0)
        raw.set_state(np.append(raw.goal - [away, 0], raw.data.qpos[2:]), np.zeros(14))
        observation, reward, terminated, _, _ = env.step(np.zeros(8, np.float32))
        reached = np.hypot(*(observation[:2] - raw.goal)) <= 0.5
        assert (reward, terminated) == (float(reached), reached)
        ends.add(terminated)
    assert ends == {False, True}


@mujoco_wanted
@pytest.mark.parametrize("maze", ["umaze", "medium", "large"])
def test_antmaze_walls_leave_a_way_to_the_goal(maze):
    """The walls enclose the maze, and its goal can be reached from its start: a flood fill around the model's boxes."""
    import mujoco

    model = make_env(f"antmaze-{maze}-play-v0" if maze != "umaze" else "antmaze-umaze-v0").unwrapped.model
    boxes = model.geom_pos[model.geom_type == mujoco.mjtGeom.mjGEOM_BOX]
    walls = {tuple(cell) for cell in (boxes[:, :2] / 4).round().astype(int)}
    assert len(walls) == len(boxes) == {"umaze": 18, "medium": 38, "large": 62}[maze]
    reached, edge = {(0, 0)}, [(0, 0)]
    while edge:
        x, y = edge.pop()
        for cell in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
            if cell not in walls | reached:
                reached.add(cell)
                edge.append(cell)
    goal = d4rl_tasks._cells(maze, "G")[0]
    assert (goal[0] / 4, goal[1] / 4) in reached and len(reached) == {"umaze": 7, "medium": 26, "large": 46}[maze]


@mujoco_wanted
@pytest.mark.parametrize(("env_id", "fourth"), [("kitchen-partial-v0", [19]), ("kitchen-mixed-v0", [11, 12])])
def test_kitchen_pays_once_for_each_thing_and_ends_with_the_fourth(env_id, fourth):
    env = make_env(env_id)
    env.reset(seed=0)
    raw, rewards, ends = env.unwrapped, [], []
    qpos = raw.data.qpos.copy()
    for places in ([22], [17, 18], [], list(range(23, 30)), fourth):
        qpos[places] = raw.goal[places]
        raw.set_state(qpos, np.zeros(29))
        _, reward, terminated, _, _ = env.step(np.zeros(9, np.float32))
        rewards.append(reward)
        ends.append(terminated)
    assert rewards == [1, 1, 0, 1, 1] and ends == [False] * 4 + [True]
    env.reset()
    assert not env.step(np.zeros(9, np.float32))[2] and env.unwrapped.todo == set(raw.things)


@mujoco_wanted
def test_pictures_change_nothing():
    code = """
import numpy as np, d4rl_tasks
for env_id in ("hopper-medium-v2", "pen-human-v1"):
    ends = []
    for mode in ("rgb_array", None):
        env = d4rl_tasks.make_env(env_id, render_mode=mode)
        env.reset(seed=0)
        for t in range(3):
            observation = env.step(env.action_space.high / 2)[0]
            if mode and t == 1:
                picture = env.render()
                assert picture.shape == (480, 480, 3) and picture.std() > 5, (picture.shape, picture.std())
        ends.append(observation)
        env.close()
    assert np.array_equal(*ends)
print("drawn")"""
    for library in ("osmesa", "egl"):
        environment = {**os.environ, "MUJOCO_GL": library, "PYOPENGL_PLATFORM": library}
        run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, env=environment)
        if "drawn" in run.stdout:
            return
        assert "AssertionError" not in run.stderr, run.stderr
    pytest.skip("no OpenGL library to draw with")


@mujoco_wanted
def test_packages_that_are_missing_or_do_not_fit_are_named(monkeypatch):
    import mujoco

    d4rl_tasks._mujoco.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(mujoco, "__version__", "3.3.0")
        bad_input(lambda: make_env("hopper-medium-v2"), "mujoco 3.3.0", "pip install mujoco==3.2.6")
    found = d4rl_tasks.find_spec
    for name, call in {"gymnasium": make_env, "mujoco": make_env, "h5py": load_dataset}.items():
        monkeypatch.setattr(d4rl_tasks, "find_spec", lambda other, name=name: None if other == name else found(other))
        bad_input(lambda call=call: call("halfcheetah-demo-v0"), f"{name} is not installed", "requirements.txt")


# --------------------------------------------------------------------------------------------- d4rl_tasks: the download


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` on loopback; each request is answered by the script's next word, and the last one repeats."""

    daemon_threads = True

    def __init__(self, content, *script):
        self.content, self.script, self.requests, self.lock = content, list(script) or ["whole"], [], threading.Lock()
        self.enough = threading.Event()
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/files/{HOPPER_FILE}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.enough.set()
        self.shutdown()
        self.server_close()


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        with server.lock:
            word = server.script.pop(0) if len(server.script) > 1 else server.script[0]
            server.requests.append((word, self.headers.get("Range")))
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        content = server.content
        if word == "redirect":
            self.send_response(302)
            self.send_header("Location", server.url.replace("files", "elsewhere"))
            self.end_headers()
        elif word in ("404", "503"):
            self.send_error(int(word))
        elif start >= len(content) and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
        elif word == "portal":  # status 200, but a login page
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>please log in</html>")
        else:
            start = 0 if word == "no ranges" else start
            self.send_response(206 if start else 200)
            if start:
                start += 5 if word == "other range" else 0
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            if word != "no length":
                self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            half = start + (len(content) - start) // 2
            self.wfile.write(content[start : half if word in ("cut", "stall") else len(content)])
            self.wfile.flush()
            if word == "stall":
                server.enough.wait(20)


HOPPER_FILE = TASKS[HOPPER].url.rsplit("/", 1)[1]


@pytest.fixture
def content(tmp_path):
    return write(tmp_path / "source.hdf5", rows_of(3000)).read_bytes()


@pytest.fixture
def serve(content, tmp_path, monkeypatch):
    """serve(*script, mirror=..., **fields) starts D4RL's server and mirror on loopback; files go to tmp_path/data."""
    pytest.importorskip("tqdm")
    servers = []

    def start(*script, mirror=("404",), content=content, **fields):
        pair = Server(content, *script), Server(content, *mirror)
        servers.extend(pair)
        monkeypatch.setitem(TASKS, HOPPER, TASKS[HOPPER]._replace(url=pair[0].url, **fields))
        monkeypatch.setattr(d4rl_tasks, "MIRROR", pair[1].url.removesuffix(HOPPER_FILE))
        # A busy machine answers late, so the timeout is short only in tests of a server that stops answering.
        monkeypatch.setattr(d4rl_tasks, "TIMEOUT", 4.0 if "stall" in script + tuple(mirror) else 60.0)
        return pair

    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(d4rl_tasks, "BACK_OFF", 0.01)
    monkeypatch.setattr(d4rl_tasks, "ATTEMPTS", 3)
    yield start
    for server in servers:
        server.stop()


def left(tmp_path):
    return sorted(path.name for path in (tmp_path / "data").iterdir())


@pytest.mark.parametrize(
    "script",
    [["whole"], ["redirect", "whole"], ["cut", "cut", "whole"], ["stall", "whole"], ["503", "503", "whole"],
     ["no length"], ["cut", "no ranges"], ["cut", "cut", "cut", "cut", "cut", "cut", "whole"]],
)  # fmt: skip
def test_download_gets_the_file_through(serve, content, tmp_path, script, capsys):
    server, mirror = serve(*script)
    data = load_dataset(HOPPER)
    assert (tmp_path / "data" / HOPPER_FILE).read_bytes() == content
    same(data, plain_loop(rows_of(3000), 1000))
    assert [word for word, _ in server.requests][: len(script)] == script and not mirror.requests
    offsets = [int(given[6:-1]) if given else 0 for _, given in server.requests]
    assert offsets == sorted(offsets) and (("cut" in script or "stall" in script) == (offsets[-1] > 0))
    assert HOPPER_FILE in capsys.readouterr().err  # the progress bar
    assert left(tmp_path) == [HOPPER_FILE, HOPPER_FILE + ".lock"]
    load_dataset(HOPPER)
    assert len(server.requests) == len(offsets)  # the file is there already


def test_download_goes_on_from_a_part_that_is_there(serve, content, tmp_path):
    part = tmp_path / "data" / (HOPPER_FILE + ".part")
    part.parent.mkdir()
    part.write_bytes(content[:1000])
    server, _ = serve()
    load_dataset(HOPPER)
    assert server.requests == [("whole", "bytes=1000-")]


def test_download_begins_again_where_other_bytes_come_than_were_asked_for(serve, content, tmp_path):
    server, mirror = serve("cut", "other range", "whole")
    load_dataset(HOPPER)
    assert (tmp_path / "data" / HOPPER_FILE).read_bytes() == content and not mirror.requests
    assert [given for _, given in server.requests] == [None, f"bytes={len(content) // 2}-", None]


def test_download_pieces_no_file_together_of_two(serve, content, tmp_path):
    """The server breaks off, then refuses; the mirror, whose file no hash proves to be the same, starts at byte 0."""
    _, mirror = serve("cut", "404", mirror=["whole"])
    load_dataset(HOPPER)
    assert [given for _, given in mirror.requests] == [None]


def test_download_of_a_part_that_is_whole_is_only_renamed(serve, content, tmp_path):
    part = tmp_path / "data" / (HOPPER_FILE + ".part")
    part.parent.mkdir()
    part.write_bytes(content)
    server, _ = serve()
    load_dataset(HOPPER)
    assert server.requests == [("whole", f"bytes={len(content)}-")] and not part.exists()


@pytest.mark.parametrize("spoilt", [b"x" * 1000, b"y" * 10**6])
def test_download_begins_again_after_a_part_of_something_else(serve, content, tmp_path, spoilt):
    part = tmp_path / "data" / (HOPPER_FILE + ".part")
    part.parent.mkdir()
    part.write_bytes(spoilt)
    server, mirror = serve()
    load_dataset(HOPPER)
    assert [given for _, given in server.requests] == [f"bytes={len(spoilt)}-", None] and not mirror.requests


@pytest.mark.parametrize(
    ("script", "reason"),
    [(["404"], "404"), (["503"], "503"), (["portal"], "HDF5"), (["redirect"], "redirect"), (["stall", "503"], "503")],
)
def test_download_turns_to_the_mirror(serve, tmp_path, content, script, reason):
    server, mirror = serve(*script, mirror=["whole"])
    same(load_dataset(HOPPER), plain_loop(rows_of(3000), 1000))
    assert server.requests and len(mirror.requests) == 1
    (tmp_path / "data" / HOPPER_FILE).unlink()
    mirror.script = ["404"]
    server.script = script[-1:]
    if "stall" not in script:
        bad_input(lambda: load_dataset(HOPPER), reason, server.url, mirror.url)


def test_download_that_fails_says_what_to_do(serve, tmp_path):
    server, mirror = serve("503")
    message = bad_input(lambda: load_dataset(HOPPER), "503", "404", "--dataset-path", HOPPER)
    assert server.url in message and mirror.url in message and str(tmp_path / "data" / HOPPER_FILE) in message
    assert len(server.requests) == 3 and len(mirror.requests) == 1  # a 404 is final
    assert left(tmp_path) == [HOPPER_FILE + ".lock"]
    server.stop()
    bad_input(lambda: load_dataset(HOPPER), "refused", "--dataset-path")


def test_download_checks_size_hash_and_contents(serve, tmp_path, content):
    true = hashlib.sha256(content).hexdigest()
    serve(size=len(content) + 1)
    bad_input(lambda: load_dataset(HOPPER), f"{len(content):,} bytes instead of {len(content) + 1:,}")
    serve(size=0, sha256="0" * 64)
    bad_input(lambda: load_dataset(HOPPER), true, "0" * 64)
    assert left(tmp_path) == [HOPPER_FILE + ".lock"]  # what is wrong is not kept
    serve(sha256="", content=write(tmp_path / "wide.hdf5", rows_of(3000, state_dim=12)).read_bytes())
    bad_input(lambda: load_dataset(HOPPER), "(3000, 12)")
    serve(sha256=true, size=len(content))
    load_dataset(HOPPER)


def test_download_is_kept_where_memory_does_not_suffice_to_check_it(serve, content, tmp_path, monkeypatch):
    server, _ = serve("whole")
    with monkeypatch.context() as patch:
        patch.setattr(d4rl_tasks, "_checked", lambda *_: np.empty(2**62, np.uint8))  # numpy's own MemoryError
        bad_input(lambda: load_dataset(HOPPER), HOPPER, "memory")
        bad_input(lambda: load_dataset(HOPPER, tmp_path / "source.hdf5"), HOPPER, "memory")
    assert (tmp_path / "data" / (HOPPER_FILE + ".part")).read_bytes() == content
    load_dataset(HOPPER)
    assert [given for _, given in server.requests] == [None, f"bytes={len(content)}-"]


def test_download_into_a_folder_that_cannot_be(serve, tmp_path, monkeypatch):
    serve()
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/deeper"):
        monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / folder))
        bad_input(lambda: load_dataset(HOPPER), "--dataset-path", str(tmp_path / folder))


def test_nothing_is_downloaded_that_could_not_be_read(serve, tmp_path, monkeypatch):
    serve()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "data"))
    find_spec = d4rl_tasks.find_spec
    monkeypatch.setattr(d4rl_tasks, "find_spec", lambda name: None if name == "h5py" else find_spec(name))
    bad_input(lambda: load_dataset(HOPPER), "h5py is not installed")
    assert not (tmp_path / "data").exists()


def test_download_goes_to_d4rls_own_folder_by_default(serve, tmp_path, monkeypatch):
    serve()
    monkeypatch.delenv("D4RL_DATASET_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    load_dataset(HOPPER)
    assert (tmp_path / "home" / ".d4rl" / "datasets" / HOPPER_FILE).is_file()


def loading(server, timeout):
    """Starts another process, which loads the data from the same server once it is sent a line."""
    code = f"""
import d4rl_tasks, h5py
d4rl_tasks.TASKS["{HOPPER}"] = d4rl_tasks.TASKS["{HOPPER}"]._replace(url="{server.url}")
d4rl_tasks.MIRROR, d4rl_tasks.TIMEOUT = "http://127.0.0.1:9/", {timeout}
print("ready", flush=True)
input()
print(len(d4rl_tasks.load_dataset("{HOPPER}")["rewards"]))"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdin=-1, stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_processes_that_download_at_once_do_no_harm(serve, content, tmp_path):
    server, _ = serve("stall", "whole")
    processes = [loading(server, timeout=5.0) for _ in range(3)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    results = [process.communicate(timeout=300) for process in processes]
    assert [out.strip() for out, _ in results] == ["2997"] * 3, results
    assert len(server.requests) == 2 and server.requests[1][1]  # one process downloads, and resumes after the stall
    assert sum("another process" in err for _, err in results) == 2
    assert (tmp_path / "data" / HOPPER_FILE).read_bytes() == content


def test_download_goes_on_after_a_process_was_killed(serve, content, tmp_path):
    server, _ = serve("stall", "whole")
    process, part = loading(server, timeout=60), tmp_path / "data" / (HOPPER_FILE + ".part")
    process.stdin.write("\n")
    process.stdin.flush()
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    load_dataset(HOPPER)  # neither lock nor part stands in the way
    word, given = server.requests[1]
    assert word == "whole" and 0 < int(given[6:-1]) <= len(content) // 2


def test_lock_on_windows(monkeypatch, tmp_path):
    calls = []

    def locking(_, mode, size):
        calls.append((mode, size))
        if len(calls) < 3:
            raise OSError("in use")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_LOCK=1))
    with d4rl_tasks._only_one(tmp_path / "lock"):
        assert calls == [(1, 1)] * 3


# -------------------------------------------------------------------------------- d4rl_tasks: Minari, the classic stack


@pytest.fixture
def minari_folder(tmp_path, monkeypatch):
    """A Minari data set of two episodes, made by minari, and its episodes."""
    pytest.importorskip("h5py")
    minari = pytest.importorskip("minari")
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    rng, buffers = np.random.default_rng(0), []
    for i, length in enumerate((5, 3)):
        end = np.arange(length) == length - 1
        columns = {
            "observations": rng.standard_normal((length + 1, 11)), "actions": rng.uniform(-1, 1, (length, 3)),
            "rewards": rng.standard_normal(length), "terminations": end & (i == 0), "truncations": end & (i == 1),
        }  # fmt: skip
        buffers.append(EpisodeBuffer(id=i, **columns, infos={}))
    minari.create_dataset_from_buffers(
        "test/hopper-v0", buffers, observation_space=Box(-np.inf, np.inf, (11,), np.float64),
        action_space=Box(-1, 1, (3,), np.float64), data_format="hdf5", algorithm_name="none", author="none",
        author_email="none", code_permalink="none",
    )  # fmt: skip
    return tmp_path / "minari" / "test" / "hopper-v0", buffers


def test_minari_folder_is_read(minari_folder):
    folder, (first, second) = minari_folder
    wanted = {
        "observations": np.concatenate([first.observations[:5], second.observations[:3]]),
        "actions": np.concatenate([first.actions, second.actions]),
        "next_observations": np.concatenate([first.observations[1:], second.observations[1:]]),
        "rewards": np.append(first.rewards, second.rewards),
    }
    wanted = {name: values.astype(np.float32) for name, values in wanted.items()}
    wanted["terminals"] = np.array([False] * 4 + [True] + [False] * 3)  # a truncated step is not terminal
    for path in (folder, folder / "data"):
        same(load_dataset(HOPPER, path), wanted)
    bad_input(lambda: load_dataset("walker2d-medium-v2", folder), "(8, 11)", "(8, 17)")


def test_minari_folders_that_cannot_be_read(minari_folder, monkeypatch, tmp_path):
    folder, _ = minari_folder
    (tmp_path / "empty").mkdir()
    bad_input(lambda: load_dataset(HOPPER, tmp_path / "empty"), "Minari")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "minari", None)
        bad_input(lambda: load_dataset(HOPPER, folder), "pip install 'minari[hdf5]'")
    (folder / "data" / "main_data.hdf5").write_bytes(b"")
    bad_input(lambda: load_dataset(HOPPER, folder), "Minari")


def test_classic_backend_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gym", None)
    path = write(tmp_path / "d.hdf5", rows_of(5))
    for call in (lambda: make_env(HOPPER, "d4rl"), lambda: load_dataset(HOPPER, path, "d4rl")):
        bad_input(call, "backend 'd4rl'", "requirements-classic.txt")


@pytest.fixture
def fake_classic(monkeypatch):
    """A gym that behaves as d4rl's: a seed method, four values per step, a goal from numpy's global generator."""
    pytest.importorskip("gymnasium")

    class Inner:
        def seed(self, seed):
            self.rng = np.random.RandomState(seed)

        def set_target(self):
            self.goal = np.random.uniform(size=2)

    class Classic:
        def __init__(self, env_id):
            self.env_id, self.wrapped_env, self.unwrapped, self.t = env_id, Inner(), self, 0
            self.wrapped_env.seed(None)

        def reset(self):
            self.t = 0
            return self.wrapped_env.rng.uniform(size=29)

        def step(self, action):
            self.t += 1
            done = self.t == 5 or action[0] > 0
            info = {"TimeLimit.truncated": not action[0] > 0} if self.t == 5 else {}
            return np.full(29, self.t), np.float32(self.t), done, info

        def get_dataset(self, h5path):
            return {"read": h5path}

    modules = {"gym": types.SimpleNamespace(make=Classic), "mjrl": types.ModuleType("mjrl")}
    modules["mjrl"].__spec__ = "found"
    modules["d4rl"] = types.SimpleNamespace(qlearning_dataset=lambda env, dataset: {"env": env.env_id, **dataset})
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("fake_classic")
def test_classic_environments_get_gymnasiums_interface():
    import gymnasium

    env = make_env("antmaze-umaze-v0", backend="d4rl")
    assert isinstance(env, gymnasium.Env) and env.classic.env_id == "antmaze-umaze-v0"
    assert env.observation_space.shape == (29,) and env.action_space.shape == (8,)
    before = np.random.get_state()[1].copy()
    first, info = env.reset(seed=1)
    goal = env.classic.wrapped_env.goal
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # the user's global generator is unchanged
    env.reset(seed=2)
    assert info == {} and not np.array_equal(goal, env.classic.wrapped_env.goal)
    np.testing.assert_array_equal(env.reset(seed=1)[0], first)
    np.testing.assert_array_equal(env.classic.wrapped_env.goal, goal)
    stay, move = np.zeros(8), np.ones(8)
    assert [env.step(stay)[1:4] for _ in range(5)] == [(t, False, t == 5) for t in (1.0, 2.0, 3.0, 4.0, 5.0)]
    env.reset()
    assert env.step(move)[1:4] == (1.0, True, False)
    env.reset()
    assert [env.step(action)[2:4] for action in [stay] * 4 + [move]][-1] == (True, False)


@pytest.mark.usefixtures("fake_classic")
def test_classic_backend_reads_by_d4rl(tmp_path):
    path = tmp_path / "d.hdf5"
    assert load_dataset("pen-human-v1", path, "d4rl") == {"env": "pen-human-v1", "read": str(path)}
    assert load_dataset("halfcheetah-demo-v0", path, "d4rl")["env"] == "halfcheetah-medium-v2"
    assert load_dataset("halfcheetah-demo-v0", None, "d4rl")["read"] == str(d4rl_tasks.DEMO_FILE)
