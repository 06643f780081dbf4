"""The folder of a run: what is written, how it is read back, and which of its evaluations are reported.

    runs/ENV__dql__SEED__TIME/    args.json, checkpoint.pt, summary.json and, of one seed, metrics.csv, curve.png and
                                  TensorBoard events; of several, a folder seed-K for each with all of these

Every file is written beside and renamed: no reader and no crash ever finds one half written.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from d4rl_tasks import BadInput

if TYPE_CHECKING:
    from dql import Args

LOSS_NAMES = ("critic_loss", "bc_loss", "q_loss", "policy_loss", "target_q", "critic_grad_norm", "policy_grad_norm")
METRICS = ("step", *LOSS_NAMES, "score", "score_std", "updates_per_second", "seconds")


def start_folder(args: Args) -> Path:
    """Makes the run's folder and writes args.json. Raises BadInput where that cannot be."""
    last = f"-{args.seed + args.num_seeds - 1}" if args.num_seeds > 1 else ""
    name = f"{args.env_id}__dql__{args.seed}{last}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder, again = args.runs_dir / name, 0
    try:
        while folder.exists():
            again += 1
            folder = args.runs_dir / f"{name}-{again}"
        folder.mkdir(parents=True)
        write_args(folder, args)
        for k, path in enumerate(seed_folders(args, folder) if args.num_seeds > 1 else []):
            path.mkdir()
            write_args(path, replace(args, seed=args.seed + k, num_seeds=1))
    except OSError as error:
        raise BadInput(f"cannot write the run's folder {folder}: {error.strerror}; choose a --runs-dir") from None
    return folder


def write_args(folder: Path, args: Args) -> None:
    write_whole(folder / "args.json", lambda path: path.write_text(json.dumps(asdict(args), indent=2, default=str)))


def read_checkpoint(folder: Path, device: torch.device) -> dict:
    """{"agents", "generators", "history", "device"} of a run's last checkpoint, of each seed. Raises BadInput."""
    try:
        checkpoint = torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)
        return {name: checkpoint[name] for name in ("agents", "generators", "history", "device")}
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        raise BadInput(f"{folder / 'checkpoint.pt'} cannot be read as a checkpoint: {reason(error)}") from None


def select(rows: list[dict], args: Args) -> dict[str, dict]:
    """The evaluation that is last, best ("online selection"), and of rank-th lowest denoising loss since the one before
    ("offline selection": it needs no environment)."""
    evaluations, losses, weights, start = [], [], [], 0
    for row in rows:
        weights.append(row["step"] - start)
        losses.append(row["bc_loss"])
        start = row["step"]
        if row["score"] != "":
            evaluations.append(row | {"bc_loss": np.average(losses, weights=weights)})
            losses, weights = [], []
    by_loss = sorted(evaluations, key=lambda row: row["bc_loss"])
    chosen = {
        "last": evaluations[-1],
        "best": max(evaluations, key=lambda row: row["score"]),
        "offline": by_loss[min(args.offline_rank, len(by_loss) - 1)],
    }
    return {
        name: {"score": row["score"], "std": row["score_std"], "episodes": args.eval_episodes, "step": row["step"]}
        for name, row in chosen.items()
    }


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls write with a path beside, then renames it: no reader and no crash ever finds the file half written."""
    beside = path.with_name(f".part-{path.name}")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_metrics(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, METRICS)
        writer.writeheader()
        writer.writerows(rows)


def write_curve(path: Path, rows: list[dict], args: Args, paper: tuple[float, float] | None) -> None:
    """Score (band: one standard deviation over episodes) and losses over updates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    step, score, std = np.array([(r["step"], r["score"], r["score_std"]) for r in rows if r["score"] != ""]).T
    left.plot(step, score, marker=".", label=f"{args.eval_episodes} episodes")
    left.fill_between(step, score - std, score + std, alpha=0.2)
    if paper:
        left.axhline(paper[0], color="gray", linestyle="--", label=f"paper: {paper[0]}")
    left.set(xlabel="updates", ylabel="normalized score", title=f"{args.env_id}, seed {args.seed}")
    left.legend()
    for name in ("critic_loss", "bc_loss", "q_loss"):
        right.plot([r["step"] for r in rows], [r[name] for r in rows], label=name)
    right.set(xlabel="updates", yscale="symlog", title="losses")
    right.legend()
    figure.savefig(path)


def versions() -> dict[str, str | int]:
    """Of what a score depends on."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads()}
    for package in ("torch", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "gym", "d4rl", "free-mujoco-py"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def seed_folders(args: Args, folder: Path) -> list[Path]:
    """Of each seed: the run's folder itself, or a folder within where there are several."""
    if args.num_seeds == 1:
        return [folder]
    return [folder / f"seed-{seed}" for seed in range(args.seed, args.seed + args.num_seeds)]


def open_logs(args: Args, folder: Path, step: int) -> list:
    """A TensorBoard writer for each seed, and Weights & Biases."""
    from torch.utils.tensorboard import SummaryWriter

    if args.track:
        import wandb

        wandb.init(project="dql", name=folder.name, config=asdict(args), sync_tensorboard=True)
    return [SummaryWriter(path, purge_step=step + 1 if step else None) for path in seed_folders(args, folder)]


def log(args: Args, folder: Path, history: list[list[dict]], writers: list) -> None:
    """The newest row of each seed, to TensorBoard and metrics.csv."""
    for path, rows, writer in zip(seed_folders(args, folder), history, writers, strict=True):
        for name in METRICS[1:]:
            if rows[-1][name] != "":
                kind = "losses" if name in LOSS_NAMES else "charts"
                writer.add_scalar(f"{kind}/{name}", rows[-1][name], rows[-1]["step"])
        write_whole(path / "metrics.csv", lambda path, rows=rows: write_metrics(path, rows))


def save(
    args: Args, folder: Path, agents: list[dict], generators: list, history: list[list[dict]], paper: tuple | None
) -> None:
    """The checkpoint of all seeds, from which a run goes on; then of each, for itself, and its curve."""
    states, kind = [generator.get_state() for generator in generators], generators[0].device.type
    whole = {"agents": agents, "generators": states, "history": history, "device": kind}
    write_whole(folder / "checkpoint.pt", lambda path: torch.save(whole, path))
    for k, path in enumerate(seed_folders(args, folder)):
        if args.num_seeds > 1:
            one = {name: whole[name][k : k + 1] for name in ("agents", "generators", "history")} | {"device": kind}
            write_whole(path / "checkpoint.pt", lambda path, one=one: torch.save(one, path))
        one_args = replace(args, seed=args.seed + k)
        write_whole(path / "curve.png", lambda path, k=k, a=one_args: write_curve(path, history[k], a, paper))


def summarize(
    args: Args, folder: Path, history: list[list[dict]], device: torch.device, paper: tuple | None
) -> dict:
    """Writes each seed's summary.json and, of several, the mean and spread; returns the run's."""
    common = {
        "env_id": args.env_id,
        "num_updates": history[0][-1]["step"],
        "paper": paper,
        "updates_per_second": history[0][-1]["step"] / history[0][-1]["seconds"],
        "seconds": history[0][-1]["seconds"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": versions(),
    }
    summaries = []
    for k, (path, rows) in enumerate(zip(seed_folders(args, folder), history, strict=True)):
        summaries.append(common | {"seed": args.seed + k, **select(rows, args), "folder": str(path)})
        write_whole(path / "summary.json", lambda path, k=k: path.write_text(json.dumps(summaries[k], indent=2) + "\n"))
    if args.num_seeds == 1:
        return summaries[0]
    summary = common | {"seed": args.seed, "num_seeds": args.num_seeds, "folder": str(folder)}
    for name in ("last", "best", "offline"):
        scores = [one[name]["score"] for one in summaries]
        summary[name] = {"score": float(np.mean(scores)), "std": float(np.std(scores)), "scores": scores}
    write_whole(folder / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))
    return summary


def reason(error: Exception) -> str:
    """Its message's first line, or its kind where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]
