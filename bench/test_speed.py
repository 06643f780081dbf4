"""Speed of updates, acting and evaluation, compared with other implementations if checkouts of them are given.

    pytest bench/
    OMP_NUM_THREADS=1 pytest bench/test_speed.py --official CHECKOUT --benchmark-json=FILE
    pytest bench/test_speed.py --flow-rl CHECKOUT -k beside

--official: github.com/Zhendong-Wang/Diffusion-Policies-for-Offline-RL. --flow-rl: github.com/typoverflow/flow-rl, at
bae22f4, the fastest other one, in JAX (pip install jax==0.5.3 flax==0.10.5 orbax-checkpoint==0.11.23 optax distrax
hydra-core). For one thread put `taskset -c 0` before pytest: JAX ignores OMP_NUM_THREADS.

Shapes and settings are HalfCheetah's, batch 256, N = 5, unless a test's name says otherwise. A group compares variants
of the same work. A replica is one more agent: on a GPU updated in the same step, on a CPU in turn. On a GPU the timed
region ends when the device is done.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

import compiling
import dql
import fast_sampler
from d4rl_tasks import make_envs
from housekeeping.machine import choose_device

STATE_DIM, ACTION_DIM, ROWS = 17, 6, 100_000
DEVICE = choose_device("auto")
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


def steps(replicas: int = 1, states: int = 1, **args) -> tuple[list, Callable, Callable]:
    """(agents, updates, act) of `fast_sampler.make_steps`; each replica acts in so many states at once."""
    args = {"compile": False, "cudagraphs": False, "device": str(DEVICE), **args}
    args = dql.with_settings(
        dql.Args(env_id="halfcheetah-medium-v2", num_seeds=replicas, eval_episodes=states, **args)
    )
    agents = [dql.make_agent(args, seed) for seed in range(replicas)]
    generators = [torch.Generator(DEVICE).manual_seed(k) for k in range(2 * replicas)]
    data = dql.make_batch(arrays(), "none", DEVICE)
    return fast_sampler.make_steps(args, agents, data, generators[:replicas], generators[replicas:])


def trainer(**args) -> Callable[[], torch.Tensor]:
    """A function that makes UPDATES updates and returns their summed losses."""
    return partial(steps(**args)[1], UPDATES)


def actor(states: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from so many states to actions, compiled and, on a GPU, captured."""
    return steps(states=states, compile=True, cudagraphs=ON_GPU)[2]


def measure(benchmark, work: Callable[[], object], rounds: int = 7) -> object:
    """Times work() until the device is done with it; returns its result."""

    def timed() -> object:
        result = work()
        if ON_GPU:
            torch.cuda.synchronize()
        return result

    return benchmark.pedantic(timed, rounds=rounds, iterations=1, warmup_rounds=1)


gpu = pytest.mark.skipif(not ON_GPU, reason="no GPU")
GPU_PATHS = ("captured", "compiled, captured", "fused, captured")


# ----------------------------------------------------------------------------- updates


@pytest.mark.benchmark(group=f"{UPDATES} updates")
@pytest.mark.parametrize(
    "path", ["eager", "compiled", *(pytest.param(p, marks=gpu) for p in GPU_PATHS)]
)
def test_update(benchmark, path) -> None:
    work = trainer(compile="compiled" in path, cudagraphs="captured" in path, fused="fused" in path)
    assert torch.isfinite(measure(benchmark, work)).all()


@pytest.mark.benchmark(group=f"{UPDATES} updates of each replica")
@pytest.mark.parametrize("replicas", [1, 4, *(pytest.param(k, marks=gpu) for k in (5, 16, 64))])
def test_update_replicas(benchmark, replicas) -> None:
    work = trainer(replicas=replicas, compile=not ON_GPU, cudagraphs=ON_GPU, fused=ON_GPU)
    assert torch.isfinite(measure(benchmark, work)).all()


@pytest.mark.benchmark(group=f"{UPDATES} updates: N")
@pytest.mark.parametrize("num_steps", [1, 2, 5, 10, 20, 50])
def test_update_of_n_steps(benchmark, num_steps) -> None:
    work = trainer(num_steps=num_steps, cudagraphs=ON_GPU, fused=ON_GPU)
    assert torch.isfinite(measure(benchmark, work, rounds=3)).all()


@pytest.mark.benchmark(group=f"{UPDATES} updates: batch size")
@pytest.mark.parametrize("batch_size", [64, 256, 1024, 4096])
def test_update_of_batch_size(benchmark, batch_size) -> None:
    work = trainer(batch_size=batch_size, cudagraphs=ON_GPU, fused=ON_GPU)
    assert torch.isfinite(measure(benchmark, work, rounds=3)).all()


# ----------------------------------------------------------------------------- acting, evaluation


@pytest.mark.benchmark(group="act: states, 50 candidates each")
@pytest.mark.parametrize("states", [1, 10, 50])
def test_act(benchmark, states) -> None:
    act, x = actor(states), torch.randn(states, STATE_DIM, device=DEVICE)
    assert measure(benchmark, lambda: act(x).cpu(), rounds=20).shape == (states, ACTION_DIM)


def short_episodes() -> list:
    """Ten HalfCheetah environments whose episodes end after 20 time steps instead of 1,000."""
    gymnasium = pytest.importorskip("gymnasium")
    pytest.importorskip("mujoco")
    return [gymnasium.wrappers.TimeLimit(env, 20) for env in make_envs("halfcheetah-medium-v2", 10)]


@pytest.mark.benchmark(group="evaluation: 20 time steps of 10 episodes")
def test_evaluation(benchmark) -> None:
    envs, act = short_episodes(), actor(10)
    assert np.isfinite(measure(benchmark, lambda: dql.evaluate(act, envs, list(range(10)), DEVICE))).all()


# ----------------------------------------------------------------------------- beside other implementations


class Peer(NamedTuple):
    """Another implementation: update draws batches and makes UPDATES updates, act maps states (E, S) to actions (E, A),
    evaluate runs an episode in each of E environments."""

    update: Callable[[], object]
    act: Callable[[np.ndarray], object]
    evaluate: Callable[[list], object]


def checkout(request: pytest.FixtureRequest, option: str, code: str) -> None:
    """Makes the option's checkout, which has the file code, importable; skips the test if the option is not given."""
    path = request.config.getoption(option)
    if path is None:
        pytest.skip(f"no {option} CHECKOUT")
    if not (path / code).exists():
        raise pytest.UsageError(f"{option} {path} has no {code}: give the folder of a checkout")
    sys.path.insert(0, str(path))


def official(request: pytest.FixtureRequest) -> Peer:
    """The official implementation: acts in one state per call, and evaluates one episode after another."""
    checkout(request, "--official", "agents/ql_diffusion.py")
    from agents.ql_diffusion import Diffusion_QL
    from utils.data_sampler import Data_Sampler

    settings = {"beta_schedule": "vp", "n_timesteps": 5, "grad_norm": 9.0}
    agent = Diffusion_QL(STATE_DIM, ACTION_DIM, 1.0, str(DEVICE), 0.99, 0.005, **settings)
    data = Data_Sampler(arrays(), agent.device)

    def evaluate(envs: list) -> None:
        for k, env in enumerate(envs):
            (state, _), done = env.reset(seed=k), False
            while not done:
                state, _, terminated, truncated, _ = env.step(agent.sample_action(np.array(state)))
                done = terminated or truncated

    def act(states: np.ndarray) -> list:
        return [agent.sample_action(state) for state in states]

    return Peer(lambda: agent.train(data, UPDATES, 256), act, evaluate)


def flow_rl(request: pytest.FixtureRequest) -> Peer:
    """flow-rl: acts in all states at once; numpy draws its batches; its time embedding is 64 wide, ours 16."""
    checkout(request, "--flow-rl", "flowrl/agent/offline/dql.py")
    jax = pytest.importorskip("jax")
    from flowrl.agent.offline.dql import DQLAgent
    from flowrl.types import Batch

    wide = [256, 256, 256]
    diffusion = SimpleNamespace(noise_schedule="vp", time_dim=64, hidden_dims=wide, solver="ddpm", steps=5,
                                clip_sampler=True, x_min=-1.0, x_max=1.0, ema=0.005, ema_every=5)  # fmt: skip
    critic = SimpleNamespace(discount=0.99, maxQ=False, ensemble_size=2, hidden_dims=wide, ema=0.005, ema_every=1)
    agent = DQLAgent(STATE_DIM, ACTION_DIM, SimpleNamespace(
        name="dql", temperature=1.0, start_actor_ema=0, eta=1.0, grad_norm=9.0, lr=3e-4, lr_decay_steps=None,
        diffusion=diffusion, critic=critic,
    ), 0)  # fmt: skip
    data, rng = arrays(), np.random.default_rng(0)
    names = ("observations", "actions", "rewards", "terminals", "next_observations", "actions")
    data = [data[name].astype(np.float32).reshape(ROWS, -1) for name in names]

    def update() -> None:
        for step in range(UPDATES):
            index = rng.integers(ROWS, size=256)
            agent.train_step(Batch(*(x[index] for x in data)), step)
        jax.block_until_ready(agent.actor.params)

    def act(states: np.ndarray) -> np.ndarray:
        return np.asarray(agent.sample_actions(states, num_samples=50)[0])

    return Peer(update, act, lambda envs: dql.evaluate(
        lambda states: torch.from_numpy(act(states.numpy())), envs, list(range(len(envs))), torch.device("cpu")
    ))  # fmt: skip


def both(work: str, peer: Peer) -> tuple[Callable, Callable]:
    """The same work by our fastest path on this device, and by the other implementation."""
    if work == "update":
        return trainer(compile=True, cudagraphs=ON_GPU), peer.update
    if work == "evaluation":
        act, ours, theirs = actor(10), short_episodes(), short_episodes()
        return lambda: dql.evaluate(act, ours, list(range(10)), DEVICE), lambda: peer.evaluate(theirs)
    act, x = actor(int(work.split()[1])), torch.randn(int(work.split()[1]), STATE_DIM, device=DEVICE)
    states = x.cpu().numpy()
    return lambda: act(x).cpu(), lambda: peer.act(states)


def in_turns(benchmark, ours: Callable, theirs: Callable, rounds: int) -> str:
    """Times both alternately, so that other load slows both; returns median and quartiles of theirs / ours."""
    seconds = []

    def timed(work: Callable) -> float:
        begun = time.perf_counter()
        work()
        if ON_GPU:
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    benchmark.pedantic(timed, (ours,), setup=lambda: seconds.append(timed(theirs)), rounds=rounds, warmup_rounds=1)
    low, ratio, high = np.quantile(np.array(seconds[-rounds:]) / benchmark.stats.stats.data, [0.25, 0.5, 0.75])
    benchmark.extra_info |= {"other_seconds": float(np.median(seconds)), "ratio_quartiles": [low, ratio, high],
                             "threads": torch.get_num_threads(), "cores": len(os.sched_getaffinity(0))}  # fmt: skip
    return f"{ratio:.2f} times as long ({low:.2f} to {high:.2f})"


@pytest.mark.benchmark(group="beside other implementations")
@pytest.mark.parametrize("peer", [official, flow_rl])
@pytest.mark.parametrize("work, rounds", [("update", 40), ("act 1", 40), ("act 10", 40), ("evaluation", 10)])
def test_beside(benchmark, request, peer, work, rounds, capsys) -> None:
    ratio = in_turns(benchmark, *both(work, peer(request)), rounds)
    with capsys.disabled():
        print(f"\n{work}: {peer.__name__} takes {ratio}")


@pytest.mark.benchmark(group="four agents beside one")
def test_four_agents_beside_one(benchmark, capsys) -> None:
    """Times updates of four agents at once beside four times as many updates of one agent."""
    one, four = (partial(steps(replicas=k, compile=True, cudagraphs=ON_GPU)[1], UPDATES * 4 // k) for k in (1, 4))
    ratio = in_turns(benchmark, four, one, rounds=10)
    with capsys.disabled():
        print(f"\nas many updates of one agent take {ratio}")


@pytest.mark.benchmark(group="compiling.py: what it makes of products, beside others")
@pytest.mark.skipif(ON_GPU, reason="it changes what a CPU compiles alone")
@pytest.mark.parametrize("other", ["products as they are", "the other library"])
@pytest.mark.parametrize("work", ["update", "act 10"])
def test_compiling(benchmark, request, monkeypatch, other, work, capsys) -> None:
    """Compiled work beside the same without compiling.py's pass, or with its choice of oneDNN or MKL reversed."""
    if work == "update" and not request.config.option.keyword:
        pytest.skip("takes a minute: -k compiling")
    if other == "the other library" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("no CPU with AVX-512")

    def build() -> Callable:
        if work == "update":
            return trainer(compile=True)
        act, x = actor(10), torch.randn(10, STATE_DIM)
        return lambda: act(x)

    ours = build()
    ours()
    if other == "the other library":
        library = "Intel AVX512" if compiling.instructions() == "AMD AVX512" else "AMD AVX512"
        monkeypatch.setattr(compiling, "instructions", lambda: library)
        # a new pass: otherwise what was compiled with the old one would be reused
        monkeypatch.setattr(compiling, "FASTER_PRODUCTS", compiling.FasterProducts())
    else:
        monkeypatch.setattr(compiling, "FASTER_PRODUCTS", None)
    ratio = in_turns(benchmark, ours, build(), rounds=15)
    with capsys.disabled():
        print(f"\n{work}: with {other} it takes {ratio}")


# ----------------------------------------------------------------------------- what an update is made of


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Seconds of one call of work, the median of seven rounds."""
    rounds = []
    for _ in range(8):  # the first warms up
        begun = time.perf_counter()
        for _ in range(repeats):
            work()
        if ON_GPU:
            torch.cuda.synchronize()
        rounds.append((time.perf_counter() - begun) / repeats)
    return float(np.median(rounds[1:]))


def product_rate(product: Callable, size: int, repeats: int) -> float:
    """Floating-point operations per second of a product of two float32 matrices, (size, size)."""
    x, w = torch.randn(size, size, device=DEVICE), torch.randn(size, size, device=DEVICE)
    return 2 * size**3 / seconds_of(lambda: product(x, w), repeats)


@pytest.mark.benchmark(group=f"{UPDATES} updates: the roofline")
def test_roofline_of_an_update(benchmark, capsys) -> None:
    """Operations, bytes and calls of an update; the limit that the first two set here, and what part of it is reached.

    Operations are those of the matrix products. Bytes are each parameter, its two moments and its average, read and
    written once, as if from memory, though a cache may hold them. The device's rates are measured here.
    """
    from torch.utils.flop_counter import FlopCounterMode

    (agent,), updates, act = steps(states=10)
    updates(1)
    with FlopCounterMode(display=False) as count:
        updates(1)
    with FlopCounterMode(display=False) as count_acting:
        act(torch.randn(10, STATE_DIM, device=DEVICE))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:  # calls, not kernels
        updates(1)
    parameters = sum(p.numel() for name in ("policy", "critic") for p in getattr(agent, name).parameters())
    source, target = torch.zeros(2, 2**26, device=DEVICE)
    product = compiling.compiled(lambda x, w: x @ w, DEVICE)
    work = {
        "flop": count.get_total_flops(),
        "flop_acting_10": count_acting.get_total_flops(),
        "bytes": 4 * 2 * 4 * parameters,
        "calls_eager": sum(not event.cpu_children for event in profile.events()),
        "flop_per_second_256": product_rate(product, 256, 100),
        "flop_per_second_256_eager": product_rate(torch.mm, 256, 100),
        "flop_per_second_2048": product_rate(product, 2048, 3),
        "bytes_per_second": 2 * source.nbytes / seconds_of(lambda: target.copy_(source), 1),
    }
    fastest = max(rate for name, rate in work.items() if name.startswith("flop_per_second"))
    limit = max(work["flop"] / fastest, work["bytes"] / work["bytes_per_second"])
    train = trainer(compile=True, cudagraphs=ON_GPU)
    measure(benchmark, train)
    seconds = seconds_of(train, 1) / UPDATES
    benchmark.extra_info |= work | {"limit_seconds": limit, "part_of_limit": limit / seconds}
    with capsys.disabled():
        print(
            f"\none update: {work['flop'] / 1e9:.2f} GFLOP in products (acting in 10 states: "
            f"{work['flop_acting_10'] / 1e9:.2f}), {work['bytes'] / 1e6:.1f} MB of parameters, "
            f"{work['calls_eager']:,} calls if eager; here a product of 256 x 256 makes "
            f"{work['flop_per_second_256'] / 1e9:.0f} GFLOP/s compiled and "
            f"{work['flop_per_second_256_eager'] / 1e9:.0f} eager, of 2048 {work['flop_per_second_2048'] / 1e9:.0f}, "
            f"a copy {work['bytes_per_second'] / 1e9:.0f} GB/s: at least {1000 * limit:.2f} ms; "
            f"{1000 * seconds:.2f} ms are {limit / seconds:.0%} of that speed"
        )
    assert 2.2e9 < work["flop"] < 2.6e9
