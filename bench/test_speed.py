"""Speed of updates, acting and evaluation, beside the official implementation where a checkout of it is given.

    pytest bench/
    OMP_NUM_THREADS=1 pytest bench/test_speed.py --official CHECKOUT --benchmark-json=FILE

HalfCheetah's shapes and settings, batch 256, N = 5, where a name says nothing else. A group holds the same work; a
replica is one more agent updated in the same step. On a GPU the device is waited for inside the timed region.
"""

import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

import dql
from fast_sampler import FastSampler, FastUpdate, together

STATE_DIM, ACTION_DIM, ROWS = 17, 6, 100_000
DEVICE = dql.choose_device("auto")
ON_GPU = DEVICE.type == "cuda"
UPDATES = 200 if ON_GPU else 4  # in one timed call


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "observations": rng.standard_normal((ROWS, STATE_DIM)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (ROWS, ACTION_DIM)).astype(np.float32),
        "next_observations": rng.standard_normal((ROWS, STATE_DIM)).astype(np.float32),
        "rewards": rng.standard_normal(ROWS).astype(np.float32),
        "terminals": np.zeros(ROWS, bool),
    }


def build(replicas: int = 1, compiled: bool = False, **args) -> tuple[dql.DiffusionQL, object]:
    """An agent, or several as one, and its generator, or theirs."""
    generators = [torch.Generator(DEVICE).manual_seed(k) for k in range(replicas)]
    torch.manual_seed(0)
    args = dql.Args(env_id="halfcheetah-medium-v2", **args)
    agents = [dql.DiffusionQL(STATE_DIM, ACTION_DIM, args) for _ in range(replicas)]
    if replicas > 1:
        return together(agents, compiled), generators
    if compiled:
        agents[0].compile()
    return agents[0], generators[0]


def trainer(captured: bool = False, **args) -> Callable[[], torch.Tensor]:
    """UPDATES training steps, and their losses."""
    agent, generator = build(**args)
    data = dql.make_batch(arrays(), "none", DEVICE)
    if captured:
        return partial(FastUpdate(agent, data, generator), UPDATES)
    return lambda: sum(dql.train_step(agent, data, generator) for _ in range(UPDATES))


def measure(benchmark, work: Callable[[], object], rounds: int = 7) -> object:
    """Times work() until the device is done with it."""

    def timed() -> object:
        result = work()
        if ON_GPU:
            torch.cuda.synchronize()
        return result

    return benchmark.pedantic(timed, rounds=rounds, iterations=1, warmup_rounds=1)


gpu = pytest.mark.skipif(not ON_GPU, reason="no GPU")


@pytest.fixture
def official(request: pytest.FixtureRequest):
    path = request.config.getoption("--official")
    if path is None:
        pytest.skip("no --official CHECKOUT")
    sys.path.insert(0, str(path))
    from agents.ql_diffusion import Diffusion_QL

    settings = {"beta_schedule": "vp", "n_timesteps": 5, "grad_norm": 9.0}
    return Diffusion_QL(STATE_DIM, ACTION_DIM, 1.0, str(DEVICE), 0.99, 0.005, **settings)


# ----------------------------------------------------------------------------- updates


@pytest.mark.benchmark(group=f"{UPDATES} updates")
@pytest.mark.parametrize(
    "path", ["eager", "compiled", pytest.param("captured", marks=gpu), pytest.param("compiled, captured", marks=gpu)]
)
def test_update(benchmark, path) -> None:
    work = trainer(compiled="compiled" in path, captured="captured" in path)
    assert torch.isfinite(measure(benchmark, work)).all()


@pytest.mark.benchmark(group=f"{UPDATES} updates of each replica")
@pytest.mark.parametrize("replicas", [1, 4, *(pytest.param(k, marks=gpu) for k in (5, 16, 64))])
def test_update_replicas(benchmark, replicas) -> None:
    work = trainer(replicas=replicas, compiled=True, captured=ON_GPU)
    assert torch.isfinite(measure(benchmark, work)).all()


@pytest.mark.benchmark(group=f"{UPDATES} updates: N")
@pytest.mark.parametrize("num_steps", [1, 2, 5, 10, 20, 50])
def test_update_of_n_steps(benchmark, num_steps) -> None:
    assert torch.isfinite(measure(benchmark, trainer(num_steps=num_steps, captured=ON_GPU), rounds=3)).all()


@pytest.mark.benchmark(group=f"{UPDATES} updates: batch size")
@pytest.mark.parametrize("batch_size", [64, 256, 1024, 4096])
def test_update_of_batch_size(benchmark, batch_size) -> None:
    assert torch.isfinite(measure(benchmark, trainer(batch_size=batch_size, captured=ON_GPU), rounds=3)).all()


# ----------------------------------------------------------------------------- acting, evaluation


def actor(states: int) -> Callable[[torch.Tensor], torch.Tensor]:
    agent, generator = build(compiled=True)
    return FastSampler(agent, states, generator) if ON_GPU else lambda x: dql.act_fresh(agent, x, generator)


@pytest.mark.benchmark(group="act: states, 50 candidates each")
@pytest.mark.parametrize("states", [1, 10, 50])
def test_act(benchmark, states) -> None:
    act, x = actor(states), torch.randn(states, STATE_DIM, device=DEVICE)
    assert measure(benchmark, lambda: act(x).cpu(), rounds=20).shape == (states, ACTION_DIM)


def short_episodes() -> list:
    """Ten HalfCheetahs that stop after 20 of the 1,000 time steps."""
    gymnasium = pytest.importorskip("gymnasium")
    pytest.importorskip("mujoco")
    return [gymnasium.wrappers.TimeLimit(env, 20) for env in dql.make_envs("halfcheetah-medium-v2", 10)]


@pytest.mark.benchmark(group="evaluation: 20 time steps of 10 episodes")
def test_evaluation(benchmark) -> None:
    envs, act = short_episodes(), actor(10)
    assert np.isfinite(measure(benchmark, lambda: dql.evaluate(act, envs, list(range(10)), DEVICE))).all()


# ----------------------------------------------------------------------------- beside the official implementation


def evaluate_officially(official, envs: list) -> list[float]:
    """Its own loop: episode after episode, one state a call."""
    returns = []
    for k, env in enumerate(envs):
        (state, _), done, total = env.reset(seed=k), False, 0.0
        while not done:
            state, reward, terminated, truncated, _ = env.step(official.sample_action(np.array(state)))
            done, total = terminated or truncated, total + reward
        returns.append(total)
    return returns


def both(work: str, official) -> tuple[Callable, Callable]:
    """The same work by us, as fast as we can here, and by the official implementation."""
    if work == "update":
        from utils.data_sampler import Data_Sampler

        data = Data_Sampler(arrays(), official.device)
        return trainer(compiled=True, captured=ON_GPU), lambda: official.train(data, UPDATES, 256)
    if work == "evaluation":
        act, ours, theirs = actor(10), short_episodes(), short_episodes()
        return lambda: dql.evaluate(act, ours, list(range(10)), DEVICE), lambda: evaluate_officially(official, theirs)
    act, x = actor(int(work.split()[1])), torch.randn(int(work.split()[1]), STATE_DIM, device=DEVICE)
    states = x.cpu().numpy()
    return lambda: act(x).cpu(), lambda: [official.sample_action(state) for state in states]  # one state a call


@pytest.mark.benchmark(group="beside the official implementation")
@pytest.mark.parametrize("work, rounds", [("update", 15), ("act 1", 40), ("act 10", 20), ("evaluation", 5)])
def test_beside_official(benchmark, official, work, rounds, capsys) -> None:
    """In turns, so that what else the machine does slows both: quartiles of the ratios, round by round."""
    ours, theirs = both(work, official)
    seconds = []

    def timed(work: Callable) -> float:
        begun = time.perf_counter()
        work()
        if ON_GPU:
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    benchmark.pedantic(timed, (ours,), setup=lambda: seconds.append(timed(theirs)), rounds=rounds, warmup_rounds=1)
    low, ratio, high = np.quantile(np.array(seconds[-rounds:]) / benchmark.stats.stats.data, [0.25, 0.5, 0.75])
    benchmark.extra_info |= {"official_seconds": float(np.median(seconds)), "ratio_quartiles": [low, ratio, high]}
    with capsys.disabled():
        print(f"\n{work}: the official implementation takes {ratio:.2f} times as long ({low:.2f} to {high:.2f})")


# ----------------------------------------------------------------------------- what an update is made of


def test_work_of_one_update(capsys) -> None:
    """Floating-point operations and bytes of an update: what a device's peak rates let it cost at the least."""
    from torch.utils.flop_counter import FlopCounterMode

    agent, generator = build()
    data = dql.make_batch(arrays(), "none", DEVICE)
    dql.train_step(agent, data, generator)
    with FlopCounterMode(display=False) as count:
        dql.train_step(agent, data, generator)
    with torch.profiler.profile() as profile:
        dql.train_step(agent, data, generator)
    calls = sum(not event.cpu_children for event in profile.events())
    parameters = sum(p.numel() for name in ("policy", "critic") for p in getattr(agent, name).parameters())
    flop = count.get_total_flops()
    with capsys.disabled():
        print(f"\none update: {flop / 1e9:.2f} GFLOP in products, {parameters:,} parameters, {calls:,} calls if eager")
    assert 2.2e9 < flop < 2.6e9
