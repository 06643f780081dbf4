"""The paper's Table 1: trains tasks x seeds, skips finished ones, and prints the table beside the paper's.

    python bench/table1.py                                            # twenty tasks, five seeds, every GPU
    python bench/table1.py --tasks 'hopper-*' --num-updates 20000     # flags of dql.py are passed on to it
    python bench/table1.py --only-table                               # the table of the runs in --runs-dir
    python bench/table1.py --ray auto                                 # on a Ray cluster (pip install ray)
    python bench/table1.py --quick                                    # tries everything in a minute

A job trains some seeds of one task in a process `python dql.py`; if it fails, the others go on. Killed and started
again, this script goes on from the checkpoints in --runs-dir. The table has all finished runs with the settings asked
for; if a seed was run twice, the run that finished last counts.

On Ray every machine must see this folder, --runs-dir and the data under the same paths; a job whose worker dies is
started again and resumes.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import dql  # noqa: E402
from d4rl_tasks import TASKS, BadInput, reason, task_of  # noqa: E402
from housekeeping import arguments, ending  # noqa: E402
from housekeeping.folder import write_whole  # noqa: E402
from housekeeping.report import write_metrics  # noqa: E402


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
    """folder for table1.md, table1.csv and runs.csv"""
    devices: list[str] = field(default_factory=list)
    """cuda:0 cuda:1 ..., or cpu. Default: every GPU, or cpu if there is none. On Ray only the kind counts"""
    jobs_per_device: int | None = None
    """jobs at a time on each device. Default: 1 on a GPU, where a task's seeds share a job; 1 per core on a CPU"""
    ray: str | None = None
    """address of a Ray cluster to train on: auto, HOST:PORT, or local to start one on this machine"""
    quick: bool = False
    """the demo data, two seeds and next to no training; writes to runs/table1-quick unless --out is given"""
    only_table: bool = False
    """train nothing, only make the table"""


QUICK = ["--num-updates", "24", "--eval-every", "24", "--batch-size", "16", "--num-steps", "2", "--eval-episodes", "1",
         "--eval-candidates", "2"]  # fmt: skip
SCORES = ("last", "best", "offline")
DOMAINS = {"antmaze": "AntMaze", "pen": "Adroit", "kitchen": "Kitchen"}  # by family; the others are Gym's
REFERENCE = json.loads((ROOT / "reference" / "paper.json").read_text())["tasks"]
OWN = ("env_id", "seed", "num_seeds", "device", "runs_dir", "resume")  # dql.py's flags that are set for each job
FREE = {*OWN, "compile", "cudagraphs", "track", "capture_video", "log_every", "checkpoint_every"} - {"env_id"}


class Run(NamedTuple):
    folder: Path
    args: dict
    summary: dict | None  # of a finished run

    def differs(self, settings: dict) -> set[str]:
        """The settings that the run was not made with; one missing from its args.json is newer, and counts as equal."""
        return {name for name, value in settings.items() if self.args.get(name, value) != value}

    def counts(self) -> bool:
        """Whether this is a finished run of one seed."""
        return bool(self.summary) and self.args["num_seeds"] == 1

    def unfinished(self, kind: str) -> bool:
        """Whether dql.py may resume the run on a device of that kind."""
        part_of_group = (self.folder.parent / "args.json").exists()
        return not self.summary and not part_of_group and self.args["device"].split(":")[0] in ("auto", kind)


class Job(NamedTuple):
    """Consecutive seeds of a task, trained in one process."""

    env_id: str
    seed: int
    num_seeds: int
    settings: dict  # of its args.json
    words: list[str]  # flags passed on to dql.py
    runs_dir: Path
    cwd: Path

    def __str__(self) -> str:
        return f"{self.env_id}__{'-'.join(map(str, sorted({self.seed, self.seed + self.num_seeds - 1})))}"

    def log(self) -> Path:
        return self.runs_dir / "logs" / f"{self}.log"


# ----------------------------------------------------------------------------- runs and jobs


def read_runs(runs_dir: Path) -> tuple[list[Run], list[Path]]:
    """All runs in a folder, each seed of several too, sorted by the time they finished or else began.

    Second: each args.json that is skipped since it, or summary.json beside it, is damaged or another program's.
    """
    runs, skipped = [], []
    for path in sorted(runs_dir.rglob("args.json")):
        written = path.with_name("summary.json")
        try:
            args = read_args(path)
            summary = read_summary(written, args) if written.exists() else None
            runs.append(((written if summary else path).stat().st_mtime, Run(path.parent, args, summary)))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            skipped.append(path)
    return [run for _, run in sorted(runs, key=lambda entry: entry[0])], skipped


def read_args(path: Path) -> dict:
    """A run's args.json. Raises if it is damaged or another program's; an older version may have had other flags."""
    args = json.loads(path.read_text())
    known = {f.name: args[f.name] for f in fields(dql.Args) if f.name in args}
    if missing := {"env_id", "seed", "num_seeds", "num_updates", "device"} - {*known}:
        raise ValueError(f"no {missing}")
    dql.with_settings(dql.Args(**known))
    return args


def read_summary(path: Path, args: dict) -> dict | None:
    """A run's summary.json, or None if the run was extended since. Raises if it is damaged or another program's."""
    summary = json.loads(path.read_text())
    numbers = [summary["num_updates"]]
    if args["num_seeds"] == 1:
        numbers += [summary["updates_per_second"], summary["seconds"], len(summary["device"])]
        numbers += [summary[name][what] for name in SCORES for what in ("score", "std", "step")]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("not finite")
    return summary if summary["num_updates"] == args["num_updates"] else None


def settings_of(env_id: str, given: dql.Args) -> dict:
    """The args.json of a run of that task with these flags, without seeds and what does not affect scores."""
    full = arguments.as_json(dql.with_settings(replace(given, env_id=env_id)))
    return {name: value for name, value in full.items() if name not in FREE}


def plan(args: Args, wanted: dict[str, dict], words: list[str], kind: str) -> list[Job]:
    """For each task, jobs that resume folders, then jobs for missing seeds; on a GPU consecutive seeds share one."""
    (runs, _), jobs, rest = read_runs(args.runs_dir), [], (words, args.runs_dir.resolve(), Path.cwd())
    for env_id, settings in wanted.items():
        same = [run for run in runs if not run.differs(settings)]
        missing = set(range(args.seeds)) - {run.args["seed"] for run in same if run.counts()}
        for run in reversed(same):
            group = range(run.args["seed"], run.args["seed"] + run.args["num_seeds"])
            if missing & {*group} and run.unfinished(kind) and (run.folder / "checkpoint.pt").exists():
                jobs.append(Job(env_id, group.start, len(group), settings, *rest))
                missing -= {*group}
        for _, neighbours in groupby(enumerate(sorted(missing)), lambda pair: pair[1] - pair[0]):
            seeds = [seed for _, seed in neighbours]
            for group in [seeds] if kind == "cuda" else [[seed] for seed in seeds]:
                jobs.append(Job(env_id, group[0], len(group), settings, *rest))
    return jobs


# ----------------------------------------------------------------------------- training

# Linux sends the child SIGTERM when its parent dies, even by SIGKILL; with the parent dead already, it runs nothing.
BOUND = """import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.getppid() == int(sys.argv[1]) and os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"""


def start(job: Job, device: str) -> subprocess.Popen | None:
    """Starts or resumes a job; returns its process, or None if the job is already done."""
    same = [run for run in read_runs(job.runs_dir)[0] if not run.differs(job.settings)
            and (run.args["seed"], run.args["num_seeds"]) == (job.seed, job.num_seeds)]  # fmt: skip
    if any(run.summary for run in same):
        return None
    command = [*job.words, "--env-id", job.env_id, "--seed", str(job.seed), "--num-seeds", str(job.num_seeds),
               "--runs-dir", str(job.runs_dir)]  # fmt: skip
    for run in same:
        if run.unfinished(device.split(":")[0]) and (_in_use(run.folder) or (run.folder / "checkpoint.pt").exists()):
            command = ["--resume", str(run.folder)]
    threads = {"OMP_NUM_THREADS": "1"} if device == "cpu" else {}
    program = ["-c", BOUND, str(os.getpid()), "-u", str(ROOT / "dql.py"), *command, "--device", device]
    with job.log().open("a") as log:
        # in its own session, so that Ctrl-C reaches it as one SIGTERM: a second signal would end it without checkpoint
        return subprocess.Popen([sys.executable, *program], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                cwd=job.cwd, env=threads | os.environ, start_new_session=True)  # fmt: skip


def _in_use(folder: Path) -> bool:
    """Whether a process is writing the run; waits up to 30 s for one whose parent died to checkpoint and end."""
    try:
        with FileLock(folder / ".lock", timeout=30):
            return False
    except Timeout:
        return True


def outcome(job: Job, code: int) -> str:
    """Empty if the job ended well; otherwise its exit code, its log's last line and path."""
    lines = re.split(r"[\r\n]+", job.log().read_text(errors="replace").strip())
    return f"exit code {code}: {lines[-1]} ({job.log()})" if code else ""


def train_here(jobs: list[Job], slots: list[str], stopped: list[int]) -> Iterator[tuple[Job, str]]:
    """Trains jobs, one at a time on each slot; yields each with its outcome as it ends. A signal stops them all."""
    waiting, free, running = jobs[::-1], slots[::-1], []
    while (waiting or running) and not stopped:
        while waiting and free and not stopped:
            job = waiting.pop()
            print(f"{job}: starts on {free[-1]}", flush=True)
            if child := start(job, free[-1]):
                running.append((job, free.pop(), child))
        for entry in [entry for entry in running if entry[2].poll() is not None]:
            job, device, child = entry
            running.remove(entry)
            free.append(device)
            yield job, outcome(job, child.returncode)
        time.sleep(0.1)
    for *_, child in running:
        child.terminate()
    for *_, child in running:
        child.wait()


def work(job: Job, device: str) -> str:
    """Runs a job on a Ray worker; returns its outcome."""
    child = start(job, device)
    try:
        while child and child.poll() is None:
            time.sleep(0.2)  # unlike wait(), lets through the interrupt by which Ray cancels
    finally:
        if child and child.poll() is None:
            child.terminate()
            child.wait()
    return outcome(job, child.returncode) if child else ""


def train_on_ray(jobs: list[Job], kind: str, per_device: int, stopped: list[int]) -> Iterator[tuple[Job, str]]:
    """Trains each job as a Ray task, retried if its worker dies; yields each with its outcome as it ends."""
    import ray

    gpus = 1 / per_device if kind == "cuda" else 0
    task = ray.remote(max_retries=10, num_cpus=1, num_gpus=gpus)(work)
    running = {task.options(name=str(job)).remote(job, kind): job for job in jobs}
    while running and not stopped:
        for handle in ray.wait(list(running), timeout=0.5)[0]:
            job = running.pop(handle)
            try:
                yield job, ray.get(handle)
            except ray.exceptions.RayError as error:
                yield job, str(error).strip().splitlines()[-1]
    for handle in running:
        ray.cancel(handle)
    if running:
        ray.wait(list(running), num_returns=len(running), timeout=30)


def connect(args: Args) -> str:
    """Joins the Ray cluster; returns the kind of device to train on. Raises BadInput."""
    try:
        import ray
    except ImportError:
        raise BadInput("--ray needs Ray: pip install ray") from None
    try:
        ray.init(address=args.ray, log_to_driver=False, logging_level="warning")
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise BadInput(f"--ray {args.ray}: {reason(error)}") from None
    gpus = ray.cluster_resources().get("GPU")
    return args.devices[0].split(":")[0] if args.devices else "cuda" if gpus else "cpu"


# ----------------------------------------------------------------------------- the table


def newest(runs: list[Run], settings: dict) -> list[Run]:
    """For each seed, in order, the run with these settings that finished last."""
    by_seed = {run.args["seed"]: run for run in runs if run.counts() and not run.differs(settings)}
    return [by_seed[seed] for seed in sorted(by_seed)]


def task_row(env_id: str, runs: list[Run]) -> dict:
    """A task's row; each score is (mean, standard deviation over seeds, None for one seed), or None if unknown."""
    row = {"task": env_id, "seeds": len(runs), "num_updates": runs[0].args["num_updates"]}
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
                known = [row[name][0] for row in there if row[name]]
                average[name] = (float(np.mean(known)), None) if len(known) == len(there) else None
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


def write_tables(out: Path, runs_dir: Path, wanted: dict[str, dict], words: list[str]) -> str:
    """Writes table1.md, table1.csv and runs.csv; returns the first's text. Raises BadInput if no run has finished."""
    runs, skipped = read_runs(runs_dir)
    note = f"Skipped: {len(skipped)} run(s) with damaged or foreign JSON: {skipped[0].parent} ..." if skipped else ""
    used = {env_id: found for env_id, settings in wanted.items() if (found := newest(runs, settings))}
    if not used:
        raise BadInput(f"no finished run of these tasks and settings in {runs_dir}. {note}".strip())
    rows = [task_row(env_id, found) for env_id, found in used.items()]
    rows += average_rows(rows)
    text = markdown(rows) + f"""

Normalized scores, mean ± standard deviation over seeds, of the last, the best and the offline-selected evaluation.
Settings: the paper's{" but for " * bool(words) + " ".join(words)}. Paper: its Table 1 (*: quoted from memory).
Reproduction: FlowRL (arXiv 2603.27450), table 2, last evaluation.
"""
    others = [run.differs(wanted[run.args["env_id"]]) for run in runs if run.counts() and run.args["env_id"] in wanted]
    if names := sorted(set().union(*others)):
        text += f"Left out: {sum(map(bool, others))} finished run(s) with other {', '.join(names)}.\n"
    text += f"{note}\n" * bool(note)
    write_whole(out / "table1.md", lambda beside: beside.write_text(text))
    by_task = [
        {key: row[key] for key in ("task", "seeds", "num_updates")}
        | {f"{key}_{what}": row[key] and row[key][k] for key in (*SCORES, "paper", "reproduction")
           for k, what in enumerate(("mean", "std"))} for row in rows
    ]  # fmt: skip
    by_run = [
        {key: run.summary[key] for key in ("env_id", "seed", "num_updates", "updates_per_second", "seconds", "device")}
        | {f"{key}_{what}": run.summary[key][what] for key in SCORES for what in ("score", "std", "step")}
        | {"folder": str(run.folder)} for found in used.values() for run in found
    ]  # fmt: skip
    for name, table in (("table1.csv", by_task), ("runs.csv", by_run)):
        write_whole(out / name, lambda beside, table=table: write_metrics(beside, table))
    return text


# ----------------------------------------------------------------------------- the command line


def parse(argv: list[str]) -> tuple[Args, list[str]]:
    """The arguments, and the words passed on to dql.py. Raises BadInput."""
    args, words = arguments.parsed(Args, argv, "bench/table1.py", return_unknown_args=True)
    if args.quick:
        out = Path("runs/table1-quick") if args.out == Args().out else args.out
        return replace(args, tasks=["halfcheetah-demo-v0"], seeds=2, out=out), [*QUICK, *words]
    for name in ("seeds", "jobs_per_device"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} is {getattr(args, name)}, it must be at least 1")
    return args, words


def choose_tasks(patterns: list[str]) -> list[str]:
    """The ids that match, in the paper's order. Raises BadInput for a pattern that matches none."""
    chosen = set()
    for pattern in patterns:
        found = {name for name, it in dql.SETTINGS.items() if name == pattern or (it.paper and fnmatch(name, pattern))}
        chosen |= found
        if not found:
            task_of(pattern)  # raises, naming the closest ids
    return [env_id for env_id in dql.SETTINGS if env_id in chosen]


def choose_devices(args: Args) -> list[str]:
    """Each device, repeated for every job that may run on it at once. Raises BadInput."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]  # which touches none: that would take memory there
    devices = args.devices or gpus or ["cpu"]
    if missing := {*devices} - {*gpus, "cpu"}:
        raise BadInput(f"--devices {' '.join(sorted(missing))}: there is {' and '.join([*gpus, 'cpu'])}")
    if len({device.split(":")[0] for device in devices}) > 1:
        raise BadInput(f"--devices {' '.join(devices)}: a run ends on the kind of device that it began on, give one")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [d for d in devices for _ in range(args.jobs_per_device or (cores if d == "cpu" else 1))]


def train(args: Args, wanted: dict[str, dict], words: list[str]) -> int:
    """Trains what is missing and writes the tables whenever a job ends; returns the exit code. Raises BadInput."""
    (args.runs_dir / "logs").mkdir(parents=True, exist_ok=True)
    stopped, failed, slots = [], False, None if args.ray else choose_devices(args)
    kind = slots[0].split(":")[0] if slots else connect(args)
    for signum in ending.SIGNALS:
        signal.signal(signum, lambda signum, _: stopped.append(signum))
    jobs = plan(args, wanted, words, kind)
    print(f"{len(jobs)} job(s) to do", flush=True)
    on_ray = (jobs, kind, args.jobs_per_device or 1, stopped)
    for job, wrong in train_here(jobs, slots, stopped) if slots else train_on_ray(*on_ray):
        print(f"{job}: {wrong or 'done'}", file=sys.stderr if wrong else sys.stdout, flush=True)
        failed |= bool(wrong)
        with suppress(BadInput):  # none has finished yet, or the disk is full
            write_tables(args.out, args.runs_dir, wanted, words)
    return 128 + stopped[0] if stopped else int(failed)


def run(argv: list[str]) -> int:
    """Does what the command line asks for; returns the exit code. Raises BadInput."""
    args, words = parse(argv)
    given = arguments.parse(dql.Args, words)
    if taken := [name for name in OWN if getattr(given, name) != getattr(dql.Args(), name)]:
        raise BadInput(f"--{taken[0].replace('_', '-')} is not passed on: each job has its own (see --help)")
    wanted = {env_id: settings_of(env_id, given) for env_id in choose_tasks(args.tasks)}
    args.out.mkdir(parents=True, exist_ok=True)
    code = 0 if args.only_table else train(args, wanted, words)
    with suppress(BadInput) if code else nullcontext():
        print(write_tables(args.out, args.runs_dir, wanted, words))
    return code


def main() -> None:
    ending.run_main("table1.py", lambda: sys.exit(run(sys.argv[1:])))


if __name__ == "__main__":
    main()
