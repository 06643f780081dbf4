"""Kills runs at random moments, resumes them, and checks that they end with the same bits as a run left alone.

    python bench/torture.py --kills 20               # SIGKILL: one seed, several, compiled
    python bench/torture.py --cases memory overhead  # memory over 200,000 updates; cost of checks and checkpoints
    python bench/torture.py --cases sigterm          # how long the demo's run takes to stop

Runs are children forked from this process, so that no run has to import torch again. Linux only.
"""

import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

os.environ["OMP_NUM_THREADS"] = "1"  # a forked child could not use the threads of its parent
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # compile in the child itself, so that a kill ends that too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import h5py
import matplotlib.figure  # noqa: F401, imported here so that children need not
import mujoco  # noqa: F401
import numpy as np
import torch
import torch._dynamo
import torch.utils.tensorboard
from tqdm import tqdm

import dql
import fast_sampler
from command_line import parsed
from d4rl_tasks import TASKS, BadInput
from run_folder import Progress, check_health, held_signals, log, save, seed_folders, versions, write_whole

KILLED = {"one": {}, "several": {"num_seeds": 2}, "compiled": {"compile": True}}


@dataclass
class Torture:
    """Kills runs; measures memory over a long run, the cost of checks and checkpoints, and the time to stop."""

    kills: int = 20
    """SIGKILLs for each of the cases one, several and compiled"""
    cases: tuple[Literal["one", "several", "compiled", "memory", "overhead", "sigterm"], ...] = tuple(KILLED)
    """which cases to run"""
    memory_updates: int = 200_000
    """length of the run whose memory is watched"""
    out: Path = Path("runs/torture.json")
    """results file; earlier results of other cases are kept"""
    seed: int = 0
    """seed of the random moments of the kills"""


def tiny_args(folder: Path, **changes) -> dql.Args:
    """A run of one or two seconds: random data, and Hopper, which soon falls."""
    data, task, rng = folder / "data.hdf5", TASKS["hopper-medium-v2"], np.random.default_rng(0)
    if not data.exists():
        with h5py.File(data, "w") as file:
            file["observations"] = rng.standard_normal((600, task.state_dim)).astype(np.float32)
            file["actions"] = np.tanh(rng.standard_normal((600, task.action_dim))).astype(np.float32)
            file["rewards"] = rng.standard_normal(600).astype(np.float32)
            file["terminals"] = rng.uniform(size=600) < 0.05
            file["timeouts"] = np.zeros(600, bool)
    return dql.Args(**{
        "env_id": "hopper-medium-v2", "dataset_path": data, "device": "cpu", "runs_dir": folder / "runs",
        "num_updates": 60, "batch_size": 16, "num_steps": 2, "eval_every": 30, "eval_episodes": 2,
        "eval_candidates": 2, "log_every": 8, "checkpoint_every": 5, "compile": False, **changes,
    })  # fmt: skip


def quiet_train(args: dql.Args, log: Path) -> None:
    """Trains in a child process, with its output in a file."""
    fd = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    dql.train(args)


def start(args: dql.Args, folder: Path) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=quiet_train, args=(args, folder / "log.txt"))
    child.start()
    return child


def newest(args: dql.Args) -> Path | None:
    """The folder of the run begun last, or None if none has an args.json yet."""
    runs = sorted(args.runs_dir.glob("*/args.json"), key=lambda path: path.stat().st_mtime_ns)
    return runs[-1].parent if runs else None


def ends_alike(a: Path, b: Path) -> bool:
    """Whether two runs have the same bits in weights, optimizers, generators, metrics (times aside) and scores."""
    args = dql.read_args(a)
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (a, b)]
    alike = all(same(states[0][part], states[1][part]) for part in ("agents", "generators"))
    for x, y in zip(seed_folders(args, a), seed_folders(args, b), strict=True):
        own = [torch.load(folder / "checkpoint.pt", weights_only=True)["agents"] for folder in (x, y)]
        alike &= same(*own)
        rows = [(folder / "metrics.csv").read_text().splitlines() for folder in (x, y)]
        rows = [[row.rsplit(",", 2)[0] for row in of_one] for of_one in rows]  # without updates_per_second and seconds
        scores = [json.loads((folder / "summary.json").read_text()) for folder in (x, y)]
        alike &= rows[0] == rows[1] and all(scores[0][n] == scores[1][n] for n in ("last", "best", "offline"))
    return alike


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def kill_and_compare(args: dql.Args, kills: int, folder: Path, rng: random.Random) -> dict:
    """Kills and resumes runs at uniformly random moments, up to that many kills; compares them with one left alone."""
    begun = time.perf_counter()
    child = start(args, folder)
    child.join()
    length, whole = time.perf_counter() - begun, newest(args)
    if child.exitcode:
        raise SystemExit(f"torture.py: the run failed: {(folder / 'log.txt').read_text()[-2000:]}")
    done, runs, alike, resumed_at = 0, 0, True, []
    again = replace(args, runs_dir=folder / "killed")
    while True:
        run = newest(again)
        fresh = run is None or (run / "summary.json").exists()
        if done == kills and fresh and runs:
            break
        begun = time.perf_counter()
        child = start(again if fresh else dql.Args(resume=run, device="cpu", compile=args.compile), folder)
        child.join(rng.uniform(0, length) if done < kills else None)
        if child.is_alive():
            child.kill()
            done += 1
        child.join()
        run = newest(again)
        if child.exitcode == 0:
            runs += 1
            alike &= ends_alike(whole, run)
            length = time.perf_counter() - begun if fresh else length  # the first may have taken longer, to compile
        elif child.exitcode != -signal.SIGKILL:
            raise SystemExit(f"torture.py: a run failed: {(folder / 'log.txt').read_text()[-2000:]}")
        elif run and (run / "checkpoint.pt").exists():
            resumed_at.append(torch.load(run / "checkpoint.pt", weights_only=True)["progress"]["step"])
    return {"kills": done, "runs": runs, "same": alike, "checkpoints_resumed_from": resumed_at,
            "updates": args.num_updates, "seconds_of_one_run": round(length, 1)}  # fmt: skip


def watch_memory(args: dql.Args, folder: Path) -> dict:
    """Resident memory, threads and open files of a long run, watched each second: at a tenth of it and at the end."""
    child, seen = start(args, folder), []
    while child.is_alive():
        time.sleep(1)
        run = newest(args)
        if run and (run / "metrics.csv").exists():
            update = int((run / "metrics.csv").read_text().splitlines()[-1].split(",")[0])
            try:
                process = Path(f"/proc/{child.pid}")
                pages = int((process / "statm").read_text().split()[1])
                counts = [len(list((process / name).iterdir())) for name in ("task", "fd")]
            except OSError:  # it has just ended
                break
            seen.append((update, pages * os.sysconf("SC_PAGESIZE") / 2**20, *counts))
    child.join()
    n = args.num_updates
    early = [row for row in seen if 0.08 * n <= row[0] <= 0.12 * n]
    late = [row for row in seen if row[0] >= 0.96 * n]
    mib = [statistics.median(row[1] for row in rows) for rows in (early, late)]
    return {
        "updates": n, "evaluations": n // args.eval_every, "exit_code": child.exitcode,
        "resident_mib_at_a_tenth": round(mib[0], 1), "resident_mib_at_the_end": round(mib[1], 1),
        "growth": round(mib[1] / mib[0] - 1, 4),
        "threads": [early[0][2], late[-1][2]], "files": [early[0][3], late[-1][3]],
    }  # fmt: skip


def overhead(folder: Path) -> dict:
    """What a run adds to bare updates of the demo: its loop, in paired blocks; rows and checkpoints by themselves."""
    args = replace(dql.with_settings(dql.Args()), device="cpu", compile=False)
    device, writers = torch.device("cpu"), [torch.utils.tensorboard.SummaryWriter(folder)]
    data = dql.load_dataset(args.env_id)
    dataset = dql.make_batch(data, args.reward, device)
    agent, generators = dql.make_agent(args, 0), [torch.Generator().manual_seed(0)]
    _, updates, _ = fast_sampler.make_steps(args, [agent], dataset, generators, generators)
    now = Progress.begin(1, device, data)

    def bare() -> None:
        sums = 0
        for _ in range(20):
            sums = sums + updates(1)

    def within_a_run() -> None:
        stop = now.step + 20
        while now.step < stop:
            bar.update(now.advance(updates, stop, 1))
            check_signals()

    def row() -> None:
        check_health(folder, args, [agent.state_dict()], now)
        now.add_row(now.end_row())
        log(args, folder, now.history, writers, None)

    def seconds(block) -> float:
        begun = time.perf_counter()
        block()
        return time.perf_counter() - begun

    bare()
    bares, ratios, rows, saves = [], [], [], []
    with open(os.devnull, "w") as nowhere, tqdm(total=10**6, file=nowhere) as bar, held_signals() as check_signals:
        for _ in range(12):
            before, within, after = seconds(bare), seconds(within_a_run), seconds(bare)
            bares.append((before + after) / 2)
            ratios.append(within / bares[-1])
            rows.append(seconds(row))
            saves.append(seconds(lambda: save(args, folder, [agent.state_dict()], generators, now)))
    update, ratio, of_row, of_save = map(statistics.median, (bares, ratios, rows, saves))
    update /= 20
    added = (ratio - 1) + of_row / (args.log_every * update) + of_save / (args.checkpoint_every * update)
    return {
        "milliseconds_of_a_bare_update": update * 1e3,
        "loop_ratio": ratio, "loop_ratio_quartiles": list(np.quantile(ratios, [0.25, 0.75])),
        "milliseconds_of_a_row": of_row * 1e3, "milliseconds_of_a_checkpoint": of_save * 1e3, "added_share": added,
    }  # fmt: skip


def stop_demo(folder: Path) -> dict:
    """Seconds from SIGTERM, amid updates, to the end of the demo's eager run of 1 and of 3 seeds: medians of three."""
    seconds = {}
    for num_seeds in (1, 3):
        times = []
        for k in range(3):
            runs = folder / f"{num_seeds}-{k}"
            runs.mkdir()
            args = dql.Args(num_seeds=num_seeds, device="cpu", compile=False, log_every=20, runs_dir=runs)
            child = start(args, runs)
            while child.is_alive() and not any(runs.rglob("metrics.csv")):
                time.sleep(0.1)
            child.terminate()
            begun = time.perf_counter()
            child.join()
            times.append(time.perf_counter() - begun)
            if "Stopped: stopped at update" not in (log := (runs / "log.txt").read_text()):
                raise SystemExit(f"torture.py: it did not stop: {log[-2000:]}")
        seconds[num_seeds] = round(statistics.median(times), 2)
    return {"seconds_by_seeds": seconds}


def main() -> None:
    try:
        args = parsed(Torture, sys.argv[1:], "bench/torture.py")
    except BadInput as error:
        print(f"torture.py: {error}", file=sys.stderr)
        sys.exit(2)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        for case in dict.fromkeys(args.cases):
            folder = Path(temporary, case)
            folder.mkdir()
            if case == "memory":
                n = args.memory_updates
                # cloning: an update with critics takes four times as long
                long = {"num_updates": n, "batch_size": 4, "num_steps": 1, "eta": 0.0, "eval_candidates": 1,
                        "log_every": 1000, "checkpoint_every": 5000, "eval_every": n // 50}  # fmt: skip
                results["memory"] = watch_memory(tiny_args(folder, **long), folder)
            elif case in ("overhead", "sigterm"):
                results[case] = {"overhead": overhead, "sigterm": stop_demo}[case](folder)
            else:
                runs = tiny_args(folder, **KILLED[case])
                found = kill_and_compare(runs, args.kills, folder, random.Random(args.seed))
                results["kills"] = results.get("kills", {}) | {case: found}
            print(case, json.dumps(results["kills"][case] if case in KILLED else results[case]), flush=True)
            results["versions"] = versions(torch.device("cpu"))
            write_whole(args.out, lambda path: path.write_text(json.dumps(results, indent=2) + "\n"))


if __name__ == "__main__":
    main()
