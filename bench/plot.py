"""Draws learning curves of runs, seeds of one setting as one line: mean and spread over seeds.

    python bench/plot.py runs/A runs/B              # a line for each run, whose seeds it holds
    python bench/plot.py runs/* --by eta num-steps  # a line for each value of these flags, of all runs

Writes a picture for each task, curves-ENV.png, and the numbers of all lines, curves.csv. The spread of a single seed's
score is over its episodes.
"""

import sys
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

import dql
from d4rl_tasks import BadInput, score_name
from housekeeping import arguments, ending
from housekeeping.curves import Rows, mean_and_spread, read_metrics, write_curves, write_metrics
from housekeeping.folder import seed_runs, write_whole


@dataclass
class Args:
    """Learning curves of runs."""

    runs: tyro.conf.Positional[list[Path]]
    """the runs' folders, or those of single seeds"""
    by: list[str] = field(default_factory=list)
    """flags of dql.py: runs of one task with the same values share a line"""
    out: Path = Path("runs/curves")
    """folder for the pictures and curves.csv"""


def groups_of(runs: list[Path], by: list[str]) -> dict[tuple[str, str], dict[str, list[Rows]]]:
    """By task and kind of score the groups, and in each the rows of its seeds. Raises BadInput."""
    names, tasks = arguments.named([f"--{name.lstrip('-')}" for name in by]), {}
    if unknown := set(names) - {f.name for f in fields(dql.Args)}:
        raise BadInput(f"--by {', '.join(sorted(unknown))}: dql.py has no such flag")
    for run in runs:
        if not run.exists():
            raise BadInput(f"{run} does not exist")
        if not (run / "args.json").exists():  # as runs/* has the folders of other programs too
            print(f"skipped, not the folder of a run: {run}")
            continue
        for folder, args in seed_runs(dql.read_args(run), run):
            values = [f"{arguments.flag(name)} {getattr(args, name)}" for name in names]
            groups = tasks.setdefault((args.env_id, score_name(args.env_id, args.score_range)), {})
            group = groups.setdefault(", ".join(values) if by else str(run), [])
            group.append(read_metrics(folder / "metrics.csv"))
    if not tasks:
        raise BadInput(f"none of these is the folder of a run: {', '.join(map(str, runs))}")
    return tasks


def table(env_id: str, groups: dict[str, list[Rows]]) -> list[dict]:
    """A row for each evaluation that all seeds of a group have; groups that have none are left out."""
    rows = []
    for group, seeds in list(groups.items()):
        steps, means, spreads = mean_and_spread(seeds, "score")
        if not len(steps):
            print(f"left out: {env_id}, {group}: its seeds share no evaluation (draw --by num-updates too)")
            del groups[group]
            continue
        for step, mean, spread in zip(steps, means, spreads, strict=True):
            rows.append({"env_id": env_id, "group": group, "seeds": len(seeds), "step": int(step), "score": mean,
                         "std": spread})  # fmt: skip
        of = f"{len(seeds)} seeds" if len(seeds) > 1 else "1 seed, spread over its episodes"
        print(f"{env_id}, {group}: {mean:.1f} ± {spread:.1f} ({of}, update {int(step):,})")
    return rows


def main(args: Args) -> None:
    tasks = groups_of(args.runs, args.by)
    rows = [row for (env_id, _), groups in tasks.items() for row in table(env_id, groups)]
    if not rows:
        raise BadInput("these runs have made no evaluation yet")
    args.out.mkdir(parents=True, exist_ok=True)
    written = [args.out / "curves.csv"]
    write_whole(written[0], partial(write_metrics, rows=rows))
    for (env_id, score), groups in ((task, groups) for task, groups in tasks.items() if groups):
        written.append(args.out / f"curves-{env_id.replace('/', '-')}.png")
        write_whole(written[-1], partial(write_curves, groups=groups, title=env_id, score_name=score))
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    ending.run_main("plot.py", lambda: main(arguments.parsed(Args, sys.argv[1:], "bench/plot.py")))
