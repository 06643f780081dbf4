"""The effect of N and eta on a task: score, losses and cost over a grid of each, for several seeds (section 5.3).

    python bench/ablate.py --env-id hopper-medium-v2 --out bench/results/hopper-medium-v2-ablation
    python bench/ablate.py --quick --out FOLDER    # the HalfCheetah demo, a minute: only shows that it works

Each setting is one run of dql.py with all seeds, in FOLDER/runs, evaluated once, after its last update. steps.csv and
steps.png show all finished runs at the task's eta; eta.csv and eta.png those at N = 5. There is a row for each seed.
Run again, the script goes on with the run that was stopped, and trains only what is missing: only the number of seeds
and the two grids may then differ from the first time.

N = 1 is one step from nearly pure noise (vp: 0.6 % of the variance is the action's): little more than a regression of
the action on the state, and almost deterministic.
"""

import csv
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import dql
from d4rl_tasks import BadInput, load_dataset
from housekeeping import arguments, ending
from housekeeping.curves import write_metrics
from housekeeping.folder import seed_runs, write_json, write_whole
from housekeeping.machine import choose_device


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
N = 5  # of the table of etas
LABELS = {
    "num_steps": "N, denoising steps",
    "eta": "eta",
    "score": "normalized score",
    "bc_loss": "L_d, last tenth of updates",
    "target_q": "mean target Q, last tenth of updates",
    "action_distance": "distance from the data's action, L2",
    "ms_per_update": "ms an update, of one agent",
}
PANELS = {"num_steps": ("score", "ms_per_update"), "eta": ("score", "bc_loss", "target_q", "action_distance")}


def run_of(args: Args, num_steps: int = N, eta: float | None = None) -> dql.Args:
    """dql.py's arguments for all seeds of a setting. Raises BadInput if a value makes no sense."""
    run = dql.with_settings(dql.Args(
        env_id=args.env_id, dataset_path=args.dataset_path, num_seeds=args.num_seeds, num_updates=args.num_updates,
        batch_size=args.batch_size, num_steps=num_steps, eta=eta, eval_episodes=args.eval_episodes,
        device=str(choose_device(args.device)), runs_dir=args.out / "runs",
    ))  # fmt: skip
    return replace(run, eval_every=run.num_updates, log_every=math.ceil(run.num_updates / 10))


def runs_in(folder: Path) -> dict[Path, dql.Args]:
    """The arguments of each run in a folder, by its path. Raises BadInput if an args.json is damaged."""
    return {path.parent: dql.read_args(path.parent) for path in sorted(folder.glob("*/args.json"))}


def train_missing(run: dql.Args) -> None:
    """Goes on with the setting's runs that have not finished, and trains the seeds that have none."""
    seeds = 0
    for folder, begun in runs_in(run.runs_dir).items():
        if (begun.num_steps, begun.eta) == (run.num_steps, run.eta):
            seeds = max(seeds, begun.seed + begun.num_seeds)
            if not (folder / "summary.json").exists():
                dql.train(dql.Args(resume=folder))
    if seeds < run.num_seeds:
        dql.train(replace(run, seed=seeds, num_seeds=run.num_seeds - seeds))


def row_of(folder: Path, own: dql.Args, replicas: int) -> dict:
    """The tables' row of a seed that was trained with others, replicas in all. Kept in the seed's row.json."""
    if (folder / "row.json").exists():
        return json.loads((folder / "row.json").read_text())
    score = json.loads((folder / "summary.json").read_text())["last"]
    with (folder / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    data = load_dataset(own.env_id, own.dataset_path)
    some = np.random.default_rng(0).permutation(len(data["actions"]))[:2000]
    action = dql.load_policy(folder, device=own.device, eval_candidates=1)(data["observations"][some])
    row = {
        "num_steps": own.num_steps, "eta": own.eta, "seed": own.seed,
        "score": score["score"], "score_std": score["std"], "bc_loss": float(last["bc_loss"]),
        "target_q": float(last["target_q"]) if own.eta > 0 else math.nan,
        "action_distance": float(np.linalg.norm(action - data["actions"][some], axis=1).mean()),
        "ms_per_update": 1000 / float(last["updates_per_second"]) / replicas,
    }  # fmt: skip
    write_json(folder / "row.json", row)
    return row


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
        axes.set(xlabel=LABELS[x], ylabel=LABELS[name])
        axes.set_xscale("symlog", linthresh=min(filter(None, xs), default=1))  # symlog, unlike log, can show eta = 0
        axes.set_xticks(xs, [f"{at:g}" for at in xs])
        axes.minorticks_off()
    figure.savefig(path, format="png")


def write_tables(out: Path, default: dql.Args) -> None:
    """Writes both tables and pictures of all finished runs."""
    done = [(folder, run) for folder, run in runs_in(default.runs_dir).items() if (folder / "summary.json").exists()]
    rows = [row_of(path, own, run.num_seeds) for folder, run in done for path, own in seed_runs(run, folder)]
    rows.sort(key=lambda row: (row["num_steps"], row["eta"], row["seed"]))
    steps, etas = ([row for row in rows if row[k] == getattr(default, k)] for k in ("eta", "num_steps"))
    for name, x, some in (("steps", "num_steps", steps), ("eta", "eta", etas)):
        if some:
            write_whole(out / f"{name}.csv", lambda beside, some=some: write_metrics(beside, some))
            write_whole(out / f"{name}.png", lambda beside, some=some, x=x: draw(beside, some, x))


def ablate(args: Args) -> None:
    """Trains the missing runs, and writes the tables after each. A run that diverges leaves the others alone.

    Raises BadInput, Stopped and, at the end, Diverged.
    """
    if args.quick:
        default = Args()
        args = replace(args, **{k: v for k, v in QUICK.items() if getattr(args, k) == getattr(default, k)})
    default = run_of(args)
    settings = [(n, default.eta) for n in args.num_steps] + [(N, eta) for eta in args.etas]
    runs, diverged = [run_of(args, *setting) for setting in dict.fromkeys(settings)], []
    args.out.mkdir(parents=True, exist_ok=True)
    for run in runs_in(default.runs_dir).values():
        if differ := [f"{k} {getattr(run, k)}" for k in FIXED if getattr(run, k) != getattr(default, k)]:
            raise BadInput(f"{args.out} holds an ablation with {', '.join(differ)}: choose another --out")
    for run in runs:
        torch.compiler.reset()  # torch.compile keeps at most eight versions of a function
        print(f"N {run.num_steps}, eta {run.eta:g}", flush=True)
        try:
            train_missing(run)
        except ending.Diverged as error:
            diverged.append(f"N {run.num_steps}, eta {run.eta:g}: {error}")
        write_tables(args.out, default)
    if diverged:
        raise ending.Diverged("; ".join(diverged))


def main() -> None:
    ending.run_main("ablate.py", lambda: ablate(arguments.parsed(Args, sys.argv[1:], "bench/ablate.py")))


if __name__ == "__main__":
    main()
