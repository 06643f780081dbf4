"""The effect of N and eta on a task: score, losses and cost over a grid of each, for several seeds (section 5.3).

    python bench/ablate.py --env-id hopper-medium-v2 --out bench/results/hopper-medium-v2-ablation
    python bench/ablate.py --quick --out FOLDER    # the demo data set, a minute: only shows that it works

steps.csv and steps.png vary N at the task's eta; eta.csv and eta.png vary eta at N = 5. Each row is one agent, trained
as dql.py trains it and evaluated once, after its last update; an agent that is in both tables is trained once. On a GPU
these are trained at once, as replicas: all seeds of one N; all seeds of eta = 0, which has no critics; all seeds of all
other etas. On a CPU, which one agent keeps busy, agents are trained one after another. Rows are written as soon as
their agents are evaluated. Run again, the script trains only the missing rows; only the number of seeds and the two
grids may then differ from the first time.

N = 1 is one step from nearly pure noise (vp: 0.6 % of the variance is the action's): little more than a regression of
the action on the state, and almost deterministic.
"""

import csv
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

import dql
import fast_sampler
from d4rl_tasks import BadInput, load_dataset, make_envs, normalized_score
from dql import LOSSES, Batch, DiffusionQL
from housekeeping import arguments, ending
from housekeeping.folder import write_json, write_whole
from housekeeping.machine import choose_device, versions
from housekeeping.report import write_metrics


@dataclass
class Args:
    """Ablation of N and eta. A flag left at None takes the task's setting from the paper."""

    env_id: str = "halfcheetah-demo-v0"
    """a task of dql.py"""
    dataset_path: Path | None = None
    """data to train on instead of the task's own"""
    num_seeds: int = 5
    """how many seeds of each setting, from seed 0 on"""
    num_updates: int | None = None
    """updates of each agent"""
    batch_size: int = 256
    """transitions per update"""
    eval_episodes: int = 10
    """evaluation episodes of each agent"""
    num_steps: tuple[int, ...] = (1, 2, 5, 10, 20)
    """grid of N"""
    etas: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
    """grid of eta"""
    out: Path = Path("runs/ablation")
    """output folder; an ablation already in it is continued"""
    quick: bool = False
    """small values for every number and grid not given; writes to runs/ablation-quick unless --out is given"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda if there is one"""


QUICK = {"num_seeds": 2, "num_updates": 20, "batch_size": 32, "eval_episodes": 1, "num_steps": (1, 3),
         "etas": (0.0, 1.0), "out": Path("runs/ablation-quick")}  # fmt: skip
FIXED = ("env_id", "dataset_path", "num_updates", "batch_size", "eval_episodes", "device")
DISTANCE_ROWS = 2000
COLUMNS = {
    "num_steps": "N, denoising steps",
    "eta": "eta",
    "seed": "seed",
    "score": "normalized score",
    "score_std": "its deviation over episodes",
    "bc_loss": "L_d, last tenth of updates",
    "target_q": "mean target Q, last tenth of updates",
    "action_distance": "distance from the data's action, L2",
    "ms_per_update": "ms an update, of one agent",
    "ms_per_act": "ms an acting step, of one agent",
    "replicas": "agents trained at once",
}
PANELS = {
    "num_steps": ("score", "ms_per_update", "ms_per_act"),
    "eta": ("score", "bc_loss", "target_q", "action_distance"),
}
Setting = tuple[int, float, int]  # N, eta, seed


def settings_of(args: Args, num_steps: int = 5, eta: float | None = None, replicas: int = 1) -> dql.Args:
    """dql.py's arguments for one group of agents, with the task's settings filled in. Raises BadInput."""
    return dql.with_settings(dql.Args(
        env_id=args.env_id, dataset_path=args.dataset_path, num_seeds=replicas, device=args.device,
        num_updates=args.num_updates, batch_size=args.batch_size, num_steps=num_steps, eta=eta,
        eval_episodes=args.eval_episodes,
    ))  # fmt: skip


def groups_of(args: Args) -> dict[str, list[list[Setting]]]:
    """The groups of each table: the settings that a GPU trains at once. Raises BadInput if a value makes no sense."""
    seeds, default = range(args.num_seeds), settings_of(args, replicas=args.num_seeds)
    steps, etas = dict.fromkeys(args.num_steps), dict.fromkeys(args.etas)
    for n in steps:
        settings_of(args, num_steps=n)
    for eta in etas:
        settings_of(args, eta=eta)
    return {
        "num_steps": [[(n, default.eta, seed) for seed in seeds] for n in steps],
        "eta": [
            [(default.num_steps, eta, seed) for eta in some for seed in seeds]
            for some in ([e for e in etas if e == 0], [e for e in etas if e > 0])
        ],
    }


def train_group(args: Args, settings: Sequence[Setting], dataset: Batch, bar) -> list[dict]:
    """Trains a group of agents, which may differ in eta and seed only, evaluates them, and returns their rows."""
    num_steps, eta, _ = settings[0]
    # chosen by the length of all seeds' runs together: what is compiled for one agent serves the next
    path = fast_sampler.choose_path(settings_of(args, replicas=args.num_seeds), dataset.state.device)
    own = settings_of(args, num_steps, eta, len(settings))
    own = replace(own, compile=path.compile, cudagraphs=path.cudagraphs)
    agents = [dql.make_agent(replace(own, eta=eta), seed) for _, eta, seed in settings]
    device = agents[0].device
    generators = [torch.Generator(device).manual_seed(seed) for _, _, seed in settings]
    # seeded as dql.train's last evaluation is: an agent's score is that of `python dql.py --seed`
    noise_seeds = [dql.eval_noise_seed(seed, own.num_updates) for _, _, seed in settings]
    eval_generators = [torch.Generator(device).manual_seed(seed) for seed in noise_seeds]
    trained, updates, act = fast_sampler.make_steps(own, agents, dataset, generators, eval_generators)

    tenth = max(1, own.num_updates // 10)  # the updates before it warm up the timed ones
    if own.num_updates > tenth:
        run_updates(updates, own.num_updates - tenth, bar)
    losses, ms_per_update = run_updates(updates, tenth, bar)
    scores, ms_per_act = evaluate(own, act, settings, device)
    states = fast_sampler.states_of(trained, len(settings))
    rows = []
    for k, (num_steps, eta, seed) in enumerate(settings):
        agents[k].load_state_dict(states[k])
        rows.append({
            "num_steps": num_steps, "eta": eta, "seed": seed,
            "score": scores[k].mean(), "score_std": scores[k].std(), "bc_loss": losses[k]["bc_loss"],
            "target_q": losses[k]["target_q"] if eta > 0 else math.nan,
            "action_distance": action_distance(agents[k], dataset, seed),
            "ms_per_update": ms_per_update / len(settings), "ms_per_act": ms_per_act / len(settings),
            "replicas": len(settings),
        })  # fmt: skip
    return rows


def run_updates(updates: Callable[[int], Tensor], n: int, bar) -> tuple[list[dict], float]:
    """Each agent's mean losses over n updates, and the milliseconds of one update of all. Waits for the device once."""
    start, sums = time.perf_counter(), []
    for done in range(0, n, 10):
        chunk = min(10, n - done)
        sums.append(updates(chunk))
        bar.update(chunk)
    means = (sum(sums) / n).reshape(-1, len(LOSSES)).tolist()
    ms = 1000 * (time.perf_counter() - start) / n
    return [dict(zip(LOSSES, mean, strict=True)) for mean in means], ms


def evaluate(
    own: dql.Args, act: Callable, settings: Sequence[Setting], device: torch.device
) -> tuple[np.ndarray, float]:
    """Normalized scores (K, episodes) of a group's agents, and the median milliseconds of one call of act for all."""
    envs = make_envs(own.env_id, own.eval_episodes * len(settings))
    env_seeds = [seed + 100 + k for _, _, seed in settings for k in range(own.eval_episodes)]
    times = []

    def timed(states: Tensor) -> Tensor:
        start = time.perf_counter()
        actions = act(states).cpu()  # waits for the device
        times.append(1000 * (time.perf_counter() - start))
        return actions

    returns = dql.evaluate(timed, envs, env_seeds, device)
    return normalized_score(own.env_id, returns).reshape(len(settings), -1), float(np.median(times))


@torch.no_grad()
def action_distance(agent: DiffusionQL, dataset: Batch, seed: int) -> float:
    """Mean L2 distance between the data's actions and the policy's in the same states, one sample of the chain each."""
    generator = torch.Generator(agent.device).manual_seed(seed)
    rows = min(DISTANCE_ROWS, len(dataset.state))
    index = torch.randperm(len(dataset.state), generator=generator, device=agent.device)[:rows]
    shape = (agent.args.num_steps + 1, rows, agent.action_dim)
    action = agent.policy.sample(dataset.state[index], torch.randn(shape, generator=generator, device=agent.device))
    return (action - dataset.action[index]).norm(dim=-1).mean().item()


# ----------------------------------------------------------------------------- tables and pictures


def read_table(path: Path) -> dict[Setting, dict]:
    """A table's rows by setting; empty if there is no file. Raises BadInput if the file is not such a table."""
    if not path.exists():
        return {}
    try:
        with path.open(newline="") as file:
            rows = [{name: float(row[name]) for name in COLUMNS} for row in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is not a table of this script: {error}") from None
    rows = [row | {name: int(row[name]) for name in ("num_steps", "seed", "replicas")} for row in rows]
    return {(row["num_steps"], row["eta"], row["seed"]): row for row in rows}


def save_table(path: Path, rows: dict[Setting, dict]) -> None:
    """Writes a table's rows, sorted by setting."""
    write_whole(path, lambda beside: write_metrics(beside, [rows[setting] for setting in sorted(rows)]))


def draw(path: Path, rows: list[dict], x: str) -> None:
    """Plots each measure against x: a dot per seed, the mean, and a band of one standard deviation over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(PANELS[x]), 3.4), layout="constrained")
    xs = sorted({row[x] for row in rows})
    for axes, name in zip(figure.subplots(1, len(PANELS[x])), PANELS[x], strict=True):
        ys = [np.array([row[name] for row in rows if row[x] == at]) for at in xs]
        mean, std = np.array([y.mean() for y in ys]), np.array([y.std() for y in ys])
        axes.plot(xs, mean, marker="o")
        axes.fill_between(xs, mean - std, mean + std, alpha=0.2)
        axes.scatter(*zip(*((row[x], row[name]) for row in rows), strict=True), s=8, color="gray", zorder=3)
        axes.set(xlabel=COLUMNS[x], ylabel=COLUMNS[name])
        axes.set_xscale("symlog", linthresh=min(filter(None, xs), default=1))  # symlog, unlike log, can show eta = 0
        axes.set_xticks(xs, [f"{at:g}" for at in xs])
        axes.minorticks_off()
    figure.savefig(path, format="png")


def open_folder(args: Args) -> None:
    """Makes the folder and writes ablate.json. Raises BadInput if it holds an ablation with other FIXED arguments."""
    path, mine, device = args.out / "ablate.json", arguments.as_json(args), torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else args.device
    try:
        others = json.loads(path.read_text())["args"] if path.exists() else mine
        differ = [f"{name} {others[name]}" for name in FIXED if others[name] != mine[name]]
        if not differ:
            args.out.mkdir(parents=True, exist_ok=True)
            write_json(path, {"args": mine, "device": name, "versions": versions(device)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"cannot go on in {args.out}: {error}; choose another --out") from None
    if differ:
        raise BadInput(f"{args.out} holds an ablation with {', '.join(differ)}: choose another --out")


def ablate(args: Args) -> None:
    """Trains the agents missing from the tables, and draws the tables. Raises BadInput."""
    from tqdm import tqdm

    if args.quick:
        default = Args()
        args = replace(args, **{k: v for k, v in QUICK.items() if getattr(args, k) == getattr(default, k)})
    device = choose_device(args.device)
    own = settings_of(args)
    args = replace(args, device=str(device), num_updates=own.num_updates)
    tables = groups_of(args)
    dataset = dql.make_batch(load_dataset(args.env_id, args.dataset_path), own.reward, device)
    open_folder(args)
    known = {}
    for x, groups in tables.items():
        name = {"num_steps": "steps", "eta": "eta"}[x]
        rows = read_table(args.out / f"{name}.csv")
        known |= rows
        for group in groups:
            torch.compiler.reset()  # torch.compile keeps at most eight versions of a function
            rows |= {setting: known[setting] for setting in group if setting in known}
            missing = [setting for setting in group if setting not in rows]
            at_once = max(1, len(missing)) if device.type == "cuda" else 1
            for some in (missing[k : k + at_once] for k in range(0, len(missing), at_once)):
                with tqdm(total=args.num_updates, leave=False, disable=not sys.stderr.isatty()) as bar:
                    found = train_group(args, some, dataset, bar)
                rows |= {(row["num_steps"], row["eta"], row["seed"]): row for row in found}
                save_table(args.out / f"{name}.csv", rows)
                for row in found:
                    print(f"N {row['num_steps']}, eta {row['eta']:g}, seed {row['seed']}: score {row['score']:.1f}, "
                          f"{row['ms_per_update']:.2f} ms an update", flush=True)  # fmt: skip
        known |= rows
        if rows:
            save_table(args.out / f"{name}.csv", rows)
            write_whole(args.out / f"{name}.png", lambda path, x=x, rows=rows: draw(path, list(rows.values()), x))


def main() -> None:
    ending.run_main("ablate.py", lambda: ablate(arguments.parsed(Args, sys.argv[1:], "bench/ablate.py")))


if __name__ == "__main__":
    main()
