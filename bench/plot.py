"""Draws learning curves of runs, seeds of one setting as one line: mean and spread over seeds.

    python bench/plot.py runs/A runs/B              # a line for each run, whose seeds it holds
    python bench/plot.py runs/* --by eta num-steps  # a line for each task and value of these flags, of all runs

Writes curves.png and curves.csv, the numbers of its lines.
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
from housekeeping.folder import seed_folders, write_whole


@dataclass
class Args:
    """Learning curves of runs."""

    runs: tyro.conf.Positional[list[Path]]
    """the runs' folders, or those of single seeds"""
    by: list[str] = field(default_factory=list)
    """flags of dql.py: runs of one task with the same values share a line"""
    out: Path = Path("runs/curves")
    """folder for curves.png and curves.csv"""


def groups_of(runs: list[Path], by: list[str]) -> tuple[dict[str, list[Rows]], str]:
    """The rows of each seed in each group, and what a score is. Raises BadInput."""
    names, groups, scores = [name.lstrip("-").replace("-", "_") for name in by], {}, set()
    if unknown := set(names) - {f.name for f in fields(dql.Args)}:
        raise BadInput(f"--by {', '.join(sorted(unknown))}: dql.py has no such flag")
    for run in runs:
        if not (run / "args.json").exists():  # as runs/* has the folders of other programs too
            print(f"skipped, not the folder of a run: {run}")
            continue
        args = dql.read_args(run)
        values = [f"{arguments.flag(name)} {getattr(args, name)}" for name in names]
        group = groups.setdefault(", ".join([args.env_id, *values]) if by else run.resolve().name, [])
        group += [read_metrics(folder / "metrics.csv") for folder in seed_folders(args, run)]
        scores.add(score_name(args.env_id, args.score_range))
    if len(scores) != 1:
        raise BadInput(f"scores of these runs are {', '.join(sorted(scores)) or 'none'}: draw runs of one kind")
    return groups, scores.pop()


def table(groups: dict[str, list[Rows]]) -> list[dict]:
    """A row for each evaluation that all seeds of a group have."""
    rows = []
    for group, seeds in groups.items():
        for step, mean, spread in zip(*mean_and_spread(seeds, "score"), strict=True):
            rows.append({"group": group, "seeds": len(seeds), "step": int(step), "score": mean, "std": spread})
    return rows


def main(args: Args) -> None:
    groups, score = groups_of(args.runs, args.by)
    rows = table(groups)
    for group in groups:
        if not (own := [row for row in rows if row["group"] == group]):
            raise BadInput(f"{group}: its seeds have no evaluation after the same number of updates")
        last = own[-1]
        print(f"{group}: {last['score']:.1f} ± {last['std']:.1f} ({last['seeds']} seed(s), update {last['step']:,})")
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(args.out / "curves.csv", partial(write_metrics, rows=rows))
    write_whole(args.out / "curves.png", partial(write_curves, groups=groups, title="", score_name=score))
    print(f"{args.out / 'curves.png'}\n{args.out / 'curves.csv'}")


if __name__ == "__main__":
    ending.run_main("plot.py", lambda: main(arguments.parsed(Args, sys.argv[1:], "bench/plot.py")))
