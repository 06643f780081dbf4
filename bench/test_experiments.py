"""Tests of the bandit, the ablation and the variants, on small budgets."""

import csv
import json
import math
import shutil
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
    cloned = shares(bandit.diffusion(data, bandit.agent_args(50, 0.0, 4000)), data, 0.3)
    assert min(cloned) > 0.1 and sum(cloned) > 0.6, cloned


def test_diffusion_ql_finds_the_best_mode(data):
    assert shares(bandit.diffusion(data, bandit.agent_args(5, bandit.ETA, 1500)), data, 0.3)[3] > 0.6


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
    with pytest.raises(BadInput, match="--num-updates is -1"):
        bandit.main(bandit.Args(num_updates=-1, out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    (stopped.out / "samples.npz").write_bytes(b"PK")
    with pytest.raises(BadInput, match="holds damaged results"):
        bandit.main(stopped)


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


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder and the words of a finished comparison: published and layernorm+ensemble, one seed of each."""
    out = tmp_path_factory.mktemp("innovations")
    file = tiny.write_data(out / "hopper.hdf5", 300)
    flags = f"--env-id {tiny.ENV_ID} --dataset-path {file} --num-updates 4 --eval-episodes 2"
    innovations.DATA["tiny"] = flags, 1
    words = ["tiny", "--variants", "published", "layernorm+ensemble", "--devices", "cpu", "--batch-size", "8"]
    assert innovations.run([*words, "--out", str(out)]) == 0
    return out, words


def variant_runs(out: Path) -> list[Path]:
    """The runs' folders: published, layernorm+ensemble."""
    runs = [path.parent for path in out.glob("tiny/*/args.json")]
    return sorted(runs, key=lambda run: dql.read_args(run).num_critics)


def rows_of(out: Path, words: list[str]) -> list[dict]:
    assert innovations.run([*words, "--only-table", "--out", str(out)]) == 0
    return [*json.loads((out / "tiny.json").read_text())["rows"].values()]


def test_innovations_trains_evaluates_and_compares(compared):
    """Each run has its variant's flags, the table the scores of evaluations, and nothing is made twice."""
    out, words = compared
    rows, runs = json.loads((out / "tiny.json").read_text())["rows"], variant_runs(out)
    args = [dql.read_args(run) for run in runs]
    assert [(it.num_critics, it.critic_layernorm, it.pessimism) for it in args] == [(2, False, None), (5, True, 1.0)]
    assert [*rows] == ["published", "layernorm+ensemble"] and {it.batch_size for it in args} == {8}
    for row, run in zip(rows.values(), runs, strict=True):
        found = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
        assert [it["settings"]["eval_candidates"] for it in found] == [50, 1]
        assert [row["candidates"], row["one_candidate"]] == [it["scores"] for it in found]
        last = [*csv.DictReader((run / "metrics.csv").open())][-1]
        assert (row["target_q"], row["diverge"]) == ([float(last["target_q"])], [False])
    text = (out / "tiny.md").read_text()
    assert "Flags for all: --batch-size 8." in text and "| layernorm+ensemble | 1 of 1 |" in text
    assert innovations.run([*words, "--out", str(out)]) == 0 and variant_runs(out) == runs
    assert (out / "tiny.md").read_text() == text and (out / "tiny.png").stat().st_size > 10_000


def test_innovations_counts_only_what_belongs_to_the_run(compared, tmp_path):
    """An evaluation of fewer updates, with another temperature, or cut off is none; a seed may be missing."""
    shutil.copytree(compared[0], out := tmp_path / "out")
    words, (published, variant) = compared[1], variant_runs(out)
    whole, by_one = (json.loads(line) for line in (variant / "evaluations.jsonl").read_text().splitlines())
    cold = whole | {"settings": whole["settings"] | {"eval_temperature": 0.0}}
    lines = [json.dumps(x) for x in (whole | {"steps": [2]}, cold, whole | {"episodes": 3}, whole | {"which": "best"})]
    (variant / "evaluations.jsonl").write_text("\n".join([*lines, json.dumps(by_one), json.dumps(whole)[:40]]) + "\n")
    metrics = variant / "metrics.csv"
    rows = [*csv.DictReader(metrics.open())]
    metrics.write_text(metrics.read_text().replace(rows[-1]["target_q"], "-1e6"))
    first, second = rows_of(out, words)
    assert (first["diverge"], second["diverge"], second["candidates"]) == ([False], [True], [None])
    assert second["one_candidate"] == by_one["scores"] and "| not evaluated |" in (out / "tiny.md").read_text()

    for k in (1, 2):  # copies as further seeds
        for run in (published, variant):
            shutil.copytree(run, copy := out / "tiny" / f"{run.name}-{k}")
            (copy / "args.json").write_text(json.dumps(json.loads((run / "args.json").read_text()) | {"seed": k}))
            (copy / "evaluations.jsonl").write_text("".join(json.dumps(
                it | {"mean": 10.0 * k + (run == variant)}) + "\n" for it in (whole, by_one)))  # fmt: skip
    (variant / "evaluations.jsonl").write_text(json.dumps(whole | {"mean": 5.0}) + "\n")
    (published / "evaluations.jsonl").write_text(json.dumps(whole | {"mean": 2.0}) + "\n")
    first, second = rows_of(out, [*words, "--seeds", "2"])
    assert (first["seeds"], first["candidates"], second["candidates"]) == ([0, 1], [2.0, 10.0], [5.0, 11.0])
    assert second["difference"] == innovations.difference([5.0, 11.0], [2.0, 10.0]) and first["difference"] is None
    (out / "tiny" / f"{variant.name}-1" / "summary.json").unlink()
    assert rows_of(out, [*words, "--seeds", "2"])[1]["difference"] is None
    assert "| layernorm+ensemble | 1 of 2 |" in (out / "tiny.md").read_text()


def test_innovations_intervals_and_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert innovations.difference([3.0] * 3, [1.0] * 3) == [2, 2]
    rng = np.random.default_rng(1)
    a, b = rng.normal(5, 2, 40).tolist(), rng.normal(0, 1, 40).tolist()
    half = 1.96 * math.sqrt((np.var(a) + np.var(b)) / 40)  # of a normal distribution
    wanted = [np.mean(a) - np.mean(b) - half, np.mean(a) - np.mean(b) + half]
    assert innovations.difference(a, b) == pytest.approx(wanted, abs=0.05)
    for words, said in (
        (["kitchn"], "kitchn: there is kitchen"), (["cube", "--variants", "x"], "--variants x"),
        (["kitchen", "--resume", "x"], "--resume is not passed on"), (["kitchen", "--lr", "-1"], "--learning-rate is"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=said):
            innovations.run([*words, "--out", "out", "--only-table"])
    assert not [*tmp_path.glob("out/*")]
