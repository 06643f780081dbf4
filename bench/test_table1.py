"""Tests Table 1 of made-up runs against arithmetic by hand, and real runs killed and started again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import table1
import tiny

import dql
from housekeeping.ending import run_main
from housekeeping.folder import seed_folders, write_args

TINY = ["--num-updates", "40", "--eval-every", "10", "--eval-episodes", "2", "--eval-candidates", "2",
        "--batch-size", "8", "--num-steps", "2", "--log-every", "4"]  # fmt: skip
linux = pytest.mark.skipif(sys.platform != "linux", reason="only there do a killed program's children end with it")


def make_run(runs_dir: Path, env_id: str, seed: int, scores: tuple | None, num_seeds=1, name="", **changes) -> Path:
    """Makes a run's folder like dql.py's: finished with these scores (last, best, offline) or, if None, unfinished."""
    args = dql.with_settings(dql.Args(env_id=env_id, seed=seed, num_seeds=num_seeds, device="cpu", **changes))
    folder = runs_dir / f"{env_id}__dql__{seed}__{name or num_seeds}"
    folder.mkdir(parents=True)
    write_args(args, folder)
    if scores:
        summary = {name: {"score": s, "std": 1.0} for name, s in zip(table1.SCORES, scores, strict=True)}
        for path in {folder, *seed_folders(args, folder)}:
            (path / "summary.json").write_text(json.dumps(summary | {"num_updates": args.num_updates}))
    return folder


def table_of(tmp_path: Path, *words: str) -> list[dict]:
    """The table's rows for the runs in a folder."""
    assert table1.run(["--only-table", "--runs-dir", str(tmp_path), "--out", str(tmp_path / "out"), *words]) == 0
    return json.loads((tmp_path / "out" / "table1.json").read_text())["rows"]


def test_table_of_made_up_runs(tmp_path, capsys):
    for seed, last in enumerate((80.0, 86.0, 92.0)):
        make_run(tmp_path, "hopper-medium-v2", seed, (last, 95.0, 90.0))
    make_run(tmp_path, "hopper-medium-v2", 3, None)
    make_run(tmp_path, "walker2d-medium-v2", 0, (70.0, 74.0, 71.0), num_seeds=2)
    make_run(tmp_path, "kitchen-complete-v0", 7, (50.0, 60.0, 55.0))
    make_run(tmp_path, "hopper-medium-v2", 4, (1.0, 1.0, 1.0), num_updates=20_000, eval_every=10_000)
    make_run(tmp_path, "hopper-medium-v2", 5, (2.0, 2.0, 2.0), eta=0.0)
    make_run(tmp_path, "halfcheetah-demo-v0", 0, (3.0, 3.0, 3.0))

    hopper, walker, kitchen, gym, kitchens = table_of(tmp_path)
    assert (hopper["task"], hopper["seeds"], hopper["num_updates"]) == ("hopper-medium-v2", 3, 2_000_000)
    assert hopper["last"] == [86.0, pytest.approx(24**0.5)]  # (36 + 0 + 36) / 3 = 24
    assert [hopper[name] for name in ("best", "offline", "paper", "reproduction")] == [[95, 0], [90, 0], [90.5, 4.6],
                                                                                       [80.4, 15.7]]  # fmt: skip
    assert (walker["seeds"], walker["last"], kitchen["seeds"], kitchen["last"]) == (2, [70, 0], 1, [50, None])
    assert gym["task"] == "Gym average, 2 of 9 tasks" and kitchens["task"] == "Kitchen average, 1 of 3 tasks"
    assert (gym["last"], gym["paper"]) == ([78, None], [88.75, None])  # (86 + 70) / 2, (90.5 + 87.0) / 2
    assert gym["reproduction"][0] == pytest.approx(83.55) and kitchens["reproduction"] is None  # (80.4 + 86.7) / 2

    text = (tmp_path / "out" / "table1.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "| hopper-medium-v2 | 3 | 2,000,000 | 86.0 ± 4.9 | 95.0 ± 0.0 | 90.0 ± 0.0 | 90.5 ± 4.6 |" in text
    assert "| kitchen-complete-v0 | 1 | 250,000 | 50.0 | 60.0 | 55.0 | 84.0 ± 7.4* |  |" in text
    assert "Left out: 2 finished run(s) with other eta, eval_candidates, eval_every, num_updates." in text

    (short,) = (r for r in table_of(tmp_path, "--num-updates", "20000", "--eval-every", "10000") if r["seeds"] == 1)
    assert (short["num_updates"], short["last"]) == (20_000, [1.0, None])
    (demo,) = table_of(tmp_path, "--tasks", "halfcheetah-demo-v0")
    assert demo["last"] == [3.0, None]


def test_the_newest_finished_run_of_a_seed_counts(tmp_path):
    for name, score, age in (("b", 10.0, 100), ("a", 20.0, 0), ("c", 30.0, 200)):
        folder = make_run(tmp_path, "pen-human-v1", 0, (score,) * 3, name=name)
        os.utime(folder / "summary.json", (time.time() - age,) * 2)
    make_run(tmp_path, "pen-human-v1", 0, None, name="d")
    task, average = table_of(tmp_path)
    assert (task["seeds"], task["last"], average["last"]) == (1, [20, None], [20, None])


def test_damaged_and_foreign_json_is_skipped(tmp_path, capsys):
    """It is counted and told in one line; runs that are whole are in the table, and none is trained in its place."""
    make_run(tmp_path, "hopper-medium-v2", 0, (80.0, 95.0, 90.0))
    whole = make_run(tmp_path, "hopper-medium-v2", 1, (1.0, 1.0, 1.0))
    args, summary = (json.loads((whole / name).read_text()) for name in ("args.json", "summary.json"))
    bad_args = ["", "[1, 2", "[]", "3", "[" * 10_000, "{}", {"env_id": "hopper-medium-v2"}, "\0\udcff",
                args | {"env_id": ["a"]}, args | {"seed": "0"}]  # fmt: skip
    bests = (1.0, {"score": "1", "std": 1.0}, {"score": float("nan"), "std": 1.0})
    bad_summaries = ["", "[]", "{}", {"num_updates": 2_000_000}, *(summary | {"best": best} for best in bests)]
    bad = [("args.json", text) for text in bad_args] + [("summary.json", text) for text in bad_summaries]
    for k, (name, text) in enumerate(bad):
        shutil.copytree(whole, tmp_path / f"bad-{k}")
        text = text if isinstance(text, str) else json.dumps(text)
        (tmp_path / f"bad-{k}" / name).write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "folders" / "args.json").mkdir(parents=True)
    hopper, _ = table_of(tmp_path)
    assert (hopper["seeds"], hopper["last"]) == (2, [40.5, 39.5])
    out = capsys.readouterr().out
    assert f"Skipped: {len(bad) + 1} run(s) with damaged or foreign JSON: {tmp_path / 'bad-0'} ..." in out.splitlines()
    (whole / "summary.json").write_text("x")
    assert jobs_of(tmp_path, "cuda", seeds=2) == [(1, 1)]


def jobs_of(runs_dir: Path, kind: str, seeds=5) -> list[tuple[int, int]]:
    """The first seed and number of seeds of each job."""
    wanted = dql.with_settings(dql.Args(env_id="hopper-medium-v2", num_seeds=seeds))
    return [(job.seed, job.num_seeds) for job in table1.plan(wanted, table1.read_runs(runs_dir)[0], kind)]


def test_jobs(tmp_path):
    """Consecutive seeds share a job on a GPU only; finished ones get none; a folder is resumed where it can be."""
    assert jobs_of(tmp_path, "cuda") == [(0, 5)]
    assert jobs_of(tmp_path, "cpu", seeds=3) == [(0, 1), (1, 1), (2, 1)]
    make_run(tmp_path, "hopper-medium-v2", 1, (1.0, 1.0, 1.0))
    make_run(tmp_path, "hopper-medium-v2", 4, None, eta=0.0)
    assert jobs_of(tmp_path, "cuda") == [(0, 1), (2, 3)]
    make_run(tmp_path, "hopper-medium-v2", 3, None, num_seeds=2)
    assert jobs_of(tmp_path, "cpu") == [(3, 2), (0, 1), (2, 1)]
    assert jobs_of(tmp_path, "cuda") == [(0, 1), (2, 3)]  # a run is resumed only on the kind of device it began on


@pytest.mark.parametrize("words, complaint", [
    (["--seeds", "0"], "--num-seeds is 0, it must be at least 1"),
    (["--seeds", "x"], "invalid literal for int"),
    (["--tasks", "hoper-medium-v2"], "hopper-medium-v2"),
    (["--gama", "1"], "--gamma"),
    (["--num-seeds", "2"], "--num-seeds is not passed on"),
    (["--num-updates", "0"], "--num-updates is 0"),
    (["--devices", "cuda:99"], "--devices cuda:99: there is "),
    (["--only-table"], "no finished run"),
    (["--only-table", "--runs-dir", table1.__file__], "no finished run"),
    (["--only-table", "--out", table1.__file__], "File exists"),
    (["--devices", "cpu", "--tasks", "hopper-medium-v2", "--runs-dir", table1.__file__], "Not a directory"),
])  # fmt: skip
def test_bad_input_in_one_line(words, complaint, tmp_path, capsys):
    words = ["--runs-dir", str(tmp_path), "--out", str(tmp_path), *words]
    with pytest.raises(SystemExit) as stop:
        run_main("table1.py", lambda: table1.run(words))
    said = capsys.readouterr()
    assert stop.value.code == 2 and complaint in said.err and said.err.count("\n") == 1 and said.out == ""


def command(folder: Path, data: Path, *words: str) -> list[str]:
    return [sys.executable, table1.__file__, "--runs-dir", str(folder / "runs"), "--out", str(folder / "out"),
            "--dataset-path", str(data), "--devices", "cpu", "--seeds", "2", *TINY, "--tasks", tiny.ENV_ID, *words]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A folder with the data and the finished runs of seeds 0 and 1, and the output of the command that made them.

    The command was also given walker2d, which the data do not fit.
    """
    folder = tmp_path_factory.mktemp("undisturbed")
    words = command(folder, tiny.write_data(folder / "hopper.hdf5", 300), "walker2d-medium-v2")
    return folder, subprocess.run(words, capture_output=True, text=True)


def run_of(folder: Path, seed: int) -> Path:
    """The folder of that seed's run, which may not be there yet."""
    return next((folder / "runs").glob(f"hopper-medium-v2__dql__hopper__{seed}__*"), folder / "none")


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def no_trainer(folder: Path) -> bool:
    """Whether no dql.py is running that was given a path in the folder."""
    lines = subprocess.run(["ps", "-eo", "args", "-ww"], capture_output=True, text=True).stdout.splitlines()
    return not any("dql.py" in line and str(folder) in line for line in lines)


@linux
def test_killed_and_started_again(undisturbed, tmp_path):
    """Asked to stop in mid-run, then killed in mid-run: no process is left, and the results equal undisturbed ones."""
    folder, _ = undisturbed
    words = command(tmp_path, folder / "hopper.hdf5")
    for seed, signum, code in ((0, signal.SIGTERM, 128 + signal.SIGTERM), (1, signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        try:
            wait_until(lambda seed=seed: (run_of(tmp_path, seed) / "checkpoint.pt").exists())
        finally:
            process.send_signal(signum)
        assert process.communicate()[1] == "table1.py: stopped; the same command goes on\n" * (seed == 0)
        assert process.returncode == code
        wait_until(lambda: no_trainer(tmp_path))
        assert not (run_of(tmp_path, seed) / "summary.json").exists()  # it was in mid-run
    assert "1 job(s) to do" in subprocess.run(words, capture_output=True, text=True, check=True).stdout
    for seed in (0, 1):
        log = (tmp_path / "runs" / "logs" / f"hopper-medium-v2__{seed}.log").read_text()
        first, again = re.findall(r"updates (\d+) to 40", log)  # where the run was started and resumed
        assert int(first) == 0 and int(again) >= 10
    assert len({(path / "out" / "table1.json").read_text() for path in (folder, tmp_path)}) == 1


def test_a_failing_job_takes_no_other_with_it(undisturbed):
    folder, done = undisturbed
    log = folder / "runs" / "logs" / "walker2d-medium-v2__0.log"
    assert done.returncode == 1 and "| hopper-medium-v2 | 2 | 40 |" in done.stdout
    assert "walker2d-medium-v2__0: exit code 2: dql.py: " in done.stderr and f"({log})" in done.stderr
    assert done.stderr.count("\n") == 2 and "are they walker2d's?" in log.read_text()


def test_quick_then_nothing_to_do(tmp_path):
    words = [sys.executable, table1.__file__, "--quick", "--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path),
             "--devices", "cpu"]  # fmt: skip
    first = subprocess.run(words, capture_output=True, text=True)
    assert first.returncode == 0 and "2 job(s) to do" in first.stdout
    assert "| halfcheetah-demo-v0 | 2 | 24 |" in first.stdout
    assert "0 job(s) to do" in subprocess.run(words, capture_output=True, text=True).stdout
