"""Whole runs: the files they write, the same numbers for the same seed, divergence, scores, policies, memory."""

import gc
import itertools
import json
import math
import os
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import assert_same, bad_input, metrics, on_call, random_file, read_torch, resume, tiny_args

import dql
import fast_sampler
from d4rl_tasks import TASKS, make_env, make_envs
from dql import Args
from fast_sampler import replicate
from housekeeping import acting, curves, machine, report
from housekeeping.ending import Diverged
from housekeeping.run import Run

SCORED = ("last", "best", "offline")


def test_a_run_writes_its_folder(tmp_path, capsys):
    summary = dql.train(tiny_args(tmp_path))
    err = capsys.readouterr().err
    lines = re.findall(r"^update (\d+) of 30: bc_loss .*, target_q (.*) \(.* updates/s\)$", err, re.M)
    assert [int(step) for step, _ in lines] == [5, 10, 12, 15, 20, 24, 25, 30]
    assert ["(update 24)" in line for _, line in lines] == 5 * [False] + [True, True, False]
    folder = Path(summary["folder"])
    names = {p.name for p in folder.iterdir()}
    assert {"args.json", "metrics.csv", "checkpoint.pt", "curve.png", "summary.json"} < names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.startswith(".part") for name in names)
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    rows = metrics(folder)
    assert list(rows[0]) == ["step", *dql.LOSSES, "score", "score_std"]
    assert [int(r["step"]) for r in rows] == [5, 10, 12, 15, 20, 24, 25, 30]
    assert [bool(r["score"]) for r in rows] == [False, False, True, False, False, True, False, True]
    assert summary["last"]["step"] == 30 and summary["last"]["episodes"] == 3 and summary["paper"] is None
    assert summary["best"]["score"] == max(float(r["score"]) for r in rows if r["score"])
    assert summary["versions"]["torch"] == torch.__version__ and summary["updates_per_second"] > 0
    assert "gpu" not in summary["versions"], "it ran on the CPU"
    assert (folder / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    *_, files, last = report.report(summary).splitlines()
    assert files.startswith("files: args.json, checkpoint.pt, metrics.csv, summary.json, curve.png; ")
    assert last == str(folder)


def test_metrics_are_means_over_the_updates_since_the_last_row(tmp_path, monkeypatch):
    """Also where a row is cut in two by a checkpoint."""
    steps, train_step = [], dql.DiffusionQL.train_step

    def watched(agent, *args):
        steps.append(train_step(agent, *args).tolist())
        return torch.tensor(steps[-1])

    monkeypatch.setattr(dql.DiffusionQL, "train_step", watched)
    folder = dql.train(tiny_args(tmp_path, num_updates=12, checkpoint_every=3))["folder"]
    steps = np.array(steps[-12:])  # the dry run made one too
    for row, own in zip(metrics(Path(folder)), (steps[:5], steps[5:10], steps[10:]), strict=True):
        np.testing.assert_allclose([float(row[name]) for name in dql.LOSSES], own.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("env_id", dql.SETTINGS)
def test_every_task_runs_end_to_end(env_id, tmp_path, monkeypatch, capsys):
    """The command line on a tiny file: the task's settings, whole episodes, and a printed score for the last update."""
    data = random_file(tmp_path / "data.hdf5", env_id)
    monkeypatch.setattr(sys, "argv", [
        "dql.py", "--env-id", env_id, "--dataset-path", str(data), "--runs-dir", str(tmp_path), "--device", "cpu",
        "--num-updates", "4", "--batch-size", "8", "--eval-episodes", "2", "--eval-candidates", "2", "--num-steps", "1",
    ])  # fmt: skip
    envs = []
    monkeypatch.setattr(dql, "make_envs", lambda *args: envs.extend(make_envs(*args)) or envs)
    dql.main()
    out = capsys.readouterr().out
    assert re.search(r"last +-?\d+\.\d ± \d+\.\d \(2 episodes, update 4\)", out), out
    if TASKS[env_id].family in ("halfcheetah", "antmaze", "kitchen"):  # the others may fall and end early
        assert [env.get_wrapper_attr("_elapsed_steps") for env in envs] == 2 * [TASKS[env_id].max_episode_steps]


def test_a_run_can_end_with_a_video(tmp_path):
    """The run writes one video file, and resuming writes it if it is missing; skipped if OpenGL cannot render."""
    try:
        make_env("hopper-medium-v2", render_mode="rgb_array").render()
    except Exception as error:  # every OpenGL backend fails in its own way
        pytest.skip(f"no rendering here: {error}")
    pytest.importorskip("moviepy")
    folder = Path(dql.train(tiny_args(tmp_path, num_updates=2, capture_video=True))["folder"])
    (video,) = folder.glob("*.mp4")
    assert video.stat().st_size > 1000 and not list(folder.glob(".part*"))
    video.unlink()  # as if the run had been killed before writing it
    resume(folder, capture_video=True)
    assert video.stat().st_size > 1000


class TwoPictures:
    """An environment whose episode lasts one step."""

    metadata = {"render_fps": 10}  # noqa: RUF012

    def reset(self, seed):
        return np.zeros(2), {}

    def step(self, action):
        return np.zeros(2), 0.0, True, False, {}

    def render(self):
        return np.zeros((64, 64, 3), np.uint8)


def test_a_video_is_written_whole(tmp_path):
    """Also where nothing renders: the pictures are made up."""
    pytest.importorskip("moviepy")
    acting.film(lambda state: np.zeros(1), TwoPictures(), 0, tmp_path / "video.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"] and (tmp_path / "video.mp4").stat().st_size > 500


# ----------------------------------------------------------------- seeds


def test_same_seed_same_metrics_and_other_seed_other(tmp_path):
    folders = [Path(dql.train(tiny_args(tmp_path, seed=seed))["folder"]) for seed in (3, 3, 4)]
    assert metrics(folders[0]) == metrics(folders[1]) != metrics(folders[2])
    assert_same(read_torch(folders[0])["agents"], read_torch(folders[1])["agents"])


def test_episodes_beyond_those_side_by_side_come_in_rounds(tmp_path, monkeypatch):
    """200 episodes: 100 environments, twice, each episode with its own seed, all of them in the score."""
    seeds = []

    def scores(act, envs, env_seeds, *rest):
        assert len(envs) == 100
        seeds.extend(env_seeds[0])
        return env_seeds.astype(float)

    monkeypatch.setattr(dql, "evaluate", scores)
    monkeypatch.setattr(dql, "normalized_score", lambda env_id, returns: returns)
    summary = dql.train(tiny_args(tmp_path, num_updates=2, eval_episodes=200))
    assert seeds == list(range(100, 300)) and summary["last"]["score"] == 199.5


@pytest.mark.parametrize("path", ["in turn", "mapped"])
def test_several_seeds_are_the_single_runs(path, tmp_path, monkeypatch):
    """--num-seeds: each folder holds the single run of that seed, bit for bit if seeds take turns, and up to float32's
    rounding for replicas (used on a GPU); the summary has the mean and spread."""
    if path == "mapped":
        steps_in_turn = fast_sampler.steps_in_turn

        def mapped(args, agents, dataset, generators, eval_generators):
            if len(agents) > 1:
                agents[:], generators, eval_generators = [replicate(agents)], [generators], [eval_generators]
            return steps_in_turn(args, agents, dataset, generators, eval_generators)

        monkeypatch.setattr(fast_sampler, "steps_in_turn", mapped)
    args = tiny_args(tmp_path, num_seeds=2, seed=5, num_updates=12, eval_every=6)
    summary = dql.train(args)
    folder, scores = Path(summary["folder"]), []
    for seed in (5, 6):
        alone = Path(dql.train(tiny_args(tmp_path, seed=seed, num_updates=12, eval_every=6))["folder"])
        own = folder / f"seed-{seed}"
        names = [{p.name.split(".1")[0] for p in path.iterdir()} - {".lock"} for path in (own, alone)]
        assert names[0] == names[1]
        for a, b in zip(metrics(own), metrics(alone), strict=True):
            for name in (*dql.LOSSES, "score"):
                if path == "in turn":
                    assert a[name] == b[name], name
                elif name != "score":  # in float32 each update amplifies the rounding of those before
                    assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3, abs=1e-4), name
        scores.append(json.loads((own / "summary.json").read_text())["last"]["score"])
        assert dql.load_policy(own, device="cpu")(np.zeros(11)).shape == (3,)
    assert summary["last"]["scores"] == scores
    assert summary["last"]["score"] == pytest.approx(np.mean(scores))
    assert summary["last"]["std"] == pytest.approx(np.std(scores))
    assert re.search(r"seeds 5-6, 12 updates.*\n +last +-?\d+\.\d ± \d+\.\d \(2 seeds\)", report.report(summary))
    bad_input(lambda: dql.load_policy(folder, device="cpu"), "2 policies", "seed-")


# ----------------------------------------------------------------- while it trains


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_a_run_that_diverges_stops(num_seeds, tmp_path, monkeypatch):
    """A run stops at the next row or checkpoint; the last checkpoint is from before, and finite."""
    args, make_steps = tiny_args(tmp_path, num_seeds=num_seeds, checkpoint_every=4), fast_sampler.make_steps

    def make_poisoned_steps(*args, **options):
        agents, updates, act = make_steps(*args, **options)
        target = agents[0].critic.q1[2].weight

        def poison():
            with torch.no_grad():
                target[(0,) * target.dim()] = math.nan

        return agents, on_call(7, updates, poison), act

    monkeypatch.setattr(fast_sampler, "make_steps", make_poisoned_steps)
    says = r"critic_loss, .*critic's parameters.* not finite in updates 6 to 8, seed 0; .* is of update 4\."
    with pytest.raises(Diverged, match=says):
        dql.train(args)
    (folder,) = args.runs_dir.iterdir()
    state = read_torch(folder)
    assert state["progress"]["step"] == 4
    assert all(p.isfinite().all() for of_seed in state["agents"] for p in of_seed["critic"].values())


def test_q_beyond_what_rewards_allow_is_told_once(tmp_path, capsys):
    """The warning comes once per seed, and only beyond a margin of a twentieth of the range that rewards allow."""
    args = dql.with_settings(tiny_args(tmp_path, gamma=0.9, seed=7, num_seeds=2))
    reward, place = torch.tensor([-1.0, 2.0]), dql.LOSSES.index("target_q")

    def warned(q_range: tuple, *values: float) -> str:
        for value in values:
            run.q_range, run.step, run.seconds = q_range, run.step + 1, 1.0
            run.sums[:, place] = (run.step - run.last_row) * torch.tensor(value)
            run.end_row()
        return capsys.readouterr().err

    run = Run(args, torch.device("cpu"), {}, dql.LOSSES, None, report.q_range(reward, args))
    for values, told in (((21, -11), []), ((0, -12), [8]), ((22, -99), [7]), ((99, 99), [])):
        err = warned(run.q_range, values)
        assert [int(seed) for seed in re.findall(r"seed (\d+): .* rewards allow -10 to 20\n", err)] == told
    run.warned.clear()
    assert warned(report.q_range(torch.ones(2), dql.replace(args, gamma=1.0)), (1e9, 1e9)) == ""


def test_rewards_that_float32_cannot_square_are_refused(tmp_path):
    data = random_file(tmp_path / "huge.hdf5", rewards=np.full(600, 1e38, np.float32))
    args = tiny_args(tmp_path, dataset_path=data)
    bad_input(lambda: dql.train(args), "rewards reach 1e+38", "scale them down")
    assert not args.runs_dir.exists()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_many_evaluations_leak_nothing(tmp_path, monkeypatch):
    """Over 50 evaluations and checkpoints, environments, threads and open files stay constant from the 5th on."""
    counts, evaluations, evaluate = [], itertools.count(1), dql.evaluate

    def evaluate_and_count(*args):
        if next(evaluations) in (5, 20, 35, 50):
            gc.collect()
            models = sum(type(x).__name__ == "MjData" for x in gc.get_objects())
            counts.append((models, threading.active_count(), len(os.listdir("/proc/self/fd"))))
        return evaluate(*args)

    monkeypatch.setattr(dql, "evaluate", evaluate_and_count)
    monkeypatch.setattr(curves, "curves_work", lambda: False)  # plots take half a second
    dql.train(tiny_args(tmp_path, num_updates=50, eval_every=1, eval_episodes=1, checkpoint_every=1))
    assert len(counts) == 4 and len(set(counts)) == 1, counts


def test_events_of_updates_that_are_made_again_are_forgotten(tmp_path):
    """A run killed before its first checkpoint begins again from update 0, in the same folder."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    args = dql.with_settings(tiny_args(tmp_path, num_updates=4, compile=False, cudagraphs=False))
    folder = tmp_path / "run"
    folder.mkdir()
    for steps in ((1, 2, 3), (1,)):
        run = Run(args, torch.device("cpu"), {}, dql.LOSSES, None, (-1.0, 1.0))
        run.folder, run.seeds = folder, [(folder, args)]
        with run.training(lambda: None):
            for run.step in steps:
                run.seconds = 1.0
                run.log(run.end_row())
        time.sleep(1.1)  # event files are read in the order of their names, which have the time in seconds
    events = accumulators.EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("losses/bc_loss")] == [1]


# ----------------------------------------------------------------- scores and policies


def test_offline_selection_takes_the_ranked_evaluation():
    """Evaluations rank by mean loss since the one before, weighted by updates; ranks beyond the last take the worst."""
    rows = [
        {"step": 10, "bc_loss": 9.0, "score": "", "score_std": ""},
        {"step": 20, "bc_loss": 1.0, "score": 1.0, "score_std": 0.0},  # mean 5
        {"step": 30, "bc_loss": 2.0, "score": 2.0, "score_std": 0.0},  # 2
        {"step": 31, "bc_loss": 0.0, "score": "", "score_std": ""},
        {"step": 40, "bc_loss": 4.0, "score": 3.0, "score_std": 0.0},  # 3.6
    ]
    for rank, want in ((0, 2.0), (1, 3.0), (2, 1.0), (7, 1.0)):
        chosen = report.select(rows, dql.with_settings(Args(offline_rank=rank)))
        assert chosen["offline"]["score"] == want and chosen["best"]["score"] == chosen["last"]["score"] == 3.0


def test_load_policy(tmp_path):
    """Numpy in, numpy out; torch in, torch out; one state or many; the same seed gives the same actions."""
    folder = dql.train(tiny_args(tmp_path, num_updates=2))["folder"]
    policy, again = dql.load_policy(folder, device="cpu"), dql.load_policy(folder, device="cpu")
    states = np.random.default_rng(0).standard_normal((5, 11))
    actions = policy(states)
    assert isinstance(actions, np.ndarray) and actions.shape == (5, 3) and np.abs(actions).max() <= 1
    np.testing.assert_array_equal(actions, again(states))
    assert policy(states[0]).shape == (3,)
    assert torch.is_tensor(policy(torch.as_tensor(states))) and policy(torch.as_tensor(states)).shape == (5, 3)
    before = torch.get_rng_state()
    average, online = (dql.load_policy(folder, device="cpu", eval_candidates=1, eval_average=x) for x in (True, False))
    assert torch.equal(torch.get_rng_state(), before)
    assert not np.array_equal(average(states), online(states))
    assert not np.array_equal(online(states), dql.load_policy(folder, device="cpu")(states))
    assert policy(np.zeros((0, 11))).shape == (0, 3)
    for wrong in (np.zeros(22), np.zeros((11, 2)), 0.0):  # 22 numbers could pass for two states
        with pytest.raises(ValueError, match="have 11 numbers each"):
            policy(wrong)


# ----------------------------------------------------------------- memory


@pytest.mark.parametrize("changes, flag", [
    ({"batch_size": 10**8}, "--batch-size 100,000,000"),
    ({"eval_candidates": 2 * 10**8}, "--eval-candidates 200,000,000"),
])  # fmt: skip
def test_what_cannot_fit_into_memory_is_refused_at_once(changes, flag, tmp_path):
    args, begun = tiny_args(tmp_path, **changes), time.perf_counter()
    bad_input(lambda: dql.train(args), flag, "GiB of memory at least", "are free: at most")
    assert time.perf_counter() - begun < 20 and list(args.runs_dir.iterdir()) == []


def test_the_bound_on_memory_is_below_what_an_update_takes():
    """Or it would refuse what fits: torch's peak for 20,000 rows, by its profiler, is above the bound."""
    args = dql.with_settings(Args(
        env_id="halfcheetah-demo-v0", device="cpu", batch_size=20_000, num_steps=3, compile=False, cudagraphs=False
    ))  # fmt: skip
    agent, asked = dql.make_agent(args, 0), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "check_memory", lambda flag, value, each, device: asked.append((flag, value * each)))
        fast_sampler.check_memory(args, agent)
    batch = dql.Batch(*(torch.zeros(20_000, *shape) for shape in ((17,), (6,), (), (17,), ())))
    draws = agent.draw(torch.Generator())
    with torch.profiler.profile(profile_memory=True) as profile:
        agent.policy_gradient(batch, draws)
    total = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    assert dict(asked)["--batch-size"] == 20_000 * 3 * 3 * 256 * 4 < peak


def test_memory_that_acting_lacks_shows_before_training(tmp_path, monkeypatch):
    """The first evaluation's batch is tried before the first update."""
    updates, train_step = [], dql.DiffusionQL.train_step

    def no_memory(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 6144000000 bytes")

    monkeypatch.setattr(dql.DiffusionQL, "train_step", lambda *args: updates.append(1) or train_step(*args))
    monkeypatch.setattr(dql.DiffusionQL, "act_fresh", no_memory)
    args = tiny_args(tmp_path)
    bad_input(lambda: dql.train(args), "out of memory", "6144000000 bytes", "--eval-candidates")
    assert len(updates) == 1 and list(args.runs_dir.iterdir()) == []
