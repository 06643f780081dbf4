"""A run while it trains: where it stands, and what it writes into its folder."""

import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d4rl_tasks import BadInput, reason, score_name, score_range
from housekeeping import curves, report
from housekeeping.arguments import Args, as_json
from housekeeping.checkpoint import all_finite, keep_policy, load, read_checkpoint, remove_policies
from housekeeping.ending import Diverged, Stopped, held_signals
from housekeeping.folder import only_writer, seed_runs, start_folder, write_args, write_json, write_torch, write_whole
from housekeeping.machine import commit, versions

GROUP = 10  # captured updates are made in groups of so many: between two groups the program looks for signals


class Run:
    """A run's folder and progress: `locked` around everything, `training` around the loop.

    losses names the columns of the losses that updates return; paper is the score to compare with, if there is one;
    q_range is the range of Q that rewards allow.
    """

    def __init__(self, args: Args, device: torch.device, data: dict[str, np.ndarray], losses: Sequence[str],
                 paper: tuple[float, float] | None, q_range: tuple[float, float]):  # fmt: skip
        self.args, self.device, self.losses, self.paper, self.q_range = args, device, losses, paper, q_range
        self.score_name, self.warned = score_name(args.env_id, args.score_range), set()
        self.commit = commit()  # now: the working tree may change while the run trains
        self.step = self.kept = 0  # updates made, and those that the last checkpoint holds
        self.sums = torch.zeros(args.num_seeds, len(losses), device=device)  # of losses since the last row
        self.seconds = 0.0  # spent on updates since the last row
        self.history = [[] for _ in range(args.num_seeds)]  # the rows of each seed's metrics.csv
        self.data = 0  # a checksum
        for name in sorted(data):
            self.data = zlib.crc32(np.ascontiguousarray(data[name]), self.data)
        self.bounds = torch.as_tensor(data["action_bounds"]) if "action_bounds" in data else None
        self.folder = args.resume or start_folder(args)
        self.seeds = seed_runs(args, self.folder)  # each seed's folder and arguments

    def use(self, args: Args) -> None:
        """Goes on with other arguments, and notes them in args.json."""
        self.args, self.seeds = args, seed_runs(args, self.folder)
        write_args(args, self.folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process writes the folder. If the block fails before the first update, a new folder is removed."""
        try:
            with only_writer(self.folder):
                if not self.args.resume:
                    write_args(self.args, self.folder)
                yield
        except BaseException:
            if not self.args.resume and self.step == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    @contextmanager
    def training(self, save: Callable[[], None]) -> Iterator[None]:
        """Opens logs and holds signals back; if one arrives, save() is called before Stopped ends the block."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams
        from tqdm import tqdm

        if self.args.track:
            self.track()
        self.curves, self.writers, self.told, self.scored = curves.curves_work(), [], time.time(), ""
        self.bar = tqdm(total=self.args.num_updates, initial=self.step, mininterval=0.5,
                        disable=not sys.stderr.isatty())  # a file gets a line for each row instead
        try:
            if self.args.resume:  # files may have been lost, and arguments changed
                write_args(self.args, self.folder)
                save()
                self.write_rows()
            # events of an interrupted run after its last checkpoint are hidden: they come again
            self.writers = [SummaryWriter(path, purge_step=self.step + 1) for path, _ in self.seeds]
            for writer, (_, args) in zip(self.writers, self.seeds, strict=True):
                values = {name: v if isinstance(v, (int, float, str)) else str(v) for name, v in vars(args).items()}
                experiment, begin, _ = hparams(values, {"charts/score": 0})  # its value is the last of that curve
                writer.file_writer.add_summary(experiment)
                writer.file_writer.add_summary(begin)
            with self.bar, held_signals() as self.check_signals:
                try:
                    yield
                except Stopped as stopped:
                    save()
                    where = f"stopped at update {self.step:,} of {self.args.num_updates:,}"
                    raise Stopped(stopped.signum, f"{where}; to go on: python dql.py --resume {self.folder}") from None
        except OSError as error:  # of TensorBoard, on a full disk say
            raise BadInput(f"cannot write in {self.folder}: {error.strerror or error}") from None
        finally:
            for writer in self.writers:
                with suppress(OSError):  # of a full disk, which has been told
                    writer.close()

    def track(self) -> None:
        """Copies TensorBoard's events to Weights & Biases, to the same run there once resumed. Raises BadInput."""
        import wandb

        file = self.folder / "wandb-id.txt"
        again = {"id": file.read_text(), "resume": "allow"} if file.exists() else {}
        try:
            run = wandb.init(project=os.environ.get("WANDB_PROJECT", "dql"), name=self.folder.name, dir=self.folder,
                             config=asdict(self.args), sync_tensorboard=True, **again)  # fmt: skip
            write_whole(file, lambda beside: beside.write_text(run.id))
        except Exception as error:  # it has errors of its own for each way not to be logged in
            raise BadInput(f"--track: {reason(error)}") from None

    # --- where it stands

    @property
    def last_row(self) -> int:
        """The update at which the last row of metrics.csv ends."""
        return self.history[0][-1]["step"] if self.history[0] else 0

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
            self.sums, self.step = self.sums + updates(n), stop
            self.seconds += time.perf_counter() - begun
            self.bar.update(n)

    def while_evaluating(self, ended: int) -> None:
        """Called after each time step of an evaluation, with the number of episodes that have ended. Raises Stopped."""
        self.check_signals()
        self.time_steps += 1
        if time.time() - self.told > 0.5:
            self.told = time.time()
            self.bar.set_postfix_str(f"evaluating: time step {self.time_steps:,}, {ended} episodes have ended")

    # --- rows

    def end_row(self) -> list[dict]:
        """For each seed the row of metrics.csv that ends now, still without a score. Raises Diverged.

        Warns, once for each seed, if the mean target Q is out of its range by more than a twentieth.
        """
        begun = time.perf_counter()
        self.check_finite([])  # waits for the device
        self.seconds += time.perf_counter() - begun
        count, before = self.step - self.last_row, self.history[0][-1]["seconds"] if self.history[0] else 0.0
        times = {"updates_per_second": count / self.seconds, "seconds": before + self.seconds}
        rest = {"score": "", "score_std": "", **times}
        means, self.time_steps = (self.sums / count).tolist(), 0
        rows = [{"step": self.step, **dict(zip(self.losses, mean, strict=True)), **rest} for mean in means]
        low, high = self.q_range
        for seed, row in enumerate(rows, self.args.seed):
            if report.leaves_range(row["target_q"], self.q_range) and seed not in self.warned:
                self.warned.add(seed)
                print(f"warning: update {self.step:,}, seed {seed}: mean target Q is {row['target_q']:.4g}, "
                      f"rewards allow {low:.4g} to {high:.4g}", file=sys.stderr)  # fmt: skip
        return rows

    def add_scores(self, rows: list[dict], scores: np.ndarray) -> None:
        """Adds each seed's scores, (K, E) of E episodes, to its row."""
        for row, of_seed in zip(rows, scores, strict=True):
            row |= {"score": float(of_seed.mean()), "score_std": float(of_seed.std())}
        self.scored = f", {self.score_name} {scores.mean():.1f} (update {self.step:,})"

    def log(self, rows: list[dict]) -> None:
        """Writes each seed's row to TensorBoard, metrics.csv and, with a score, curve.png; begins the next."""
        for of_seed, row, writer in zip(self.history, rows, self.writers, strict=True):
            of_seed.append(row)
            for name, value in row.items():
                if name != "step" and value != "":
                    writer.add_scalar(f"{'losses' if name in self.losses else 'charts'}/{name}", value, row["step"])
        self.sums, self.seconds = torch.zeros_like(self.sums), 0.0
        self.write_rows()
        shown = [name for name in ("bc_loss", "critic_loss", "target_q") if any(row[name] for row in rows)]
        text = ", ".join(f"{name} {np.mean([row[name] for row in rows]):.4g}" for name in shown) + self.scored
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            rate = f"{rows[0]['updates_per_second']:.1f} updates/s"
            print(f"update {self.step:,} of {self.args.num_updates:,}: {text} ({rate})", file=sys.stderr)

    def write_rows(self) -> None:
        """Writes metrics.csv and, after an evaluation, curve.png, of each seed and, with several, of the run."""
        if not self.last_row:
            return
        for (folder, args), rows in zip(self.seeds, self.history, strict=True):
            write_whole(folder / "metrics.csv", partial(curves.write_metrics, rows=rows))
            self.write_curve(folder, f"{self.args.env_id}, seed {args.seed}", [rows])
        if (seeds := self.args.num_seeds) > 1:
            rows = [{"seed": args.seed, **row} for (_, args), rows in zip(self.seeds, self.history, strict=True)
                    for row in rows]  # fmt: skip
            write_whole(self.folder / "metrics.csv", partial(curves.write_metrics, rows=rows))
            self.write_curve(self.folder, f"{self.args.env_id}, mean and spread of {seeds} seeds", self.history)

    def write_curve(self, folder: Path, title: str, seeds: Sequence[list[dict]]) -> None:
        if self.curves and seeds[0][-1]["score"] != "":
            name = f"{self.args.eval_episodes} episodes" if len(seeds) == 1 else f"{len(seeds)} seeds"
            draw = partial(curves.write_curves, groups={name: seeds}, title=title, score_name=self.score_name,
                           paper=self.paper, q_range=self.q_range)  # fmt: skip
            write_whole(folder / "curve.png", draw)

    def summarize(self) -> dict:
        """Writes summary.json, of each seed and, with several, of all, with mean and spread; returns the run's."""
        last, gpu = self.history[0][-1], self.device.type == "cuda"
        common = {
            "env_id": self.args.env_id, "score_is": self.score_name,
            "score_range": score_range(self.args.env_id, self.args.score_range), "num_updates": last["step"],
            "paper": self.paper,
            "updates_per_second": last["step"] / last["seconds"], "seconds": last["seconds"],
            "device": torch.cuda.get_device_name(self.device) if gpu else "cpu", "versions": versions(self.device),
            "commit": self.commit,
        }  # fmt: skip
        summaries = []
        for (folder, args), rows in zip(self.seeds, self.history, strict=True):
            own = {"seed": args.seed, **report.select(rows, args), "folder": str(folder), "args": as_json(args)}
            summaries.append(common | own)
            write_json(folder / "summary.json", summaries[-1])
        if self.args.num_seeds == 1:
            return summaries[0]
        summary = common | {"seed": self.args.seed, "num_seeds": self.args.num_seeds, "folder": str(self.folder),
                            "args": as_json(self.args)}  # fmt: skip
        for name in report.SELECTIONS:
            scores = [one[name]["score"] for one in summaries]
            summary[name] = {"score": float(np.mean(scores)), "std": float(np.std(scores)), "scores": scores}
        write_json(self.folder / "summary.json", summary)
        return summary

    # --- checkpoints

    def save(self, states: list[dict], generators: list[torch.Generator]) -> None:
        """Writes a checkpoint of each seed, usable by itself, and then that of all, from which the run is resumed.

        Before them, if an evaluation has just been made, the networks it acted by, where `report.to_keep` asks for
        them; after them those no longer asked for go. So at any moment there are all those that a checkpoint may name.
        states are those of the seeds' agents. Raises Diverged before anything is written, and BadInput if writing
        fails; then the old checkpoints are as they were.
        """
        self.check_finite(states)
        to_keep = [report.to_keep(rows, args) for (_, args), rows in zip(self.seeds, self.history, strict=True)]
        for (folder, args), state, steps in zip(self.seeds, states, to_keep, strict=True):
            if self.step in steps:
                keep_policy(folder, args, self.step, state)
        self.kept, numbers = self.step, [generator.get_state() for generator in generators]

        def write(folder: Path, args: Args, seeds: slice) -> None:
            progress = {"step": self.step, "sums": self.sums[seeds].clone(), "seconds": self.seconds,
                        "history": self.history[seeds], "data": self.data, "kept": self.kept}  # fmt: skip
            write_torch(folder / "checkpoint.pt", {
                "agents": states[seeds], "generators": numbers[seeds], "progress": progress, "args": as_json(args),
                "versions": versions(self.device), "device": self.device.type, "action_bounds": self.bounds,
            })  # fmt: skip

        if self.args.num_seeds > 1:
            for k, (folder, args) in enumerate(self.seeds):
                write(folder, args, slice(k, k + 1))
        write(self.folder, self.args, slice(None))
        for (folder, _), steps in zip(self.seeds, to_keep, strict=True):
            remove_policies(folder, steps)

    def restore(self, agents: list, generators: list[torch.Generator]) -> None:
        """Restores a resumed run, agents and generators from its checkpoint, if it has made one.

        Raises BadInput if the checkpoint is damaged, or of another run, device or data. Warns if versions differ.
        """
        if not self.args.resume or not any((self.folder / f).exists() for f in ("checkpoint.pt", "summary.json")):
            return
        checkpoint = read_checkpoint(self.folder, self.args, self.device)
        if checkpoint["device"] != self.device.type:
            raise BadInput(f"{self.folder} ran on {checkpoint['device']}, and resumes exactly only there: see --device")
        if checkpoint["progress"]["data"] != self.data:
            raise BadInput(f"the data are not those that {self.folder} began with: give those, or begin a new run")
        if checkpoint["progress"]["sums"].shape != self.sums.shape:
            raise BadInput(f"{self.folder} logs other losses than this version of dql.py: go on with that version")
        load(checkpoint, self.folder, agents, generators)
        vars(self).update(checkpoint["progress"])
        path = {name: getattr(self.args, name) for name in ("compile", "cudagraphs")}
        for name, value in (versions(self.device) | path).items():
            before = (checkpoint["versions"] | checkpoint["args"]).get(name)
            if before != value:
                print(f"warning: {name} was {before} and is {value}: results may differ in rounding", file=sys.stderr)

    def check_finite(self, states: list[dict]) -> None:
        """Raises Diverged if summed losses, or parameters in the states of the seeds' agents, are not finite."""
        fine = dict(zip(self.losses, self.sums.isfinite().T, strict=True))
        for name in states[0] if states else ():
            fine[f"{name}'s parameters"] = torch.stack([all_finite(state[name]) for state in states])
        table = torch.stack(list(fine.values())).cpu()
        if not table.all():
            bad = ", ".join(name for name, of_seeds in zip(fine, table, strict=True) if not of_seeds.all())
            seeds = ", ".join(str(self.args.seed + k) for k, of_all in enumerate(table.T) if not of_all.all())
            kept = f"{self.folder / 'checkpoint.pt'} is of update {self.kept:,}" if self.kept else "no checkpoint yet"
            raise Diverged(f"{bad} not finite in updates {self.last_row + 1:,} to {self.step:,}, seed {seeds}; {kept}. "
                           "Try a smaller --learning-rate, --eta or --grad-norm")  # fmt: skip


def following(step: int, every: int) -> int:
    """The next multiple of every after step."""
    return (step // every + 1) * every
