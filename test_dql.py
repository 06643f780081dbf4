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
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import command_line
import compiling
import dql
import fast_sampler
import run_folder
from d4rl_tasks import TASKS, BadInput, make_env, make_envs
from dql import ActDraws, Args, Batch, DiffusionPolicy, DiffusionQL, Draws, beta_schedule
from fast_sampler import FastSampler, FastUpdate, replicate, unstack

torch.set_num_threads(1)  # the networks are small: threads would wait for each other, most of all on a busy machine

HERE = Path(__file__).parent
REFERENCE = HERE / "reference"
OFFICIAL = json.loads((REFERENCE / "official_update.json").read_text())
RUN_PACKAGES = ("gymnasium", "gymnasium_robotics", "mujoco", "h5py", "tqdm", "tensorboard", "matplotlib")
run_wanted = pytest.mark.skipif(not all(map(find_spec, RUN_PACKAGES)), reason="no packages for whole runs")
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
        assert torch.autograd.gradcheck(dql.Mish(), x[4200:5200:50], check_undefined_grad=False)


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


def test_draws_are_fresh_normal_and_uniform():
    agent = tiny_agent(batch_size=2000)
    generator = torch.Generator().manual_seed(0)
    first, second = agent.draw(generator), agent.draw(generator)
    for a, b in zip(first, second, strict=True):
        assert not torch.equal(a, b)
    for noise in (first.next_noise, first.bc_noise, first.policy_noise):
        assert abs(noise.mean()) < 0.06 and abs(noise.var() - 1) < 0.1
    assert torch.bincount(first.bc_step, minlength=5).min() > 300 and first.bc_step.max() == 4


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
    args = command_line.read_args(a)
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
    (dql, "train_step", 8, 8, signal.SIGTERM), (dql, "act_fresh", 5, 12, signal.SIGINT),
    (run_folder, "log", 4, 15, signal.SIGTERM),
])  # fmt: skip
def test_a_stopped_run_goes_on_exactly(
    num_seeds, module, name, count, step, signum, run_left_alone, interruptible, monkeypatch, capsys, tmp_path
):
    """A signal during an update, evaluation or log stops a run; resumed, it ends exactly as if never interrupted."""
    args, whole = run_left_alone(num_seeds)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    count *= num_seeds if module is dql else 1  # seeds take turns
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
        assert command_line.read_args(folder).num_updates == 24
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
        patch.setattr(dql, "train_step", on_call(20, dql.train_step, lambda: signal.raise_signal(signal.SIGTERM)))
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
    command_line.refuse_given(command_line.parse(same), same)
    assert command_line.resumed_args(command_line.parse(same)).dataset_path == args.dataset_path
    command_line.refuse_given(Args(resume=folder), ["--resume", "num-seeds"])  # a folder of that name is not a flag


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
        patch.setattr(dql, "train_step", on_call(14, dql.train_step, lambda: signal.raise_signal(signal.SIGTERM)))
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
    assert command_line.resumed_args(Args(resume=folder)).compile is False
    assert command_line.resumed_args(Args(resume=folder, compile=True)).compile is True
    assert command_line.resumed_args(Args(resume=folder)).device == "cpu"
    assert command_line.resumed_args(Args(resume=folder, device="cuda:1")).device == "cuda:1"


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
    assert common["critic_learning_rate"] == dql.CRITIC_LEARNING_RATE
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
        losses = dql.train_step(many, data, generators)
        want = torch.stack([dql.train_step(agent, data, g) for agent, g in zip(agents, alone, strict=True)])
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
        want = [dql.act_fresh(a, states[5 * k :][:5], g) for k, (a, g) in enumerate(zip(agents, alone, strict=True))]
        torch.testing.assert_close(dql.act_fresh(many, states, generators), torch.cat(want), **FLOAT64)


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
        want = [sum(dql.train_step(agent, data, g) for _ in range(n)) for agent, g in zip(agents, alone, strict=True)]
        torch.testing.assert_close(updates(n), torch.stack(want), **tolerance)
        for got, agent in zip(fast_sampler.states_of(trained, 3), agents, strict=True):
            assert_states_close(got, agent.state_dict(), **tolerance)
    states = torch.randn(3 * 5, 3)
    want = [dql.act_fresh(a, x.clone(), g) for a, x, g in zip(agents, states.split(5), alone, strict=True)]
    torch.testing.assert_close(act(states), torch.cat(want), **tolerance)


@can_compile
def test_what_is_compiled_for_one_seed_or_eta_serves_the_next(float64):
    """torch.compile raises after compiling a function eight times, so ten agents in a row must share compiled code."""
    torch.compiler.reset()
    data, generator = tiny_data("cpu"), torch.Generator()
    for k in range(10):
        agent = tiny_agent(num_steps=2, eta=0.1 + k)
        agent.compile()
        dql.train_step(agent, data, generator)


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
    # policy: 2 in each of 16 forward passes, 4 in each of 6 backward; critics: 4 in each of 4 forward, 8 + 2 backward
    assert calls["mkldnn::_linear_pointwise"] == (32 + 24 + 16 + 10 if processor == "AMD AVX512" else 0)
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
                dql.train_step(agent, data, g)
        assert_states_close(compiled.state_dict(), agents[0].state_dict(), **FLOAT64)
        for k, agent in enumerate(agents):
            assert_states_close(unstack(many.state_dict(), k), agent.state_dict(), **FLOAT64)
    states = torch.randn(2 * 5, 3, device=device)
    want = [dql.act_fresh(agent, x, g) for agent, x, g in zip(agents, states.split(5), alone, strict=True)]
    torch.testing.assert_close(dql.act_fresh(compiled, states[:5], generator), want[0], **FLOAT64)
    torch.testing.assert_close(dql.act_fresh(many, states, both), torch.cat(want), **FLOAT64)


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
            torch.stack([dql.train_step(a, data, g) for a, g in zip(eager, alone, strict=True)]) for _ in range(n)
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
    dql.train_step(agent, data, generator)
    for one, g in zip(eager, alone, strict=True):
        dql.train_step(one, data, g)
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
            dql.train_step(agent, data, generator)
            dql.act_fresh(agent, states, generator)
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
        want = [dql.act_fresh(a, states[5 * k :][:5], g) for k, (a, g) in enumerate(zip(agents, alone, strict=True))]
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
    assert command_line.parse(["--compile", "--seed", "3"]).compile is True
    assert command_line.parse(["--no-compile"]).compile is False
    assert command_line.parse(["--cudagraphs", "False", "--max-q-backup"]).cudagraphs is False
    assert command_line.parse([]).compile is None


def test_a_complaint_is_one_short_line():
    for words, line in ((["--num-updates", "x"], "Error parsing --num-updates: no type matching .* from \\['x'\\]\\."),
                        (["--schedule", "x"], "invalid choice 'x' for argument '--schedule'\\. Expected one of .*"),
                        (["--bogus"], "Unrecognized options: --bogus")):  # fmt: skip
        with pytest.raises(BadInput, match=f"^{line} \\(python dql.py --help lists the flags\\)$"):
            command_line.parse(words)


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
            args = dql.with_settings(command_line.parse(argv))
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
        assert command_line.parse(argv) == args

    fuzz(check, 100, st.builds(Args, **sound))


def digest(dataset):
    parts = b"".join(dataset[name].tobytes() for name in sorted(dataset))
    return hashlib.sha256(parts).hexdigest()
