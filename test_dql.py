"""The proof: every part of dql.py and d4rl_tasks.py against something that is not itself.

    pytest test_dql.py

Oracles: the official implementation's figures (reference/official_update.json), D4RL's own transitions
(reference/classic_steps.npz), closed forms and second implementations in float64.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import dql
from dql import ActDraws, Args, Batch, DiffusionPolicy, DiffusionQL, Draws, beta_schedule

HERE = Path(__file__).parent
REFERENCE = HERE / "reference"
OFFICIAL = json.loads((REFERENCE / "official_update.json").read_text())


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tiny_agent(state_dim=3, action_dim=2, **args) -> DiffusionQL:
    torch.manual_seed(0)
    return DiffusionQL(state_dim, action_dim, Args(**{"device": "cpu", "batch_size": 8, **args}))


def random_batch(agent: DiffusionQL, state_dim=3, seed=0) -> Batch:
    rng, rows = np.random.default_rng(seed), agent.args.batch_size
    arrays = (
        rng.standard_normal((rows, state_dim)), np.tanh(rng.standard_normal((rows, agent.action_dim))),
        rng.standard_normal(rows), rng.standard_normal((rows, state_dim)), rng.uniform(size=rows) < 0.2,
    )  # fmt: skip
    return Batch(*(torch.as_tensor(a, dtype=torch.get_default_dtype()) for a in arrays))


def parameters(agent: DiffusionQL) -> list[torch.Tensor]:
    return [p.detach().clone() for name in ("policy", "policy_ema", "critic", "critic_target")
            for p in getattr(agent, name).parameters()]  # fmt: skip


# ----------------------------------------------------------------- equal to the official implementation


def fill_official(network: torch.nn.Module, rs: np.random.RandomState) -> None:
    """Weights by the rules of the official figures: uniform(-1, 1) / sqrt(fan in), 16 for a bias, layer by layer."""
    for p in network.parameters():
        p.data.copy_(torch.as_tensor(rs.uniform(-1, 1, p.shape) / math.sqrt(p.shape[1] if p.dim() == 2 else 16)))


def official_batch(rs: np.random.RandomState, S: int, A: int, B: int) -> Batch:
    state, action = rs.standard_normal((B, S)), np.tanh(rs.standard_normal((B, A)))
    next_state, reward = rs.standard_normal((B, S)), rs.standard_normal((B, 1))[:, 0]
    done = (rs.uniform(size=(B, 1)) < 0.2)[:, 0].astype(float)
    return Batch(*map(torch.as_tensor, (state, action, reward, next_state, done)))


def official_draws(rs: np.random.RandomState, A: int, B: int, N: int, rows: int) -> Draws:
    next_noise = np.stack([rs.standard_normal((rows, A)) for _ in range(N + 1)])
    bc_step, bc_noise = rs.randint(0, N, size=(B,)), rs.standard_normal((B, A))
    policy_noise = np.stack([rs.standard_normal((B, A)) for _ in range(N + 1)])
    return Draws(*map(torch.as_tensor, (next_noise, bc_step, bc_noise, policy_noise, rs.uniform())))


@pytest.mark.parametrize("case", OFFICIAL["cases"])
def test_official_updates(case, float64):
    """Twelve updates on the official implementation's numbers: losses, actions, Q values and norms to 1e-9."""
    want = OFFICIAL["cases"][case]
    c = want["config"]
    S, A, B, N = (c[k] for k in "SABN")
    agent = DiffusionQL(S, A, Args(
        eta=c["eta"], grad_norm=c["gn"], learning_rate=c["lr"], max_q_backup=c["max_q_backup"], num_steps=N,
        schedule=c["schedule"], batch_size=B, tau=OFFICIAL["tau"], gamma=OFFICIAL["discount"], device="cpu",
        average_decay=OFFICIAL["ema_decay"], average_every=OFFICIAL["ema_every"], average_from=OFFICIAL["ema_start"],
    ))  # fmt: skip
    rs = np.random.RandomState(c["seed"])
    fill_official(agent.policy, rs)
    fill_official(agent.critic, rs)
    agent.policy_ema.load_state_dict(agent.policy.state_dict())
    agent.critic_target.load_state_dict(agent.critic.state_dict())

    for expected in want["losses"]:
        batch = official_batch(rs, S, A, B)
        losses = agent.update(batch, official_draws(rs, A, B, N, 10 * B if c["max_q_backup"] else B))
        got = [losses.critic, losses.bc, losses.q, losses.policy]
        names = ("critic_loss", "bc_loss", "ql_loss", "actor_loss")
        np.testing.assert_allclose(got, [expected[k] for k in names], rtol=1e-9)

    state = torch.as_tensor(rs.standard_normal((8, S)))
    noise = torch.as_tensor(np.stack([rs.standard_normal((8, A)) for _ in range(N + 1)]))
    with torch.no_grad():
        actions = agent.policy.sample(state, noise)
        q1, q2 = agent.critic(state, actions)
        target_q_min = torch.min(*agent.critic_target(state, actions))
    for name, got in {"actions": actions, "q1": q1, "q2": q2, "target_q_min": target_q_min}.items():
        np.testing.assert_allclose(got.flatten(), np.ravel(want[name]), rtol=1e-9, err_msg=name)
    parts = {"actor": "policy", "ema": "policy_ema", "critic": "critic", "critic_target": "critic_target"}
    for name, part in parts.items():
        norm = torch.cat([p.flatten() for p in getattr(agent, part).parameters()]).norm()
        assert norm.item() == pytest.approx(want["norms"][name], rel=1e-9), name


# ----------------------------------------------------------------- the diffusion policy


@pytest.mark.parametrize("case", OFFICIAL["cases"])
def test_schedules_are_the_official_ones(case):
    want = OFFICIAL["cases"][case]
    np.testing.assert_allclose(
        beta_schedule(want["config"]["schedule"], want["config"]["N"]), want["betas"], rtol=1e-14, atol=1e-16
    )


def test_schedules_by_hand():
    """Each formula as its paper writes it, one number at a time."""
    N = 5
    vp = [1 - math.exp(-0.1 / N - 0.5 * (10 - 0.1) * (2 * i - 1) / N**2) for i in range(1, N + 1)]
    linear = [1e-4 + (2e-2 - 1e-4) * i / (N - 1) for i in range(N)]
    bar = [math.cos((i / N + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(N + 1)]
    cosine = [min(1 - bar[i + 1] / bar[i], 0.999) for i in range(N)]
    for name, want in {"vp": vp, "linear": linear, "cosine": cosine}.items():
        got = beta_schedule(name, N)
        assert got.dtype == torch.float64
        np.testing.assert_allclose(got, want, rtol=1e-13)
    assert beta_schedule("vp", 1).shape == beta_schedule("cosine", 1).shape == (1,)


@pytest.mark.parametrize("schedule", ["vp", "linear", "cosine"])
def test_reverse_chain_is_bayes_rule(schedule, float64):
    """With a predictor that says one constant, every reverse step is the posterior of a product of two Gaussians."""
    N, B = 4, 6
    policy = DiffusionPolicy(3, 2, 1.0, N, schedule)
    eps = torch.tensor([0.3, -0.2])
    policy.output.weight.data.zero_()
    policy.output.bias.data.copy_(eps)
    noise = torch.randn(N + 1, B, 2, generator=torch.Generator().manual_seed(0))
    beta = beta_schedule(schedule, N).numpy()
    bar = np.cumprod(1 - beta)

    a = noise[0].numpy()
    for k, i in enumerate(reversed(range(N)), start=1):
        a0 = np.clip((a - math.sqrt(1 - bar[i]) * eps.numpy()) / math.sqrt(bar[i]), -1, 1)
        if i == 0:
            a = a0
            break
        # prior a^{i-1} | a^0 and likelihood a^i | a^{i-1}: precisions add
        precision = 1 / (1 - bar[i - 1]) + (1 - beta[i]) / beta[i]
        mean = (math.sqrt(bar[i - 1]) * a0 / (1 - bar[i - 1]) + math.sqrt(1 - beta[i]) * a / beta[i]) / precision
        a = mean + precision**-0.5 * noise[k].numpy()
    got = policy.sample(torch.zeros(B, 3), noise).detach()
    np.testing.assert_allclose(got, a, rtol=1e-10, atol=1e-12)


def test_last_noise_is_not_added_and_actions_stay_in_bounds():
    policy = DiffusionPolicy(3, 2, 0.5)
    noise = 3 * torch.randn(6, 50, 2, generator=torch.Generator().manual_seed(0))
    other = noise.clone()
    other[-1] = 9.0
    actions = policy.sample(torch.zeros(50, 3), noise)
    assert torch.equal(actions, policy.sample(torch.zeros(50, 3), other))
    assert actions.abs().max() <= 0.5 and actions.std() > 0


def test_bc_loss_is_eq_2(float64):
    """Against Eq. 2 written out a sample at a time."""
    policy = DiffusionPolicy(3, 2, 1.0, 5, "vp")
    rng = np.random.default_rng(0)
    action, state, noise = (torch.as_tensor(rng.standard_normal((7, d))) for d in (2, 3, 2))
    step = torch.as_tensor(rng.integers(0, 5, 7))
    bar = np.cumprod(1 - beta_schedule("vp", 5).numpy())
    total = 0.0
    for a, s, i, e in zip(action, state, step, noise, strict=True):
        noisy = math.sqrt(bar[i]) * a + math.sqrt(1 - bar[i]) * e
        angle = i * torch.exp(-torch.arange(8) * math.log(10000) / 7)
        time = policy.time_mlp(torch.cat([angle.sin(), angle.cos()]))
        total += (policy.output(policy.trunk(torch.cat([noisy, time, s]))) - e).square().sum()
    assert policy.bc_loss(action, state, step, noise).item() == pytest.approx(total.item() / 14, rel=1e-12)


def test_mish_and_its_gradient(float64):
    """The one-exponential form is x tanh(softplus(x)), also where e^x would overflow."""
    x = torch.cat([torch.linspace(-50, 50, 4001), torch.tensor([-1e4, 0.0, 19.999, 20.001, 1e4])]).requires_grad_()
    for form in (dql.Mish(), torch.nn.functional.mish):
        x.grad = None
        y = form(x)
        y.sum().backward()
        if isinstance(form, dql.Mish):
            got = y.detach(), x.grad
    np.testing.assert_allclose(got[0], y.detach(), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(got[1], x.grad, rtol=1e-12, atol=1e-14)


# ----------------------------------------------------------------- the update


def test_policy_gradient_against_finite_differences(float64):
    """Eq. 3's gradient flows through the whole reverse chain, but not through the scale of Q."""
    agent = tiny_agent(eta=1.0)
    batch, draws = random_batch(agent), agent.draw(torch.Generator().manual_seed(1))
    draws = draws._replace(coin=torch.tensor(1.0))
    bc, q = agent.policy_losses(batch, draws)
    grads = torch.autograd.grad(bc + q, list(agent.policy.parameters()))
    scale = agent.critic(batch.state, agent.policy.sample(batch.state, draws.policy_noise))[1].abs().mean()

    def loss():
        bc = agent.policy.bc_loss(batch.action, batch.state, draws.bc_step, draws.bc_noise)
        return bc - agent.critic(batch.state, agent.policy.sample(batch.state, draws.policy_noise))[0].mean() / scale

    generator = torch.Generator().manual_seed(2)
    for p, grad in zip(agent.policy.parameters(), grads, strict=True):
        direction = torch.randn(p.shape, generator=generator)
        values = []
        with torch.no_grad():
            for h in (1e-6, -2e-6):
                p.add_(direction, alpha=h)
                values.append(loss().item())
            p.add_(direction, alpha=1e-6)
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx((grad * direction).sum().item(), rel=2e-5, abs=1e-8)


def test_coin_chooses_the_critic(float64):
    """Above 0.5 Q1 is maximised and |Q2| normalises, as a constant."""
    agent = tiny_agent()
    batch, draws = random_batch(agent), agent.draw(torch.Generator().manual_seed(1))
    with torch.no_grad():
        q1, q2 = agent.critic(batch.state, agent.policy.sample(batch.state, draws.policy_noise))
    for coin, up, down in ((0.51, q1, q2), (0.5, q2, q1)):
        got = agent.policy_losses(batch, draws._replace(coin=torch.tensor(coin)))[1]
        assert got.item() == pytest.approx((-up.mean() / down.abs().mean()).item(), rel=1e-12)


def test_backup_takes_the_maximum_before_the_minimum():
    """Ten next actions: the maximum of each critic, then the lesser; minimum first would give 1, not 4."""
    agent = tiny_agent(max_q_backup=True, batch_size=2, gamma=0.5)
    q1 = torch.tensor([5.0] + 9 * [1.0] + 10 * [0.0])
    q2 = torch.tensor([1.0] + 8 * [1.0] + [4.0] + 10 * [0.0])
    agent.critic_target = lambda state, action: (q1, q2)
    batch = random_batch(agent)._replace(reward=torch.tensor([3.0, 7.0]), done=torch.tensor([0.0, 1.0]))
    draws = agent.draw(torch.Generator().manual_seed(0))
    assert draws.next_noise.shape == (6, 20, 2)
    assert agent.critic_loss(batch, draws.next_noise)[1].item() == ((3 + 0.5 * 4) + 7) / 2


def test_average_starts_and_moves_when_it_should():
    agent = tiny_agent(average_from=3, average_every=2, average_decay=0.9)
    generator, moved = torch.Generator().manual_seed(0), []
    for k in range(8):
        before = [p.clone() for p in agent.policy_ema.parameters()]
        agent.update(random_batch(agent, seed=k), agent.draw(generator))
        after = list(agent.policy_ema.parameters())
        if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            moved.append(k)
            for a, b, p in zip(after, before, agent.policy.parameters(), strict=True):
                torch.testing.assert_close(a, 0.9 * b + 0.1 * p)
    assert moved == [4, 6]


def test_targets_move_every_update():
    agent = tiny_agent(tau=0.25)
    before = [p.clone() for p in agent.critic_target.parameters()]
    agent.update(random_batch(agent), agent.draw(torch.Generator().manual_seed(0)))
    for a, b, p in zip(agent.critic_target.parameters(), before, agent.critic.parameters(), strict=True):
        torch.testing.assert_close(a, 0.75 * b + 0.25 * p)


def test_gradients_are_clipped_network_by_network():
    """Adam's first moment after one update is 0.1 of the clipped gradient."""
    agent = tiny_agent(grad_norm=0.01)
    losses = agent.update(random_batch(agent), agent.draw(torch.Generator().manual_seed(0)))
    assert losses.critic_grad_norm > 0.01 and losses.policy_grad_norm > 0.01
    for opt in (agent.policy_opt, agent.critic_opt):
        moments = torch.cat([s["exp_avg"].flatten() for s in opt.state.values()])
        assert moments.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_eta_0_is_behaviour_cloning():
    """The policy learns what it learns at any eta > 0 with a Q-loss of no weight; critics rest; one candidate acts."""
    agents = [tiny_agent(eta=0.0), tiny_agent(eta=1e-30)]
    for agent in agents:
        generator = torch.Generator().manual_seed(0)
        for k in range(3):
            losses = agent.update(random_batch(agent, seed=k), agent.draw(generator))
    for p, q in zip(agents[0].policy.parameters(), agents[1].policy.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    for p, q in zip(agents[0].critic.parameters(), tiny_agent().critic.parameters(), strict=True):
        assert torch.equal(p, q)
    assert losses.bc > 0 and agents[0].args.eval_candidates == 1 and agents[1].args.eval_candidates == 50
    with pytest.raises(dql.BadInput, match="--eval-candidates"):
        tiny_agent(eta=0.0, eval_candidates=2)


def test_learning_rate_decay():
    agent = tiny_agent(lr_decay=True, num_updates=4, learning_rate=1e-3)
    rates, generator = [], torch.Generator().manual_seed(0)
    for k in range(4):
        agent.update(random_batch(agent, seed=k), agent.draw(generator))
        rates.append([opt.param_groups[0]["lr"].item() for opt in (agent.policy_opt, agent.critic_opt)])
    want = [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    np.testing.assert_allclose(rates, np.outer(want, [1e-3, 3e-4]), rtol=1e-6)


def test_draws_are_fresh_normal_and_uniform():
    agent = tiny_agent(batch_size=2000)
    generator = torch.Generator().manual_seed(0)
    first, second = agent.draw(generator), agent.draw(generator)
    for a, b in zip(first, second, strict=True):
        assert not torch.equal(a, b)
    for noise in (first.next_noise, first.bc_noise, first.policy_noise):
        assert abs(noise.mean()) < 0.06 and abs(noise.var() - 1) < 0.1
    assert torch.bincount(first.bc_step, minlength=5).min() > 300 and first.bc_step.max() == 4


# ----------------------------------------------------------------- acting


def test_act_draws_from_the_softmax_of_min_target_q():
    """Three candidates of known Q, 20,000 states: shares within four standard errors; temperature 0 takes the best."""
    states, q = 20_000, torch.tensor([1.0, 0.0, -1.0])
    for temperature in (1.0, 0.5, 0.0):
        agent = tiny_agent(eval_candidates=3, eval_temperature=temperature)
        agent.policy.sample = lambda state, noise: torch.arange(3.0).repeat(states)[:, None].expand(-1, 2)
        agent.critic_target = lambda state, action: (q[action[:, 0].long()], q[action[:, 0].long()] + 1)
        draws = agent.draw_act(states, torch.Generator().manual_seed(0))
        chosen = agent.act(torch.zeros(states, 3), draws)[:, 0].long()
        want = torch.softmax(q / temperature, 0) if temperature else torch.tensor([1.0, 0.0, 0.0])
        frequency = torch.bincount(chosen, minlength=3) / states
        assert ((frequency - want).abs() <= 4 * (want * (1 - want) / states).sqrt()).all(), temperature


def test_act_pairs_states_with_their_own_candidates():
    """One candidate each, two states: the same actions as the chain alone; and --eval-average acts with the average."""
    agent = tiny_agent(eval_candidates=1)
    for p in agent.policy_ema.parameters():
        p.data.mul_(2)
    state, noise = torch.randn(2, 3), torch.randn(6, 2, 2)
    draws = ActDraws(noise, torch.zeros(2, 1))
    assert torch.equal(agent.act(state, draws), agent.policy.sample(state, noise))
    agent.args.eval_average = True
    assert torch.equal(agent.act(state, draws), agent.policy_ema.sample(state, noise))


def test_bandit_finds_the_best_corner():
    """Actions at four corners, the best of them rewarded with 5: the chain alone, no candidates, learns to go there."""
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 4, 4000)
    centers = np.array([[-0.8, 0.8], [-0.8, -0.8], [0.8, 0.8], [0.8, -0.8]])
    action = np.clip(centers[corner] + 0.05 * rng.standard_normal((4000, 2)), -1, 1)
    reward = np.array([3.0, 0.0, 1.5, 5.0])[corner] + 0.5 * rng.standard_normal(4000)
    arrays = (np.zeros((4000, 1)), action, reward, np.zeros((4000, 1)), np.ones(4000))
    data = Batch(*(torch.as_tensor(x, dtype=torch.float32) for x in arrays))
    agent = tiny_agent(1, 2, eta=2.5, batch_size=64, learning_rate=1e-3, eval_candidates=1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        index = torch.randint(4000, (64,), generator=generator)
        agent.update(Batch(*(x[index] for x in data)), agent.draw(generator))
    actions = agent.act(torch.zeros(400, 1), agent.draw_act(400, generator))
    near = torch.cdist(actions, torch.as_tensor(centers, dtype=torch.float32)) < 0.3
    assert near[:, 3].float().mean() > 0.8, near.float().mean(0)


# ----------------------------------------------------------------- the run


def hopper_file(path: Path, rows=600) -> Path:
    """A D4RL-layout file of Hopper's widths with random contents."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.standard_normal((rows, 11)).astype(np.float32)
        file["actions"] = np.tanh(rng.standard_normal((rows, 3))).astype(np.float32)
        file["rewards"] = rng.standard_normal(rows).astype(np.float32)
        file["terminals"] = rng.uniform(size=rows) < 0.05
        file["timeouts"] = np.zeros(rows, bool)
    return path


def tiny_args(folder: Path, **changes) -> Args:
    data = folder / "hopper.hdf5"
    return Args(**{
        "env_id": "hopper-medium-v2", "dataset_path": data if data.exists() else hopper_file(data), "device": "cpu",
        "runs_dir": folder / "runs", "num_updates": 30, "batch_size": 16, "num_steps": 2, "eval_every": 12,
        "eval_episodes": 3, "eval_candidates": 4, "log_every": 5, **changes,
    })  # fmt: skip


TIMES = ("updates_per_second", "seconds")


def metrics(folder: Path) -> list[dict]:
    import csv

    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def test_a_run_writes_its_folder(tmp_path):
    summary = dql.train(tiny_args(tmp_path))
    folder = Path(summary["folder"])
    names = {p.name for p in folder.iterdir()}
    assert {"args.json", "metrics.csv", "checkpoint.pt", "curve.png", "summary.json"} < names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    rows = metrics(folder)
    assert [int(r["step"]) for r in rows] == [5, 10, 12, 15, 20, 24, 25, 30]
    assert [bool(r["score"]) for r in rows] == [False, False, True, False, False, True, False, True]
    assert summary["last"]["step"] == 30 and summary["last"]["episodes"] == 3 and summary["paper"] == (90.5, 4.6)
    assert summary["best"]["score"] == max(float(r["score"]) for r in rows if r["score"])
    assert summary["versions"]["torch"] == torch.__version__ and summary["updates_per_second"] > 0
    with open(folder / "curve.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_same_seed_same_metrics_and_other_seed_other(tmp_path):
    runs = [metrics(Path(dql.train(tiny_args(tmp_path, seed=seed))["folder"])) for seed in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_resume_is_exact(tmp_path, monkeypatch, capsys):
    """Stopped after its first checkpoint and resumed: the weights and metrics of a run that was not stopped."""
    whole = Path(dql.train(tiny_args(tmp_path, num_updates=24))["folder"])
    save = dql.save

    def save_and_stop(*args):
        save(*args)
        if args[3][-1]["step"] == 15:
            raise KeyboardInterrupt

    monkeypatch.setattr(dql, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        dql.train(tiny_args(tmp_path, num_updates=24))
    monkeypatch.setattr(dql, "save", save)
    stopped = next(p for p in (tmp_path / "runs").iterdir() if p != whole)
    assert not (stopped / "summary.json").exists()
    dql.train(Args(resume=stopped))
    assert metrics(stopped) == metrics(whole)
    saved = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, stopped))
    a, b = (torch.utils._pytree.tree_leaves([x["agent"], x["generator"]]) for x in saved)
    assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b, strict=True))

    with pytest.raises(dql.BadInput, match=r"--eta 7.0 \(the run's: 1.0\)"):
        dql.train(Args(resume=stopped, eta=7.0))


def test_load_policy(tmp_path):
    """Numpy in, numpy out; torch in, torch out; one state or many; the same seed acts the same."""
    folder = dql.train(tiny_args(tmp_path, num_updates=2))["folder"]
    policy, again = dql.load_policy(folder, device="cpu"), dql.load_policy(folder, device="cpu")
    states = np.random.default_rng(0).standard_normal((5, 11))
    actions = policy(states)
    assert isinstance(actions, np.ndarray) and actions.shape == (5, 3) and np.abs(actions).max() <= 1
    np.testing.assert_array_equal(actions, again(states))
    assert policy(states[0]).shape == (3,)
    assert torch.is_tensor(policy(torch.as_tensor(states))) and policy(torch.as_tensor(states)).shape == (5, 3)


def test_compiled_update_equals_eager(float64):
    """torch.compile changes how an update is computed, not what."""
    eager, compiled = (tiny_agent(num_steps=2, compile=c) for c in (False, True))
    for agent in (eager, compiled):
        generator = torch.Generator().manual_seed(0)
        for k in range(3):
            agent.update(random_batch(agent, seed=k), agent.draw(generator))
    for a, b in zip(parameters(eager), parameters(compiled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_offline_selection_takes_the_ranked_evaluation():
    """Losses since the evaluation before, weighted by updates; ranks beyond the last take the worst."""
    rows = [
        {"step": 10, "bc_loss": 9.0, "score": "", "score_std": ""},
        {"step": 20, "bc_loss": 1.0, "score": 1.0, "score_std": 0.0},  # mean 5
        {"step": 30, "bc_loss": 2.0, "score": 2.0, "score_std": 0.0},  # 2
        {"step": 31, "bc_loss": 0.0, "score": "", "score_std": ""},
        {"step": 40, "bc_loss": 4.0, "score": 3.0, "score_std": 0.0},  # 3.6
    ]
    for rank, want in ((0, 2.0), (1, 3.0), (2, 1.0), (7, 1.0)):
        chosen = dql.select(rows, dql.with_settings(Args(offline_rank=rank)))
        assert chosen["offline"]["score"] == want and chosen["best"]["score"] == chosen["last"]["score"] == 3.0


def test_reward_transforms():
    data = {"observations": np.zeros((4, 2)), "actions": np.zeros((4, 1)), "next_observations": np.zeros((4, 2)),
            "rewards": np.array([0.0, 1.0, 1.0, 4.0]), "terminals": np.zeros(4, bool)}  # fmt: skip
    cpu = torch.device("cpu")
    np.testing.assert_allclose(dql.make_batch(data, "none", cpu).reward, [0, 1, 1, 4])
    np.testing.assert_allclose(dql.make_batch(data, "antmaze", cpu).reward, [-2, 2, 2, 14])
    standard = (data["rewards"] - 1.5) / np.std(data["rewards"], ddof=1)
    np.testing.assert_allclose(dql.make_batch(data, "standardize", cpu).reward, standard, rtol=1e-6)


def test_settings_are_the_papers():
    """Spot checks of what each column means, and one entry for every task."""
    assert set(dql.SETTINGS) == set(dql.TASKS)
    args = dql.with_settings(Args(env_id="antmaze-medium-play-v0"))
    assert (args.eta, args.max_q_backup, args.grad_norm, args.learning_rate) == (2.0, True, 2.0, 1e-3)
    assert (args.num_updates, args.eval_every, args.eval_episodes, args.reward) == (1_000_000, 50_000, 100, "antmaze")
    assert dql.with_settings(Args(env_id="hopper-medium-v2", eta=0.5)).eta == 0.5


# ----------------------------------------------------------------- bad input


def fails(capsys, *argv: str) -> str:
    """Runs the command line, which must end with exit code 2 and one line on stderr; returns that line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dql.py", *argv])
        with pytest.raises(SystemExit) as stop:
            dql.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error, error
    return error


@pytest.mark.parametrize("argv, says", [
    (["--env-id", "halfcheetah-medum-v2"], "halfcheetah-medium-v2"),
    (["--eta", "much"], "--eta"),
    (["--eta", "nan"], "--eta is nan, it must be"),
    (["--eta", "-1"], "--eta is -1.0, it must be"),
    (["--schedule", "sigmoid"], "'vp', 'linear', 'cosine'"),
    (["--num-steps", "0"], "--num-steps is 0, it must be at least 1"),
    (["--gamma", "1.5"], "between 0 and 1"),
    (["--batch-size"], "--batch-size"),
    (["--no-such-flag"], "--no-such-flag"),
    (["--device", "tpu9"], "--device tpu9 cannot be used"),
    (["--dataset-path", "no-such-file.hdf5"], "no-such-file.hdf5"),
    (["--resume", "no-such-run"], "no-such-run is not the folder of a run"),
])  # fmt: skip
def test_bad_flags_get_one_line(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_run_folder_gets_one_line(capsys, tmp_path):
    """A file where the folder should be: true for any user, root too."""
    (tmp_path / "taken").write_text("")
    data = hopper_file(tmp_path / "hopper.hdf5")
    argv = ["--env-id", "hopper-medium-v2", "--dataset-path", str(data), "--runs-dir", str(tmp_path / "taken")]
    assert "--runs-dir" in fails(capsys, *argv, "--eval-episodes", "1")


def test_damaged_checkpoint_gets_one_line(capsys, tmp_path):
    folder = Path(dql.train(tiny_args(tmp_path, num_updates=2))["folder"])
    whole = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert "cannot be read as a checkpoint" in fails(capsys, "--resume", str(folder))


def test_errors_reach_the_shell_without_a_traceback(tmp_path):
    run = [sys.executable, str(HERE / "dql.py"), "--env-id", "no-such-env"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("dql.py: unknown") and done.stderr.count("\n") == 1
