"""The folder of a run: what is written, how it is read back, which evaluations are reported, how a run stops.

    runs/ENV__dql__SEED__TIME/    args.json, checkpoint.pt, summary.json and, with one seed, metrics.csv, curve.png and
                                  TensorBoard events; with several seeds, a folder seed-K for each with all of these

Every file but TensorBoard's events is written beside and renamed: no reader and no crash ever finds one half written.
What a run does next depends on its arguments, its data and its checkpoint alone: killed at any moment and resumed, it
ends with the same bits.
"""

from __future__ import annotations

import csv
import functools
import gc
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from command_line import FREE, may_grow
from d4rl_tasks import BadInput, reason

if TYPE_CHECKING:
    from dql import Args, DiffusionQL

Plain = str | int | float | None
NETWORKS = ("policy", "policy_ema", "critic", "critic_target")  # of a DiffusionQL
# in the order of dql.Losses
LOSS_NAMES = ("critic_loss", "bc_loss", "q_loss", "policy_loss", "target_q", "critic_grad_norm", "policy_grad_norm")
METRICS = ("step", *LOSS_NAMES, "score", "score_std", "updates_per_second", "seconds")


class Stopped(Exception):
    """SIGTERM or SIGINT arrived; the message says where the run stands."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.signum, self.exit_code = signum, 128 + signum


class Diverged(Exception):
    """A loss or a parameter is no longer a finite number; the message says which, when, and what is left."""

    exit_code = 3


@dataclass
class Progress:
    """How far a run has come."""

    step: int  # updates made
    sums: Tensor  # (K, 7), the losses since the last row of metrics.csv, added up
    seconds: float  # spent on updates since that row
    history: list[list[dict]]  # the rows of metrics.csv, for each seed
    data: int  # checksum of the data set
    kept: int = 0  # update of the last checkpoint

    @classmethod
    def begin(cls, num_seeds: int, device: torch.device, data: dict[str, np.ndarray]) -> Progress:
        sums, history = torch.zeros(num_seeds, len(LOSS_NAMES), device=device), [[] for _ in range(num_seeds)]
        checksum = 0
        for name in sorted(data):
            checksum = zlib.crc32(np.ascontiguousarray(data[name]), checksum)
        return cls(0, sums, 0.0, history, checksum)

    def advance(self, updates: Callable[[int], Tensor], stop: int, chunk: int) -> int:
        """Makes updates up to the next multiple of chunk, or stop; so a resumed run sums losses in the same groups.

        updates(n) makes n of them and returns their summed losses. Returns how many were made.
        """
        begun = time.perf_counter()
        n = min(chunk - self.step % chunk, stop - self.step)
        self.sums = self.sums + updates(n)
        self.step += n
        self.seconds += time.perf_counter() - begun
        return n

    def last_row(self) -> int:
        """The update of the last row."""
        return self.history[0][-1]["step"] if self.history[0] else 0

    def next_row(self, args: Args) -> int:
        """The update of the next row: the next log or evaluation, whichever comes first, or the last update."""
        return min(args.num_updates, *((self.last_row() // n + 1) * n for n in (args.log_every, args.eval_every)))

    def wait(self) -> None:
        """Waits until the device has made the updates, and counts that time."""
        begun = time.perf_counter()
        self.sums.sum().item()
        self.seconds += time.perf_counter() - begun

    def end_row(self) -> list[dict]:
        """For each seed the row that ends now, still without a score."""
        count = self.step - self.last_row()
        before = self.history[0][-1]["seconds"] if self.history[0] else 0.0
        rest = {"score": "", "score_std": "", "updates_per_second": count / self.seconds,
                "seconds": before + self.seconds}  # fmt: skip
        means = (self.sums / count).tolist()
        return [{"step": self.step, **dict(zip(LOSS_NAMES, mean, strict=True)), **rest} for mean in means]

    def add_row(self, rows: list[dict]) -> None:
        """Appends each seed's row to its history and begins the next."""
        for of_seed, row in zip(self.history, rows, strict=True):
            of_seed.append(row)
        self.sums, self.seconds = torch.zeros_like(self.sums), 0.0


# ----------------------------------------------------------------------------- starting and resuming


def start_folder(args: Args) -> Path:
    """Makes the run's folder and writes args.json. Raises BadInput if that fails."""
    last = f"-{args.seed + args.num_seeds - 1}" if args.num_seeds > 1 else ""
    name = f"{args.env_id}__dql__{args.seed}{last}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder, again = args.runs_dir / name, 0
    try:
        args.runs_dir.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                folder.mkdir()
                break
            except FileExistsError:
                again += 1
                folder = args.runs_dir / f"{name}-{again}"
        try:
            for k, path in enumerate(seed_folders(args, folder) if args.num_seeds > 1 else []):
                path.mkdir()
                write_args(path, replace(args, seed=args.seed + k, num_seeds=1))
            write_args(folder, args)  # last, for it makes the folder one that can be resumed
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except (OSError, BadInput) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"cannot write the run's folder {folder}: {why}; choose a --runs-dir") from None
    return folder


def as_json(args: Args) -> dict:
    """args as args.json holds them."""
    return json.loads(json.dumps(asdict(args), default=str))


def write_args(folder: Path, args: Args) -> None:
    write_whole(folder / "args.json", lambda path: path.write_text(json.dumps(as_json(args), indent=2)))


def saved_args(folder: Path) -> dict:
    """What args.json of the run in a folder holds."""
    if not (folder / "args.json").is_file():  # a pipe would be waited for
        raise OSError("it has no file args.json" if folder.exists() else "it does not exist")
    return json.loads((folder / "args.json").read_text())


def note_length(args: Args) -> None:
    """Writes a resumed run's number of updates into the folders of its seeds, and then into its own."""
    for folder in (*seed_folders(args, args.resume), args.resume):
        saved = saved_args(folder) | {"num_updates": args.num_updates}
        write_whole(folder / "args.json", lambda path, saved=saved: path.write_text(json.dumps(saved, indent=2)))


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Locks a run's folder until the block or the process ends, in whatever way. Raises BadInput if it is locked."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BadInput(f"another process is writing {folder}: wait for it, or stop it") from None
    except OSError as error:
        raise BadInput(f"cannot write in {folder}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def finished(folder: Path, num_updates: int) -> dict | None:
    """The summary of a run that has made all its updates; None for any other."""
    path = folder / "summary.json"
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        if path.is_file():  # a pipe would be waited for
            summary = json.loads(path.read_text())
            report(summary)  # raises where it is none
            return summary if summary["num_updates"] == num_updates else None
    return None


def read_checkpoint(folder: Path, device: torch.device) -> dict:
    """A run's last checkpoint, as `save` wrote it. Raises BadInput."""
    path = folder / "checkpoint.pt"
    kinds = {"agents": list, "generators": list, "progress": dict, "args": dict, "versions": dict, "device": str}
    try:
        check_zip(path)
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        if not all(isinstance(checkpoint[name], kind) for name, kind in kinds.items()):
            raise TypeError("its parts are not those of a checkpoint")
        if not all(isinstance(x, Plain) for name in ("args", "versions") for x in checkpoint[name].values()):
            raise TypeError("its arguments and versions are not words and numbers")
        return {name: checkpoint[name] for name in kinds}
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        raise BadInput(f"{path} cannot be read as a checkpoint: {reason(error)}") from None


def check_zip(path: Path) -> None:
    """Raises if torch.load would wait for a pipe, unpack more than the file holds, or accept damaged bytes."""
    if not path.is_file():
        raise OSError("there is no such file")
    with zipfile.ZipFile(path) as file:
        if sum(record.file_size for record in file.infolist()) > path.stat().st_size:
            raise ValueError("it claims more than it holds")
        if damaged := file.testzip():
            raise ValueError(f"{damaged} is damaged")


def check_same_run(checkpoint: dict, folder: Path, args: Args, device: torch.device) -> None:
    """Raises BadInput if arguments or kind of device differ from the checkpoint's; warns if versions or path do."""
    if checkpoint["device"] != device.type:
        raise BadInput(f"{folder} ran on {checkpoint['device']}, and resumes exactly only there: see --device")
    then, now = checkpoint["args"], as_json(args)
    differ = [name for name in now if name not in FREE and then.get(name, now[name]) != now[name]]
    if may_grow(then.get("num_updates"), args.num_updates, args.lr_decay):
        differ.remove("num_updates")
    if differ:
        raise BadInput(f"{folder / 'checkpoint.pt'} is not of the run of its args.json: {', '.join(differ)} differ")
    path = {name: now[name] for name in ("compile", "cudagraphs")}
    for name, value in (versions(device) | path).items():
        before = (checkpoint["versions"] | then).get(name)
        if before != value:
            print(f"warning: {name} was {before} and is {value}: results may differ in rounding", file=sys.stderr)


def restore(args: Args, agents: list[DiffusionQL], generators: list, begun: Progress) -> Progress:
    """Restores agents and generators from the checkpoint of the run args.resume; returns its progress.

    begun is this process's fresh Progress. Raises BadInput if the checkpoint is damaged, or of another run or data.
    """
    folder, device = args.resume, begun.sums.device
    checkpoint = read_checkpoint(folder, device)
    check_same_run(checkpoint, folder, args, device)
    restore_agents(checkpoint, folder, agents)
    with must_fit(folder):
        for generator, numbers in zip(generators, checkpoint["generators"], strict=True):
            generator.set_state(numbers.cpu())
        now = Progress(**checkpoint["progress"])
        fill(begun.sums, now.sums)
        now.sums = begun.sums
        check_history(now.history, args)
        if any(type(count) is not int for count in (now.step, now.data, now.kept)) or not is_number(now.seconds):
            raise TypeError("its counts are not numbers")
        if now.step < now.last_row() or any(agent.step != now.step for agent in agents):
            raise ValueError("its step is not that of its history")
    if now.data != begun.data:
        raise BadInput(f"the data are no longer those that {folder} began with: bring those back, or begin a new run")
    return now


def restore_agents(checkpoint: dict, folder: Path, agents: list[DiffusionQL]) -> None:
    """Restores agents from a checkpoint. Raises BadInput."""
    with must_fit(folder):
        for agent, state in zip(agents, checkpoint["agents"], strict=True):
            agent.load_state_dict(state)
            for name, part in agent.state_dict().items():
                if not all_finite(part):
                    raise ValueError(f"{name} is not finite")


@torch.no_grad()
def fill(own: Tensor | dict | list, saved: Tensor | dict | list) -> None:
    """Copies a saved state into the tensors of own, and takes nothing else from it. Raises if it does not fit.

    copy_ alone would broadcast, drop imaginary parts and truncate fractions to integers.
    """
    if isinstance(own, Tensor):
        if saved.shape != own.shape or saved.is_floating_point() != own.is_floating_point() or saved.is_complex():
            raise ValueError(f"{saved.dtype} {tuple(saved.shape)} is not {own.dtype} {tuple(own.shape)}")
        own.copy_(saved)
        return
    here, there = parts(own), parts(saved)
    if differ := here.keys() ^ there.keys():
        raise ValueError(f"it has not, or has too much, {', '.join(map(str, differ))}")
    for key, part in here.items():
        fill(part, there[key])


def parts(state: dict | list) -> dict:
    """The tensors, dicts and lists in a state: all but settings, which may differ between versions of torch."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    return {key: part for key, part in items if isinstance(part, (Tensor, dict, list))}


def all_finite(state: Tensor | dict | list) -> bool:
    """Whether all tensors in a state are finite."""
    return bool(state.isfinite().all()) if isinstance(state, Tensor) else all(map(all_finite, parts(state).values()))


@contextmanager
def must_fit(folder: Path) -> Iterator[None]:
    """Turns any exception of the block into BadInput."""
    try:
        yield
    except Exception as error:  # torch raises nearly anything on what does not fit
        raise BadInput(f"{folder / 'checkpoint.pt'} is not of the run of its args.json: {reason(error)}") from None


def check_history(history: list[list[dict]], args: Args) -> None:
    """Raises unless history holds, for each seed, rows of metrics.csv at the same rising steps."""
    if not len(history) == args.num_seeds or any(len(of_seed) != len(history[0]) for of_seed in history):
        raise ValueError("its history is not of its seeds")
    for rows in zip(*history, strict=True):
        for row in rows:
            scores = [row["score"], row["score_std"]]
            numbers = [value for name, value in row.items() if name not in ("score", "score_std")]
            unscored = scores == ["", ""] and row["step"] < args.num_updates
            if row.keys() != {*METRICS} or not all(map(is_number, numbers if unscored else numbers + scores)):
                raise ValueError("its history is not that of a run")
    steps = [[row["step"] for row in of_seed] for of_seed in history]
    rising = all(a < b for a, b in pairwise([0, *steps[0]]))
    if not rising or any(of_seed != steps[0] or any(type(step) is not int for step in of_seed) for of_seed in steps):
        raise ValueError("its history is not that of a run")


def is_number(value: object) -> bool:
    """Whether value is a finite number."""
    return type(value) in (int, float) and abs(value) < 1e300


# ----------------------------------------------------------------------------- stopping


@contextmanager
def held_signals() -> Iterator[Callable[[], None]]:
    """Holds back SIGTERM and SIGINT; yields a function that raises Stopped once one has arrived.

    A second signal has its usual effect. Only the main thread gets signals: in another nothing is held back.
    """
    came: list[int] = []

    def note(signum: int, _) -> None:
        came.append(signum)
        release()

    def release() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def check() -> None:
        if came:
            raise Stopped(came[0])

    before = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(signum)
            if handler not in (signal.SIG_IGN, None):  # ignored, as SIGINT is for background jobs; or not Python's
                before[signum] = handler
                signal.signal(signum, note)
    try:
        yield check
    finally:
        release()


def finite_parameters(parameters: dict[str, Tensor]) -> Tensor:
    """Whether all parameters are finite, (): a device tensor, which is not waited for."""
    return torch.stack([p.isfinite().all() for p in parameters.values()]).all()


def check_health(folder: Path, args: Args, states: list[dict], now: Progress) -> None:
    """Raises Diverged if the summed losses or any seed's parameters are not finite. Waits for the device."""
    now.wait()
    fine = dict(zip(LOSS_NAMES, now.sums.isfinite().T, strict=True))
    for name in NETWORKS:
        fine[f"{name}'s parameters"] = torch.stack([finite_parameters(state[name]) for state in states])
    table = torch.stack(list(fine.values())).cpu()
    if not table.all():
        bad = ", ".join(name for name, of_seeds in zip(fine, table, strict=True) if not of_seeds.all())
        seeds = ", ".join(str(args.seed + k) for k, of_all in enumerate(table.T) if not of_all.all())
        left = f"{folder / 'checkpoint.pt'} is of update {now.kept:,}" if now.kept else "there is no checkpoint yet"
        raise Diverged(f"{bad} not finite in updates {now.last_row() + 1:,} to {now.step:,}, seed {seeds}; {left}. "
                       "Try a smaller --learning-rate, --eta or --grad-norm")  # fmt: skip


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


# ----------------------------------------------------------------------------- what is written


def select(rows: list[dict], args: Args) -> dict[str, dict]:
    """The last evaluation, the best ("online selection"), and the one with the (rank + 1)-th lowest denoising loss, a
    mean since the evaluation before ("offline selection", which needs no environment)."""
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
    """Calls write with a path beside, then renames it: no reader and no crash ever finds the file half written.

    Raises BadInput if that fails, on a full disk say; the old file is then as it was.
    """
    beside = path.with_name(f".part-{path.name}")
    try:
        write(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}; what was there before is whole") from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


@contextmanager
def files_beside(folder: Path) -> Iterator[Path]:
    """Yields the path of a folder to make and fill; at the end its files are moved into the folder given.

    Raises BadInput if that fails.
    """
    beside = folder / ".part-files"
    try:
        shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
        yield beside
        for path in beside.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            path.replace(folder / path.name)
    except OSError as error:
        raise BadInput(f"cannot write in {beside}: {error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_torch(path: Path, contents: dict) -> None:
    """torch.save by way of memory: straight to a file, it would not say why it failed."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    write_whole(path, lambda beside: beside.write_bytes(buffer.getbuffer()))


def write_metrics(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, METRICS)
        writer.writeheader()
        writer.writerows(rows)


def write_curve(path: Path, rows: list[dict], args: Args, paper: tuple[float, float] | None) -> None:
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
    left.set(xlabel="updates", ylabel="normalized score", title=f"{args.env_id}, seed {args.seed}")
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
    figure.savefig(path)
    del figure, left, right
    gc.collect()  # a figure is part of reference cycles: its megabytes would wait for the collector


@functools.cache
def cpuinfo() -> str:
    """What the system says of the processor."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else platform.processor()


def processor_vendor() -> str:
    """The processor's vendor: "AMD", "Intel" or "other"."""
    return "AMD" if "AuthenticAMD" in cpuinfo() else "Intel" if "GenuineIntel" in cpuinfo() else "other"


def instructions() -> str:
    """The processor's vendor and vector instructions, such as "AMD AVX512"; compiling.py chooses products by them.

    Zen 4, the one family of AMD's with AVX-512 before Zen 5 (26), executes it in halves: "AMD AVX512 in halves".
    """
    found = f"{processor_vendor()} {torch.backends.cpu.get_cpu_capability()}"
    family = re.search(r"family\s*:?\s*(\d+)", cpuinfo(), re.IGNORECASE)
    in_halves = found == "AMD AVX512" and family and int(family[1]) < 26
    return found + " in halves" * bool(in_halves)


@functools.cache
def versions(device: torch.device) -> dict[str, str | int]:
    """What a score depends on besides arguments and data: versions, threads, instructions and, on a GPU, which one."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads()}
    found["instructions"] = instructions()
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    found["torch"] = str(torch.__version__)  # with its build, which the metadata of PyPI's wheels leave out
    for package in ("numpy", "gymnasium", "gymnasium-robotics", "mujoco", "gym", "d4rl", "free-mujoco-py"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def seed_folders(args: Args, folder: Path) -> list[Path]:
    """The folder of each seed: the run's own, or with several seeds a folder within for each."""
    if args.num_seeds == 1:
        return [folder]
    return [folder / f"seed-{seed}" for seed in range(args.seed, args.seed + args.num_seeds)]


@contextmanager
def open_logs(args: Args, folder: Path, step: int) -> Iterator[list]:
    """Yields a TensorBoard writer for each seed; what an interrupted run logged after step is hidden.

    With --track it also starts Weights & Biases. Raises BadInput.
    """
    from torch.utils.tensorboard import SummaryWriter

    if args.track:
        import wandb

        try:
            wandb.init(project="dql", name=folder.name, config=asdict(args), sync_tensorboard=True)
        except Exception as error:  # it has errors of its own for each way not to be logged in
            raise BadInput(f"--track: {reason(error)}") from None
    try:
        writers = [SummaryWriter(path, purge_step=step + 1) for path in seed_folders(args, folder)]
    except OSError as error:
        raise BadInput(f"cannot write TensorBoard's events in {folder}: {error.strerror}") from None
    try:
        yield writers
    finally:
        for writer in writers:
            with suppress(OSError):  # of a full disk, which has been told
                writer.close()


def log(args: Args, folder: Path, history: list[list[dict]], writers: list, paper: tuple | None) -> None:
    """Writes each seed's newest row to TensorBoard and metrics.csv and, after an evaluation, curve.png."""
    for k, (path, rows, writer) in enumerate(zip(seed_folders(args, folder), history, writers, strict=True)):
        for name in METRICS[1:]:
            if rows[-1][name] != "":
                kind = "losses" if name in LOSS_NAMES else "charts"
                try:
                    writer.add_scalar(f"{kind}/{name}", rows[-1][name], rows[-1]["step"])
                except OSError as error:
                    raise BadInput(f"cannot write TensorBoard's events in {path}: {error.strerror}") from None
        write_whole(path / "metrics.csv", lambda path, rows=rows: write_metrics(path, rows))
        if rows[-1]["score"] != "":
            own = replace(args, seed=args.seed + k)
            write_whole(path / "curve.png", lambda path, rows=rows, own=own: write_curve(path, rows, own, paper))


def save(args: Args, folder: Path, states: list[dict], generators: list, now: Progress) -> None:
    """Writes a checkpoint of each seed, usable by itself, and then that of all, from which the run is resumed.

    states are those of the seeds' agents. Raises Diverged before anything is written, and BadInput if writing fails.
    """
    check_health(folder, args, states, now)
    now.kept = now.step
    numbers = [generator.get_state() for generator in generators]
    device = generators[0].device
    common = {"versions": versions(device), "device": device.type}
    whole = {"agents": states, "generators": numbers, "progress": vars(now), "args": as_json(args)}
    for k, path in enumerate(seed_folders(args, folder) if args.num_seeds > 1 else []):
        progress = vars(now) | {"sums": now.sums[k : k + 1].clone(), "history": now.history[k : k + 1]}
        own = as_json(replace(args, seed=args.seed + k, num_seeds=1))
        one = {"agents": states[k : k + 1], "generators": numbers[k : k + 1], "progress": progress, "args": own}
        write_torch(path / "checkpoint.pt", one | common)
    write_torch(folder / "checkpoint.pt", whole | common)


def summarize(args: Args, folder: Path, history: list[list[dict]], device: torch.device, paper: tuple | None) -> dict:
    """Writes each seed's summary.json and, with several seeds, that of all, with mean and spread; returns the run's."""
    common = {
        "env_id": args.env_id,
        "num_updates": history[0][-1]["step"],
        "paper": paper,
        "updates_per_second": history[0][-1]["step"] / history[0][-1]["seconds"],
        "seconds": history[0][-1]["seconds"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": versions(device),
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


def report(summary: dict) -> str:
    """The text that ends a run: a summary's scores and the run's folder."""
    seeds = summary.get("num_seeds", 1)
    last = f"-{summary['seed'] + seeds - 1}" * (seeds > 1)
    lines = [f"{summary['env_id']}, seed {summary['seed']}{last}, {summary['num_updates']} updates, normalized score:"]
    for name in ("last", "best", "offline"):
        it = summary[name]
        of = f"{seeds} seeds"
        if seeds == 1:
            of = f"{it['episodes']} episode{'s' * (it['episodes'] > 1)}, update {it['step']}"
        lines.append(f"  {name:8} {it['score']:6.1f} ± {it['std']:.1f} ({of})")
    if summary["paper"]:
        mean, std = summary["paper"]
        lines.append(f"  {'paper':8} {mean:6.1f} ± {std:.1f} (5 seeds)")
    return "\n".join([*lines, summary["folder"]])
