"""The proof that dql.py is the published algorithm, and that every faster path computes the same.

    pytest test_dql.py

Oracles: the official implementation's numbers (reference/official_update.json), the paper's settings
(reference/paper.json), closed forms and finite differences in float64; for the fast paths the eager one.
"""

import ast
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import compiling
import dql
import fast_sampler
from d4rl_tasks import TASKS, BadInput
from dql import ActDraws, Args, Batch, DiffusionPolicy, DiffusionQL, Draws, beta_schedule
from fast_sampler import FastSampler, FastUpdate, compile_agent, replicate, unstack

torch.set_num_threads(1)  # the networks are small: threads would wait for each other, most of all on a busy machine

HERE = Path(__file__).parent
REFERENCE = HERE / "reference"
OFFICIAL = json.loads((REFERENCE / "official_update.json").read_text())


can_compile, gpu_compiles = (
    pytest.mark.skipif(bool(lacks), reason=f"compiling needs {lacks}")
    for lacks in map(fast_sampler.lacks_to_compile, (False, True))
)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


VARIANTS = {"critic_layernorm": True, "num_critics": 3, "pessimism": 0.5, "one_step_gradient": True}
FLOAT64 = {"rtol": 1e-9, "atol": 1e-11}  # for sums in another order, amplified by Adam's division over 100 updates


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tiny_agent(state_dim=3, action_dim=2, **args) -> DiffusionQL:
    torch.manual_seed(0)
    args = {"env_id": "halfcheetah-demo-v0", "device": "cpu", "batch_size": 8, **args}  # for the settings
    return DiffusionQL(state_dim, action_dim, Args(**args))


def random_batch(agent: DiffusionQL, state_dim=3, seed=0) -> Batch:
    rng, rows = np.random.default_rng(seed), agent.args.batch_size
    arrays = (
        rng.standard_normal((rows, state_dim)), np.tanh(rng.standard_normal((rows, agent.action_dim))),
        rng.standard_normal(rows), rng.standard_normal((rows, state_dim)), rng.uniform(size=rows) < 0.2,
    )  # fmt: skip
    return Batch(*(torch.as_tensor(a, dtype=torch.get_default_dtype()) for a in arrays))


def assert_states_close(a, b, **tolerance) -> None:
    """Two nested states have the same keys, tensors equal within the tolerance, and otherwise equal values."""
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, **tolerance)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_states_close(a[key], b[key], **tolerance)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_states_close(x, y, **tolerance)
    else:
        assert a == b


def three_agents(**args) -> list[DiffusionQL]:
    """Agents with different weights and etas; their averages start early, and some gradients exceed grad_norm."""
    settings = {"num_steps": 2, "average_from": 2, "average_every": 3, "grad_norm": 3.0, **args}
    agents = []
    for seed, eta in enumerate((1.0, 0.3, 2.0)):
        agents.append(tiny_agent(**{"eta": eta, **settings}))
        generator = torch.Generator().manual_seed(seed)
        for name in ("policy", "critic"):
            for p in getattr(agents[-1], name).parameters():
                p.data += 0.1 * torch.randn(p.shape, generator=generator).to(p.device)
    return agents


def tiny_data(device: str, rows=40) -> Batch:
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal((rows, 3)), rng.uniform(-1, 1, (rows, 2)), 3 * rng.standard_normal(rows),
              rng.standard_normal((rows, 3)), rng.uniform(size=rows) < 0.2)  # fmt: skip
    return Batch(*(torch.as_tensor(x, dtype=torch.get_default_dtype(), device=device) for x in arrays))


def generators_of(device: str, count: int) -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(10 + k) for k in range(count)]


# ----------------------------------------------------------------------------- equal to the official implementation


def fill_official(network: torch.nn.Module, rs: np.random.RandomState) -> None:
    """Draws weights as the official run did: uniform(-1, 1) / sqrt(fan-in), fan-in 16 for a bias, layer by layer."""
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
    """Twelve updates match the official implementation's losses, actions, Q values and weight norms to 1e-9."""
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


@pytest.mark.parametrize("case", OFFICIAL["cases"])
def test_schedules_are_the_official_ones(case):
    want = OFFICIAL["cases"][case]
    np.testing.assert_allclose(
        beta_schedule(want["config"]["schedule"], want["config"]["N"]), want["betas"], rtol=1e-14, atol=1e-16
    )


def test_settings_are_the_papers():
    """All twenty tasks against the official code's settings and the paper's scores."""
    reference = json.loads((REFERENCE / "paper.json").read_text())
    rewards = {"none": "none", "4 (r - 1/2)": "antmaze", "standardized": "standardize"}
    assert set(dql.SETTINGS) == set(TASKS) == {*reference["tasks"], "maze-demo-v0", "halfcheetah-demo-v0"}
    for env_id, want in reference["tasks"].items():
        got = dql.SETTINGS[env_id]
        for name in ("eta", "max_q_backup", "grad_norm", "offline_rank", "num_updates"):
            assert getattr(got, name) == want[name], (env_id, name)
        assert got.learning_rate == want["policy_learning_rate"] and got.reward == rewards[want["reward"]]
        assert list(got.paper) == want["paper"] and got.eval_episodes == (10 if env_id.endswith("-v2") else 100)
    common, args = reference["common"], dql.with_settings(Args(env_id="hopper-medium-v2"))
    for name in ("batch_size", "gamma", "tau", "num_steps", "schedule", "eval_candidates"):
        assert getattr(args, name) == common[name], name
    assert (args.average_every, args.average_from) == (common["average_every"], common["average_from"])
    assert (args.average_decay, args.eval_every) == (common["policy_average"], common["eval_every_updates"])
    assert common["critic_learning_rate"] == DiffusionQL.critic_learning_rate
    assert dql.with_settings(Args(env_id="hopper-medium-v2", eta=0.5)).eta == 0.5


# ----------------------------------------------------------------------------- the diffusion policy


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
    """With a constant noise predictor, every reverse step samples the posterior, a product of two Gaussians."""
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
    """bc_loss equals Eq. 2 written out one sample at a time."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=can_compile)])
def test_mish_and_its_gradient(compiled, dtype):
    """x tanh(log(1 + e^x)) and its derivative are accurate to the rounding of x, even where e^x would overflow."""
    x = torch.cat([torch.linspace(-120, 120, 9601), torch.tensor([-1e30, -1e4, 0.0, 19.999, 20.001, 1e4, 1e30])])
    x = x.to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    want = torch.nn.functional.mish(exact)
    (want_slope,) = torch.autograd.grad(want.sum(), exact)
    got = (compiling.compiled(dql.Mish(), x.device) if compiled else dql.Mish())(x)
    (slope,) = torch.autograd.grad(got.sum(), x)
    rounding = 4 * torch.finfo(dtype).eps * exact.detach().abs().clamp(min=1)
    assert ((got - want).abs() <= rounding).all()
    assert ((slope - want_slope).abs() <= rounding).all()
    if not compiled and dtype == torch.float64:
        assert torch.autograd.gradcheck(dql.Mish(), x[4200:5200:50])


# ----------------------------------------------------------------------------- the update


def check_gradient(network: torch.nn.Module, loss: torch.Tensor, again: Callable[[], torch.Tensor]) -> None:
    """The gradient of a loss, in a random direction for each parameter, is the difference quotient of again()."""
    grads = torch.autograd.grad(loss, list(network.parameters()))
    generator = torch.Generator().manual_seed(2)
    for p, grad in zip(network.parameters(), grads, strict=True):
        direction = torch.randn(p.shape, generator=generator)
        values = []
        with torch.no_grad():
            for h in (1e-6, -2e-6):
                p.add_(direction, alpha=h)
                values.append(again().item())
            p.add_(direction, alpha=1e-6)
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx((grad * direction).sum().item(), rel=2e-5, abs=1e-8)


def test_policy_gradient_against_finite_differences(float64):
    """Eq. 3's gradient flows through the whole reverse chain, but not through the scale of Q."""
    agent = tiny_agent(eta=1.0)
    batch, draws = random_batch(agent), agent.draw(torch.Generator().manual_seed(1))
    draws = draws._replace(coin=torch.tensor(1.0))
    bc, q = agent.policy_losses(batch, draws)
    scale = agent.critic(batch.state, agent.policy.sample(batch.state, draws.policy_noise))[1].abs().mean()

    def loss():
        bc = agent.policy.bc_loss(batch.action, batch.state, draws.bc_step, draws.bc_noise)
        return bc - agent.critic(batch.state, agent.policy.sample(batch.state, draws.policy_noise))[0].mean() / scale

    check_gradient(agent.policy, bc + q, loss)


def test_coin_chooses_the_critic(float64):
    """With a coin above 0.5, Q_1 is maximised and |Q_2| normalises; otherwise the two swap roles."""
    agent = tiny_agent()
    batch, draws = random_batch(agent), agent.draw(torch.Generator().manual_seed(1))
    with torch.no_grad():
        q1, q2 = agent.critic(batch.state, agent.policy.sample(batch.state, draws.policy_noise))
    for coin, up, down in ((0.51, q1, q2), (0.5, q2, q1)):
        got = agent.policy_losses(batch, draws._replace(coin=torch.tensor(coin)))[1]
        assert got.item() == pytest.approx((-up.mean() / down.abs().mean()).item(), rel=1e-12)


def test_backup_takes_the_maximum_before_the_minimum():
    """Over ten next actions each critic's maximum, then the minimum of the two; the other order would give 1, not 4."""
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
    """eta 0 trains the policy as a vanishing eta does, leaves the critics unchanged, and acts with one candidate."""
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


@pytest.mark.filterwarnings("error")
def test_reward_transforms():
    data = {"observations": np.zeros((4, 2)), "actions": np.zeros((4, 1)), "next_observations": np.zeros((4, 2)),
            "rewards": np.array([0.0, 1.0, 1.0, 4.0]), "terminals": np.zeros(4, bool)}  # fmt: skip
    cpu = torch.device("cpu")
    np.testing.assert_allclose(dql.make_batch(data, "none", cpu).reward, [0, 1, 1, 4])
    np.testing.assert_allclose(dql.make_batch(data, "antmaze", cpu).reward, [-2, 2, 2, 14])
    standard = (data["rewards"] - 1.5) / np.std(data["rewards"], ddof=1)
    np.testing.assert_allclose(dql.make_batch(data, "standardize", cpu).reward, standard, rtol=1e-6)
    for rewards in ([1.0], [1.0, 1.0]):
        with pytest.raises(BadInput, match="needs several rewards that differ"):
            dql.make_batch(data | {"rewards": np.array(rewards)}, "standardize", cpu)


def distance(sample: torch.Tensor, cdf: Callable) -> float:
    """sqrt(n) times the Kolmogorov-Smirnov distance of n numbers from a distribution: in 1 of 1,500 cases above 2."""
    x = sample.flatten().double().sort().values
    below = torch.arange(len(x)) / len(x)
    return (torch.maximum(cdf(x) - below, below + 1 / len(x) - cdf(x)).max() * math.sqrt(len(x))).item()


def far_from_uniform(sample: torch.Tensor, values: int) -> float:
    """The largest deviation of a value's count from n / values, in standard errors."""
    want = sample.numel() / values
    counts = torch.bincount(sample.flatten(), minlength=values)
    assert len(counts) == values
    return ((counts - want).abs().max() / math.sqrt(want)).item()


def test_every_draw_has_its_distribution():
    """Noise is normal, the coin uniform on [0, 1), steps uniform over all N, rows over the whole data set, and acting's
    second draw is Gumbel's; every draw is fresh."""
    agent, generator = tiny_agent(batch_size=2000), torch.Generator().manual_seed(0)
    first, second = agent.draw(generator), agent.draw(generator)
    for a, b in zip(first, second, strict=True):
        assert not torch.equal(a, b)
    normal = torch.distributions.Normal(0.0, 1.0).cdf
    for noise in (first.next_noise, first.bc_noise, first.policy_noise, agent.draw_act(20, generator).noise):
        assert distance(noise, normal) < 2
    assert distance(agent.draw_act(100, generator).gumbel, lambda x: torch.exp(-torch.exp(-x))) < 2
    assert far_from_uniform(first.bc_step, 5) < 4
    rows = torch.cat([agent.draw_index(50, generator) for _ in range(5)])
    assert far_from_uniform(rows, 50) < 4
    small = tiny_agent(batch_size=1)
    coins = torch.stack([small.draw(generator).coin for _ in range(1000)])
    assert distance(coins, lambda x: x.clamp(0, 1)) < 2


# ----------------------------------------------------------------------------- variants


def test_critic_layernorm_by_hand(float64):
    """Critics and targets: W_3 mish(LN(W_2 mish(LN(W_1 x)))), with LayerNorm's mean and variance over the layer."""
    agent = tiny_agent(critic_layernorm=True, hidden_dim=4, hidden_layers=2)
    generator, batch = torch.Generator().manual_seed(0), random_batch(agent)
    x = torch.cat([batch.state, batch.action], 1).numpy()
    for critic in (agent.critic, agent.critic_target):
        for p in critic.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator))
        parameters, got = critic.state_dict(), critic(batch.state, batch.action)
        for k in range(2):
            w = [p.numpy() for name, p in parameters.items() if name.startswith(f"q{k + 1}.")]
            h = x
            for weight, bias, scale, shift in (w[:4], w[4:8]):
                z = h @ weight.T + bias
                centred = z - z.mean(1, keepdims=True)
                z = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * scale + shift
                h = z * np.tanh(np.log1p(np.exp(z)))
            np.testing.assert_allclose(got[k].detach(), (h @ w[8].T + w[9])[:, 0], rtol=1e-10)
    assert not any(isinstance(part, torch.nn.LayerNorm) for part in agent.policy.modules())


@pytest.mark.parametrize("copies", [1, 10])
@pytest.mark.parametrize("pessimism", [None, 0.0, 0.7])
def test_three_critics_by_hand(pessimism, copies, float64):
    """Eq. 4 with the minimum or the lower bound of three, a loss for each; Eq. 3 with their mean, whatever the coin."""
    agent = tiny_agent(num_critics=3, pessimism=pessimism, max_q_backup=copies > 1, gamma=0.9)
    for target, p in zip(agent.critic_target.parameters(), agent.critic.parameters(), strict=True):
        target.data.copy_(2 * p)
    batch, draws = random_batch(agent), agent.draw(torch.Generator().manual_seed(1))
    with torch.no_grad():
        next_action = agent.policy_ema.sample(batch.next_state, draws.next_noise)
        next_q = agent.critic_target(batch.next_state.repeat_interleave(copies, 0), next_action)
        next_q = np.stack(next_q).reshape(3, 8, copies).max(2)
        q, own_q = (np.stack(agent.critic(batch.state, action)) for action in
                    (batch.action, agent.policy.sample(batch.state, draws.policy_noise)))  # fmt: skip
    mean = next_q.sum(0) / 3
    bound = next_q.min(0) if pessimism is None else mean - pessimism * np.sqrt(((next_q - mean) ** 2).sum(0) / 3)
    target = batch.reward.numpy() + (1 - batch.done.numpy()) * 0.9 * bound
    loss, target_q = agent.critic_loss(batch, draws.next_noise)
    np.testing.assert_allclose([loss.item(), target_q], [((q - target) ** 2).mean(1).sum(), target.mean()], rtol=1e-10)
    want = -own_q.mean() / np.abs(own_q.mean(0)).mean()
    for coin in (0.0, 1.0):
        got = agent.policy_losses(batch, draws._replace(coin=torch.tensor(coin)))[1]
        assert got.item() == pytest.approx(want, rel=1e-10)


def test_act_takes_the_best_lower_bound():
    """Of three candidates with Q of (9, 0, 0), (2.5, 2.5, 1) and (1.5, 1.5, 1.5)."""
    qs = torch.tensor([[9.0, 2.5, 1.5], [0.0, 2.5, 1.5], [0.0, 1.0, 1.5]])
    for pessimism, want in ((0.0, 0), (0.5, 1), (None, 2), (5.0, 2)):
        agent = tiny_agent(num_critics=3, pessimism=pessimism, eval_candidates=3, eval_temperature=0.0)
        agent.policy.sample = lambda state, noise: torch.arange(3.0)[:, None].expand(-1, 2)
        agent.critic_target = lambda state, action: tuple(qs)
        assert agent.act(torch.zeros(1, 3), agent.draw_act(1, torch.Generator()))[0, 0] == want


def test_two_critics_with_pessimism_1_take_the_minimum(float64):
    losses, data = [], tiny_data("cpu")
    for pessimism in (None, 1.0):
        agent, (generator,) = three_agents(pessimism=pessimism)[0], generators_of("cpu", 1)
        losses.append([agent.train_step(data, generator) for _ in range(20)])
    torch.testing.assert_close(*losses, **FLOAT64)


@pytest.mark.parametrize("num_critics", [2, 3])
def test_one_step_gradient_against_finite_differences(num_critics, float64, monkeypatch):
    """Eq. 3 at EDP's estimate, by hand: no chain, one prediction of noise; its gradient leaves out the scale of Q."""
    agent = tiny_agent(one_step_gradient=True, num_critics=num_critics)
    for p in agent.policy.output.parameters():
        p.data.mul_(5)  # some estimates leave the action range
    batch, draws = random_batch(agent), agent.draw(torch.Generator().manual_seed(1))
    draws, policy = draws._replace(coin=torch.tensor(1.0)), agent.policy
    bar = torch.as_tensor(np.cumprod(1 - beta_schedule("vp", 5).numpy()))[draws.bc_step, None]
    noisy = bar.sqrt() * batch.action + (1 - bar).sqrt() * draws.bc_noise

    def by_hand() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        eps = policy.predict_noise(noisy, policy.time_mlp(policy.sinusoid[draws.bc_step]), batch.state)
        a0 = (noisy - (1 - bar).sqrt() * eps) / bar.sqrt()
        qs = agent.critic(batch.state, torch.min(torch.max(a0, -torch.ones_like(a0)), torch.ones_like(a0)))
        q, other = qs if num_critics == 2 else 2 * [sum(qs) / 3]
        return (eps - draws.bc_noise).square().mean(), q.mean(), other.abs().mean(), a0

    with torch.no_grad():
        bc, q, scale, a0 = by_hand()
    assert 0.1 < (a0.abs() > 1).double().mean() < 0.9
    with monkeypatch.context() as patch:
        patch.setattr(policy, "sample", None)
        calls = []
        patch.setattr(policy, "predict_noise", lambda *x: calls.append(1) or DiffusionPolicy.predict_noise(policy, *x))
        losses = agent.policy_losses(batch, draws)
    assert calls == [1]
    np.testing.assert_allclose([x.item() for x in losses], [bc, -q / scale], rtol=1e-10)
    check_gradient(policy, sum(losses), lambda: by_hand()[0] - by_hand()[1] / scale)


# ----------------------------------------------------------------------------- acting and evaluation


def test_act_draws_from_the_softmax_of_min_target_q():
    """Three candidates of known Q: frequencies are right to four standard errors; temperature 0 takes the best."""
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
    """With one candidate per state, actions are those of the chain alone; --eval-average uses the policy's average."""
    agent = tiny_agent(eval_candidates=1)
    for p in agent.policy_ema.parameters():
        p.data.mul_(2)
    state, noise = torch.randn(2, 3), torch.randn(6, 2, 2)
    draws = ActDraws(noise, torch.zeros(2, 1))
    assert torch.equal(agent.act(state, draws), agent.policy.sample(state, noise))
    agent.args.eval_average = True
    assert torch.equal(agent.act(state, draws), agent.policy_ema.sample(state, noise))


def test_bandit_finds_the_best_corner():
    """Data hold actions at four corners; the policy alone, with one candidate, learns the corner of highest reward."""
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


class Scripted:
    """An environment whose episode lasts seed steps; its t-th step pays the action's first number plus t, steps after
    the end pay 1,000. A state is (seed, t)."""

    def reset(self, seed: int) -> tuple[np.ndarray, dict]:
        self.seed, self.t = seed, 0
        return np.array([seed, 0.0]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        ended, even = self.t == self.seed, self.seed % 2 == 0
        reward = action[0] + self.t if self.t <= self.seed else 1000.0
        return np.array([self.seed, self.t]), reward, ended and even, ended and not even, {}


def test_evaluation_sums_the_rewards_of_each_episode():
    """Episodes of 3, 1, 4 and 2 steps, terminated or truncated; actions are ten times the state's seed."""
    shapes = []

    def act(states: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(states.shape))
        assert (states[:, 1] <= states[:, 0]).all()
        return 10 * states[:, :1]

    seeds = [3, 1, 4, 2]
    returns = dql.evaluate(act, [Scripted() for _ in seeds], seeds, torch.device("cpu"))
    assert returns.tolist() == [10 * n * n + n * (n + 1) / 2 for n in seeds]
    assert shapes == 4 * [(4, 2)], "one call a time step, always of the same shape"


def test_episode_k_is_reset_with_seed_plus_100_plus_k(tmp_path, monkeypatch):
    """A run of two seeds evaluates both after updates 1 and 2; 200 episodes of each run in two rounds of 100."""
    for package in ("gymnasium", "mujoco", "tensorboard", "h5py", "filelock", "tqdm"):
        pytest.importorskip(package)
    rounds = []

    def noted(act, envs, seeds, *rest):
        rounds.append(np.asarray(seeds).tolist())
        return np.zeros(np.shape(seeds))

    monkeypatch.setattr(dql, "evaluate", noted)
    tiny = {"num_updates": 2, "eval_every": 1, "batch_size": 4, "num_steps": 1, "eval_candidates": 1, "device": "cpu"}
    for episodes, shape in ((3, (1, 2, 3)), (200, (2, 2, 100))):
        rounds.clear()
        dql.train(Args(seed=7, num_seeds=2, eval_episodes=episodes, runs_dir=tmp_path, **tiny))
        assert np.shape(rounds) == (2 * shape[0], *shape[1:])
        for seed, of_seed in ((7, np.array(rounds)[: shape[0], 0]), (8, np.array(rounds)[shape[0] :, 1])):
            assert of_seed.ravel().tolist() == [seed + 100 + k for k in range(episodes)]
    noise = {dql.eval_noise_seed(seed, step) for seed in range(5) for step in range(0, 10**6, 10**5)}
    assert len(noise) == 50, "each seed and each evaluation has noise of its own"


# ----------------------------------------------------------------------------- replicas and agents in turn


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "changes", [{}, {"max_q_backup": True, "lr_decay": True, "num_updates": 100}, {"eta": 0.0}, VARIANTS]
)
def test_replicas_equal_single_agents(changes, device, float64):
    """100 updates of three agents at once, each with its own generator, and acting equal three single runs."""
    agents, data = three_agents(device=device, **changes), tiny_data(device)
    many, generators = replicate(agents), generators_of(device, 3)
    alone = generators_of(device, 3)
    norms = []
    for k in range(100):
        losses = many.train_step(data, generators)
        want = torch.stack([agent.train_step(data, g) for agent, g in zip(agents, alone, strict=True)])
        torch.testing.assert_close(losses, want, **FLOAT64)
        norms.append(want[:, -2:])
        if k in (0, 1, 99):
            for j, agent in enumerate(agents):
                assert_states_close(unstack(many.state_dict(), j), agent.state_dict(), **FLOAT64)
    clipped = torch.stack(norms) > 3.0
    assert clipped.any() and not clipped.all(), "the test wants both"
    assert (many.step.item(), agents[0].step.item()) == (100, 100)
    with torch.no_grad():
        states = torch.randn(3 * 5, 3, device=device)
        want = [a.act_fresh(states[5 * k :][:5], g) for k, (a, g) in enumerate(zip(agents, alone, strict=True))]
        torch.testing.assert_close(many.act_fresh(states, generators), torch.cat(want), **FLOAT64)


def test_replicas_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="eta 0"):
        replicate([tiny_agent(eta=0.0), tiny_agent(eta=1.0)])
    older = tiny_agent()
    older.step += 1
    with pytest.raises(ValueError, match="same number of updates"):
        replicate([tiny_agent(), older])


def test_replicas_of_a_subclass_have_its_losses():
    class Tenfold(DiffusionQL):
        def policy_losses(self, batch, draws):
            bc, q = super().policy_losses(batch, draws)
            return 10 * bc, q

    agents = [Tenfold(3, 2, agent.args) for agent in three_agents()]
    batches = [random_batch(agent) for agent in agents]
    draws = [agent.draw(torch.Generator().manual_seed(k)) for k, agent in enumerate(agents)]
    many = replicate(agents)
    together = many.update(*(type(parts[0])(*map(torch.stack, zip(*parts, strict=True))) for parts in (batches, draws)))
    alone = [agent.update(batch, of_agent).bc for agent, batch, of_agent in zip(agents, batches, draws, strict=True)]
    torch.testing.assert_close(together.bc, torch.stack(alone))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=can_compile)])
def test_agents_in_turn_are_single_agents(compiled, float64):
    """Agents that take turns, as on a CPU, give the losses, states and actions of single runs with equal generators."""
    agents, data = three_agents(), tiny_data("cpu")
    own, generators, alone = copy.deepcopy(agents), generators_of("cpu", 3), generators_of("cpu", 3)
    if compiled:
        for agent in own:
            compile_agent(agent)
    args = dql.with_settings(Args(device="cpu", num_seeds=3, compile=compiled, cudagraphs=False, eval_episodes=5))
    trained, updates, act = fast_sampler.make_steps(args, own, data, generators, generators)
    tolerance = FLOAT64 if compiled else {"rtol": 0, "atol": 0}
    for n in (1, 1, 10):
        want = [sum(agent.train_step(data, g) for _ in range(n)) for agent, g in zip(agents, alone, strict=True)]
        torch.testing.assert_close(updates(n), torch.stack(want), **tolerance)
        for got, agent in zip(fast_sampler.states_of(trained, 3), agents, strict=True):
            assert_states_close(got, agent.state_dict(), **tolerance)
    states = torch.randn(3 * 5, 3)
    want = [a.act_fresh(x.clone(), g) for a, x, g in zip(agents, states.split(5), alone, strict=True)]
    torch.testing.assert_close(act(states), torch.cat(want), **tolerance)


def test_several_agents_are_mapped_on_a_gpu_alone(monkeypatch):
    def steps(agents: list) -> list:
        args = dql.with_settings(Args(device="cpu", num_seeds=2, compile=False, cudagraphs=False))
        generators = generators_of("cpu", 4)
        return fast_sampler.make_steps(args, agents, tiny_data("cpu"), generators[:2], generators[2:])[0]

    agents, mapped = [tiny_agent(), tiny_agent()], replicate([tiny_agent(), tiny_agent()])
    assert steps(agents) is agents
    monkeypatch.setattr(agents[0], "device", torch.device("cuda"))
    monkeypatch.setattr(fast_sampler, "replicate", lambda agents: mapped)
    assert steps(agents) == [mapped]


# ----------------------------------------------------------------------------- compiled and captured


@can_compile
def test_what_is_compiled_for_one_seed_or_eta_serves_the_next(float64):
    """torch.compile raises after compiling a function eight times, so ten agents in a row must share compiled code."""
    torch.compiler.reset()
    data, generator = tiny_data("cpu"), torch.Generator()
    for k in range(10):
        agent = tiny_agent(num_steps=2, eta=0.1 + k)
        compile_agent(agent)
        agent.train_step(data, generator)


@pytest.mark.parametrize("several", [False, True])
def test_no_foreach_operation_is_compiled(several):
    """For a GPU Inductor fuses them into one kernel, in which one part would compute the norm that all others read."""
    seen = []

    def look(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    agent, generator, batch = three_agents()[0], torch.Generator(), random_batch(tiny_agent())
    if several:
        agent, generator = replicate(three_agents()), generators_of("cpu", 3)
        batch = Batch(*(torch.stack(3 * [x]) for x in batch))
    for function in (agent.critic_gradient, agent.policy_gradient):
        torch.compile(function, backend=look, fullgraph=True)(batch, agent.draw(generator))
    assert len(seen) > 100 and not [name for name in seen if "foreach" in name]


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=can_compile), pytest.param("cuda", marks=[*DEVICES[1].marks, gpu_compiles])]
)
@pytest.mark.parametrize("changes", [{}, {**VARIANTS, "hidden_layers": 1}])
def test_compiled_updates_equal_eager(changes, device, float64):
    """torch.compile does not change the results of updating and acting, for one agent and for two at once."""
    data, generator = tiny_data(device), generators_of(device, 1)[0]
    agents = three_agents(device=device, **changes)[:2]
    copies = copy.deepcopy(agents)
    for agent in copies:
        compile_agent(agent)
    compiled, many = copies[0], replicate(copies)
    compile_agent(many)
    for agent in (compiled, many):
        for function in (agent.critic_gradient, agent.policy_gradient, agent.act):
            assert hasattr(function, "_torchdynamo_orig_callable")
    both, alone = generators_of(device, 2), generators_of(device, 2)
    fast, fast_many = FastUpdate(compiled, data, generator), FastUpdate(many, data, both)
    for n in (1, 1, 98):
        fast(n)
        fast_many(n)
        for agent, g in zip(agents, alone, strict=True):
            for _ in range(n):
                agent.train_step(data, g)
        assert_states_close(compiled.state_dict(), agents[0].state_dict(), **FLOAT64)
        for k, agent in enumerate(agents):
            assert_states_close(unstack(many.state_dict(), k), agent.state_dict(), **FLOAT64)
    states = torch.randn(2 * 5, 3, device=device)
    want = [agent.act_fresh(x, g) for agent, x, g in zip(agents, states.split(5), alone, strict=True)]
    torch.testing.assert_close(compiled.act_fresh(states[:5], generator), want[0], **FLOAT64)
    torch.testing.assert_close(many.act_fresh(states, both), torch.cat(want), **FLOAT64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "changes", [{}, {"max_q_backup": True, "lr_decay": True, "num_updates": 200}, {"eta": 0.0}, VARIANTS]
)
@pytest.mark.parametrize("replicas", [1, 3])
def test_fast_update_equals_eager(replicas, changes, device, float64):
    """Building one changes nothing; 1, 1 and 98 replays give the losses and states of as many eager steps; it follows a
    state and a learning rate set from outside; and eager steps may come between replays."""
    data, eager = tiny_data(device), three_agents(device=device, **changes)[:replicas]
    agent = replicate(eager) if replicas > 1 else copy.deepcopy(eager[0])
    generators, alone = generators_of(device, replicas), generators_of(device, replicas)
    generator = generators if replicas > 1 else generators[0]

    before = copy.deepcopy(agent.state_dict())
    fast = FastUpdate(agent, data, generator)
    assert_states_close(agent.state_dict(), before, rtol=0, atol=0)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(generators, alone, strict=True))

    def check(n: int) -> None:
        sums = fast(n)
        want = sum(
            torch.stack([a.train_step(data, g) for a, g in zip(eager, alone, strict=True)]) for _ in range(n)
        )
        torch.testing.assert_close(sums.reshape(want.shape), want, **FLOAT64)
        for k, one in enumerate(eager):
            state = agent.state_dict() if replicas == 1 else unstack(agent.state_dict(), k)
            assert_states_close(state, one.state_dict(), **FLOAT64)

    check(1)
    check(1)
    after_two = copy.deepcopy(agent.state_dict())
    check(98)
    for one in (agent, *eager):
        one.policy_opt.param_groups[0]["lr"].fill_(1e-2)
    check(2)
    agent.load_state_dict(after_two)
    for k, one in enumerate(eager):
        one.load_state_dict(after_two if replicas == 1 else unstack(after_two, k))
    check(2)
    again = FastUpdate(agent, data, generator)  # captured when the optimizers already have state
    assert_states_close(again(0), torch.zeros_like(again(0)), rtol=0, atol=0)
    check(1)
    agent.train_step(data, generator)
    for one, g in zip(eager, alone, strict=True):
        one.train_step(data, g)
    check(2)


class NothingIsRead(TorchDispatchMode):
    """Fails if an operation sends values to the host or takes them from it: a GPU would wait, and a capture fail. Such
    are .item(), `if tensor`, masks as indices and torch.tensor(...). It does not see .tolist(), .numpy() and, on a CPU,
    .cpu()."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        else:
            waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        assert not waits and func is not torch.ops.aten.lift_fresh.default, f"{func} in a step that is to be captured"
        return func(*args, **(kwargs or {}))


def tensors_of(state) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize(
    "changes", [{}, {"max_q_backup": True, "lr_decay": True, "num_updates": 9}, {"eta": 0.0}, VARIANTS]
)
@pytest.mark.parametrize("replicas", [1, 3])
def test_a_step_waits_for_nothing_and_stays_where_it_is(replicas, changes):
    """Training and acting meet the demands of a capture: the host reads no value, and the state keeps its memory."""
    agents, data = three_agents(**changes)[:replicas], tiny_data("cpu")
    agent = replicate(agents) if replicas > 1 else agents[0]
    generator = generators_of("cpu", replicas) if replicas > 1 else generators_of("cpu", 1)[0]
    states = torch.randn(5 * replicas, 3)
    where = [x.data_ptr() for x in tensors_of(agent.state_dict())]
    with NothingIsRead():
        for _ in range(3):
            agent.train_step(data, generator)
            agent.act_fresh(states, generator)
    assert [x.data_ptr() for x in tensors_of(agent.state_dict())] == where
    for stray in (
        lambda: states.sum().item(), lambda: bool(states.sum() > 0), lambda: torch.tensor(1.0),
        lambda: states[states > 0], lambda: states.__setitem__(states > 0, torch.ones_like(states[0, 0])),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="to be captured"), NothingIsRead():
            stray()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("replicas", [1, 3])
def test_fast_sampler_equals_act(replicas, device, float64):
    """A sampler equals agent.act with the same draws, draws anew at each call, and uses the agent's current weights."""
    agents = three_agents(device=device)[:replicas]
    agent = replicate(agents) if replicas > 1 else agents[0]
    generators, alone = generators_of(device, replicas), generators_of(device, replicas)
    sampler = FastSampler(agent, 5, generators if replicas > 1 else generators[0])
    states = torch.randn(replicas * 5, 3, device=device)
    first, second = sampler(states), sampler(states)
    for got in (first, second):
        want = [a.act_fresh(states[5 * k :][:5], g) for k, (a, g) in enumerate(zip(agents, alone, strict=True))]
        torch.testing.assert_close(got, torch.cat(want), **FLOAT64)
    assert not torch.equal(first, second)
    for g in generators:
        g.manual_seed(7)
    again = sampler(states)
    for g in generators:
        g.manual_seed(7)
    assert torch.equal(sampler(states), again), "a generator that is seeded anew draws the same numbers again"
    with torch.no_grad():
        for p in agent.policy.parameters():
            p.zero_()
    assert not torch.equal(sampler(states), again), "it acts with the current weights"


@pytest.mark.parametrize("device", DEVICES[1:])
def test_replays_draw_fresh_numbers(device):
    """1,000 replays of one draw have the mean and variance of a normal, and hardly ever repeat a number."""
    generator, drawn = torch.Generator(device).manual_seed(0), torch.empty(100, device=device)
    graph = fast_sampler.capture(
        lambda: drawn.copy_(torch.randn(100, generator=generator, device=device)), [generator], torch.device(device)
    )
    draws = []
    for _ in range(1000):
        graph.replay()
        draws.append(drawn.clone())
    draws = torch.stack(draws)
    assert abs(draws.mean()) < 4 / math.sqrt(1e5) and abs(draws.var() - 1) < 4 * math.sqrt(2 / 1e5)
    assert len(torch.unique(draws[:, 0])) > 990


def test_a_captured_sampler_refuses_other_shapes():
    sampler = FastSampler(tiny_agent(), 5, torch.Generator())
    with pytest.raises(ValueError, match=r"\(5, 3\), not \(3,\)"):
        sampler(torch.zeros(3))


def test_paths_are_chosen_by_device_and_length(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(fast_sampler, "lacks_to_compile", lambda on_gpu: "")

    def chosen(device: torch.device, **args) -> tuple[bool, bool]:
        args = fast_sampler.choose_path(dql.with_settings(Args(**args)), device)
        return args.compile, args.cudagraphs

    eager, compiled, captured, both = (False, False), (True, False), (False, True), (True, True)
    assert chosen(cpu, num_updates=100) == eager and chosen(cpu, num_updates=10**6) == compiled
    assert chosen(cpu, num_updates=2500, num_seeds=2) == compiled and chosen(cpu, num_updates=4999) == eager
    assert chosen(gpu, num_updates=100) == eager and chosen(gpu, num_updates=19_999) == captured
    assert chosen(gpu, num_updates=20_000) == both
    assert chosen(gpu, num_updates=20_000, compile=False, cudagraphs=False) == eager
    assert chosen(gpu, num_updates=20_000, fused=True) == captured
    for flag in ("cudagraphs", "fused", "tf32"):
        with pytest.raises(BadInput, match=f"--{flag}"):
            chosen(cpu, **{flag: True})
    for wrong in ({"compile": True}, {"num_steps": 33}, {"hidden_dim": 100}):
        with pytest.raises(BadInput, match="--fused goes with"):
            chosen(gpu, fused=True, **wrong)
    for name in ("critic_layernorm", "num_critics", "pessimism"):
        with pytest.raises(BadInput, match=f"--fused does not compute --{name.replace('_', '-')}:"):
            chosen(gpu, fused=True, **{name: VARIANTS[name]})
    assert chosen(gpu, num_updates=20_000, fused=True, one_step_gradient=True) == captured
    monkeypatch.undo()
    monkeypatch.setattr(fast_sampler.shutil, "which", lambda name: None)
    assert chosen(cpu, num_updates=10**6) == eager
    with pytest.raises(BadInput, match=r"--compile needs a compiler, g\+\+"):
        chosen(cpu, compile=True)


# ----------------------------------------------------------------------------- the house


def test_imports_run_one_way():
    """No file of the project imports dql but bench/ and tests, and imports have no circle."""
    files = {path.relative_to(HERE).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
             for folder in (HERE, HERE / "housekeeping", HERE / "d4rl_tasks") for path in folder.glob("*.py")
             if not path.name.startswith("test_")}  # fmt: skip
    imports = {}
    for name, path in files.items():
        nodes, found = list(ast.walk(ast.parse(path.read_text()))), set()
        for block in [n for n in nodes if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]:
            nodes = [node for node in nodes if node not in block.body]  # what type checkers alone import
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        imports[name] = found & files.keys() - {name}
    assert [name for name, found in imports.items() if "dql" in found] == []
    while leaves := [name for name, found in imports.items() if not found & imports.keys()]:
        for name in leaves:
            del imports[name]
    assert not imports, f"these files import one another in a circle: {imports}"
