"""The paper's bandit (section 4, Figure 1): which policies represent four modes, and which learn to choose the best.

    python bench/bandit.py                         # the paper's 100,000 updates: two hours of a core
    python bench/bandit.py --num-updates 2000      # minutes

One state, actions (2,) around four corners, a reward for each corner. Four policies imitate the data: a tanh-Gaussian
by maximum likelihood, BCQ's conditional VAE, a tanh-Gaussian by BEAR's MMD, and diffusion (Eq. 2). Then four policies
learn with Q: TD3+BC, BCQ, BEAR and Diffusion-QL (Eq. 3). Every episode ends after its first action, so Q is an action's
mean reward and does not depend on the policy. TD3+BC, BCQ and BEAR share one that is fitted before them; Diffusion-QL
is dql.py itself, which fits its own.

It writes runs/bandit/: policies.png shows these eight, steps.png both diffusion policies for each N, and bandit.json
has all numbers; run again, the program goes on after the last policy in it.

As in the official code (run_toy_bc.py, run_toy_ql.py) are the data, N = 50, schedule, eta, learning rates, width, batch
size and number of updates; no gradient is clipped, one candidate is acted with, and the policy starts untrained. Its
time embedding is 4 wide, here 16 as in dql.py; its state is two zeros, here one. The other methods are simpler here,
and not those of its picture: there "TD3+BC" is a Gaussian by likelihood and Q, and "BCQ" shows the VAE alone.
"""

import json
import math
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Normal

import dql
import fast_sampler
from d4rl_tasks import BadInput, reason
from dql import Critics, mlp
from housekeeping import arguments, ending
from housekeeping.folder import write_json, write_whole
from housekeeping.machine import versions

CORNERS = torch.tensor([[-0.8, 0.8], [-0.8, -0.8], [0.8, 0.8], [0.8, -0.8]])
NAMES = ("top left", "bottom left", "top right", "bottom right")
REWARDS = torch.tensor([3.0, 0.0, 1.5, 5.0])
RADII = (0.2, 0.3)  # 0.2 is four of a mode's standard deviations; 0.3 includes the square's own corner, 0.28 away
STEPS = (2, 5, 10, 20, 50)
ETA, BATCH, LEARNING_RATE, WIDTH, SAMPLES = 2.5, 100, 3e-4, 128, 1000
LATENT = 4  # width of the VAE's latents, twice the action's

Sampler = Callable[[int], Tensor]  # n -> n actions (n, 2)


@dataclass
class Args:
    """The paper's bandit."""

    num_updates: int = 100_000
    """updates of each policy; the paper's are 1,000 epochs of 100"""
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


def with_state(x: Tensor) -> Tensor:
    """The bandit's only state, 0, beside x: (n, k) -> (n, 1 + k)."""
    return torch.cat([torch.zeros(len(x), 1), x], -1)


def fit(loss: Callable[[Tensor, Tensor], Tensor], data: Data, num_updates: int, *modules: nn.Module) -> None:
    """Minimises loss(action (B, 2), reward (B,)) with Adam on random batches."""
    optimizer = torch.optim.Adam(nn.ModuleList(modules).parameters(), lr=LEARNING_RATE, fused=True)
    for _ in range(num_updates):
        index = torch.randint(len(data.action), (BATCH,))
        optimizer.zero_grad()
        loss(data.action[index], data.reward[index]).backward()
        optimizer.step()


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of x (n, 2) and y (m, 2), with a Gaussian kernel of standard deviation 0.2."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a[:, None] - b).square().sum(-1) / (2 * 0.2**2)).mean()

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


class TanhGaussian(nn.Module):
    """tanh of a Gaussian with diagonal covariance; called with n it samples actions (n, 2), differentiably."""

    def __init__(self):
        super().__init__()
        self.net = mlp(1, WIDTH, WIDTH, 4)

    def normal(self, n: int) -> Normal:
        mean, log_std = self.net(torch.zeros(n, 1)).chunk(2, -1)
        return Normal(mean, log_std.clamp(-5, 2).exp())

    def forward(self, n: int) -> Tensor:
        return self.normal(n).rsample().tanh()


def clone_gaussian(data: Data, by: str, num_updates: int) -> TanhGaussian:
    """Trained by "MLE", without tanh's Jacobian, which does not depend on the parameters, or by "MMD"."""
    policy = TanhGaussian()
    losses = {
        "MLE": lambda action, _: -policy.normal(BATCH).log_prob(action.clamp(-0.999, 0.999).atanh()).mean(),
        "MMD": lambda action, _: mmd(policy(BATCH), action),
    }
    fit(losses[by], data, num_updates, policy)
    return policy


def clone_vae(data: Data, num_updates: int) -> Callable[..., Tensor]:
    """BCQ's conditional VAE, with BCQ's loss weights. The sampler also takes a bound to which latents are clipped."""
    encoder, decoder = mlp(3, WIDTH, WIDTH, 2 * LATENT), mlp(1 + LATENT, WIDTH, WIDTH, 2)

    def loss(action: Tensor, _: Tensor) -> Tensor:
        mean, log_std = encoder(with_state(action)).chunk(2, -1)
        std = log_std.clamp(-4, 15).exp()
        kl = -0.5 * (1 + 2 * std.log() - mean**2 - std**2).mean()
        return F.mse_loss(decoder(with_state(mean + std * torch.randn_like(std))).tanh(), action) + 0.5 * kl

    fit(loss, data, num_updates, encoder, decoder)
    return lambda n, bound=math.inf: decoder(with_state(torch.randn(n, LATENT).clamp(-bound, bound))).tanh()


def fit_q(data: Data, num_updates: int) -> Critics:
    """Eq. 4 with every action the last of its episode: both critics regress the reward on the action."""
    q = Critics(1, 2, 3 * (WIDTH,))
    fit(lambda action, r: sum(F.mse_loss(one, r) for one in q(torch.zeros(BATCH, 1), action)), data, num_updates, q)
    return q.requires_grad_(False)


def td3_bc(data: Data, q: Critics, num_updates: int) -> Sampler:
    """Fujimoto and Gu 2021: a deterministic policy; maximises 2.5 Q_1 / mean |Q_1| minus the squared error to data."""
    net = mlp(1, WIDTH, WIDTH, 2)

    def loss(action: Tensor, _: Tensor) -> Tensor:
        own = net(torch.zeros(BATCH, 1)).tanh()
        q1, _ = q(torch.zeros(BATCH, 1), own)
        return -2.5 * q1.mean() / q1.detach().abs().mean() + F.mse_loss(own, action)

    fit(loss, data, num_updates, net)
    return lambda n: net(torch.zeros(n, 1)).tanh()


def bcq(data: Data, q: Critics, vae: Callable[..., Tensor], num_updates: int) -> Sampler:
    """Fujimoto et al. 2019: moves the VAE's actions by at most 0.05 to raise Q_1; acts with the best of 100."""
    net = mlp(3, WIDTH, WIDTH, 2)

    def propose(n: int) -> tuple[Tensor, Tensor]:
        action = vae(n, 0.5).detach()
        action = (action + 0.05 * net(with_state(action)).tanh()).clamp(-1, 1)
        return action, q.q1(with_state(action)).squeeze(-1)

    def policy(n: int) -> Tensor:
        action, q1 = propose(100 * n)
        return action.view(n, 100, 2)[torch.arange(n), q1.view(n, 100).argmax(1)]

    fit(lambda *_: -propose(BATCH)[1].mean(), data, num_updates, net)
    return policy


def bear(data: Data, q: Critics, num_updates: int) -> Sampler:
    """Kumar et al. 2019: a tanh-Gaussian maximises the smaller Q; a multiplier keeps its MMD to the data below 0.05."""
    policy = TanhGaussian()
    policy.log_multiplier = nn.Parameter(torch.zeros(()))

    def loss(action: Tensor, _: Tensor) -> Tensor:
        sample = policy(BATCH)
        excess, multiplier = mmd(sample, action) - 0.05, policy.log_multiplier.clamp(-5, 10).exp()
        gain = torch.min(*q(torch.zeros(BATCH, 1), sample)).mean()
        return -gain + multiplier.detach() * excess - multiplier * excess.detach()

    fit(loss, data, num_updates, policy)
    return policy


def agent_args(num_steps: int, eta: float, num_updates: int, seed: int = 0) -> dql.Args:
    """The arguments of dql.py; eta = 0 is cloning. Raises BadInput."""
    args = dql.with_settings(dql.Args(
        device="cpu", seed=seed, num_updates=num_updates, num_steps=num_steps, eta=eta, batch_size=BATCH,
        hidden_dim=WIDTH, learning_rate=LEARNING_RATE, grad_norm=0.0, eval_candidates=1,
    ))  # fmt: skip
    return fast_sampler.choose_path(args, torch.device("cpu"))


def diffusion(data: Data, args: dql.Args, watch: Callable[[int, Sampler], None] = lambda *_: None) -> Sampler:
    """dql.py on these data. As all episodes end, the target of Eq. 4 is the reward.

    watch gets the number of updates and the policy, about twenty times.
    """
    torch.compiler.reset()  # torch.compile keeps at most eight versions of a function
    state = torch.zeros(len(data.action), 1)
    dataset = dql.Batch(state, data.action, data.reward, state, torch.ones(len(state)))
    training, acting = (torch.Generator().manual_seed(args.seed + k) for k in range(2))
    (agent,), updates, _ = fast_sampler.make_steps(
        args, [dql.make_agent(args, args.seed, (1, 2))], dataset, [training], [acting], fall_back=True
    )

    @torch.no_grad()
    def policy(n: int) -> Tensor:
        return agent.policy.sample(torch.zeros(n, 1), torch.randn(args.num_steps + 1, n, 2, generator=acting))

    every = math.ceil(args.num_updates / 20)
    for done in range(0, args.num_updates, every):
        more = min(every, args.num_updates - done)
        updates(more)
        watch(done + more, policy)
    return policy


def numbers(action: Tensor, data: Data) -> dict:
    """Of samples (n, 2): share within each radius of each corner, mean reward (0 outside the larger), squared MMD."""
    found = {}
    for radius in RADII:
        near = (torch.cdist(action, CORNERS) < radius).float()
        found[f"share_{radius}"] = {name: round(x, 3) for name, x in zip(NAMES, near.mean(0).tolist(), strict=True)}
    found["mean_reward"] = round((near @ REWARDS).mean().item(), 3)
    found["mmd"] = round(mmd(action, data.action[:SAMPLES]).item(), 4)
    return found


def draw(path: Path, found: dict[str, Tensor], rows: list[list[str]], data: Data) -> None:
    """Scatter plots of two rows of policies. Each row starts with the data: plain, then coloured by reward."""
    width = len(rows[0]) + 1
    figure = Figure(figsize=(2.4 * width, 5.2), layout="constrained")
    panels = figure.subplots(2, width, sharex=True, sharey=True)
    action, reward = (x[:SAMPLES] for x in data)
    panels[0, 0].scatter(*action.T, s=3, color="gray")
    panels[0, 0].set(title="data", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xticks=(-0.8, 0, 0.8), yticks=(-0.8, 0, 0.8))
    dots = panels[1, 0].scatter(*action.T, s=3, c=reward)
    panels[1, 0].set_title("data and reward")
    figure.colorbar(dots, ax=panels[1, 0], location="bottom")
    for names, color, axes in zip(rows, ("tab:blue", "tab:red"), panels, strict=True):
        for name, axis in zip(names, axes[1:], strict=True):
            axis.scatter(*found[name].T, s=3, color=color)
            axis.set_title(name)
    figure.savefig(path, format="png", dpi=110)


def main(args: Args) -> None:
    agents = {(k, eta): agent_args(k, eta, args.num_updates, args.seed) for k in STEPS for eta in (0.0, ETA)}
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the networks are small
    torch.manual_seed(args.seed)
    start, data, n = time.perf_counter(), make_data(), args.num_updates
    path, settings = args.out / "bandit.json", {"seed": args.seed, "num_updates": n}
    found, samples = {**settings, "policies": {}}, {}
    try:
        if path.exists():
            found = json.loads(path.read_text())
            samples = {name: torch.from_numpy(x) for name, x in np.load(args.out / "samples.npz").items()}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        why = reason(error)
        raise BadInput(f"{args.out} holds damaged results ({why}): remove them, or give another --out") from None
    if not settings.items() <= found.items():
        raise BadInput(f"{path} has results of another --seed or --num-updates: give another --out")
    policies = found["policies"]

    def seeded(train: Callable) -> object:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            return train()

    q, vae = (cache(partial(seeded, partial(train, data, n))) for train in (fit_q, clone_vae))  # when first asked for

    def add(name: str, train: Callable[[], Sampler], **more) -> None:
        if name in policies:
            return
        samples[name] = seeded(lambda: train()(SAMPLES)).detach()
        policies[name] = of = {**numbers(samples[name], data), **more}
        write_whole(args.out / "samples.npz", partial(np.savez_compressed, **samples))  # first: what is in path is here
        write_json(path, {**found, "versions": versions(torch.device("cpu"))})
        shares = "  ".join(f"{corner} {share:.2f}" for corner, share in of["share_0.2"].items())
        print(f"{time.perf_counter() - start:4.0f} s  {name:22} {shares}  reward {of['mean_reward']:.2f}  "
              f"MMD {of['mmd']:.3f}", flush=True)  # fmt: skip

    def add_diffusion(name: str, num_steps: int, eta: float) -> None:
        curve = []  # number of updates, and the shares within 0.2 of any corner and of the best

        def watch(update: int, policy: Sampler) -> None:
            shares = [*numbers(policy(SAMPLES), data)["share_0.2"].values()]
            curve.append([update, round(sum(shares), 3), shares[-1]])

        train = partial(diffusion, data, agents[num_steps, eta], watch)
        add(f"{name}, N = {num_steps}", train, curve=curve)

    add("data", lambda: lambda n: data.action[-n:])
    add("Gaussian, MLE", lambda: clone_gaussian(data, "MLE", n))
    add("conditional VAE", vae)
    add("Gaussian, MMD", lambda: clone_gaussian(data, "MMD", n))
    add("TD3+BC", lambda: td3_bc(data, q(), n))
    add("BCQ", lambda: bcq(data, q(), vae(), n))
    add("BEAR", lambda: bear(data, q(), n))
    for num_steps in (STEPS[-1], *STEPS[:-1]):  # the paper's first, then the cheapest
        add_diffusion("diffusion", num_steps, 0.0)
        add_diffusion("Diffusion-QL", num_steps, ETA)

    rows = {
        "policies": [["Gaussian, MLE", "conditional VAE", "Gaussian, MMD", f"diffusion, N = {STEPS[-1]}"],
                     ["TD3+BC", "BCQ", "BEAR", f"Diffusion-QL, N = {STEPS[-1]}"]],
        "steps": [[f"{name}, N = {n}" for n in STEPS] for name in ("diffusion", "Diffusion-QL")],
    }  # fmt: skip
    for name, names in rows.items():
        write_whole(args.out / f"{name}.png", lambda path, names=names: draw(path, samples, names, data))


if __name__ == "__main__":
    ending.run_main("bandit.py", lambda: main(arguments.parsed(Args, sys.argv[1:], "bench/bandit.py")))
