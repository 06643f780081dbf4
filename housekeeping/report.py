"""What a run reports: which evaluations, the range of a sound Q, and the text that ends it."""

import json
import math
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
from torch import Tensor

from housekeeping.arguments import Args
from housekeeping.folder import seed_folders

SELECTIONS = ("last", "best", "offline")  # evaluations that are reported, see `select`
FILES = ("args.json", "checkpoint.pt", "metrics.csv", "summary.json")  # of every finished run


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


def q_range(reward: Tensor, args: Args) -> tuple[float, float]:
    """The least and the largest discounted sum of rewards, and so the range of a sound Q."""
    horizon = 1 / (1 - args.gamma) if args.gamma < 1 else math.inf
    return min(0.0, reward.min().item() * horizon), max(0.0, reward.max().item() * horizon)


def leaves_range(target_q: float, allowed: tuple[float, float]) -> bool:
    """Whether a mean target Q is out of the range that rewards allow, by more than a twentieth of it."""
    low, high = allowed
    return max(low - target_q, target_q - high) > 0.05 * (high - low)


def finished(args: Args, folder: Path) -> dict | None:
    """The summary of a run that has made all its updates; None for any other. Says which of its files are missing."""
    files = {path / name for path in (folder, *seed_folders(args, folder)) for name in FILES}
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
    score, scale = summary.get("score_is", "normalized score"), summary.get("score_range")
    means = f" (0 is a return of {scale[0]:g}, 100 of {scale[1]:g})" if scale else ""
    lines = [f"{summary['env_id']}, {name}, {summary['num_updates']:,} updates, {score}{means}:"]
    for name in SELECTIONS:
        it = summary[name]
        of = f"{seeds} seeds"
        if seeds == 1:
            of = f"{it['episodes']} episode{'s' if it['episodes'] > 1 else ''}, update {it['step']}"
        lines.append(f"  {name:8} {it['score']:6.1f} ± {it['std']:.1f} ({of})")
    if summary["paper"]:
        mean, std = summary["paper"]
        lines.append(f"  {'paper':8} {mean:6.1f} ± {std:.1f} (5 seeds)")
    folder = Path(summary["folder"])
    files = [name for name in (*FILES, "curve.png", "video.mp4") if (folder / name).exists()]
    return "\n".join([*lines, f"files: {', '.join(files)}; policies of evaluations: evaluation-STEP.pt", str(folder)])
