"""Learning curves of one run or of groups of runs: metrics.csv, curve.png."""

import csv
import gc
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from d4rl_tasks import BadInput, reason

Rows = list[dict]  # those of one seed's metrics.csv
Pair = tuple[float, float]


def write_metrics(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_metrics(path: Path) -> Rows:
    """The rows of a metrics.csv. Raises BadInput if there are none, or a value is no number."""
    try:
        with path.open(newline="") as file:
            rows = [{k: float(v) if v else "" for k, v in row.items()} for row in csv.DictReader(file)]
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist: the run has written no row yet") from None
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path} is damaged: {reason(error)}") from None
    if not rows or "score" not in rows[0]:
        raise BadInput(f"{path} is not the metrics.csv of a run, or has no rows yet")
    return rows


def mean_and_spread(seeds: Sequence[Rows], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps (n,) that all seeds have, and there the mean and standard deviation over seeds of a column, (n,) each.

    The spread of a single seed's score is that over its episodes, of another column 0.
    """
    columns = [{row["step"]: row for row in rows if row.get(name, "") != ""} for rows in seeds]
    steps = sorted(set.intersection(*map(set, columns)))
    values = np.array([[column[step][name] for step in steps] for column in columns], float)
    spread = values.std(0)
    if name == "score" and len(seeds) == 1:
        spread = np.array([columns[0][step]["score_std"] for step in steps], float)
    return np.array(steps), values.mean(0), spread


def write_curves(file: Path | io.BytesIO, groups: dict[str, Sequence[Rows]], title: str, score_name: str,
                 paper: Pair | None = None, q_range: Pair | None = None) -> None:  # fmt: skip
    """A line for each group of seeds in four panels: score, imitation loss, and of the critics loss and mean target Q.

    paper is a score to compare with, q_range the least and the largest Q that rewards allow.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = {"score": score_name, "bc_loss": "imitation loss (Eq. 2)"}
    if any(row["critic_loss"] for seeds in groups.values() for rows in seeds for row in rows):  # cloning has none
        panels |= {"critic_loss": "critics' loss (Eq. 4)", "target_q": "mean target Q (Eq. 4)"}
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for group, seeds in groups.items():
            step, mean, spread = mean_and_spread(seeds, name)
            if name in ("critic_loss", "target_q") and not mean.any():  # cloning's, beside others
                continue
            axes.plot(step, mean, marker="o", markersize=3 if len(step) > 1 else 6, label=group)
            axes.fill_between(step, mean - spread, mean + spread, alpha=0.2)
        axes.set(xlabel="updates", title=label)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if name == "critic_loss":
            axes.set_yscale("log", nonpositive="mask")
        if name == "bc_loss":
            axes.set_ylim(bottom=0)
        if name == "score" and paper:
            axes.axhline(paper[0], color="gray", linestyle="--", label=f"paper: {paper[0]}")
        if name == "target_q" and q_range:
            limits = axes.get_ylim()  # the lines are seen once Q comes near them
            for end in filter(np.isfinite, q_range):
                axes.axhline(end, color="gray", linestyle="--")
            axes.set(ylim=limits, title=f"{label}\nrewards allow {q_range[0]:.4g} to {q_range[1]:.4g}")
    figure.axes[0].legend()
    figure.suptitle(title)
    figure.savefig(file, format="png")
    del figure, axes
    gc.collect()  # a figure is part of reference cycles: its megabytes would wait for the collector


def curves_work() -> bool:
    """Whether curve.png can be drawn here; if not, says why: a picture never costs a run."""
    row = dict.fromkeys(("step", "score", "score_std", "critic_loss", "bc_loss", "target_q"), 1.0)
    try:
        write_curves(io.BytesIO(), {"seed": [[row]]}, "", "")
    except Exception as error:  # matplotlib is missing, or its settings are broken in one of many ways
        print(f"warning: no curve.png will be drawn: {reason(error)}", file=sys.stderr)
        return False
    return True
