"""Tests of the experiments, on small budgets.

    pytest bench/test_experiments.py
"""

import csv
import math
import sys
import types
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import ablate
import bandit
import pytest
import tiny
import torch

import dql

torch.set_num_threads(1)

# ----------------------------------------------------------------------------- bandit


@pytest.fixture(scope="module")
def data() -> bandit.Data:
    torch.manual_seed(0)
    return bandit.make_data()


def shares(policy: bandit.Sampler, data: bandit.Data, radius: float) -> list[float]:
    """The share of the policy's actions within the radius of each corner."""
    with torch.no_grad():
        return list(bandit.numbers(policy(500), data)[f"share_{radius}"].values())


def test_bandit_data_and_numbers(data):
    near = bandit.numbers(data.action[-2000:], data)
    assert min(near["share_0.2"].values()) > 0.21 and sum(near["share_0.2"].values()) > 0.995
    assert near["mean_reward"] == pytest.approx((3 + 0 + 1.5 + 5) / 4, abs=0.1)
    assert data.reward.mean().item() == pytest.approx((3 + 0 + 1.5 + 5) / 4, abs=0.1)
    best = (data.action - torch.tensor([0.8, -0.8])).norm(dim=1) < 0.3
    assert data.reward[best].mean().item() == pytest.approx(5, abs=0.1)
    assert data.reward[best].std().item() == pytest.approx(0.5, abs=0.05)
    assert bandit.mmd(data.action[:50], data.action[:50]).item() == pytest.approx(0, abs=1e-6)
    points = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.3, 0.0]])
    assert bandit.mmd(*points).item() == pytest.approx(2 - 2 * math.exp(-0.3**2 / (2 * 0.2**2)))


def test_gaussians_cannot_hold_four_modes(data):
    """The likelihood's maximum is known: mean 0, and the standard deviation of atanh(action)."""
    torch.manual_seed(0)
    policy = bandit.clone_mle(data, 300)
    normal = policy.normal(1)
    assert normal.mean.abs().max() < 0.2
    assert torch.allclose(normal.stddev, data.action.clamp(-0.999, 0.999).atanh().std(0), rtol=0.1)
    assert sum(shares(policy, data, 0.2)) < 0.5 and sum(shares(policy, data, 0.3)) < 0.6


def test_diffusion_holds_four_modes(data):
    torch.manual_seed(0)
    cloned = shares(bandit.sampler(bandit.clone_diffusion(data, num_steps=50, num_updates=1200)), data, 0.3)
    assert min(cloned) > 0.1 and sum(cloned) > 0.7, cloned


def test_diffusion_ql_finds_the_best_mode(data):
    torch.manual_seed(0)
    clone = bandit.clone_diffusion(data, num_steps=5, num_updates=300)
    agent = bandit.diffusion_ql(data, bandit.fit_q(data, 400), clone, num_updates=150)
    learned = shares(bandit.sampler(agent), data, 0.3)
    assert learned[3] > 0.6, learned


def test_other_learners_take_steps(data, tmp_path):
    """After three updates the actions of each are finite and in the square, and a picture of them is written."""
    torch.manual_seed(0)
    q, vae = bandit.fit_q(data, 3), bandit.clone_vae(data, 3)
    policies = {
        "vae": vae, "mmd": bandit.clone_mmd(data, 3), "td3_bc": bandit.td3_bc(data, q, 3),
        "bcq": bandit.bcq(data, q, vae, 3), "bear": bandit.bear(data, q, 3),
    }  # fmt: skip
    with torch.no_grad():
        actions = {name: policy(20) for name, policy in policies.items()}
    for name, action in actions.items():
        assert action.shape == (20, 2) and (action.abs() <= 1).all(), name
    bandit.draw(tmp_path / "picture.png", [actions, actions], data)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


# ----------------------------------------------------------------------------- ablation

RUN_PACKAGES = ("gymnasium", "gymnasium_robotics", "mujoco", "h5py", "tqdm", "tensorboard", "matplotlib")
run_wanted = pytest.mark.skipif(not all(map(find_spec, RUN_PACKAGES)), reason="no packages for whole runs")


def tiny_args(folder: Path, **changes) -> ablate.Args:
    """A small ablation on Hopper, whose episodes are short, with random data."""
    return ablate.Args(**{
        "env_id": tiny.ENV_ID, "dataset_path": tiny.write_data(folder / "hopper.hdf5", 300), "num_updates": 10,
        "batch_size": 8, "num_seeds": 1, "eval_episodes": 1, "num_steps": (1, 5), "etas": (0.0, 1.0, 3.0),
        "out": folder / "out", "device": "cpu", **changes,
    })  # fmt: skip


def table(path: Path) -> list[dict]:
    """A table's rows without their times."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("ms_")} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def ablation(tmp_path_factory) -> ablate.Args:
    args = tiny_args(tmp_path_factory.mktemp("ablation"))
    ablate.ablate(args)
    return args


def count_trained(monkeypatch) -> list:
    """A list that collects the settings of each group trained from now on."""
    trained, train_group = [], ablate.train_group

    def counted(args, settings, *rest):
        trained.append(settings)
        return train_group(args, settings, *rest)

    monkeypatch.setattr(ablate, "train_group", counted)
    return trained


@run_wanted
def test_ablation_writes_tables_and_pictures(ablation):
    names = {"ablate.json", "eta.csv", "eta.png", "steps.csv", "steps.png"}
    assert {path.name for path in ablation.out.iterdir()} == names
    steps, etas = table(ablation.out / "steps.csv"), table(ablation.out / "eta.csv")
    assert [(row["num_steps"], row["eta"], row["seed"]) for row in steps] == [("1", "1.0", "0"), ("5", "1.0", "0")]
    assert [(float(row["eta"]), row["num_steps"], row["seed"]) for row in etas] == [(e, "5", "0") for e in (0, 1, 3)]
    for row in steps + etas:
        finite = [name for name in row if name != "target_q" or float(row["eta"]) > 0]
        assert all(math.isfinite(float(row[name])) for name in finite), row
    assert all(0 < float(row["action_distance"]) < 2 * math.sqrt(3) for row in steps + etas)
    assert etas[1] == steps[1], "N = 5, eta = 1 of both tables is the same agent"


@run_wanted
def test_ablation_trains_the_same_agent_again(ablation, tmp_path):
    """Without the table of N to take it from, eta = 1 is trained again, and its row equals that of N = 5."""
    ablate.ablate(replace(ablation, out=tmp_path, num_steps=(), etas=(1.0,)))
    assert table(tmp_path / "eta.csv") == table(ablation.out / "steps.csv")[1:]


@run_wanted
def test_ablation_skips_what_is_done(ablation, monkeypatch):
    trained = count_trained(monkeypatch)
    before = {path: path.read_bytes() for path in ablation.out.glob("*.csv")}
    ablate.ablate(ablation)
    assert trained == [] and before == {path: path.read_bytes() for path in ablation.out.glob("*.csv")}


@run_wanted
def test_ablation_goes_on_and_grows(ablation, tmp_path, monkeypatch):
    args = replace(ablation, out=tmp_path)
    train_group = ablate.train_group

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ablate, "train_group", lambda args, settings, *rest: (
            train_group(args, settings, *rest) if settings[0][0] == 1 else stop()))  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            ablate.ablate(args)
    assert len(table(tmp_path / "steps.csv")) == 1 and not (tmp_path / "eta.csv").exists()

    trained = count_trained(monkeypatch)
    ablate.ablate(args)
    assert trained == [[(5, 1.0, 0)], [(5, 0.0, 0)], [(5, 3.0, 0)]]
    for name in ("steps.csv", "eta.csv"):
        assert table(tmp_path / name) == table(ablation.out / name)

    trained.clear()
    ablate.ablate(replace(args, num_seeds=3, num_steps=(1,), etas=()))
    assert trained == [[(1, 1.0, 1)], [(1, 1.0, 2)]]
    assert len(table(tmp_path / "steps.csv")) == 4


@run_wanted
def test_replicas_are_single_agents(ablation):
    """In a group with an agent of another eta and seed, an agent has the same row as alone, up to rounding."""
    dataset = dql.make_batch(dql.load_dataset(ablation.env_id, ablation.dataset_path), "none", torch.device("cpu"))
    rows = ablate.train_group(ablation, [(5, 3.0, 1), (5, 1.0, 0)], dataset, types.SimpleNamespace(update=int))
    alone = table(ablation.out / "eta.csv")[1]
    assert rows[1]["replicas"] == 2 and rows[0]["seed"] == 1
    for name in ("bc_loss", "target_q", "action_distance"):
        assert rows[1][name] == pytest.approx(float(alone[name]), rel=1e-3)


@run_wanted
def test_row_is_a_run_of_dql(tmp_path):
    """A row's score equals that of the same run by dql.train, to the last bit."""
    args = tiny_args(tmp_path, num_steps=(2,), etas=())
    ablate.ablate(args)
    summary = dql.train(dql.Args(
        env_id=args.env_id, dataset_path=args.dataset_path, device="cpu", num_updates=10, batch_size=8, num_steps=2,
        eval_episodes=1, runs_dir=tmp_path / "runs",
    ))  # fmt: skip
    (row,) = table(args.out / "steps.csv")
    assert float(row["score"]) == summary["last"]["score"]


@run_wanted
@pytest.mark.parametrize(("flags", "said"), [
    (["--num-steps", "0"], "--num-steps is 0"),
    (["--etas", "-1"], "--eta is -1.0"),
    (["--num-seeds", "0"], "--num-seeds is 0"),
    (["--num-updates", "30"], "holds an ablation with num_updates 10"),
    (["--env-id", "nothing-v0"], "nothing-v0"),
    (["--out", "{file}"], "choose another --out"),
])  # fmt: skip
def test_bad_input_is_one_line(ablation, flags, said, monkeypatch, capsys):
    file = str(ablation.dataset_path)
    base = ["--env-id", ablation.env_id, "--dataset-path", file, "--num-updates", "10", "--batch-size", "8",
            "--eval-episodes", "1", "--out", str(ablation.out), "--device", "cpu"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["ablate.py", *base, *(flag.format(file=file) for flag in flags)])
    with pytest.raises(SystemExit) as stop:
        ablate.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
