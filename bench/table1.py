"""The paper's Table 1: trains tasks x seeds, skips finished ones, and prints the table beside the paper's.

    python bench/table1.py                                            # twenty tasks, five seeds, every GPU
    python bench/table1.py --tasks 'hopper-*' --num-updates 20000     # flags of dql.py are passed on to it
    python bench/table1.py --only-table                               # the table of the runs in --runs-dir
    python bench/table1.py --quick                                    # tries everything in a minute

A job trains some seeds of one task in a process `python dql.py`; if it fails, the others go on. Killed and started
again, this script goes on from the checkpoints in --runs-dir. The table has all finished runs with the settings asked
for; if a seed was run twice, the run that finished last counts.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import dql  # noqa: E402
from d4rl_tasks import TASKS, BadInput, task_of  # noqa: E402
from housekeeping import arguments, ending  # noqa: E402
from housekeeping.folder import write_json, write_whole  # noqa: E402


@dataclass
class Args:
    """The paper's Table 1. Other flags are passed on to dql.py: --num-updates 20000, --eval-episodes 20, --eta 0 ..."""

    tasks: list[str] = field(default_factory=lambda: ["*"])
    """ids or patterns ('hopper-*') of the paper's twenty tasks"""
    seeds: int = 5
    """how many seeds of each task, from seed 0 on"""
    runs_dir: Path = Path("runs")
    """where the runs' folders are read and written"""
    out: Path = Path("runs/table1")
    """folder for table1.md and table1.json"""
    devices: list[str] = field(default_factory=list)
    """one for each job at a time: cuda:0 cuda:1 ..., or cpu cpu ... Default: every GPU or, without one, cpu per core"""
    quick: bool = False
    """the demo data, two seeds and next to no training; writes to runs/table1-quick unless --out is given"""
    only_table: bool = False
    """train nothing, only make the table"""


QUICK = ["--num-updates", "24", "--eval-every", "24", "--batch-size", "16", "--num-steps", "2", "--eval-episodes", "1",
         "--eval-candidates", "2"]  # fmt: skip
SCORES = ("last", "best", "offline")
DOMAINS = {"antmaze": "AntMaze", "pen": "Adroit", "kitchen": "Kitchen"}  # by family; the others are Gym's
REFERENCE = json.loads((ROOT / "reference" / "paper.json").read_text())["tasks"]
OWN = ("env_id", "seed", "num_seeds", "device", "runs_dir", "run_name", "resume")  # dql.py's flags set for each job
FREE = {*OWN, "compile", "cudagraphs", "track", "capture_video", "log_every", "checkpoint_every"} - {"env_id"}
# Linux sends a job SIGTERM, so that it ends with a checkpoint, when this program dies, even by SIGKILL
WITH_PARENT = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []


class Run(NamedTuple):
    """A run's folder, or that of one of its seeds."""

    folder: Path
    args: dql.Args
    summary: dict | None  # of a finished run
    time: float  # when it finished or, if it has not, began


def seeds_of(args: dql.Args) -> set[int]:
    return set(range(args.seed, args.seed + args.num_seeds))


def differing(args: dql.Args, wanted: dql.Args) -> set[str]:
    """The names of the settings that affect scores and differ."""
    return {f.name for f in fields(args) if f.name not in FREE and getattr(args, f.name) != getattr(wanted, f.name)}


def read_runs(runs_dir: Path) -> tuple[list[Run], list[Path]]:
    """All runs in a folder, each seed of several too, by time; second, the folders with damaged or foreign JSON."""
    runs, skipped = [], []
    for path in sorted(runs_dir.rglob("args.json")):
        try:
            runs.append(read_run(path))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            skipped.append(path.parent)
    return sorted(runs, key=lambda run: run.time), skipped


def read_run(path: Path) -> Run:
    """The run of an args.json. Raises whatever damaged or foreign JSON, there or in summary.json, makes it raise."""
    args, file = dql.read_args(path.parent), path.with_name("summary.json")
    if missing := {"env_id", "seed", "num_seeds", "num_updates", "device"} - json.loads(path.read_text()).keys():
        raise BadInput(f"no {missing}")  # otherwise the defaults would be taken
    summary = json.loads(file.read_text()) if file.exists() else None
    if summary is not None:
        numbers = [summary[name][what] for name in SCORES for what in ("score", "std")]
        if not all(map(math.isfinite, [summary["num_updates"], *numbers])):
            raise BadInput("not finite")
        if summary["num_updates"] != args.num_updates:  # the run was extended since
            summary = None
    return Run(path.parent, args, summary, (path if summary is None else file).stat().st_mtime)


def plan(wanted: dql.Args, runs: list[Run], kind: str) -> list[dql.Args]:
    """A task's jobs: what began on that kind of device, then missing seeds; on a GPU consecutive ones share a job."""
    same = [run for run in runs if not differing(run.args, wanted)]
    jobs, missing = [], seeds_of(wanted) - {run.args.seed for run in same if run.summary and run.args.num_seeds == 1}
    for run in reversed(same):
        part_of_group = (run.folder.parent / "args.json").exists()
        unfinished = run.summary is None and not part_of_group and run.args.device.split(":")[0] in ("auto", kind)
        if unfinished and missing & seeds_of(run.args):
            jobs.append(replace(run.args, resume=run.folder))
            missing -= seeds_of(run.args)
    for seed in sorted(missing):
        if kind == "cuda" and seed - 1 in missing:
            jobs[-1] = replace(jobs[-1], num_seeds=jobs[-1].num_seeds + 1)
        else:
            jobs.append(replace(wanted, seed=seed, num_seeds=1))
    return jobs


def start(job: dql.Args, words: list[str], device: str, log: Path) -> subprocess.Popen:
    """Starts or resumes a job; words are its flags besides OWN."""
    own = ["--env-id", job.env_id, "--seed", str(job.seed), "--num-seeds", str(job.num_seeds),
           "--runs-dir", job.runs_dir]  # fmt: skip
    flags = ["--resume", job.resume] if job.resume else [*words, *own]
    threads = {"OMP_NUM_THREADS": "1"} if device == "cpu" else {}
    with log.open("a") as file:
        # in its own session, so that Ctrl-C reaches it as one SIGTERM: a second signal would end it without checkpoint
        return subprocess.Popen(
            [*WITH_PARENT, sys.executable, "-u", ROOT / "dql.py", *flags, "--device", device],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=threads | os.environ, start_new_session=True,
        )  # fmt: skip


def train(wanted: list[dql.Args], words: list[str], devices: list[str]) -> bool:
    """Trains what is missing, a job at a time on each device; returns whether one failed. Raises Stopped."""
    runs, logs = read_runs(wanted[0].runs_dir)[0], wanted[0].runs_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    jobs = [job for args in wanted for job in plan(args, runs, devices[0].split(":")[0])]
    print(f"{len(jobs)} job(s) to do", flush=True)
    waiting, free, running, failed = jobs[::-1], devices[::-1], {}, False
    try:
        with ending.held_signals() as check:
            while waiting or running:
                check()
                while waiting and free:
                    job, device = waiting.pop(), free.pop()
                    log = logs / f"{job.env_id}__{job.seed}.log"
                    print(f"{log.stem}: starts on {device}", flush=True)
                    running[start(job, words, device, log)] = log, device
                for child in [child for child in running if child.poll() is not None]:
                    log, device = running.pop(child)
                    free.append(device)
                    if code := child.returncode:
                        failed, said = True, re.split(r"[\r\n]+", log.read_text(errors="replace").strip())[-1]
                        print(f"{log.stem}: exit code {code}: {said} ({log})", file=sys.stderr)
                    else:
                        print(f"{log.stem}: done", flush=True)
                time.sleep(0.1)
    except ending.Stopped as stopped:
        raise ending.Stopped(stopped.signum, "stopped; the same command goes on") from None
    finally:
        for child in running:
            child.terminate()
        for child in running:
            child.wait()
    return failed


def task_row(env_id: str, runs: list[Run]) -> dict:
    """A task's row; each score is (mean, standard deviation over seeds, None for one seed), or None if unknown."""
    row = {"task": env_id, "seeds": len(runs), "num_updates": runs[0].args.num_updates}
    for name in SCORES:
        scores = [run.summary[name]["score"] for run in runs]
        row[name] = (float(np.mean(scores)), float(np.std(scores)) if len(scores) > 1 else None)
    return row | {"paper": dql.SETTINGS[env_id].paper, "reproduction": REFERENCE.get(env_id, {}).get("reproduction")}


def average_rows(rows: list[dict]) -> list[dict]:
    """Each domain's average over those of its tasks that have a row; None if one of these lacks the score."""
    averages = []
    for domain in ("Gym", *DOMAINS.values()):
        tasks = [name for name in dql.SETTINGS if TASKS[name].url and DOMAINS.get(TASKS[name].family, "Gym") == domain]
        if there := [row for row in rows if row["task"] in tasks]:
            average = dict.fromkeys(there[0]) | {"task": f"{domain} average, {len(there)} of {len(tasks)} tasks"}
            for name in (*SCORES, "paper", "reproduction"):
                if all(row[name] for row in there):
                    average[name] = (float(np.mean([row[name][0] for row in there])), None)
            averages.append(average)
    return averages


def cell(value: str | int | tuple | None) -> str:
    if isinstance(value, tuple | list):
        return f"{value[0]:.1f}" + (f" ± {value[1]:.1f}" if value[1] is not None else "")
    return "" if value is None else f"{value:,}" if isinstance(value, int) else value


def markdown(rows: list[dict]) -> str:
    table = [[*rows[0]], ["---"] * len(rows[0])]
    for row in rows:
        asterisk = {"paper": cell(row["paper"]) + "*"} if REFERENCE.get(row["task"], {}).get("recalled") else {}
        table.append([cell(value) for value in (row | asterisk).values()])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def write_tables(out: Path, wanted: list[dql.Args], words: list[str]) -> str:
    """Writes table1.json, and table1.md, whose text it returns. Raises BadInput if no run has finished."""
    (runs, skipped), rows, left_out = read_runs(wanted[0].runs_dir), [], []
    note = f"Skipped: {len(skipped)} run(s) with damaged or foreign JSON: {skipped[0]} ...\n" if skipped else ""
    for args in wanted:
        finished = [run for run in runs if run.args.env_id == args.env_id and run.summary and run.args.num_seeds == 1]
        left_out += filter(None, (differing(run.args, args) for run in finished))
        by_seed = {run.args.seed: run for run in finished if not differing(run.args, args)}  # the newest of each
        if by_seed:
            rows.append(task_row(args.env_id, list(by_seed.values())))
    if not rows:
        raise BadInput(f"no finished run of these tasks and settings in {wanted[0].runs_dir}. {note}".strip())
    rows += average_rows(rows)
    text = markdown(rows) + f"""

Normalized scores, mean ± standard deviation over seeds, of the last, the best and the offline-selected evaluation.
Settings: the paper's{" but for " * bool(words) + " ".join(words)}. Paper: its Table 1 (*: quoted from memory).
Reproduction: FlowRL (arXiv 2603.27450), table 2, last evaluation.
"""
    if left_out:
        text += f"Left out: {len(left_out)} finished run(s) with other {', '.join(sorted(set().union(*left_out)))}.\n"
    write_whole(out / "table1.md", lambda beside: beside.write_text(text + note))
    write_json(out / "table1.json", {"rows": rows})
    return text + note


def choose_tasks(patterns: list[str]) -> list[str]:
    """The ids that match, in the paper's order. Raises BadInput for a pattern that matches none."""
    chosen = set()
    for pattern in patterns:
        found = {name for name, it in dql.SETTINGS.items() if name == pattern or (it.paper and fnmatch(name, pattern))}
        chosen |= found or {task_of(pattern)}  # which raises, naming the closest ids
    return [env_id for env_id in dql.SETTINGS if env_id in chosen]


def choose_devices(asked: list[str]) -> list[str]:
    """The devices asked for or, by default, all. Raises BadInput if there is no such device."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]  # which touches none: that would take memory there
    if missing := {*asked} - {*gpus, "cpu"}:
        raise BadInput(f"--devices {' '.join(sorted(missing))}: there is {' and '.join([*gpus, 'cpu'])}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return asked or gpus or ["cpu"] * cores


def passed_on(words: list[str]) -> dql.Args:
    """Flags that are passed on to dql.py, parsed. Raises BadInput for one that each job has its own value of."""
    given = arguments.parse(dql.Args, words)
    if taken := [name for name in OWN if getattr(given, name) != getattr(dql.Args(), name)]:
        raise BadInput(f"{arguments.flag(taken[0])} is not passed on: each job has its own (see --help)")
    return given


def run(argv: list[str]) -> int:
    """Does what the command line asks for; returns the exit code. Raises BadInput and Stopped."""
    args, words = arguments.parsed(Args, argv, "bench/table1.py", return_unknown_args=True)
    if args.quick:
        out = Path("runs/table1-quick") if args.out == Args().out else args.out
        args, words = replace(args, tasks=["halfcheetah-demo-v0"], seeds=2, out=out), [*QUICK, *words]
    given = replace(passed_on(words), runs_dir=args.runs_dir, num_seeds=args.seeds)
    wanted = [dql.with_settings(replace(given, env_id=env_id)) for env_id in choose_tasks(args.tasks)]
    args.out.mkdir(parents=True, exist_ok=True)
    failed = not args.only_table and train(wanted, words, choose_devices(args.devices))
    print(write_tables(args.out, wanted, words))
    return int(failed)


if __name__ == "__main__":
    ending.run_main("table1.py", lambda: sys.exit(run(sys.argv[1:])))
