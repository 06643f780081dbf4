"""Learning curves and names: what a run writes for people to look at, and bench/plot.py, which compares runs."""

import csv
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from runs import ROOT, bad_input, random_file, resume, run_left_alone, tiny_args  # noqa: F401

import dql
from d4rl_tasks import files, is_published, task_of
from housekeeping import curves, machine
from housekeeping.curves import mean_and_spread, read_metrics, write_curves, write_metrics
from housekeeping.folder import start_folder


def row(step, score="", std="", target_q=1.0, bc=0.5, critic=2.0):
    return {"step": step, "score": score, "score_std": std, "target_q": target_q, "bc_loss": bc, "critic_loss": critic}


ONE = [row(10), row(20, 4.0, 1.0), row(40, 8.0, 3.0)]
TWO = [row(20, 6.0, 9.0, target_q=5.0), row(30, 7.0, 9.0), row(40, 2.0, 9.0)]


def columns(*of):
    return [list(map(float, x)) for x in of]


def test_means_and_spreads_by_hand():
    """Over seeds, at the steps that all have; of one seed, the spread of a score is over its episodes."""
    assert columns(*mean_and_spread([ONE, TWO], "score")) == [[20, 40], [5, 5], [1, 3]]
    assert columns(*mean_and_spread([ONE, TWO], "target_q")) == [[20, 40], [3, 1], [2, 0]]
    assert columns(*mean_and_spread([ONE], "score")) == [[20, 40], [4, 8], [1, 3]]
    assert columns(*mean_and_spread([ONE], "bc_loss")) == [[10, 20, 40], [0.5, 0.5, 0.5], [0, 0, 0]]


def test_what_a_curve_shows(tmp_path, monkeypatch):
    """A single point, the paper's score, the range of Q without flattening Q, and no empty panels for cloning."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: figures.append(figure) or save(figure, *a, **k))
    write_curves(tmp_path / "a.png", {"x": [ONE], "y": [TWO]}, "title", "return", (50.0, 1.0), (-100.0, 400.0))
    cloned = [[row(20, 4.0, 1.0, 0.0, 0.5, 0.0)]]
    write_curves(tmp_path / "b.png", {"x": cloned}, "title", "return")
    write_curves(tmp_path / "c.png", {"x": cloned, "y": [ONE]}, "title", "return")
    q, cloning, both = figures
    assert [len(axes.lines) for axes in both.axes] == [2, 2, 1, 1]
    assert [axes.get_title().split("\n")[0] for axes in q.axes] == [
        "return", "imitation loss (Eq. 2)", "critics' loss (Eq. 4)", "mean target Q (Eq. 4)"]  # fmt: skip
    scores, _, _, target = q.axes
    assert [line.get_label() for line in scores.lines] == ["x", "y", "paper: 50.0"]
    assert "-100 to 400" in target.get_title() and target.get_ylim()[1] < 10 and len(target.lines) == 4
    assert len(cloning.axes) == 2 and cloning.axes[0].lines[0].get_markersize() >= 5


def test_a_run_of_several_seeds_has_a_curve_and_rows_of_all(run_left_alone):  # noqa: F811
    folder = run_left_alone(2)[1]
    rows = read_metrics(folder / "metrics.csv")
    for seed in (0, 1):
        own = [{k: v for k, v in row.items() if k != "seed"} for row in rows if row["seed"] == seed]
        assert own == read_metrics(folder / f"seed-{seed}" / "metrics.csv")
    assert (folder / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def plot(*words):
    command = [sys.executable, ROOT / "bench" / "plot.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_runs_are_plotted_in_groups(run_left_alone, tmp_path):  # noqa: F811
    """plot.py: a line for each run, or for each value of a flag, with the mean and spread of all seeds."""
    runs = [run_left_alone(n)[1] for n in (1, 2)]
    done = plot(*runs, ROOT, "--out", tmp_path)
    assert done.returncode == 0 and f"skipped, not the folder of a run: {ROOT}" in done.stdout, done.stderr
    picture = tmp_path / "curves-hopper-medium-v2.png"
    assert done.stdout.endswith(f"{tmp_path / 'curves.csv'}\n{picture}\n") and picture.exists()
    with (tmp_path / "curves.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["group"] == str(runs[1])]
    scores = [[row["score"] for row in read_metrics(runs[1] / f"seed-{k}" / "metrics.csv") if row["score"] != ""]
              for k in (0, 1)]  # fmt: skip
    assert [int(row["seeds"]) for row in rows] == [2, 2] and [int(row["step"]) for row in rows] == [12, 24]
    np.testing.assert_allclose([float(row["score"]) for row in rows], np.mean(scores, 0))
    np.testing.assert_allclose([float(row["std"]) for row in rows], np.std(scores, 0))
    done = plot(*runs, "--by", "eta", "--num-steps", "--out", tmp_path)
    assert done.returncode == 2, "--num-steps is no flag of plot.py"
    done = plot(*runs, "--by", "eta", "num-steps", "--out", tmp_path)
    assert "hopper-medium-v2, --eta 1.0, --num-steps 2: " in done.stdout and "(3 seeds, update 24)" in done.stdout
    done = plot(*runs, "--by", "seed", "lr", "--out", tmp_path)
    assert re.findall(r"--seed (\d), --learning-rate 0.0003: .*\((\d) seed", done.stdout) == [("0", "2"), ("1", "1")]
    longer = tmp_path / "longer"
    shutil.copytree(runs[0], longer)
    rows = read_metrics(longer / "metrics.csv")
    write_metrics(longer / "metrics.csv", [{**row, "step": row["step"] + 1} for row in rows])
    done = plot(runs[0], longer, *runs[1:], "--by", "seed", "--out", tmp_path)
    assert "left out: hopper-medium-v2, --seed 0: " in done.stdout and "--seed 1: " in done.stdout
    for words, line in (((tmp_path,), "none of these is the folder"), ((*runs, "--by", "etta"), "--by etta"),
                        ((tmp_path / "gone",), "gone does not exist")):  # fmt: skip
        done = plot(*words)
        assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "step,score\nx,1\n", "step,score\n1,2,3\n"])
def test_damaged_metrics_are_refused(text, tmp_path):
    (tmp_path / "metrics.csv").write_text(text)
    bad_input(lambda: read_metrics(tmp_path / "metrics.csv"), str(tmp_path / "metrics.csv"))


# ----------------------------------------------------------------- names


def test_a_folder_s_name_says_what_was_trained(tmp_path):
    args = dql.with_settings(dql.Args(runs_dir=tmp_path, env_id="hopper-medium-v2"))
    changed = {"eta": 0.0, "eval_candidates": 1, "num_seeds": 3, "seed": 4, "dataset_path": Path("data/my.hdf5")}
    for changes, name in (({}, "hopper-medium-v2__dql__0__2"), (changed, "hopper-medium-v2__bc__my__4-6__2")):
        assert start_folder(dql.replace(args, **changes)).name.startswith(name)
    named = dql.replace(args, run_name="mine")
    assert start_folder(named) == tmp_path / "mine"
    bad_input(lambda: start_folder(named), "exists", f"--resume {tmp_path / 'mine'}")
    for wrong in ("a/b", "", ".."):
        bad_input(lambda wrong=wrong: start_folder(dql.replace(args, run_name=wrong)), "--run-name is")


def test_the_paper_s_score_stands_beside_the_paper_s_data_only(tmp_path, monkeypatch):
    """Known by where the file lies, or by its sha256."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    own = random_file(tmp_path / "own" / "hopper_medium-v2.hdf5")
    other = random_file(tmp_path / "hopper_medium-v2.hdf5")
    task = task_of("hopper-medium-v2")
    assert is_published(task, None) and is_published(task, own)
    assert not is_published(task, other) and not is_published(task, {}) and not is_published(task, tmp_path)
    import pooch

    assert is_published(task._replace(sha256=pooch.file_hash(str(other))), other)
    args = tiny_args(tmp_path, num_updates=1, batch_size=4)
    assert dql.train(dql.replace(args, dataset_path=None))["paper"] == (90.5, 4.6)
    assert dql.train(dql.replace(args, dataset_path=other))["paper"] is None
    assert files._own_path(task) == own


def test_a_summary_says_by_which_code_and_arguments(run_left_alone, tmp_path, monkeypatch):  # noqa: F811
    import json

    folder = run_left_alone(2)[1]
    for path in (folder, folder / "seed-1"):
        summary = json.loads((path / "summary.json").read_text())
        assert summary["args"] == json.loads((path / "args.json").read_text())
        assert summary["commit"] == machine.commit()
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "housekeeping" / "machine.py"))
    assert machine.commit() is None, "installed, where there is no repository"
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    assert len(machine.commit()) == 40


def test_hyperparameters_are_logged(run_left_alone):  # noqa: F811
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams import metadata

    events = accumulators.EventAccumulator(str(run_left_alone(1)[1])).Reload()
    data = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data
    start = metadata.parse_session_start_info_plugin_data(data.content)
    assert start.hparams["batch_size"].number_value == 16 and start.hparams["env_id"].string_value == "hopper-medium-v2"


def test_a_resumed_run_goes_on_with_its_own_at_weights_and_biases(tmp_path, monkeypatch):
    given = []

    def init(**options):  # as wandb.init does
        given.append(options)
        return types.SimpleNamespace(id=options.get("id", "abc-123"))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setattr(curves, "curves_work", lambda: False)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    args = tiny_args(tmp_path, num_updates=2, track=True, run_name="x")
    folder = dql.train(args)["folder"]
    resume(Path(folder), track=True, num_updates=4)
    first, second = given
    assert first["name"] == "x" and first["config"]["batch_size"] == 16 and "id" not in first
    assert (second["id"], second["resume"]) == ("abc-123", "allow")
    assert first["project"] == second["project"] == "mine"
