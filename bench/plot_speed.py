"""Plots an update's cost against N, batch size and replicas, from files of `pytest bench/ --benchmark-json=FILE`.

    python bench/plot_speed.py FILE... --out PICTURE

Each file is one line in each panel, labelled with the file's name: milliseconds of one update (of all replicas), median
of the rounds.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from d4rl_tasks import BadInput
from housekeeping import arguments, ending

PANELS = {
    "test_update_of_n_steps": "N, denoising steps",
    "test_update_of_batch_size": "batch size",
    "test_update_replicas": "replicas",
}


@dataclass
class Args:
    """Plots an update's cost against N, batch size and replicas."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON files of pytest-benchmark, at least one"""
    out: Path
    """the picture to write"""


def points(file: dict, test: str) -> list[tuple[int, float]]:
    """(parameter, milliseconds of one update) of a test's runs."""
    found = []
    for run in file["benchmarks"]:
        name, _, parameter = run["name"].partition("[")
        if name == test:
            updates = int(re.match(r"\d+", run["group"])[0])
            found.append((int(parameter.rstrip("]")), 1000 * run["stats"]["median"] / updates))
    return sorted(found)


def main(args: Args) -> None:
    if not args.files:
        raise BadInput("give a JSON file that pytest bench/test_speed.py --benchmark-json=FILE wrote")
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (test, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        axes.set(xlabel=label, ylabel="ms an update", xscale="log", yscale="log")
        measured = {path.stem: points(json.loads(path.read_text()), test) for path in args.files}
        for name, line in measured.items():
            if line:
                axes.plot(*zip(*line, strict=True), marker="o", label=name)
        ticks = sorted({parameter for line in measured.values() for parameter, _ in line})
        axes.set_xticks(ticks, map(str, ticks))
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend()
    figure.savefig(args.out)


if __name__ == "__main__":
    ending.run_main("plot_speed.py", lambda: main(arguments.parsed(Args, sys.argv[1:], "bench/plot_speed.py")))
