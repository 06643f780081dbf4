"""Disturbs runs at random moments, resumes them, and checks that they end with the same bits as a run left alone.

    python bench/torture.py --kills 20                  # SIGKILL: one seed, several, compiled
    python bench/torture.py --cases soak --minutes 60   # signals, stops, closed streams, full disks, for an hour
    python bench/torture.py --cases memory overhead     # memory over 200,000 updates; cost of checks and checkpoints
    python bench/torture.py --cases sigterm             # how long the demo's run takes to stop

Runs are children forked from this process, so that no run has to import torch again; otherwise they begin and end as
`python dql.py` does. Linux only.
"""

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

os.environ["OMP_NUM_THREADS"] = "1"  # a forked child could not use the threads of its parent
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # compile in the child itself, so that a kill ends that too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.figure  # noqa: F401, imported here so that children need not
import mujoco  # noqa: F401
import numpy as np
import tiny
import torch
import torch._dynamo
import torch.utils.tensorboard

import dql
import fast_sampler
from d4rl_tasks import load_dataset
from housekeeping import arguments, ending
from housekeeping.folder import seed_folders, write_json
from housekeeping.machine import versions
from housekeeping.report import q_range
from housekeeping.run import Run

RUNS = {"one": {}, "several": {"num_seeds": 2}, "compiled": {"compile": True}}
FAULTS = ("SIGTERM", "SIGHUP", "SIGKILL", "SIGSTOP and SIGCONT", "closed stdout and stderr", "full disk")


@dataclass
class Torture:
    """Disturbs runs; measures memory over a long run, the cost of checks and checkpoints, and the time to stop."""

    cases: tuple[Literal["one", "several", "compiled", "soak", "memory", "overhead", "sigterm"], ...] = tuple(RUNS)
    """which cases to run"""
    kills: int = 20
    """SIGKILLs for each of the cases one, several and compiled"""
    minutes: float = 60
    """length of the case soak"""
    memory_updates: int = 200_000
    """length of the run whose memory is watched"""
    out: Path = Path("runs/torture.json")
    """results file; earlier results of other cases are kept"""
    seed: int = 0
    """seed of what happens when"""


def tiny_args(folder: Path, **changes) -> dql.Args:
    """A run of one or two seconds."""
    return dql.Args(**{
        "env_id": tiny.ENV_ID, "dataset_path": tiny.write_data(folder / "data.hdf5"), "device": "cpu",
        "num_updates": 60, "batch_size": 16, "num_steps": 2, "eval_every": 30, "eval_episodes": 2,
        "eval_candidates": 2, "log_every": 8, "checkpoint_every": 5, "compile": False, "runs_dir": folder / "runs",
        **changes,
    })  # fmt: skip


class Child:
    """A run in a process of its own, which ends as `python dql.py` does; stdout and stderr go into a pipe."""

    def __init__(self, args: dql.Args):
        reader, writer = os.pipe()
        self.reader = os.fdopen(reader, "rb")
        self.process = multiprocessing.get_context("fork").Process(target=self.run, args=(args, writer))
        self.process.start()
        os.close(writer)

    def run(self, args: dql.Args, writer: int) -> None:
        self.reader.close()
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.close(writer)
        ending.begin("dql.py")
        ending.run_main("dql.py", lambda: dql.train(args))

    def alive_after(self, seconds: float | None) -> bool:
        """Whether it still runs after so many seconds, or at all if None: then waits for its end."""
        self.process.join(seconds)
        return self.process.is_alive()

    def end(self, *codes: int) -> None:
        """Waits for its end. Raises SystemExit, with what it said, if its exit code is none of these."""
        self.process.join()
        said = "(its streams were closed)" if self.reader.closed else self.reader.read().decode(errors="replace")
        self.reader.close()
        if self.process.exitcode not in codes:
            sys.exit(f"torture.py: a run ended with exit code {self.process.exitcode}: {said[-2000:]}")


def newest(args: dql.Args) -> Path | None:
    """The folder of the run begun last, or None if none has an args.json yet."""
    runs = sorted(args.runs_dir.glob("*/args.json"), key=lambda path: path.stat().st_mtime_ns)
    return runs[-1].parent if runs else None


def ends_alike(a: Path, b: Path) -> bool:
    """Whether two runs have the same bits in weights, optimizers, generators, metrics (times aside), scores and kept
    policies."""
    args = dql.read_args(a)
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (a, b)]
    alike = all(same(states[0][part], states[1][part]) for part in ("agents", "generators"))
    for x, y in zip(seed_folders(args, a), seed_folders(args, b), strict=True):
        own = [torch.load(folder / "checkpoint.pt", weights_only=True)["agents"] for folder in (x, y)]
        alike &= same(*own)
        rows = [(folder / "metrics.csv").read_text().splitlines() for folder in (x, y)]
        rows = [[row.rsplit(",", 2)[0] for row in of_one] for of_one in rows]  # without updates_per_second and seconds
        scores = [json.loads((folder / "summary.json").read_text()) for folder in (x, y)]
        kept = [{path.name: path.read_bytes() for path in folder.glob("evaluation-*")} for folder in (x, y)]
        alike &= kept[0] == kept[1] and rows[0] == rows[1]
        alike &= all(scores[0][n] == scores[1][n] for n in ("last", "best", "offline"))
    return alike


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def left_alone(args: dql.Args) -> tuple[Path, float]:
    """A run's folder and its seconds. Makes it twice, for the first may have had to compile."""
    folders = []
    for _ in range(2):
        begun = time.perf_counter()
        Child(args).end(0)
        folders.append(newest(args))
        seconds = time.perf_counter() - begun
    if not ends_alike(*folders):
        sys.exit("torture.py: two runs left alone have other bits")
    return folders[0], seconds


def disturb(child: Child, fault: str, seconds: float, room: int) -> None:
    """Does this to a run, and with SIGSTOP or a full disk waits so long before it takes it back.

    A disk that is full for this process alone: no file that it writes may grow beyond room bytes.
    """
    pid, limit = child.process.pid, resource.RLIMIT_FSIZE
    if fault == "closed stdout and stderr":
        child.reader.close()  # nobody reads the pipe any more
    elif fault == "full disk":
        with suppress(ProcessLookupError):  # it has just ended
            resource.prlimit(pid, limit, (room, resource.RLIM_INFINITY))
            child.alive_after(seconds)
            resource.prlimit(pid, limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    else:
        for name in fault.split(" and "):
            os.kill(pid, getattr(signal, name))  # a child that has just ended still has its id: nobody has waited
            if name == "SIGSTOP":
                time.sleep(seconds)
        if fault == "SIGKILL":
            child.process.join()


def disturbed(args: dql.Args, faults: tuple, rng: random.Random, count=math.inf, seconds=math.inf) -> dict:
    """Disturbs and resumes runs at random moments, by so many faults or for so long; the last is left to its end.

    Each run is compared with one left alone. Raises SystemExit if a process ends in a way that no fault explains.
    """
    (whole, length), args = left_alone(args), replace(args, runs_dir=args.runs_dir / "disturbed")
    done, ends, runs, resumed, alike, end = Counter(), Counter(), 0, 0, True, time.monotonic() + seconds

    def go_on() -> bool:
        return done.total() < count and time.monotonic() < end

    while go_on() or newest(args) or not runs:
        run = newest(args)
        resumed += bool(run and (run / "checkpoint.pt").exists())
        child, codes = Child(dql.Args(resume=run, device="cpu", compile=args.compile) if run else args), {0}
        while child.alive_after(rng.uniform(0, length) if go_on() else None):
            fault = rng.choice(faults)
            done[fault] += 1
            disturb(child, fault, rng.uniform(0, 3), rng.choice((0, 1000, 10**5, 10**6, 3 * 10**6)))
            signum = getattr(signal, fault, 0)  # a signal before the first line of the run has its default effect
            codes |= {-signum, 128 + signum} if signum else {2} if fault == "full disk" else set()
        child.end(*codes)
        ends[str(child.process.exitcode)] += 1
        run = newest(args)
        if run and (run / "summary.json").exists():
            runs += 1
            alike &= ends_alike(whole, run)
            shutil.rmtree(run)
        elif child.process.exitcode == 0:
            sys.exit(f"torture.py: a run ended with exit code 0, but without {run}/summary.json")
    return {"faults": dict(done), "runs": runs, "same": alike, "processes_by_exit_code": dict(ends),
            "resumed_from_a_checkpoint": resumed, "seconds_of_one_run": round(length, 1)}  # fmt: skip


def soak(minutes: float, folder: Path, rng: random.Random) -> dict:
    """All faults, at random, for so many minutes: a third of them each for runs of one seed, of two, and compiled."""
    found = {}
    for case, changes in RUNS.items():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")  # may be left half written
        args = tiny_args(folder, runs_dir=folder / case, **changes)
        found[case] = disturbed(args, FAULTS, rng, seconds=20 * minutes)
        print(case, json.dumps(found[case]), flush=True)
    faults = sum((Counter(of_case["faults"]) for of_case in found.values()), Counter())
    total = {"minutes": minutes, "faults": dict(faults), "faults_in_all": faults.total(),
             "runs": sum(of_case["runs"] for of_case in found.values()),
             "same": all(of_case["same"] for of_case in found.values())}  # fmt: skip
    return total | found


def watch_memory(args: dql.Args) -> dict:
    """Resident memory, threads and open files of a long run, watched each second: at a tenth of it and at the end."""
    child, seen = Child(args), []
    while child.alive_after(1):
        run = newest(args)
        if run and (run / "metrics.csv").exists():
            update = int((run / "metrics.csv").read_text().splitlines()[-1].split(",")[0])
            try:
                process = Path(f"/proc/{child.process.pid}")
                pages = int((process / "statm").read_text().split()[1])
                counts = [len(list((process / name).iterdir())) for name in ("task", "fd")]
            except OSError:  # it has just ended
                break
            seen.append((update, pages * os.sysconf("SC_PAGESIZE") / 2**20, *counts))
    child.end(0)
    n = args.num_updates
    early = [row for row in seen if 0.08 * n <= row[0] <= 0.12 * n]
    late = [row for row in seen if row[0] >= 0.96 * n]
    mib = [statistics.median(row[1] for row in rows) for rows in (early, late)]
    return {
        "updates": n, "evaluations": n // args.eval_every, "exit_code": child.process.exitcode,
        "resident_mib_at_a_tenth": round(mib[0], 1), "resident_mib_at_the_end": round(mib[1], 1),
        "growth": round(mib[1] / mib[0] - 1, 4),
        "threads": [early[0][2], late[-1][2]], "files": [early[0][3], late[-1][3]],
    }  # fmt: skip


def overhead(folder: Path) -> dict:
    """What a run adds to bare updates of a demo: its loop, in paired blocks; rows and checkpoints by themselves."""
    args = dql.Args("halfcheetah-demo-v0", device="cpu", compile=False, cudagraphs=False, runs_dir=folder)
    args = dql.with_settings(args)
    device, generators = torch.device("cpu"), [torch.Generator().manual_seed(0)]
    data = load_dataset(args.env_id)
    dataset, agent = dql.make_batch(data, args.reward, device), dql.make_agent(args, 0)
    _, updates, _ = fast_sampler.make_steps(args, [agent], dataset, generators, generators)
    run = Run(args, device, data, dql.LOSSES, None, q_range(dataset.reward, args))

    def bare() -> None:
        sums = 0
        for _ in range(20):
            sums = sums + updates(1)

    def within_a_run() -> None:
        for _ in range(20):
            run.advance(updates)
            run.check_signals()

    def save() -> None:
        run.save([agent.state_dict()], generators)

    def seconds(block) -> float:
        begun = time.perf_counter()
        block()
        return time.perf_counter() - begun

    bare()
    bares, ratios, rows, saves = [], [], [], []
    with run.training(save):
        for _ in range(12):
            before, within, after = seconds(bare), seconds(within_a_run), seconds(bare)
            bares.append((before + after) / 2)
            ratios.append(within / bares[-1])
            rows.append(seconds(lambda: run.log(run.end_row())))
            saves.append(seconds(save))
    update, ratio, of_row, of_save = map(statistics.median, (bares, ratios, rows, saves))
    update /= 20
    added = (ratio - 1) + of_row / (args.log_every * update) + of_save / (args.checkpoint_every * update)
    return {
        "milliseconds_of_a_bare_update": update * 1e3,
        "loop_ratio": ratio, "loop_ratio_quartiles": list(np.quantile(ratios, [0.25, 0.75])),
        "milliseconds_of_a_row": of_row * 1e3, "milliseconds_of_a_checkpoint": of_save * 1e3, "added_share": added,
    }  # fmt: skip


def stop_demo(folder: Path) -> dict:
    """Seconds from SIGTERM, amid updates, to the end of an eager run of 1 and of 3 seeds: medians of three."""
    seconds = {}
    for num_seeds in (1, 3):
        times = []
        for k in range(3):
            runs = folder / f"{num_seeds}-{k}"
            runs.mkdir()
            child = Child(dql.Args("halfcheetah-demo-v0", num_seeds=num_seeds, device="cpu", compile=False,
                                   log_every=20, runs_dir=runs))  # fmt: skip
            while child.alive_after(0.1) and not any(runs.rglob("metrics.csv")):
                pass
            child.process.terminate()
            begun = time.perf_counter()
            child.end(128 + signal.SIGTERM)
            times.append(time.perf_counter() - begun)
        seconds[num_seeds] = round(statistics.median(times), 2)
    return {"seconds_by_seeds": seconds}


def main() -> None:
    args = arguments.parsed(Torture, sys.argv[1:], "bench/torture.py")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        for case in dict.fromkeys(args.cases):
            folder, rng = Path(temporary, case), random.Random(args.seed)
            folder.mkdir()
            if case == "memory":
                n = args.memory_updates
                # cloning: an update with critics takes four times as long
                found = watch_memory(tiny_args(folder, num_updates=n, batch_size=4, num_steps=1, eta=0.0,
                                               eval_candidates=1, log_every=1000, checkpoint_every=5000,
                                               eval_every=n // 50))  # fmt: skip
            elif case in RUNS:
                found = disturbed(tiny_args(folder, **RUNS[case]), ("SIGKILL",), rng, count=args.kills)
                found = {"kills": found.pop("faults").get("SIGKILL", 0)} | found
            else:
                found = {"overhead": overhead, "sigterm": stop_demo}[case](folder) if case != "soak" else soak(
                    args.minutes, folder, rng)  # fmt: skip
            results |= {"kills": results.get("kills", {}) | {case: found}} if case in RUNS else {case: found}
            print(case, json.dumps(found), flush=True)
            write_json(args.out, results | {"versions": versions(torch.device("cpu"))})
            if not found.get("same", True):
                sys.exit(f"torture.py: {case}: a run ended with other bits than one left alone")


if __name__ == "__main__":
    ending.run_main("torture.py", main)
