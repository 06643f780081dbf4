"""What a run reports: rows of metrics.csv, curve.png, summary.json, and the text that ends it."""

import csv
import gc
import io
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from torch import Tensor

from d4rl_tasks import reason, score_name
from housekeeping.arguments import Args
from housekeeping.folder import seed_folders

SELECTIONS = ("last", "best", "offline")  # evaluations that are reported, see `select`


def evaluations(rows: list[dict], args: Args) -> list[dict]:
    """The evaluations in rows of metrics.csv, each with its denoising loss, a mean since the evaluation before."""
    found, losses, weights, start = [], [], [], 0
    for row in rows:
        losses.append(row["bc_loss"])
        weights.append(row["step"] - start)
        start = row["step"]
        if row["score"] != "":
            found.append({"score": row["score"], "std": row["score_std"], "episodes": args.eval_episodes,
                          "step": row["step"], "loss": np.average(losses, weights=weights)})  # fmt: skip
            losses, weights = [], []
    return found


def best_and_lowest(found: list[dict], args: Args) -> tuple[dict, list[dict]]:
    """Of evaluations the one with the best score, and the rank + 1 with the lowest denoising losses, in their order."""
    lowest = sorted(found, key=lambda one: one["loss"])[: args.offline_rank + 1]
    return max(found, key=lambda one: one["score"]), lowest


def select(rows: list[dict], args: Args) -> dict[str, dict]:
    """The last evaluation, the best ("online selection"), and the one with the (rank + 1)-th lowest denoising loss
    ("offline selection", which needs no environment)."""
    found = evaluations(rows, args)
    best, lowest = best_and_lowest(found, args)
    chosen = found[-1], best, lowest[-1]
    return {name: {k: v for k, v in one.items() if k != "loss"} for name, one in zip(SELECTIONS, chosen, strict=True)}


def to_keep(rows: list[dict], args: Args) -> set[int]:
    """The steps of the evaluations whose policies are kept: the best, and all that offline selection may yet take."""
    found = evaluations(rows, args)
    best, lowest = best_and_lowest(found, args) if found else ({}, [])
    return {one["step"] for one in (best, *lowest) if one}


def write_metrics(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_curve(file: Path | io.BytesIO, rows: list[dict], args: Args, paper: tuple[float, float] | None) -> None:
    """Score (band: one standard deviation over episodes) and losses over updates."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    step, score, std = np.array([(r["step"], r["score"], r["score_std"]) for r in rows if r["score"] != ""]).T
    left.plot(step, score, marker=".", label=f"{args.eval_episodes} episodes")
    left.fill_between(step, score - std, score + std, alpha=0.2)
    if paper:
        left.axhline(paper[0], color="gray", linestyle="--", label=f"paper: {paper[0]}")
    left.set(xlabel="updates", ylabel=score_name(args.env_id, args.score_range))
    left.set_title(f"{args.env_id}, seed {args.seed}")
    left.legend()
    for name in ("critic_loss", "bc_loss", "q_loss"):
        if any(r[name] for r in rows):  # cloning has bc_loss alone
            right.plot([r["step"] for r in rows], [r[name] for r in rows], label=name)
    right.set(xlabel="updates", title="losses")
    right.set_yscale("symlog", linthresh=1e-3)
    right.legend()
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.savefig(file, format="png")
    del figure, left, right
    gc.collect()  # a figure is part of reference cycles: its megabytes would wait for the collector


def curves_work(args: Args) -> bool:
    """Whether curve.png can be drawn here; if not, says why: a picture never costs a run."""
    row = dict.fromkeys(("score", "score_std", "critic_loss", "bc_loss", "q_loss"), 1.0)
    try:
        write_curve(io.BytesIO(), [{"step": 1, **row}], args, None)
    except Exception as error:  # matplotlib is missing, or its settings are broken in one of many ways
        print(f"warning: no curve.png will be drawn: {reason(error)}", file=sys.stderr)
        return False
    return True


def q_alarm(reward: Tensor, args: Args) -> Callable[[list[dict]], None]:
    """A function of rows that warns, once per seed, if the mean target (Eq. 4) lies outside what rewards allow.

    They allow any discounted sum of them, and a margin of a twentieth of the range, for Q may well be a little off.
    """
    horizon = 1 / (1 - args.gamma) if args.gamma < 1 else float("inf")
    low, high = min(0.0, reward.min().item() * horizon), max(0.0, reward.max().item() * horizon)
    margin, warned = 0.05 * (high - low), set()

    def warn(rows: list[dict]) -> None:
        for seed, row in enumerate(rows, args.seed):
            if not low - margin <= row["target_q"] <= high + margin and seed not in warned:
                warned.add(seed)
                print(f"warning: update {row['step']:,}, seed {seed}: mean target Q is {row['target_q']:.4g}, "
                      f"rewards allow {low:.4g} to {high:.4g}", file=sys.stderr)  # fmt: skip

    return warn


def finished(args: Args, folder: Path) -> dict | None:
    """The summary of a run that has made all its updates; None for any other. Says which of its files are missing."""
    names = ("args.json", "checkpoint.pt", "metrics.csv", "summary.json")
    files = {folder / "checkpoint.pt", *(path / name for path in seed_folders(args, folder) for name in names)}
    if args.capture_video:
        files.add(folder / "video.mp4")
    with suppress(OSError, ValueError, KeyError, TypeError):
        summary = json.loads((folder / "summary.json").read_text())
        if summary["num_updates"] == args.num_updates:
            missing = sorted(str(path) for path in files if not path.exists())
            if not missing:
                return summary
            if (folder / "checkpoint.pt").exists():  # otherwise nothing can be, as the next error says
                print(f"missing, and written again: {', '.join(missing)}", file=sys.stderr)
    return None


def report(summary: dict) -> str:
    """The text that ends a run: a summary's scores and the run's folder."""
    seeds = summary.get("num_seeds", 1)
    name = f"seeds {summary['seed']}-{summary['seed'] + seeds - 1}" if seeds > 1 else f"seed {summary['seed']}"
    score = summary.get("score_is", "normalized score")
    lines = [f"{summary['env_id']}, {name}, {summary['num_updates']} updates, {score}:"]
    for name in SELECTIONS:
        it = summary[name]
        of = f"{seeds} seeds"
        if seeds == 1:
            of = f"{it['episodes']} episode{'s' if it['episodes'] > 1 else ''}, update {it['step']}"
        lines.append(f"  {name:8} {it['score']:6.1f} ± {it['std']:.1f} ({of})")
    if summary["paper"]:
        mean, std = summary["paper"]
        lines.append(f"  {'paper':8} {mean:6.1f} ± {std:.1f} (5 seeds)")
    return "\n".join([*lines, summary["folder"]])
