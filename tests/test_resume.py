"""Runs that are stopped, killed, extended, copied or damaged, and resumed: they end with the same bits or one line."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    ROOT,
    assert_same_end,
    bad_input,
    metrics,
    on_call,
    read_torch,
    resume,
    run_left_alone,  # noqa: F401, a fixture
    stop_at,
    tiny_args,
)

import dql
from dql import DiffusionQL
from housekeeping import folder as folders
from housekeeping import run as runs_module
from housekeeping.arguments import VARIANTS
from housekeeping.folder import seed_folders, start_folder, write_args


@pytest.fixture
def interruptible():
    """Enables SIGINT: background jobs start with it ignored, and a run would then ignore it too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def finished(run_left_alone, tmp_path):  # noqa: F811
    """A copy of a finished run of one seed."""
    return Path(shutil.copytree(run_left_alone(1)[1], tmp_path / "run"))


@pytest.fixture
def unfinished(finished):
    """Such a copy that resuming does not take for finished."""
    (finished / "summary.json").unlink()
    return finished


def times_of_change(folder: Path) -> dict[Path, int]:
    """Modification times of all that a run has written, except the lock, which a mere look at the run may touch."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


# ----------------------------------------------------------------- the same bits


@pytest.mark.parametrize("num_seeds", [1, 2])
@pytest.mark.parametrize("where, name, count, step, signum", [
    (DiffusionQL, "train_step", 8, 7, signal.SIGTERM), (DiffusionQL, "act_fresh", 5, 12, signal.SIGINT),
    (runs_module.Run, "log", 4, 15, signal.SIGHUP),
])  # fmt: skip
def test_a_stopped_run_goes_on_exactly(
    num_seeds, where, name, count, step, signum, run_left_alone, interruptible, capsys, tmp_path  # noqa: F811
):  # fmt: skip
    """A signal during an update, evaluation or log stops a run; resumed, it ends exactly as if never interrupted."""
    args, whole = run_left_alone(num_seeds)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    count = count * num_seeds if where is DiffusionQL else count  # seeds take turns
    stopped = stop_at(args, count, where, name, signum)
    assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    assert read_torch(stopped)["progress"]["step"] == step
    assert not (stopped / "summary.json").exists()
    summary = resume(stopped)
    assert_same_end(whole, stopped)

    capsys.readouterr()
    before = times_of_change(stopped)
    assert resume(stopped) == json.loads(json.dumps(summary))
    assert "is finished" in capsys.readouterr().out
    assert before == times_of_change(stopped)
    copied = shutil.copytree(stopped, tmp_path / "copied")
    assert resume(copied)["folder"] == str(copied)


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_a_run_given_more_updates_is_the_longer_run(num_seeds, run_left_alone, capsys):  # noqa: F811
    args, whole = run_left_alone(num_seeds)
    short = Path(dql.train(replace(args, num_updates=12))["folder"])
    assert resume(short, num_updates=24)["num_updates"] == 24
    assert_same_end(whole, short)
    for folder in (short, *seed_folders(args, short)):
        assert dql.read_args(folder).num_updates == 24
    capsys.readouterr()
    resume(short)
    assert "is finished" in capsys.readouterr().out
    bad_input(lambda: resume(short, num_updates=20), "leave out --num-updates 20 (the run's: 24)", "only grow")
    bad_input(lambda: resume(short, num_updates=2**31), "it must be at least 1 and below")


def test_the_end_of_a_decay_does_not_move(tmp_path):
    folder = Path(dql.train(tiny_args(tmp_path, num_updates=2, lr_decay=True))["folder"])
    bad_input(lambda: resume(folder, num_updates=4), "leave out --num-updates 4", "not with --lr-decay")


def test_a_seed_copied_out_of_its_run_goes_on_alone(run_left_alone, interruptible, tmp_path):  # noqa: F811
    """On a CPU it ends bit for bit as it does within the run, so a run's seeds can be spread over cores."""
    args, whole = run_left_alone(2)
    stopped = stop_at(args, 20)
    for seed in ("seed-0", "seed-1"):
        shutil.copytree(stopped / seed, tmp_path / seed)
        resume(tmp_path / seed)
        assert_same_end(whole / seed, tmp_path / seed)


def test_a_run_killed_at_random_moments_ends_the_same(tmp_path):
    """Kills a run of one seed three times, and a run of two seeds three times."""
    out = tmp_path / "torture.json"
    words = [sys.executable, "bench/torture.py", "--kills", "3", "--cases", "one", "several", "--out", str(out)]
    subprocess.run(words, cwd=ROOT, check=True, timeout=1200, capture_output=True)
    for case in json.loads(out.read_text())["kills"].values():
        assert case["kills"] == 3 and case["same"] and case["runs"] >= 1


def test_a_run_killed_between_two_files_goes_on(run_left_alone, monkeypatch):  # noqa: F811
    """A run killed while it writes a checkpoint's files, once resumed, ends exactly like an uninterrupted one."""
    args, whole = run_left_alone(2)

    def killed():
        raise KeyboardInterrupt

    for count in (2, 6):  # the evaluations at 12 and 24 write three files each: one per seed and the group's
        before = set(args.runs_dir.iterdir())
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(runs_module, "write_torch", on_call(count, runs_module.write_torch, killed))
            dql.train(args)
        (folder,) = set(args.runs_dir.iterdir()) - before
        resume(folder)
        assert_same_end(whole, folder)


def test_a_run_without_a_checkpoint_begins_anew(tmp_path):
    args = dql.with_settings(tiny_args(tmp_path, num_updates=6))
    whole, begun = Path(dql.train(args)["folder"]), start_folder(args)
    write_args(args, begun)
    resume(begun)
    assert_same_end(whole, begun)


def test_runs_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(folders.time, "strftime", lambda _: "now")
    args = dql.with_settings(tiny_args(tmp_path))
    assert len({start_folder(args) for _ in range(6)}) == 6


# ----------------------------------------------------------------- lost and damaged files


def test_lost_parts_are_written_again(run_left_alone, tmp_path, capsys):  # noqa: F811
    """Of a finished run and of one that goes on, from the run's checkpoint; what is lost is named."""
    _, whole = run_left_alone(2)
    for finished in (True, False):
        folder = Path(shutil.copytree(whole, tmp_path / f"run-{finished}"))
        shutil.rmtree(folder / "seed-1")
        for name in ("metrics.csv", "checkpoint.pt", "curve.png"):
            (folder / "seed-0" / name).unlink()
        if not finished:
            (folder / "summary.json").unlink()
        bad_input(partial(dql.load_policy, folder / "seed-0", device="cpu"), "seed-0/checkpoint.pt is missing")
        bad_input(partial(dql.load_policy, folder / "seed-1", device="cpu"), "seed-1", "no args.json")
        capsys.readouterr()
        resume(folder)
        if finished:
            err = capsys.readouterr().err
            assert err.startswith("missing") and "seed-0/metrics.csv" in err and "seed-1/args.json" in err
        assert_same_end(whole, folder)
        assert (folder / "seed-0" / "curve.png").exists() and (folder / "seed-1" / "curve.png").exists()


def test_a_finished_run_that_lost_its_checkpoint_does_not_begin_anew(run_left_alone, tmp_path):  # noqa: F811
    for num_seeds in (1, 2):
        folder = Path(shutil.copytree(run_left_alone(num_seeds)[1], tmp_path / f"{num_seeds}"))
        (folder / "checkpoint.pt").unlink()
        bad_input(partial(resume, folder), f"{folder / 'checkpoint.pt'} is missing: put a copy there")
        assert len(metrics(seed_folders(dql.read_args(folder), folder)[0])) == 6


@pytest.mark.parametrize("text", ["", "{}", '{"num_updates": 24', "[]"])
def test_a_damaged_summary_is_written_again(text, finished, run_left_alone):  # noqa: F811
    (finished / "summary.json").write_text(text)
    resume(finished)
    assert_same_end(run_left_alone(1)[1], finished)


class Marker:
    """An object whose pickle runs code when it is loaded: it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


def test_damaged_checkpoints_get_one_line_and_run_no_code(unfinished, tmp_path):
    """Cut off, a bit changed, not a number, of another program: refused by --resume and load_policy, in a line."""
    path, mark = unfinished / "checkpoint.pt", tmp_path / "mark"
    whole, good = path.read_bytes(), read_torch(unfinished)
    rng = np.random.default_rng(0)
    variants = [whole[: rng.integers(len(whole))] for _ in range(5)] + [b"", b"text", pickle.dumps(Marker(mark))]
    for place in rng.integers(len(whole) // 10, len(whole) * 9 // 10, 5):
        variants.append(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    not_finite = {name: x.clone() for name, x in good["agents"][0]["policy"].items()}
    not_finite["output.bias"][1] = np.nan
    for contents in ({"agents": []}, [1], {"agents": Marker(mark)},
                     good | {"agents": [good["agents"][0] | {"policy": not_finite}]}):  # fmt: skip
        torch.save(contents, path)
        variants.append(path.read_bytes())
    for k, content in enumerate(variants):
        path.write_bytes(content)
        for call in (lambda: resume(unfinished), lambda: dql.load_policy(unfinished, device="cpu")):
            message = bad_input(call, str(path), "damaged", "older copy", "new run")
            assert "weights_only" not in message, k
    assert not mark.exists() and path.read_bytes() == variants[-1]


def test_checkpoints_of_other_versions_say_so(unfinished):
    """A checkpoint without a layer, with a wrong shape or with less of an optimizer."""
    for damage in (
        lambda agent: agent["policy"].pop("output.bias"),
        lambda agent: agent["policy"].update({"output.bias": torch.zeros(7)}),
        lambda agent: agent["critic_opt"]["state"].pop(3),
    ):
        state = read_torch(unfinished)
        before = (unfinished / "checkpoint.pt").read_bytes()
        damage(state["agents"][0])
        torch.save(state, unfinished / "checkpoint.pt")
        for call in (lambda: resume(unfinished), lambda: dql.load_policy(unfinished, device="cpu")):
            bad_input(call, "checkpoint.pt was written by another version", "go on with that version")
        (unfinished / "checkpoint.pt").write_bytes(before)


@pytest.mark.parametrize("change", [{"num_steps": 3}, {"schedule": "cosine"}, {"eta": 0.0, "eval_candidates": 1}])
def test_args_and_checkpoint_of_two_runs_are_refused(change, unfinished):
    """Other arguments would make other actions of the same weights."""
    args = json.loads((unfinished / "args.json").read_text())
    (unfinished / "args.json").write_text(json.dumps(args | change))
    for call in (lambda: resume(unfinished), lambda: dql.load_policy(unfinished, device="cpu")):
        bad_input(call, "are of two runs", next(iter(change)))


def test_broken_args_are_refused_or_act_as_the_whole_ones(unfinished):
    good = json.loads((unfinished / "args.json").read_text())
    wrong = {
        "num_steps": (0, -1, 2.5, True, "2", None, [2]), "seed": (-1, 1.5, None, 2**63), "learning_rate": (0, "3e-4"),
        "eta": ("1", True, float("nan"), -1.0), "num_seeds": (0, 1.5, 10**9), "schedule": (3,),
        "env_id": ("x", 3, None),
        "batch_size": (2.5, 10**12), "max_q_backup": ("x", 7), "device": (3,), "compile": ("x", 1), "runs_dir": (3, []),
        "num_updates": (1.5, 10**30), "no_such_flag": (1,), "dataset_path": (3,),
    }  # fmt: skip
    texts = ["", json.dumps(good)[:100], "[]", "null", "7", "\0\x80"]
    texts += [json.dumps(good | {name: value}) for name, values in wrong.items() for value in values]
    for text in texts:
        (unfinished / "args.json").write_text(text)
        bad_input(lambda: resume(unfinished))


def test_resume_refuses_what_is_not_the_run(unfinished, run_left_alone, tmp_path):  # noqa: F811
    import h5py

    args, before = run_left_alone(1)[0], (unfinished / "args.json").read_bytes()
    bad_input(lambda: resume(tmp_path / "no-such-run"), "no-such-run is not the folder of a run")
    bad_input(lambda: resume(unfinished, eta=7.0), "--eta 7.0 (the run's: 1.0)")
    moved = Path(shutil.copy(args.dataset_path, tmp_path / "moved.hdf5"))
    with h5py.File(moved, "r+") as file:
        file["rewards"][7] += 1
    bad_input(lambda: resume(unfinished, dataset_path=moved), "data are not those")
    bad_input(lambda: resume(unfinished, dataset_path=moved, num_updates=90), "data are not those")
    assert (unfinished / "args.json").read_bytes() == before, "what is refused changes nothing"
    state = read_torch(unfinished)
    torch.save(state | {"device": "cuda"}, unfinished / "checkpoint.pt")
    bad_input(lambda: resume(unfinished), "ran on cuda")


def test_a_run_from_before_the_variants_is_resumed(unfinished, run_left_alone):  # noqa: F811
    """Its args.json and its checkpoint do not name their flags."""
    saved, checkpoint = json.loads((unfinished / "args.json").read_text()), read_torch(unfinished)
    for name in VARIANTS:
        del saved[name], checkpoint["args"][name]
    (unfinished / "args.json").write_text(json.dumps(saved))
    torch.save(checkpoint, unfinished / "checkpoint.pt")
    resume(unfinished, num_updates=30)
    assert metrics(unfinished)[: len(metrics(run_left_alone(1)[1]))] == metrics(run_left_alone(1)[1])
    state = read_torch(unfinished)["agents"][0]["critic"]
    assert [*state] == [f"q{k}.{layer}.{name}" for k in (1, 2) for layer in (0, 2, 4, 6) for name in ("weight", "bias")]


def test_a_run_with_every_variant_is_resumed_and_acts(tmp_path):
    args = tiny_args(tmp_path, critic_layernorm=True, num_critics=3, pessimism=0.5, one_step_gradient=True)
    stopped = stop_at(args, 17)
    resume(stopped)
    assert_same_end(Path(dql.train(args)["folder"]), stopped)
    policy = dql.load_policy(stopped, device="cpu")
    assert policy(np.zeros((5, 11), np.float32)).shape == (5, 3)


def test_data_may_have_moved(unfinished, run_left_alone, tmp_path):  # noqa: F811
    args, whole = run_left_alone(1)
    saved = json.loads((unfinished / "args.json").read_text())
    (unfinished / "args.json").write_text(json.dumps(saved | {"dataset_path": "/no/such/file"}))
    bad_input(lambda: resume(unfinished), "/no/such/file does not exist")
    resume(unfinished, dataset_path=shutil.copy(args.dataset_path, tmp_path / "moved.hdf5"))
    assert_same_end(whole, unfinished)
    assert dql.read_args(unfinished).dataset_path == tmp_path / "moved.hdf5"


def test_one_seed_of_several_is_not_resumed_within_its_run(run_left_alone, finished, tmp_path, capsys):  # noqa: F811
    bad_input(lambda: resume(run_left_alone(2)[1] / "seed-0"), "resume that, or a copy of the part elsewhere")
    resume(finished.rename(tmp_path / "seed-7"))  # a whole run may have such a name
    assert "is finished" in capsys.readouterr().out


def test_a_policy_of_another_device_acts_here(finished):
    """A policy trained on a GPU acts on a CPU: its generator's state, which does not fit a CPU's, is not restored."""
    want = dql.load_policy(finished, device="cpu")(np.ones(11))
    state = read_torch(finished) | {"device": "cuda", "generators": [torch.zeros(16, dtype=torch.uint8)]}
    torch.save(state, finished / "checkpoint.pt")
    np.testing.assert_array_equal(dql.load_policy(finished, device="cpu")(np.ones(11)), want)


# ----------------------------------------------------------------- other writers, full disks


def test_a_second_writer_is_refused(tmp_path):
    """A run is refused while another process holds its folder, but not after that process was killed."""
    args = dql.with_settings(tiny_args(tmp_path, num_updates=2))
    folder = start_folder(args)
    write_args(args, folder)
    hold = """if True:
        import pathlib, sys
        from housekeeping.folder import only_writer
        with only_writer(pathlib.Path(sys.argv[1])):
            print(1)
            input()
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-uc", hold, str(folder)], cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == b"1\n"
        bad_input(lambda: resume(folder), "another process is writing")
        other.kill()
    assert resume(folder)["num_updates"] == 2


def test_links_into_another_run_are_refused(run_left_alone, unfinished, tmp_path):  # noqa: F811
    """What they lead to would be overwritten, without its lock."""
    other, folder = unfinished, Path(shutil.copytree(run_left_alone(2)[1], tmp_path / "several"))
    (folder / "summary.json").unlink()
    before = times_of_change(other)
    (folder / ".part-checkpoint.pt").symlink_to(other / "checkpoint.pt")
    bad_input(lambda: resume(folder), ".part-checkpoint.pt is a link")
    (folder / ".part-checkpoint.pt").unlink()
    (folder / "seed-1" / "metrics.csv").unlink()
    (folder / "seed-1" / "metrics.csv").symlink_to(other / "metrics.csv")
    bad_input(lambda: resume(folder), "seed-1/metrics.csv is a link")
    shutil.rmtree(folder / "seed-1")
    (folder / "seed-1").symlink_to(other)
    bad_input(lambda: resume(folder), "seed-1 is a link")
    assert before == times_of_change(other)


def test_a_full_disk_leaves_the_last_checkpoint(run_left_alone, monkeypatch):  # noqa: F811
    """When writing fails, the error is one line and the old checkpoint stays; with room again the run ends the same."""
    resource = pytest.importorskip("resource")
    args, whole = run_left_alone(1)
    folder = stop_at(args, 14)
    before, limits = (folder / "checkpoint.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        bad_input(lambda: resume(folder), "checkpoint.pt: File too large; what was there before is whole")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not list(folder.glob(".part*"))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
        bad_input(lambda: resume(folder), f"cannot write in {folder}: No space left on device")
    resume(folder)
    assert_same_end(whole, folder)


def test_memory_that_ends_while_saving_leaves_the_last_checkpoint(run_left_alone, monkeypatch):  # noqa: F811
    args, whole = run_left_alone(1)
    folder = stop_at(args, 14)
    for error in (MemoryError(), RuntimeError("[enforce fail at inline_container.cc:668] unexpected pos 64 vs 0")):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", on_call(2, torch.save, lambda error=error: (_ for _ in ()).throw(error)))
            bad_input(lambda: resume(folder), "no memory to write", "what was there before is whole")
    assert read_torch(folder)["progress"]["step"] == 13
    resume(folder)
    assert_same_end(whole, folder)


def test_a_folder_that_cannot_be_begun_is_not_left_there(tmp_path, monkeypatch):
    args = tiny_args(tmp_path, num_seeds=2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        bad_input(lambda: dql.train(args), "No space left on device")
    assert list(args.runs_dir.iterdir()) == []
    (tmp_path / "taken").write_text("")  # which stops any user, even root
    bad_input(lambda: dql.train(replace(args, runs_dir=tmp_path / "taken")), "cannot make a folder in", "--runs-dir")
