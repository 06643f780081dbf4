"""The paper's bandit (section 4, Figure 1): which policies represent four modes, and which learn to choose the best.

    python bench/bandit.py                         # writes runs/bandit/

One state, actions (2,) around four corners, a reward for each corner. Four policies imitate the data: a tanh-Gaussian
by maximum likelihood, BCQ's conditional VAE, a tanh-Gaussian by BEAR's MMD, and diffusion (Eq. 2). Then four policies
learn with Q: TD3+BC, BCQ, BEAR and Diffusion-QL (Eq. 3). Every episode ends after its first action, so Q is an action's
mean reward and does not depend on the policy: it is fitted once, for all four.

policies.png shows these eight, steps.png both diffusion policies for each N, and bandit.json has all in numbers. Data,
N, schedule and eta are the paper's; networks are dql.py's. Updates are at most a fiftieth of the paper's, at three
times its learning rate. Diffusion-QL starts from the cloned policy, acts without candidates, and gets fewer updates
than the other three, since each update costs far more. It settles a little outside the best mode, where the fitted Q
still rises.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Normal

import dql
from dql import Batch, DiffusionQL, TwinQ, mlp
from housekeeping import arguments, ending
from housekeeping.folder import write_json, write_whole
from housekeeping.machine import versions

CORNERS = torch.tensor([[-0.8, 0.8], [-0.8, -0.8], [0.8, 0.8], [0.8, -0.8]])
NAMES = ("top left", "bottom left", "top right", "bottom right")
REWARDS = torch.tensor([3.0, 0.0, 1.5, 5.0])
RADII = (0.2, 0.3)  # 0.2 is four of a mode's standard deviations; 0.3 includes the square's own corner, 0.28 away
KERNEL_STD = 0.2  # of MMD's kernel
STEPS = (2, 5, 10, 20, 50)
NUM_STEPS, ETA, BATCH, LEARNING_RATE = 50, 2.5, 100, 1e-3
UPDATES, Q_UPDATES, DIFFUSION_Q_UPDATES = 1500, 750, 150  # of cloning and Q; of policies that use Q; of Diffusion-QL
LATENT = 4  # width of the VAE's latents, twice the action's
SAMPLES = 1000

Sampler = Callable[[int], Tensor]  # n -> n actions (n, 2)


@dataclass
class Args:
    """The paper's bandit."""

    out: Path = Path("runs/bandit")
    """output folder"""
    seed: int = 0
    """seed of data, weights and noise"""


class Data(NamedTuple):
    action: Tensor  # (M, 2)
    reward: Tensor  # (M,)


def make_data(points: int = 10_000) -> Data:
    """Actions around the corners, standard deviation 0.05, clipped to the square; rewards, standard deviation 0.5."""
    corner = torch.randint(4, (points,))
    action = (CORNERS[corner] + 0.05 * torch.randn(points, 2)).clamp(-1, 1)
    return Data(action, REWARDS[corner] + 0.5 * torch.randn(points))


def the_state(n: int) -> Tensor:
    """The bandit's only state, n times, (n, 1)."""
    return torch.zeros(n, 1)


def fit(loss: Callable[[Tensor, Tensor], Tensor], data: Data, parameters: list, num_updates: int) -> None:
    """Minimises loss(action (B, 2), reward (B,)) with Adam on random batches."""
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
    for _ in range(num_updates):
        index = torch.randint(len(data.action), (BATCH,))
        optimizer.zero_grad()
        loss(data.action[index], data.reward[index]).backward()
        optimizer.step()


# ----------------------------------------------------------------------------- behaviour cloning


class TanhGaussian(nn.Module):
    """tanh of a Gaussian with diagonal covariance; called with n it samples actions (n, 2), differentiably."""

    def __init__(self):
        super().__init__()
        self.net = mlp(1, 256, 256, 4)

    def normal(self, n: int) -> Normal:
        mean, log_std = self.net(the_state(n)).chunk(2, -1)
        return Normal(mean, log_std.clamp(-5, 2).exp())

    def forward(self, n: int) -> Tensor:
        return self.normal(n).rsample().tanh()


def clone_mle(data: Data, num_updates: int = UPDATES) -> Sampler:
    """Maximum likelihood; tanh's Jacobian is left out, since it does not depend on the parameters."""
    policy = TanhGaussian()

    def loss(action: Tensor, _: Tensor) -> Tensor:
        return -policy.normal(len(action)).log_prob(action.clamp(-0.999, 0.999).atanh()).mean()

    fit(loss, data, list(policy.parameters()), num_updates)
    return policy


def clone_vae(data: Data, num_updates: int = UPDATES) -> Callable[..., Tensor]:
    """BCQ's conditional VAE, with BCQ's loss weights. The sampler also takes a bound to which latents are clipped."""
    encoder, decoder = mlp(3, 256, 256, 2 * LATENT), mlp(1 + LATENT, 256, 256, 2)

    def decode(z: Tensor) -> Tensor:
        return decoder(torch.cat([the_state(len(z)), z], -1)).tanh()

    def loss(action: Tensor, _: Tensor) -> Tensor:
        mean, log_std = encoder(torch.cat([the_state(len(action)), action], -1)).chunk(2, -1)
        std = log_std.clamp(-4, 15).exp()
        kl = -0.5 * (1 + 2 * std.log() - mean**2 - std**2).mean()
        return F.mse_loss(decode(mean + std * torch.randn_like(std)), action) + 0.5 * kl

    fit(loss, data, [*encoder.parameters(), *decoder.parameters()], num_updates)
    return lambda n, bound=math.inf: decode(torch.randn(n, LATENT).clamp(-bound, bound))


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of x (n, 2) and y (m, 2), with a Gaussian kernel of width KERNEL_STD."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a[:, None] - b).square().sum(-1) / (2 * KERNEL_STD**2)).mean()

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


def clone_mmd(data: Data, num_updates: int = UPDATES) -> Sampler:
    policy = TanhGaussian()
    fit(lambda action, _: mmd(policy(BATCH), action), data, list(policy.parameters()), num_updates)
    return policy


def clone_diffusion(data: Data, num_steps: int = NUM_STEPS, num_updates: int = UPDATES) -> DiffusionQL:
    """A diffusion policy trained with Eq. 2 alone."""
    return train_diffusion(make_agent(num_steps, eta=0.0), data, num_updates)


def make_agent(num_steps: int, eta: float) -> DiffusionQL:
    args = dql.Args(device="cpu", compile=False, batch_size=BATCH, num_steps=num_steps, eta=eta,
                    learning_rate=LEARNING_RATE, eval_candidates=1)  # fmt: skip
    return DiffusionQL(1, 2, args)


def train_diffusion(agent: DiffusionQL, data: Data, num_updates: int) -> DiffusionQL:
    """Makes Algorithm 1's policy step num_updates times; the critics do not change."""
    state, done, generator = the_state(BATCH), torch.ones(BATCH), torch.default_generator
    for _ in range(num_updates):
        index = agent.draw_index(len(data.action), generator)
        batch = Batch(state, data.action[index], data.reward[index], state, done)
        dql.descend(agent.policy_opt, agent.policy_gradient(batch, agent.draw(generator))[0])
    return agent


def sampler(agent: DiffusionQL) -> Sampler:
    return lambda n: agent.act(the_state(n), agent.draw_act(n, torch.default_generator))


# ----------------------------------------------------------------------------- Q-learning


def fit_q(data: Data, num_updates: int = UPDATES) -> TwinQ:
    """Eq. 4 with every action the last of its episode: both critics regress the reward on the action."""
    q = TwinQ(1, 2)

    def loss(action: Tensor, reward: Tensor) -> Tensor:
        return sum(F.mse_loss(one, reward) for one in q(the_state(len(action)), action))

    fit(loss, data, list(q.parameters()), num_updates)
    return q.requires_grad_(False)


def td3_bc(data: Data, q: TwinQ, num_updates: int = Q_UPDATES) -> Sampler:
    """Fujimoto and Gu 2021: a deterministic policy; maximises 2.5 Q_1 / mean |Q_1| minus the squared error to data."""
    net = mlp(1, 256, 256, 2)

    def policy(n: int) -> Tensor:
        return net(the_state(n)).tanh()

    def loss(action: Tensor, _: Tensor) -> Tensor:
        own = policy(BATCH)
        q1, _ = q(the_state(BATCH), own)
        return -2.5 * q1.mean() / q1.detach().abs().mean() + F.mse_loss(own, action)

    fit(loss, data, list(net.parameters()), num_updates)
    return policy


def bcq(data: Data, q: TwinQ, vae: Callable[..., Tensor], num_updates: int = Q_UPDATES) -> Sampler:
    """Fujimoto et al. 2019: moves the VAE's actions by at most 0.05 to raise Q_1; acts with the best of 100."""
    net = mlp(3, 256, 256, 2)

    def propose(n: int) -> tuple[Tensor, Tensor]:
        action = vae(n, 0.5).detach()
        action = (action + 0.05 * net(torch.cat([the_state(n), action], -1)).tanh()).clamp(-1, 1)
        return action, q.q1(torch.cat([the_state(n), action], -1)).squeeze(-1)

    def policy(n: int) -> Tensor:
        action, q1 = propose(100 * n)
        return action.view(n, 100, 2)[torch.arange(n), q1.view(n, 100).argmax(1)]

    fit(lambda *_: -propose(BATCH)[1].mean(), data, list(net.parameters()), num_updates)
    return policy


def bear(data: Data, q: TwinQ, num_updates: int = Q_UPDATES) -> Sampler:
    """Kumar et al. 2019: a tanh-Gaussian maximises the smaller Q; a multiplier keeps its MMD to the data below 0.05."""
    policy, log_multiplier = TanhGaussian(), nn.Parameter(torch.zeros(()))

    def loss(action: Tensor, _: Tensor) -> Tensor:
        sample = policy(BATCH)
        excess = mmd(sample, action) - 0.05
        multiplier = log_multiplier.clamp(-5, 10).exp()
        gain = torch.min(*q(the_state(BATCH), sample)).mean()
        return -gain + multiplier.detach() * excess - multiplier * excess.detach()

    fit(loss, data, [*policy.parameters(), log_multiplier], num_updates)
    return policy


def diffusion_ql(data: Data, q: TwinQ, clone: DiffusionQL, num_updates: int = DIFFUSION_Q_UPDATES) -> DiffusionQL:
    """Trains with Eq. 3, starting from a copy of the cloned policy."""
    agent = make_agent(clone.args.num_steps, ETA)
    agent.policy.load_state_dict(clone.policy.state_dict())
    agent.critic.load_state_dict(q.state_dict())
    return train_diffusion(agent, data, num_updates)


# ----------------------------------------------------------------------------- numbers and pictures


def numbers(action: Tensor, data: Data) -> dict:
    """Of samples (n, 2): share within each radius of each corner, mean reward (0 outside the larger), squared MMD."""
    found = {}
    for radius in RADII:
        near = (torch.cdist(action, CORNERS) < radius).float()
        found[f"share_{radius}"] = {name: round(x, 3) for name, x in zip(NAMES, near.mean(0).tolist(), strict=True)}
    found["mean_reward"] = round((near @ REWARDS).mean().item(), 3)
    found["mmd"] = round(mmd(action, data.action[:SAMPLES]).item(), 4)
    return found


def draw(path: Path, rows: list[dict[str, Tensor]], data: Data) -> None:
    """Scatter plots of two rows of policies. Each row starts with the data: plain, then coloured by reward."""
    width = len(rows[0]) + 1
    figure = Figure(figsize=(2.4 * width, 5.2), layout="constrained")
    panels = figure.subplots(2, width, sharex=True, sharey=True)
    some = Data(*(x[:SAMPLES] for x in data))
    panels[0, 0].scatter(*some.action.T, s=3, color="gray")
    panels[0, 0].set_title("data")
    dots = panels[1, 0].scatter(*some.action.T, s=3, c=some.reward)
    panels[1, 0].set_title("data and reward")
    figure.colorbar(dots, ax=panels[1, 0], location="bottom")
    for row, color, axes in zip(rows, ("tab:blue", "tab:red"), panels, strict=True):
        for (name, action), axis in zip(row.items(), axes[1:], strict=True):
            axis.scatter(*action.T, s=3, color=color)
            axis.set_title(name)
    panels[0, 0].set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xticks=(-0.8, 0, 0.8), yticks=(-0.8, 0, 0.8))
    figure.savefig(path, format="png", dpi=110)


def main(args: Args) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the networks are small
    torch.manual_seed(args.seed)
    start, data, found = time.perf_counter(), make_data(), {}

    @torch.no_grad()
    def note(name: str, policy: Sampler) -> None:
        found[name] = policy(SAMPLES)
        of = numbers(found[name], data)
        shares = "  ".join(f"{corner} {share:.2f}" for corner, share in of["share_0.3"].items())
        print(f"{time.perf_counter() - start:4.0f} s  {name:22} {shares}  reward {of['mean_reward']:.2f}  "
              f"MMD {of['mmd']:.3f}", flush=True)  # fmt: skip

    note("data", lambda n: data.action[-n:])
    q, vae = fit_q(data), clone_vae(data)
    note("Gaussian, MLE", clone_mle(data))
    note("conditional VAE", vae)
    note("Gaussian, MMD", clone_mmd(data))
    note("TD3+BC", td3_bc(data, q))
    note("BCQ", bcq(data, q, vae))
    note("BEAR", bear(data, q))
    for n in STEPS:
        clone = clone_diffusion(data, n)
        note(f"diffusion, N = {n}", sampler(clone))
        note(f"Diffusion-QL, N = {n}", sampler(diffusion_ql(data, q, clone)))

    last = f", N = {NUM_STEPS}"
    cloned = {name: found[name] for name in ("Gaussian, MLE", "conditional VAE", "Gaussian, MMD", f"diffusion{last}")}
    learned = {name: found[name] for name in ("TD3+BC", "BCQ", "BEAR", f"Diffusion-QL{last}")}
    by_steps = [{f"{k}, N = {n}": found[f"{k}, N = {n}"] for n in STEPS} for k in ("diffusion", "Diffusion-QL")]
    write_whole(args.out / "policies.png", lambda path: draw(path, [cloned, learned], data))
    write_whole(args.out / "steps.png", lambda path: draw(path, by_steps, data))
    write_json(args.out / "bandit.json", {
        "seed": args.seed, "updates": UPDATES, "q_updates": Q_UPDATES, "diffusion_q_updates": DIFFUSION_Q_UPDATES,
        "seconds": round(time.perf_counter() - start), "versions": versions(torch.device("cpu")),
        "policies": {name: numbers(action, data) for name, action in found.items()},
    })  # fmt: skip


if __name__ == "__main__":
    ending.run_main("bandit.py", lambda: main(arguments.parsed(Args, sys.argv[1:], "bench/bandit.py")))
