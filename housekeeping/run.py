"""A run while it trains: where it stands, and what it writes into its folder."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from d4rl_tasks import BadInput, reason
from housekeeping import checkpoint, report
from housekeeping.ending import Diverged, Stopped, held_signals
from housekeeping.folder import only_writer, seed_folders, start_folder, write_args

if TYPE_CHECKING:
    from dql import Args, DiffusionQL

GROUP = 10  # captured updates are made in groups of so many: between two groups the program looks for signals


class Run:
    """A run's folder and progress: `locked` around everything, `training` around the loop.

    losses names the columns of the losses that updates return; paper is the score to compare with, if there is one.
    """

    def __init__(self, args: Args, device: torch.device, data: dict[str, np.ndarray], losses: Sequence[str],
                 paper: tuple[float, float] | None):  # fmt: skip
        self.args, self.device, self.losses, self.paper = args, device, losses, paper
        sums, history = torch.zeros(args.num_seeds, len(losses), device=device), [[] for _ in range(args.num_seeds)]
        self.progress = checkpoint.Progress(0, sums, 0.0, history, checkpoint.checksum(data))
        self.folder = args.resume or start_folder(args)
        self.seed_folders = seed_folders(args, self.folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process writes the folder. If the block fails before the first update, a new folder is removed."""
        with only_writer(self.folder):
            try:
                if self.args.resume:
                    write_args(self.args, self.folder)  # the number of updates, the device, ... may have changed
                yield
            except BaseException:
                if not self.args.resume and self.step == 0:
                    shutil.rmtree(self.folder, ignore_errors=True)
                raise

    def restore(self, agents: list[DiffusionQL], generators: list[torch.Generator]) -> None:
        """Restores a resumed run, agents and generators from its checkpoint. Raises BadInput."""
        if self.args.resume and (self.folder / "checkpoint.pt").exists():
            self.progress = checkpoint.restore(self.args, agents, generators, self.progress)

    @contextmanager
    def training(self, save: Callable[[], None]) -> Iterator[None]:
        """Opens logs and holds signals back; if one arrives, save() is called before Stopped ends the block."""
        from tqdm import tqdm

        self.curves = report.curves_work(self.folder, self.args)
        self.bar = tqdm(total=self.args.num_updates, initial=self.step, mininterval=0.5 if sys.stderr.isatty() else 60)
        with self.bar, self.open_writers() as self.writers, held_signals() as self.check_signals:
            try:
                yield
            except Stopped as stopped:
                save()
                where = f"stopped at update {self.step:,} of {self.args.num_updates:,}"
                raise Stopped(stopped.signum, f"{where}; to go on: --resume {self.folder}") from None

    # --- where it stands

    @property
    def step(self) -> int:
        """How many updates have been made."""
        return self.progress.step

    @property
    def last_row(self) -> int:
        """The update at which the last row of metrics.csv ends."""
        history = self.progress.history[0]
        return history[-1]["step"] if history else 0

    @property
    def next_row(self) -> int:
        """The update of the next row: the next log or evaluation, whichever comes first, or the last update."""
        rows = (following(self.last_row, every) for every in (self.args.log_every, self.args.eval_every))
        return min(self.args.num_updates, *rows)

    def advance(self, updates: Callable[[int], Tensor]) -> None:
        """Makes updates up to the next row, checkpoint or group; none if a signal came before the row was written.

        updates(n) makes n and returns their summed losses (K, L).
        """
        group = GROUP if self.args.cudagraphs else 1
        stop = min(self.next_row, following(self.step, self.args.checkpoint_every), following(self.step, group))
        if n := stop - self.step:
            begun = time.perf_counter()
            self.progress.sums = self.progress.sums + updates(n)
            self.progress.step = stop
            self.progress.seconds += time.perf_counter() - begun
            self.bar.update(n)

    def while_evaluating(self, ended: int) -> None:
        """Called after each time step of an evaluation, with the number of episodes that have ended. Raises Stopped."""
        self.check_signals()
        if time.time() - self.bar.last_print_t > self.bar.mininterval:
            self.bar.set_postfix_str(f"evaluating: {ended} of {self.args.num_seeds * self.args.eval_episodes} episodes")

    # --- what it writes

    def end_row(self) -> list[dict]:
        """For each seed the row of metrics.csv that ends now, still without a score. Raises Diverged."""
        begun, progress = time.perf_counter(), self.progress
        self.check_finite([])  # waits for the device
        progress.seconds += time.perf_counter() - begun
        count = self.step - self.last_row
        before = progress.history[0][-1]["seconds"] if progress.history[0] else 0.0
        rest = {"score": "", "score_std": "", "updates_per_second": count / progress.seconds,
                "seconds": before + progress.seconds}  # fmt: skip
        means = (progress.sums / count).tolist()
        return [{"step": self.step, **dict(zip(self.losses, mean, strict=True)), **rest} for mean in means]

    def add_scores(self, rows: list[dict], scores: np.ndarray) -> None:
        """Adds each seed's scores, (K, E) of E episodes, to its row."""
        for row, of_seed in zip(rows, scores, strict=True):
            row |= {"score": float(of_seed.mean()), "score_std": float(of_seed.std())}
        self.bar.set_postfix_str(f"score {scores.mean():.1f}")

    def log(self, rows: list[dict]) -> None:
        """Writes each seed's row to TensorBoard, metrics.csv and, with a score, curve.png; begins the next."""
        progress = self.progress
        for of_seed, row, writer in zip(progress.history, rows, self.writers, strict=True):
            of_seed.append(row)
            values = {name: value for name, value in row.items() if name != "step" and value != ""}
            for name, value in values.items():
                kind = "losses" if name in self.losses else "charts"
                with writing_events(self.folder):
                    writer.add_scalar(f"{kind}/{name}", value, row["step"])
        progress.sums, progress.seconds = torch.zeros_like(progress.sums), 0.0
        report.write_rows(self.args, self.folder, progress.history, self.paper, self.curves)

    def save(self, states: list[dict], generators: list[torch.Generator]) -> None:
        """Writes a checkpoint. Raises Diverged before anything is written, and BadInput if writing fails."""
        self.check_finite(states)
        checkpoint.save(self.args, self.folder, states, generators, self.progress)

    def check_finite(self, states: list[dict]) -> None:
        """Raises Diverged if summed losses, or parameters in the states of the seeds' agents, are not finite."""
        fine = dict(zip(self.losses, self.progress.sums.isfinite().T, strict=True))
        for name in states[0] if states else ():
            fine[f"{name}'s parameters"] = torch.stack([all_finite(state[name]) for state in states])
        table = torch.stack(list(fine.values())).cpu()
        if not table.all():
            bad = ", ".join(name for name, of_seeds in zip(fine, table, strict=True) if not of_seeds.all())
            seeds = ", ".join(str(self.args.seed + k) for k, of_all in enumerate(table.T) if not of_all.all())
            kept = self.progress.kept
            left = f"{self.folder / 'checkpoint.pt'} is of update {kept:,}" if kept else "there is no checkpoint yet"
            raise Diverged(f"{bad} not finite in updates {self.last_row + 1:,} to {self.step:,}, seed {seeds}; {left}. "
                           "Try a smaller --learning-rate, --eta or --grad-norm")  # fmt: skip

    def summarize(self) -> dict:
        """Writes summary.json, of each seed and of all; returns the run's."""
        return report.summarize(self.args, self.folder, self.progress.history, self.device, self.paper)

    @contextmanager
    def open_writers(self) -> Iterator[list]:
        """Yields a TensorBoard writer for each seed; what an interrupted run logged after this step is hidden.

        With --track it also starts Weights & Biases. Raises BadInput.
        """
        from torch.utils.tensorboard import SummaryWriter

        if self.args.track:
            import wandb

            try:
                wandb.init(project="dql", name=self.folder.name, config=asdict(self.args), sync_tensorboard=True)
            except Exception as error:  # it has errors of its own for each way not to be logged in
                raise BadInput(f"--track: {reason(error)}") from None
        with writing_events(self.folder):
            writers = [SummaryWriter(path, purge_step=self.step + 1) for path in self.seed_folders]
        try:
            yield writers
        finally:
            for writer in writers:
                with suppress(OSError):  # of a full disk, which has been told
                    writer.close()


@contextmanager
def writing_events(folder: Path) -> Iterator[None]:
    """Raises BadInput if TensorBoard cannot write, on a full disk say."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"cannot write TensorBoard's events in {folder}: {error.strerror or error}") from None


def following(step: int, every: int) -> int:
    """The next multiple of every after step."""
    return (step // every + 1) * every


def all_finite(state: dict | list | Tensor) -> Tensor:
    """Whether all tensors in a nested state are finite, (): a device tensor, which is not waited for."""
    leaves = torch.utils._pytree.tree_leaves(state)
    return torch.stack([x.isfinite().all() for x in leaves if isinstance(x, Tensor)]).all()
