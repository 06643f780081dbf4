"""The life of a run after training: the policies of what it reports are kept, and evaluated anew."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import assert_same, assert_same_end, bad_input, on_call, resume, stop_at, tiny_args

import dql
from d4rl_tasks import make_env
from housekeeping import checkpoint, curves, evaluating, report
from housekeeping import run as runs_module
from housekeeping.checkpoint import ACTING
from housekeeping.folder import seed_folders
from housekeeping.run import Run

STATES = np.random.default_rng(0).standard_normal((4, 11))


@pytest.fixture(autouse=True, scope="module")
def no_curves():
    """Without curve.png, which would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "curves_work", lambda: False)
        yield


def short_args(folder: Path, **changes) -> dql.Args:
    """Six updates, an evaluation after each; with seeds 2 and 3 the last, the best and the offline one are three."""
    short = {"num_updates": 6, "eval_every": 1, "batch_size": 8, "hidden_dim": 64, "learning_rate": 1e-2, "seed": 2}
    return tiny_args(folder, **short | {"offline_rank": 1, "eval_episodes": 2} | changes)


def policies(folder: Path) -> dict[str, bytes]:
    """The files of the kept policies, of all seeds, and what is in them."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("evaluation-*.pt")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function from a number of seeds to the arguments and folder of an uninterrupted run, and its agents' states
    after each update, {step: [state of each seed]}."""

    @cache
    def run(num_seeds: int) -> tuple[dql.Args, Path, dict]:
        args, states, save = short_args(tmp_path_factory.mktemp("whole"), num_seeds=num_seeds), {}, Run.save

        def watched(run: Run, now: list[dict], generators: list) -> None:
            states[run.step] = torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, now)
            save(run, now, generators)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "save", watched)
            return args, Path(dql.train(args)["folder"]), states

    return run


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of the finished run of one seed."""
    return Path(shutil.copytree(whole(1)[1], tmp_path / "run"))


def evaluate(monkeypatch, capsys, *words: object) -> str:
    """What `python dql.py --evaluate` prints."""
    monkeypatch.setattr(sys, "argv", ["dql.py", "--evaluate", *map(str, words)])
    dql.main()
    return capsys.readouterr().out


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------- what is kept


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_policies_are_those_of_the_evaluations_that_are_reported(num_seeds, whole):
    """The same weights and actions as the agent had then; and no more files than may be asked for."""
    args, folder, states = whole(num_seeds)
    found = set()
    for k, own in enumerate(seed_folders(args, folder)):
        summary = json.loads((own / "summary.json").read_text())
        for which in report.SELECTIONS:
            step = summary[which]["step"]
            agent, kept = dql.load_agent(own, "cpu", which)
            assert kept["step"] == step
            for name in ACTING:
                assert_same(getattr(agent, name).state_dict(), states[step][k][name])
            agent.load_state_dict(states[step][k])
            want = agent.act_fresh(torch.as_tensor(STATES, dtype=torch.float32), torch.Generator().manual_seed(3))
            np.testing.assert_array_equal(dql.load_policy(own, which, 3, "cpu")(STATES), want)
            found.add(step)
        names = {path.name for path in own.glob("evaluation-*")}
        assert {f"evaluation-{summary[which]['step']}.pt" for which in ("best", "offline")} <= names
        assert len(names) <= 3, "two that offline selection may take, and the best"
        size = max(path.stat().st_size for path in own.glob("evaluation-*"))
        assert size < (own / "checkpoint.pt").stat().st_size / 2
        assert_same(dql.load_agent(own, "cpu", "last")[0].state_dict(), states[6][k])
    assert len(found) > 1, "or this test compares the last with itself"


def test_which_are_kept_are_all_that_may_yet_be_selected():
    """Whatever comes later, what is selected then was kept at every moment since it was made; with ties too."""
    rng = np.random.default_rng(0)
    for rank in (0, 1, 2, 9):
        args = dql.with_settings(dql.Args(offline_rank=rank))
        for _ in range(20):
            losses, scores = rng.integers(4, size=8), rng.integers(4, size=8)
            pairs = enumerate(zip(losses.tolist(), scores.tolist(), strict=True), 1)
            rows = [{"step": step, "bc_loss": loss, "score": score, "score_std": 0.0} for step, (loss, score) in pairs]
            assert report.to_keep([], args) == report.to_keep([rows[0] | {"score": ""}], args) == set()
            for end in range(1, 9):
                kept, chosen = report.to_keep(rows[:end], args), report.select(rows[:end], args)
                assert {chosen["best"]["step"], chosen["offline"]["step"]} <= kept and len(kept) <= rank + 2
                assert kept <= report.to_keep(rows[: end - 1], args) | {end}, "what has been removed is not needed"


@pytest.mark.parametrize("num_seeds, name, counts", [
    (1, "write_torch", (2, 5, 8)), (2, "write_torch", (2, 8, 14, 20)),
    (1, "remove_policies", (2, 5)), (2, "remove_policies", (4, 11)),
])  # fmt: skip
def test_a_run_killed_at_any_file_keeps_the_same_policies(num_seeds, name, counts, whole, monkeypatch):
    """Killed before it writes or removes a file; until it goes on it has the policies that its checkpoint names."""
    args, folder, _ = whole(num_seeds)

    def killed():
        raise KeyboardInterrupt

    for count in counts:
        before, wrapped = set(args.runs_dir.iterdir()), on_call(count, getattr(runs_module, name), killed)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            for module in (runs_module, checkpoint):
                patch.setattr(module, name, wrapped)
            dql.train(args)
        (left,) = set(args.runs_dir.iterdir()) - before
        for own in seed_folders(args, left):
            if (own / "checkpoint.pt").exists():
                for which in report.SELECTIONS:
                    dql.load_policy(own, device="cpu", which=which)
        resume(left)
        assert policies(left) == policies(folder)
        assert_same_end(folder, left)


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_a_stopped_run_keeps_the_same_policies(num_seeds, whole):
    args, folder, _ = whole(num_seeds)
    left = stop_at(args, 4 * num_seeds, signum=signal.SIGTERM)
    resume(left)
    assert policies(left) == policies(folder)


def test_a_run_given_more_updates_keeps_the_policies_of_the_longer_run(whole):
    """Also those of its first half; only the number of updates that stands in them differs."""
    args, folder, _ = whole(1)
    left = Path(dql.train(replace(args, num_updates=3))["folder"])
    resume(left, num_updates=6)
    assert policies(left).keys() == policies(folder).keys()
    for name in policies(folder):
        files = [torch.load(path / name, weights_only=True)["agents"] for path in (left, folder)]
        assert_same(*files)


def test_policies_that_are_not_there(copied, tmp_path):
    load = partial(dql.load_policy, copied, device="cpu")
    bad_input(lambda: load(which="worst"), "'worst'", "last, best, offline")
    path = copied / f"evaluation-{json.loads((copied / 'summary.json').read_text())['best']['step']}.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    bad_input(lambda: load(which="best"), str(path), "damaged")
    path.unlink()
    bad_input(lambda: load(which="best"), f"{path}, the best evaluation's policy, is missing")
    load()
    resume(copied)  # which cannot make it again
    assert not path.exists()
    begun = stop_at(short_args(tmp_path, eval_every=6), 4)
    bad_input(lambda: dql.load_policy(begun, device="cpu", which="offline"), str(begun), "no evaluation yet")
    dql.load_policy(begun, device="cpu")


# ----------------------------------------------------------------- evaluated anew


def test_an_evaluation_with_the_run_s_seed_gives_the_run_s_score(copied, monkeypatch, capsys):
    summary = json.loads((copied / "summary.json").read_text())
    for which in report.SELECTIONS:
        out = evaluate(monkeypatch, capsys, copied, "--which", which, "--seed", 2, "--device", "cpu")
        entry = entries(copied)[-1]
        assert (entry["which"], entry["steps"], entry["seeds"]) == (which, [summary[which]["step"]], [2])
        assert entry["scores"] == [summary[which]["score"]] and entry["stds"] == [summary[which]["std"]]
        assert f"hopper-medium-v2, {which}, 2 episodes of each seed, normalized score:\n" in out
        assert out.endswith(f" (t)\n{copied / 'evaluations.jsonl'}\n")
    assert len(entries(copied)) == 3 and entries(copied)[0]["versions"]["torch"] == torch.__version__


def test_an_evaluation_of_several_seeds(whole, tmp_path, monkeypatch, capsys):
    """Means, spread and interval over seeds; the same for the same seed of evaluation, other for another."""
    folder = Path(shutil.copytree(whole(2)[1], tmp_path / "run"))
    words = ["--which", "best", "--eval-episodes", 3, "--eval-candidates", 2, "--eval-temperature", 0,
             "--eval-average", "--device", "cpu"]  # fmt: skip
    out = evaluate(monkeypatch, capsys, folder, *words)
    assert evaluate(monkeypatch, capsys, folder, *words) == out
    assert evaluate(monkeypatch, capsys, folder, *words, "--seed", 7) != out
    first, again, other = entries(folder)
    assert first == again and first["scores"] != other["scores"] and first["seeds"] == [2, 3]
    acting = {"eval_candidates": 2, "eval_temperature": 0.0, "eval_average": True}
    assert first["settings"] == acting | {"seed": 10_000, "env_id": "hopper-medium-v2", "env_backend": "maintained"}
    assert other["settings"]["seed"] == 7 and first["episodes"] == 3
    a, b = first["scores"]
    half = 12.706 * abs(a - b) / 2  # t of one degree of freedom times |a - b| / sqrt(2) / sqrt(2)
    assert first["mean"] == pytest.approx((a + b) / 2) and first["std"] == pytest.approx(abs(a - b) / 2)
    assert first["interval"] == pytest.approx([first["mean"] - half, first["mean"] + half])
    lines = out.splitlines()
    assert lines[1].split()[:5] == ["seed", "2", f"{a:.1f}", "±", f"{first['stds'][0]:.1f}"]
    assert lines[3].split()[:2] == ["mean", f"{first['mean']:.1f}"]
    assert f"(2 seeds); 95 % interval of the mean {first['interval'][0]:.1f} to" in lines[3]
    evaluate(monkeypatch, capsys, folder / "seed-3", *words)
    assert entries(folder / "seed-3")[0]["scores"] == [b]
    assert resume(folder)["num_updates"] == 6 and len(entries(folder)) == 3


def test_an_evaluation_takes_what_is_not_given_from_the_run(tmp_path, monkeypatch, capsys):
    """Of a run that is not finished; of one episode there is no interval."""
    left = stop_at(short_args(tmp_path, eval_every=6, eval_average=True, eval_episodes=1), 4)
    out = evaluate(monkeypatch, capsys, left, "--device", "cpu")
    (entry,) = entries(left)
    assert entry["settings"]["eval_average"] is True and entry["settings"]["eval_candidates"] == 4
    assert entry["interval"] is None and "95 %" not in out and "1 episode of" in out and entry["steps"] == [3]
    evaluate(monkeypatch, capsys, left, "--device", "cpu", "--no-eval-average")
    assert entries(left)[1]["settings"]["eval_average"] is False


def test_what_makes_no_sense_is_refused(copied, tmp_path, monkeypatch, capsys):
    for words, want in (
        (["--eta", 2.0], "--eta"), (["--resume", copied], "--resume"), (["--num-updates", 9], "--num-updates"),
        (["--which", "worst"], "--which"), (["--eval-episodes", 0], "--eval-episodes is 0"),
        (["--eval-episodes", 150], "must be a multiple"), (["--eval-temperature", -1], "--eval-temperature is -1"),
        (["--seed", -1], "--seed is -1"), (["--env-id", "hopper-medium-replay-v2"], "--env-id hopper-medium-replay-v2"),
    ):  # fmt: skip
        bad_input(lambda words=words: evaluate(monkeypatch, capsys, copied, *words), want)
    bad_input(lambda: evaluate(monkeypatch, capsys, tmp_path / "none"), "none is not the folder of a run")
    monkeypatch.setattr(sys, "argv", ["dql.py", "--which", "best"])
    bad_input(dql.main, "--which")
    assert not (copied / "evaluations.jsonl").exists()


def test_a_module_s_environment_is_not_imported_for_a_file(copied, monkeypatch, capsys):
    saved = json.loads((copied / "args.json").read_text())
    (copied / "args.json").write_text(json.dumps(saved | {"env_id": "no_such_module:Env-v0"}))
    for words in ([], ["--env-id", "Pendulum-v1"]):
        call = partial(evaluate, monkeypatch, capsys, copied, *words)
        bad_input(call, "code of a module: if you trust it, give --env-id no_such_module:Env-v0")
    bad_input(lambda: evaluate(monkeypatch, capsys, copied, "--env-id", "no_such_module:Env-v0"), "cannot be made")


def test_another_environment_is_refused(copied, monkeypatch, capsys):
    """If what gymnasium makes of the run's id has other widths than its policy."""
    monkeypatch.setattr(evaluating, "find_task", lambda *_: dql.find_task("pen-human-v1"))
    bad_input(lambda: evaluate(monkeypatch, capsys, copied, "--device", "cpu"), "(45, 24)", "(11, 3)")


def test_quantiles_of_student_s_t():
    """Against tables."""
    for df, want in ((1, 12.706), (4, 2.776), (9, 2.262), (10, 2.228), (12, 2.179), (30, 2.042), (99, 1.984)):
        assert evaluating.t_quantile(df) == pytest.approx(want, abs=1e-3)


# ----------------------------------------------------------------- exported

OUTSIDE = """
import sys, torch
policy, states, noise, gumbel = torch.export.load("policy.pt2").module(), *torch.load("inputs.pt")
torch.save(policy(states, noise, gumbel), "actions.pt")
assert "dql" not in sys.modules
"""


@pytest.mark.parametrize("candidates", [1, 4])
@pytest.mark.parametrize("which", ["last", "best"])
def test_an_exported_policy_acts_the_same_without_this_project(which, candidates, copied, tmp_path):
    """Given the same noise, for any number of states, in a process that does not have the project."""
    dql.export_policy(copied, tmp_path / "policy.pt2", which, eval_candidates=candidates)
    agent, _ = dql.load_agent(copied, "cpu", which, eval_candidates=candidates)
    for num_states in (1, 2, 5):
        states = torch.randn(num_states, 11)
        noise, gumbel = agent.draw_act(num_states, torch.Generator())
        torch.save((states, noise.view(len(noise), num_states, candidates, 3), gumbel), tmp_path / "inputs.pt")
        subprocess.run([sys.executable, "-I", "-c", OUTSIDE], cwd=tmp_path, check=True)
        actions = torch.load(tmp_path / "actions.pt")
        torch.testing.assert_close(actions, agent.act(states, dql.ActDraws(noise, gumbel)), rtol=0, atol=1e-6)


def test_an_export_that_fails_leaves_nothing(copied, tmp_path):
    bad_input(lambda: dql.export_policy(copied, tmp_path / "none" / "policy.pt2"), "cannot write")
    bad_input(lambda: dql.export_policy(tmp_path, tmp_path / "policy.pt2"), "not the folder of a run")
    assert not list(tmp_path.rglob("*.pt2"))


# ----------------------------------------------------------------- a video


def test_an_evaluation_can_film(copied, monkeypatch, capsys):
    """Without OpenGL: pictures are made up."""
    pytest.importorskip("moviepy")
    env = make_env("hopper-medium-v2")
    monkeypatch.setattr(env, "render", lambda: np.zeros((64, 64, 3), np.uint8), raising=False)
    monkeypatch.setattr(evaluating, "rendering_env", lambda task: env)
    out = evaluate(monkeypatch, capsys, copied, "--which", "best", "--capture-video", "--device", "cpu")
    assert (copied / "video-best.mp4").stat().st_size > 500
    assert out.endswith(f"\n{copied / 'video-best.mp4'}\n{copied / 'evaluations.jsonl'}\n")
