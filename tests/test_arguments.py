"""Command lines, values from Python, and what a resumed run may change: sound arguments, or one line."""

import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
from runs import bad_input, command, one_line, run_left_alone  # noqa: F401, a fixture

import dql
from d4rl_tasks import TASKS, BadInput
from dql import Args
from housekeeping import arguments


def fails(capsys, *words: str) -> str:
    """Runs the command line, which must raise BadInput of one line; returns that line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dql.py", *words])
        return bad_input(dql.main)


@pytest.mark.parametrize("words, says", [
    (["--env-id", "halfcheetah-medum-v2"], "halfcheetah-medium-v2"),
    (["--eta", "much"], "--eta"),
    (["--eta", "nan"], "--eta is nan, it must be"),
    (["--eta", "-1"], "--eta is -1.0, it must be"),
    (["--eta", "0", "--eval-candidates", "50"], "--eta 0 trains no critics"),
    (["--eta", "0", "--critic-layernorm", "--pessimism", "1"], "leave out --critic-layernorm, --pessimism, or give"),
    (["--num-critics", "1"], "--num-critics is 1, it must be at least 2"),
    (["--pessimism", "-1"], "--pessimism is -1.0, it must be at least 0"),
    (["--eval-episodes", "150"], "must be a multiple of it"),
    (["--schedule", "sigmoid"], "'vp', 'linear', 'cosine'"),
    (["--num-steps", "0"], "--num-steps is 0, it must be at least 1"),
    (["--gamma", "1.5"], "between 0 and 1"),
    (["--batch-size"], "--batch-size"),
    (["--no-such-flag"], "--no-such-flag"),
    (["--device", "tpu9"], "--device is tpu9, it must be"),
    (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
    (["--seed", "18446744073709551616"], "below 2^31"),
    (["--seed", "2147483647", "--num-seeds", "2", "--num-updates", "1"], "the last of the seeds below 2^31"),
    (["--dataset-path", "no-such-file.hdf5"], "no-such-file.hdf5"),
    (["--runs-dir", os.fsdecode(b"a\xff")], "is not UTF-8"),
    (["--resume", "no-such-run"], "no-such-run is not the folder of a run"),
])  # fmt: skip
def test_bad_flags_get_one_line(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_errors_reach_the_shell_without_a_traceback(tmp_path):
    line = one_line(command("--env-id", "no-such-env", cwd=tmp_path), "no-such-env")
    assert line.startswith("dql.py: unknown env id 'no-such-env'")


def test_a_complaint_is_one_short_line():
    for words, line in ((["--num-updates", "x"], "--num-updates takes int, not 'x'"),
                        (["--tau", "x"], "--tau takes float, not 'x'"),
                        (["--num-steps", "2.5"], "--num-steps takes int, not '2.5'"),
                        (["--score-range", "1"], "--score-range takes float float, not '1'"),
                        (["--schedule", "x"], "invalid choice 'x' for argument '--schedule'\\. Expected one of .*"),
                        (["--bogus"], "Unrecognized options: --bogus"),
                        (["--etaa", "1"], "Unrecognized options: --etaa, 1: did you mean --eta\\?")):  # fmt: skip
        with pytest.raises(BadInput, match=f"^{line} \\(python dql.py --help lists the flags\\)$"):
            arguments.parse(Args, words)


@pytest.mark.parametrize("wrong", [
    {"reward": "standardise"}, {"schedule": "foo"}, {"env_backend": "xx"}, {"batch_size": 2.5}, {"tau": "1"},
    {"eta": "1"}, {"eta": 0.0, "eval_candidates": "5"}, {"env_id": ["a"]}, {"runs_dir": 3}, {"seed": True},
])  # fmt: skip
def test_a_value_of_another_kind_is_refused_from_python_too(wrong):
    bad_input(lambda: dql.with_settings(Args(**wrong)), "cannot be")


def test_flags_that_may_be_none_need_no_value():
    assert arguments.parse(Args, ["--compile", "--seed", "3"]).compile is True
    assert arguments.parse(Args, ["--no-compile"]).compile is False
    assert arguments.parse(Args, ["--cudagraphs", "False", "--max-q-backup"]).cudagraphs is False
    assert arguments.parse(Args, []).compile is None


def test_flags_may_be_written_as_sweeps_write_them():
    for words, want in (
        (["--lr_decay=True", "--lr", "1e-4"], (True, 1e-4)), (["--lr-decay=false", "--lr=2"], (False, 2)),
        (["--lr_decay", "true"], (True, None)), (["--no-lr-decay", "--compile=true"], (False, None)),
    ):  # fmt: skip
        args = arguments.parse(Args, words)
        assert (args.lr_decay, args.learning_rate) == want
    assert arguments.named(["--lr=1e-4", "--no-lr_decay", "x"]) == ["learning_rate", "lr_decay"]


def test_paths_may_be_under_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = dql.with_settings(arguments.parse(Args, ["--dataset-path", "~/x.hdf5", "--runs-dir", "~/runs"]))
    assert (args.dataset_path, args.runs_dir) == (tmp_path / "x.hdf5", tmp_path / "runs")


# ----------------------------------------------------------------- resuming


def test_resume_refuses_flags_with_their_default_values(run_left_alone, monkeypatch):  # noqa: F811
    """A flag given explicitly must match the run's value even if it is the default; one that matches is accepted."""
    args, folder = run_left_alone(2)
    refused = ["--num-seeds", "1", "--log-every=1000", "--no-lr-decay", "--no-compile"]
    monkeypatch.setattr(sys, "argv", ["dql.py", "--resume", str(folder), *refused])
    bad_input(dql.main, "leave out --num-seeds 1 (the run's: 2), --log-every 1000 (the run's: 5)")
    same = ["--num-seeds", "2", "--dataset-path", os.path.relpath(args.dataset_path), "--log-every=5"]
    monkeypatch.setattr(sys, "argv", ["dql.py", "--resume", str(folder), *same])
    dql.main()


def test_resume_takes_another_path_and_otherwise_the_same(run_left_alone):  # noqa: F811
    """Device and --compile may change, and otherwise stay."""
    folder = run_left_alone(1)[1]
    saved = dql.read_args(folder)
    assert saved.device == "cpu" and saved.compile is False
    for name, value in (("compile", True), ("device", "cuda:1"), ("capture_video", True), ("runs_dir", Path("x"))):
        assert getattr(arguments.resumed(Args(resume=folder), saved), name) == getattr(saved, name)
        assert getattr(arguments.resumed(Args(resume=folder, **{name: value}), saved), name) == value


# ----------------------------------------------------------------- any command line

NUMBERS = ["nan", "inf", "-inf", "1e400", "-1e400", "1e-400", "-0", "0", "0.0", "1", "7", "-1", "0.5", "1.5", "0x10",
           "1_0", "9" * 400, "9" * 5000, "2147483648", "٣", "None", "True", "False"]  # fmt: skip
WORDS = [*NUMBERS, "", " ", "\n", "─│", "\udcff", "\0", "--", "-", "-x", "@x", "{}", "auto", *TASKS, "vp", "none",
         "standardize", "d4rl", "--no-such-flag", "--=", "--help=1"]  # fmt: skip
FLAGS = [f"--{no}{f.name.replace('_', '-')}" for f in fields(Args) for no in ("", "no-")]
BOUNDS = [
    (1, 2**31 - 1, "num_updates batch_size average_every eval_every eval_episodes eval_candidates log_every"),
    (1, 10_000, "num_steps num_seeds"), (2, 1000, "num_critics"),
    (0, 2**31 - 1, "seed"), (0, 10**18 - 1, "average_from offline_rank"),
    (0.0, 1e18, "eta grad_norm eval_temperature"), (1e-300, 1e300, "learning_rate"),
    (0.0, 1.0, "gamma tau average_decay"),
]  # fmt: skip


def fuzz(check, examples: int, *strategies) -> None:
    """Calls check with examples that hypothesis draws, the same ones every time."""
    hypothesis = pytest.importorskip("hypothesis")
    hypothesis.settings(deadline=None, max_examples=examples, derandomize=True)(hypothesis.given(*strategies)(check))()


def test_any_command_line_gives_sound_arguments_or_one_line():
    st = pytest.importorskip("hypothesis.strategies")

    def check(triples):
        argv = [word for flag, by, value in triples
                for word in {"": [flag], " ": [flag, value], "=": [f"{flag}={value}"]}[by]]  # fmt: skip
        try:
            args = dql.with_settings(arguments.parse(Args, argv))
        except BadInput as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000
            return
        for low, high, names in BOUNDS:
            for name in names.split():
                value = getattr(args, name)
                assert low <= value <= high and type(value) is type(low), (name, value)
        assert args.env_id in TASKS and args.schedule in ("vp", "linear", "cosine") and args.reward is not None
        assert dql.with_settings(args) == args

    by = st.sampled_from(["", " ", "="])
    fuzz(check, 150, st.lists(st.tuples(st.sampled_from(FLAGS), by, st.sampled_from(WORDS)), max_size=5))


def test_arguments_come_back_from_the_command_line():
    st = pytest.importorskip("hypothesis.strategies")
    paths = st.text("ab/. _é", min_size=1).map(Path)
    sound = {"dataset_path": paths, "runs_dir": paths, "resume": paths, "env_id": st.sampled_from([*TASKS])}
    for low, high, names in BOUNDS:
        numbers = st.floats(low, high) if isinstance(low, float) else st.integers(low, high)
        sound |= dict.fromkeys(names.split(), numbers)
    for f in fields(Args):
        if bool in (f.type, *get_args(f.type)):
            sound[f.name] = st.booleans()

    def check(args):
        argv = []
        for f in fields(Args):
            flag, value = f"--{f.name.replace('_', '-')}", getattr(args, f.name)
            argv += [flag if value else flag.replace("--", "--no-")] if f.type is bool else [flag, str(value)]
        assert arguments.parse(Args, argv) == args

    fuzz(check, 100, st.builds(Args, **sound))
