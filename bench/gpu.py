"""Times each path of an update and of acting on a GPU: one JSON line for each measurement, as soon as it is known.

    python bench/gpu.py RESULTS [--official CHECKOUT]
    python bench/gpu.py RESULTS --dry-run        on the CPU, with tiny shapes, no kernel launched: does the script run?

Shapes are HalfCheetah's, batch 256, N = 5. A measurement that fails writes its failure, and the next begins. After
LIMIT seconds (environment variable, 300) the rest is skipped; timing begins when the file WAIT_FOR, if given, exists.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("results", type=Path)
parser.add_argument("--official", type=Path)
parser.add_argument("--dry-run", action="store_true")
options = parser.parse_args()
if options.dry_run:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dql  # noqa: E402
import fused  # noqa: E402
from fast_sampler import FastSampler, FastUpdate, compile_agent, replicate  # noqa: E402

if options.dry_run:
    fused.launch = lambda *args, **constants: None

BEGUN, LIMIT = time.perf_counter(), float(os.environ.get("LIMIT", "300"))
DEVICE = torch.device("cpu" if options.dry_run else "cuda")
STATE_DIM, ACTION_DIM, ROWS = 17, 6, 1_000 if options.dry_run else 100_000
UPDATES, ROUNDS = (1, 1) if options.dry_run else (200, 7)
SHAPES = {"batch_size": 16, "num_steps": 1, "eval_candidates": 4} if options.dry_run else {}
options.results.mkdir(parents=True, exist_ok=True)
LOG = (options.results / "gpu.jsonl").open("a", buffering=1)


def say(**row) -> None:
    line = json.dumps(row | {"t": round(time.perf_counter() - BEGUN, 1)})
    print(line, flush=True)
    LOG.write(line + "\n")


def part(name: str, work: Callable[[], object]) -> object:
    """work(), or its failure as a line."""
    if time.perf_counter() - BEGUN > LIMIT:
        return say(part=name, skipped="time")
    try:
        return work()
    except Exception as error:
        traceback.print_exc(limit=-4)
        return say(part=name, failed=f"{type(error).__name__}: {str(error)[:300]}")


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The median time of work(), until the device is done."""
    work()
    taken = []
    for _ in range(rounds):
        wait()
        begun = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - begun)
    return float(np.median(taken))


def dataset() -> dql.Batch:
    g = torch.Generator().manual_seed(0)
    state, action, next_state = (torch.randn(ROWS, d, generator=g) for d in (STATE_DIM, ACTION_DIM, STATE_DIM))
    data = state, action.clamp(-1, 1), torch.randn(ROWS, generator=g), next_state, torch.zeros(ROWS)
    return dql.Batch(*(x.to(DEVICE) for x in data))


class Built:
    """K agents by one path: `updates(n)`, `act(states)`; `first`: seconds until the first update was done."""

    def __init__(self, name: str, K: int, states: int = 1):
        begun = time.perf_counter()
        args = dql.Args(env_id="halfcheetah-medium-v2", device=str(DEVICE), compile="compiled" in name, **SHAPES)
        args = replace(dql.with_settings(args), eval_episodes=states)
        agents = [dql.make_agent(args, seed) for seed in range(K)]
        self.K, own, acting = K, [], []
        for seed in range(K):
            own.append(torch.Generator(DEVICE).manual_seed(seed))
            acting.append(torch.Generator(DEVICE).manual_seed(1000 + seed))
        if "fused" in name:
            self.agent = fused.FusedDiffusionQL(replicate(agents), tf32="tf32" in name)
        else:
            self.agent = replicate(agents)
            if "compiled" in name:
                compile_agent(self.agent)
        data = dataset()
        if "eager" in name:
            self.updates = lambda n: [self.agent.train_step(data, own) for _ in range(n)]
            self.act = lambda x: self.agent.act_fresh(x, acting)
        else:
            self.updates = FastUpdate(self.agent, data, own)
            self.act = FastSampler(self.agent, states, acting) if states else None
        self.updates(1)
        wait()
        self.first = time.perf_counter() - begun


BUILT: dict[tuple, Built] = {}


def build(name: str, K: int, states: int = 10) -> None:
    BUILT[name, K] = path = Built(name, K, states)
    say(built=name, agents=K, seconds_to_first_update=round(path.first, 2))


def time_update(name: str, K: int) -> None:
    n = max(1, UPDATES // 10) if name == "eager" else UPDATES
    ms = 1e3 * seconds(lambda: BUILT[name, K].updates(n)) / n
    say(update=name, agents=K, ms=round(ms, 4), ms_each=round(ms / K, 4))


def time_act(name: str, states: int) -> None:
    path, x = Built(name, 1, states), torch.randn(states, STATE_DIM, device=DEVICE)
    say(act=name, states=states, ms=round(1e3 * seconds(lambda: path.act(x).cpu(), 5 * ROUNDS), 4))


def profile(name: str, K: int) -> None:
    """The kernels of a replay: launches, busy and elapsed microseconds, and each kind's share."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    path, replays = BUILT[name, K], 3
    path.updates(5)
    with profiled(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as p:
        path.updates(replays)
        wait()
    on_device = [e for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    rows = sorted((e.time_range.start, e.time_range.end, e.name) for e in on_device)
    begun, kinds = rows[0][0], {}
    listed = [[round(start - begun, 2), round(end - start, 2), kind[:110]] for start, end, kind in rows]
    (options.results / f"kernels_{name.replace(' ', '_')}_{K}.json").write_text(json.dumps(listed))
    for _, took, kind in listed:
        count, total = kinds.get(kind[:60], (0, 0.0))
        kinds[kind[:60]] = count + 1, total + took
    busy = sum(took for _, took, _ in listed) / replays
    say(profile=name, agents=K, kernels=len(rows) / replays, busy_us=round(busy, 1),
        span_us=round((rows[-1][1] - begun) / replays, 1))  # fmt: skip
    for kind, (count, total) in sorted(kinds.items(), key=lambda item: -item[1][1])[:25]:
        say(kernel=kind, agents=K, launches=count / replays, us=round(total / replays, 2))


def same_bits(K: int) -> None:
    """Two runs from the same start."""
    states = []
    for _ in range(2):
        path = Built("fused, captured", K)
        path.updates(UPDATES)
        states.append(torch.cat([path.agent.policy.weights.flatten(), path.agent.critic.weights.flatten()]).clone())
    say(same_bits=torch.equal(*states), agents=K, updates=UPDATES)


def beside_official(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    from agents.ql_diffusion import Diffusion_QL
    from utils.data_sampler import Data_Sampler

    settings = {"beta_schedule": "vp", "n_timesteps": 5, "grad_norm": 9.0}
    theirs = Diffusion_QL(STATE_DIM, ACTION_DIM, 1.0, str(DEVICE), 0.99, 0.005, **settings)
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    arrays = {name: x.cpu().numpy() for name, x in zip(names, dataset(), strict=True)}
    data, ours, pairs = Data_Sampler(arrays, str(DEVICE)), BUILT["fused, captured", 1], []
    for _ in range(5):  # in turns
        pairs.append([seconds(lambda n=n, work=work: work(n), 1) / n for n, work in (
            (20, lambda n: theirs.train(data, n, 256)), (UPDATES, ours.updates))])  # fmt: skip
    pairs = np.array(pairs)
    theirs_ms, ours_ms = 1e3 * np.median(pairs, 0)
    ratio = float(np.median(pairs[:, 0] / pairs[:, 1]))
    say(beside="official", work="update", theirs_ms=round(theirs_ms, 3), ours_ms=round(ours_ms, 4),
        ratio=round(ratio, 1))  # fmt: skip
    state = np.zeros(STATE_DIM, np.float32)
    ms = 1e3 * seconds(lambda: theirs.sample_action(state), 20)
    say(beside="official", work="act, 1 state", theirs_ms=round(ms, 3))


def main() -> None:
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu, dry run"
    say(gpu=name, torch=torch.__version__, cpus=os.cpu_count(), python=sys.version.split()[0])
    plans = [("fused, captured", 1), ("fused, captured", 5), ("fused, captured", 64), ("fused tf32, captured", 1),
             ("captured", 1), ("captured", 5), ("eager", 1), ("compiled, captured", 1)]  # fmt: skip
    if options.dry_run:
        plans = [("fused, captured", 1), ("fused, captured", 2), ("captured", 1), ("eager", 1)]
    for plan in plans:
        part(f"build {plan}", lambda plan=plan: build(*plan))
    tests = os.environ.get("WAIT_FOR")  # their kernels would share the GPU
    while tests and not Path(tests).exists() and time.perf_counter() - BEGUN < LIMIT / 2:
        time.sleep(0.5)
    say(timing="begins")
    for plan in BUILT:
        part(f"update {plan}", lambda plan=plan: time_update(*plan))
    for plan in BUILT:
        if "fused" in plan[0] and DEVICE.type == "cuda":
            part(f"profile {plan}", lambda plan=plan: profile(*plan))
    for path in ("fused, captured", "captured"):
        for states in (1, 10):
            part(f"act {path}", lambda path=path, states=states: time_act(path, states))
    if options.official:
        part("official", lambda: beside_official(options.official))
    for K in (1, 2 if options.dry_run else 5):
        part("same bits", lambda K=K: same_bits(K))
    for K in () if options.dry_run else (5, 64):
        part(f"compiled, {K}", lambda K=K: (build("compiled, captured", K), time_update("compiled, captured", K)))
    say(done=True)


if __name__ == "__main__":
    main()
