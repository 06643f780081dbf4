"""Tests of the bandit, the ablation and the variants, on small budgets."""

import csv
import json
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ablate
import bandit
import innovations
import numpy as np
import pytest
import tiny
import torch

import dql
from d4rl_tasks import BadInput
from housekeeping.ending import Diverged, Stopped

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data() -> bandit.Data:
    torch.manual_seed(0)
    return bandit.make_data()


def shares(policy: bandit.Sampler, data: bandit.Data, radius: float) -> list[float]:
    """The share of the policy's actions within the radius of each corner."""
    with torch.no_grad():
        return list(bandit.numbers(policy(500), data)[f"share_{radius}"].values())


def test_bandit_data_and_numbers(data):
    near, mean = bandit.numbers(data.action[-2000:], data), (3 + 0 + 1.5 + 5) / 4
    assert min(near["share_0.2"].values()) > 0.21 and sum(near["share_0.2"].values()) > 0.995
    assert (near["mean_reward"], data.reward.mean().item()) == (pytest.approx(mean, abs=0.1),) * 2
    best = data.reward[(data.action - torch.tensor([0.8, -0.8])).norm(dim=1) < 0.3]
    assert (best.mean().item(), best.std().item()) == (pytest.approx(5, abs=0.1), pytest.approx(0.5, abs=0.05))
    assert bandit.mmd(data.action[:50], data.action[:50]).item() == pytest.approx(0, abs=1e-6)
    points = torch.tensor([[[0.0, 0.0]], [[0.3, 0.0]]])
    assert bandit.mmd(*points).item() == pytest.approx(2 - 2 * math.exp(-0.3**2 / (2 * 0.2**2)))


def test_gaussians_cannot_hold_four_modes(data):
    """The likelihood's maximum is known: mean 0, and the standard deviation of atanh(action)."""
    torch.manual_seed(0)
    policy = bandit.clone_gaussian(data, "MLE", 300)
    normal = policy.normal(1)
    assert normal.mean.abs().max() < 0.2
    assert torch.allclose(normal.stddev, data.action.clamp(-0.999, 0.999).atanh().std(0), rtol=0.1)
    assert sum(shares(policy, data, 0.2)) < 0.5 and sum(shares(policy, data, 0.3)) < 0.6


def test_diffusion_holds_four_modes(data):
    cloned = shares(bandit.diffusion(data, 50, 0.0, 4000), data, 0.3)
    assert min(cloned) > 0.1 and sum(cloned) > 0.6, cloned


def test_diffusion_ql_finds_the_best_mode(data):
    assert shares(bandit.diffusion(data, 5, bandit.ETA, 1500), data, 0.3)[3] > 0.6


def test_bandit_goes_on_after_the_last_policy(tmp_path, monkeypatch, capsys):
    """A program that was stopped makes the policies that one left alone makes; of other settings it refuses."""

    def last_numbers(folder: Path) -> dict:
        return json.loads((folder / "bandit.json").read_text())["policies"]

    def stop(*_) -> None:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(bandit, "STEPS", (2,))
    alone, stopped = (bandit.Args(num_updates=3, out=tmp_path / name) for name in ("alone", "stopped"))
    bandit.main(alone)
    with monkeypatch.context() as once, pytest.raises(Stopped):
        once.setattr(bandit, "bcq", stop)
        bandit.main(stopped)
    assert [*last_numbers(stopped.out)] == ["data", "Gaussian, MLE", "conditional VAE", "Gaussian, MMD", "TD3+BC"]
    bandit.main(stopped)
    assert last_numbers(stopped.out) == last_numbers(alone.out) and len(last_numbers(alone.out)) == 9
    assert {path.name for path in alone.out.iterdir()} == {"bandit.json", "policies.png", "samples.npz", "steps.png"}
    with pytest.raises(BadInput, match="another --seed or --num-updates"):
        bandit.main(replace(stopped, num_updates=4))


def test_other_learners_take_steps(data, tmp_path):
    """After three updates the actions of each are finite and in the square, and a picture of them is written."""
    torch.manual_seed(0)
    q, vae = bandit.fit_q(data, 3), bandit.clone_vae(data, 3)
    policies = {
        "vae": vae, "mmd": bandit.clone_gaussian(data, "MMD", 3), "td3_bc": bandit.td3_bc(data, q, 3),
        "bcq": bandit.bcq(data, q, vae, 3), "bear": bandit.bear(data, q, 3),
    }  # fmt: skip
    with torch.no_grad():
        actions = {name: policy(20) for name, policy in policies.items()}
    for name, action in actions.items():
        assert action.shape == (20, 2) and (action.abs() <= 1).all(), name
    bandit.draw(tmp_path / "picture.png", actions, [[*actions]] * 2, data)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def ablation(tmp_path_factory) -> ablate.Args:
    """A small ablation on Hopper, whose episodes are short, with random data and two seeds; it has been made."""
    folder = tmp_path_factory.mktemp("ablation")
    args = ablate.Args(
        env_id=tiny.ENV_ID, dataset_path=tiny.write_data(folder / "hopper.hdf5", 300), num_updates=10, batch_size=8,
        num_seeds=2, eval_episodes=1, num_steps=(1, 5), etas=(0.0, 1.0, 3.0), out=folder / "out", device="cpu",
    )  # fmt: skip
    ablate.ablate(args)
    return args


def table(path: Path) -> list[dict]:
    """A table's rows as numbers, without their times; nan where there is none."""
    with path.open(newline="") as file:
        return [{k: float(v or "nan") for k, v in row.items() if k != "ms_per_update"} for row in csv.DictReader(file)]


def settings(rows: list[dict]) -> list[tuple]:
    return [(row["num_steps"], row["eta"], row["seed"]) for row in rows]


def test_ablation_writes_tables_and_pictures(ablation):
    names = {"eta.csv", "eta.png", "runs", "steps.csv", "steps.png"}
    assert {path.name for path in ablation.out.iterdir()} == names
    steps, etas = table(ablation.out / "steps.csv"), table(ablation.out / "eta.csv")
    assert settings(steps) == [(n, 1, seed) for n in (1, 5) for seed in (0, 1)]
    assert settings(etas) == [(5, eta, seed) for eta in (0, 1, 3) for seed in (0, 1)]
    for row in steps + etas:
        assert [name for name in row if math.isnan(row[name])] == ["target_q"] * (row["eta"] == 0), row
        assert 0 < row["action_distance"] < 2 * math.sqrt(3)
    assert etas[2:4] == steps[2:], "N = 5, eta = 1 of both tables are the same agents"


@pytest.mark.parametrize(("num_steps", "eta", "seed"), [(1, 1.0, 1), (5, 3.0, 0)])
def test_row_is_a_run_of_dql(ablation, tmp_path, num_steps, eta, seed):
    """The row of an agent among several seeds equals a run of that seed alone by dql.train, to the last bit."""
    summary = dql.train(dql.Args(
        env_id=ablation.env_id, dataset_path=ablation.dataset_path, device="cpu", num_updates=10, batch_size=8,
        num_steps=num_steps, eta=eta, seed=seed, eval_episodes=1, log_every=1, runs_dir=tmp_path,
    ))  # fmt: skip
    rows = table(ablation.out / ("steps.csv" if eta == 1 else "eta.csv"))
    row, last = rows[settings(rows).index((num_steps, eta, seed))], table(Path(summary["folder"]) / "metrics.csv")[-1]
    assert row["score"] == summary["last"]["score"] == last["score"]  # the row of the last update, a tenth of ten
    assert (row["bc_loss"], row["target_q"]) == (last["bc_loss"], last["target_q"])


def before(monkeypatch, name: str, note: Callable) -> None:
    """Has note called, with the same arguments, before each call of a function of dql.py; it may raise."""
    function = getattr(dql, name)
    monkeypatch.setattr(dql, name, lambda *args: (note(*args), function(*args))[1])


def test_ablation_goes_on_and_grows(ablation, tmp_path, monkeypatch):
    """Stopped in the second run's evaluation it resumes that one; it trains only seeds and settings that are new."""
    args, trained = replace(ablation, out=tmp_path, num_steps=(1, 5), etas=()), []

    def note(run: dql.Args) -> None:
        run = dql.read_args(run.resume) if run.resume else run
        trained.append((run.num_steps, run.eta, run.seed, run.num_seeds))

    def stop(*_) -> None:
        if len(trained) == 2:
            raise Stopped(signal.SIGTERM)

    before(monkeypatch, "train", note)
    before(monkeypatch, "evaluate", stop)
    with pytest.raises(Stopped):
        ablate.ablate(args)
    assert settings(table(tmp_path / "steps.csv")) == [(1, 1, 0), (1, 1, 1)]
    ablate.ablate(args)
    assert trained[2:] == [(5, 1, 0, 2)] and len(list((tmp_path / "runs").iterdir())) == 2
    assert table(tmp_path / "steps.csv") == table(ablation.out / "steps.csv")
    ablate.ablate(replace(args, num_seeds=3, num_steps=(5,), etas=(0.0, 1.0)))
    assert trained[3:] == [(5, 1, 2, 1), (5, 0, 0, 3)]
    files = {path: path.read_bytes() for path in tmp_path.glob("*.csv")}
    ablate.ablate(args)
    assert len(trained) == 5 and len(files) == 2 and all(path.read_bytes() == files[path] for path in files)


def test_a_run_that_diverges_leaves_the_others_alone(ablation, tmp_path, monkeypatch):
    def diverge(run: dql.Args) -> None:
        if run.eta == 1:
            raise Diverged("not finite")

    before(monkeypatch, "train", diverge)
    with pytest.raises(Diverged, match="N 5, eta 1: not finite"):
        ablate.ablate(replace(ablation, out=tmp_path, num_steps=(), num_seeds=1))
    assert settings(table(tmp_path / "eta.csv")) == [(5, 0, 0), (5, 3, 0)]


@pytest.mark.parametrize(("flags", "said"), [
    (["--num-steps", "0"], "--num-steps is 0"),
    (["--etas", "-1"], "--eta is -1.0"),
    (["--num-seeds", "0"], "--num-seeds is 0"),
    (["--num-updates", "30"], "holds an ablation with num_updates 10"),
    (["--env-id", "nothing-v0"], "holds an ablation with env_id hopper-medium-v2"),
    (["--out", "{file}"], "File exists"),
])  # fmt: skip
def test_bad_input_is_one_line(ablation, flags, said, monkeypatch, capsys):
    file = str(ablation.dataset_path)
    base = ["--env-id", ablation.env_id, "--dataset-path", file, "--num-updates", "10", "--batch-size", "8",
            "--eval-episodes", "1", "--out", str(ablation.out), "--device", "cpu"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["ablate.py", *base, *(flag.format(file=file) for flag in flags)])
    with pytest.raises(SystemExit) as end:
        ablate.main()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and said in err and err.count("\n") == 1 and out == ""


def test_innovations_trains_evaluates_and_compares(tmp_path, monkeypatch, capsys):
    """Two variants of one seed: each run has its flags, the table the scores of evaluations, and none is made twice."""
    file = tiny.write_data(tmp_path / "hopper.hdf5", 300)
    flags = f"--env-id {tiny.ENV_ID} --dataset-path {file} --num-updates 4 --eval-episodes 2 --batch-size 8"
    monkeypatch.setitem(innovations.DATA, "tiny", (flags, 1))
    words = ["tiny", "--variants", "published", "layernorm+ensemble", "--out", str(tmp_path), "--devices", "cpu"]
    assert innovations.run(words) == 0
    table, rows = capsys.readouterr().out, json.loads((tmp_path / "tiny.json").read_text())["rows"]
    runs = {dql.read_args(path.parent).num_critics: path.parent for path in tmp_path.glob("tiny/*/args.json")}
    assert [(k, dql.read_args(runs[k]).critic_layernorm, dql.read_args(runs[k]).pessimism) for k in (2, 5)] == [
        (2, False, None), (5, True, 1.0),
    ]  # fmt: skip
    for row, run in zip(rows, (runs[2], runs[5]), strict=True):
        found = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
        assert [it["settings"]["eval_candidates"] for it in found] == [50, 1]
        assert [row["candidates"], row["one_candidate"]] == [it["scores"] for it in found]
        last = [*csv.DictReader((run / "metrics.csv").open())][-1]
        assert (row["target_q"], row["diverge"]) == ([float(last["target_q"])], 0)
    assert innovations.run([*words, "--only-table"]) == 0 and capsys.readouterr().out in table
    assert len([*tmp_path.glob("tiny/*/args.json")]) == 2 and (tmp_path / "tiny.png").stat().st_size > 10_000


def test_innovations_intervals_and_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert innovations.difference([3.0] * 3, [1.0] * 3) == [2, 2]
    rng = np.random.default_rng(1)
    a, b = rng.normal(5, 2, 40).tolist(), rng.normal(0, 1, 40).tolist()
    half = 1.96 * math.sqrt((np.var(a) + np.var(b)) / 40)  # of a normal distribution
    wanted = [np.mean(a) - np.mean(b) - half, np.mean(a) - np.mean(b) + half]
    assert innovations.difference(a, b) == pytest.approx(wanted, abs=0.05)
    assert innovations.difference(a, b[:2]) is None
    for words, said in ((["kitchn"], "kitchn: there is kitchen"), (["cube", "--variants", "x"], "--variants x")):
        with pytest.raises(BadInput, match=said):
            innovations.run(words)
    assert not [*tmp_path.iterdir()]
