"""Diffusion-QL in one file: diffusion policies for offline reinforcement learning.

Z. Wang, J. J. Hunt, M. Zhou, "Diffusion Policies as an Expressive Policy Class for Offline Reinforcement Learning",
ICLR 2023, arXiv 2208.06193. Equation numbers below are the paper's.

    python dql.py                                  # the first demo, a maze, with embedded data
    python dql.py --env-id halfcheetah-medium-v2   # the paper's run
    python dql.py --help

The policy is the reverse chain of a conditional diffusion model over actions: a^N is noise, and N learned denoising
steps lead to the action a^0. Its noise predictor learns to imitate the data (Eq. 2) and, through the whole chain, to
raise Q (Eq. 3); Q is a pair of critics with target networks (Eq. 4). Algorithm 1 is `DiffusionQL.update`.

The rows of a batch are drawn first, then all other random numbers of an update, into `Draws`: `update(batch, draws)` is
determined by its arguments and the agent's state, so any two implementations can be given the same numbers.

Where the paper, the official code (github.com/Zhendong-Wang/Diffusion-Policies-for-Offline-RL) and this file differ,
the default is what the official code effectively does (except 2, 11 and 12), since the published scores come from it.
 1. Learning rates are constant: the official decay steps once per evaluation, not per update, and so ends at 0.999 of
    its start. --lr-decay is a real cosine.
 2. Offline selection takes evaluation argsort(bc_loss)[rank]; the official code, in error, argsort(bc_loss) == rank.
 3. Evaluation acts with the online policy: --eval-candidates 50 actions per state, one of them drawn from the softmax
    of min target Q / --eval-temperature 1 (0: the best). --eval-average acts with the policy's average.
 4. The Q-loss maximises one critic, chosen by a coin each update, divided by the mean |Q| of the other on the policy's
    own actions. The paper (Eq. 3) takes |Q| on the data's actions.
 5. Max-Q backup (--max-q-backup): 10 next actions; the maximum of each critic, then the minimum of the two.
 6. The critics' learning rate is always 3e-4; --learning-rate is the policy's.
 7. The policy's average, used in the backup only, moves by 0.005 every 5th update from update 1000 on (--average-decay,
    --average-every, --average-from); in the paper's Algorithm 1 it moves in every update.
 8. --reward standardize divides by the unbiased standard deviation, as the official code does; numpy's is the biased.
 9. A reverse step (Eq. 1) clips its estimate of a^0 to the action range and uses the posterior's variance; the paper's
    formula, which is the same but for that, does not clip and uses beta_i.
10. Gradients that would be discarded (the target's chain, the critics' in the policy step) are not computed: the
    numbers are the same.
11. --eta 0 clips gradients as training with Q does; the official Diffusion-BC does not (--grad-norm 0).
12. Evaluation episode k is reset with seed + 100 + k (neighbouring seeds share most starts); the official environment
    is seeded once per evaluation, with seed + 100, and later episodes continue its random stream.
"""

import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

if __name__ == "__main__":  # before anything slow: a signal while modules load ends the program with one line
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out
    from housekeeping import ending

    ending.begin("dql.py")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import d4rl_tasks
import fast_sampler
from d4rl_tasks import BadInput, find_task, load_dataset, make_envs, normalized_score, rendering_env, step_each
from housekeeping import arguments, checkpoint, evaluating, machine, report
from housekeeping.acting import as_policy, export, film
from housekeeping.ending import run_main
from housekeeping.run import Run


@dataclass
class Args:
    """Diffusion-QL (arXiv 2208.06193). Flags of the algorithm and evaluation left at None take the task's setting.

    Tasks that the paper does not have take what its gym tasks suggest: --eta 1 --grad-norm 5 --learning-rate 3e-4
    --num-updates 1000000, and 50 episodes per evaluation. Of these, --eta matters most.
    --evaluate RUN evaluates the policies of a run anew: --evaluate RUN --help lists its flags.
    """

    # --- what to run
    env_id: str = "maze-demo-v0"
    """one of D4RL's twenty tasks (an unknown id lists them), one of the two demos, whose data are embedded, one of
    OGBench's single tasks (cube-single-play-singletask-v0), or with --dataset-path any that gymnasium makes:
    Pendulum-v1, module:Env-v0"""
    dataset_path: Path | None = None
    """data to train on instead of the task's own: a D4RL HDF5 file, an .npz file, or the folder of a Minari data set"""
    score_range: tuple[float, float] | None = None
    """LOW HIGH, the returns of scores 0 and 100 in an environment of your own; otherwise scores are returns"""
    env_backend: Literal["maintained", "d4rl"] = "maintained"
    """environments: gymnasium and mujoco made equal to D4RL's, or the real d4rl (requirements-classic.txt)"""
    seed: int = 0
    """seed of weights, batches and noise; evaluation episode k resets with seed + 100 + k"""
    num_seeds: int = 1
    """agents trained at once, with seeds seed, seed + 1, ...; each as in a run of its own (on a GPU up to rounding)"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda if there is one. A resumed run keeps the value it was started with"""
    compile: bool | None = None
    """torch.compile losses and gradients, or --no-compile: takes a minute or more. None: if the run is long"""
    cudagraphs: bool | None = None
    """capture the whole update, and acting, as CUDA graphs, or --no-cudagraphs. None: in longer runs on a GPU"""
    fused: bool = False
    """on a GPU: compute updates and acting by the Triton kernels of fused.py (new: no GPU has run them yet)"""
    tf32: bool = False
    """with --fused: products in TF32, with relative errors of about 2e-3 instead of 5e-7"""
    runs_dir: Path = Path("runs")
    """where the run's folder goes"""
    run_name: str | None = None
    """that folder's name; otherwise ENV__dql__SEED__TIME, with bc for cloning and the name of a --dataset-path"""
    resume: Path | None = None
    """folder of a run to continue exactly, from its last checkpoint; a larger --num-updates extends it"""
    track: bool = False
    """log to Weights & Biases too (pip install wandb; its WANDB_PROJECT and WANDB_RUN_GROUP name project and group)"""
    capture_video: bool = False
    """write a video of one episode after training"""

    # --- the algorithm
    num_updates: int | None = None
    """updates of Algorithm 1"""
    batch_size: int = 256
    """transitions per update"""
    num_steps: int = 5
    """N, the number of denoising steps"""
    schedule: Literal["vp", "linear", "cosine"] = "vp"
    """noise schedule"""
    eta: float | None = None
    """weight of the Q-loss in Eq. 3; 0 is behaviour cloning (Diffusion-BC): no critics, one candidate"""
    grad_norm: float | None = None
    """largest norm of each network's gradient; 0 does not clip"""
    learning_rate: float | None = None
    """the policy's learning rate, also --lr (the critics' is 3e-4)"""
    lr_decay: bool = False
    """cosine decay of both learning rates to 0 over the run"""
    max_q_backup: bool | None = None
    """Eq. 4 with the best of 10 next actions"""
    reward: Literal["none", "standardize", "antmaze"] | None = None
    """reward transform: none; standardize: (r - mean) / std; antmaze: 4 (r - 1/2)"""
    gamma: float | None = None
    """discount: 0.99, and 0.995 in OGBench's long tasks"""
    hidden_dim: int = 256
    """width of the hidden layers of policy and critics"""
    hidden_layers: int = 3
    """number of these layers"""
    tau: float = 0.005
    """rate of the critics' targets, every update"""
    average_decay: float = 0.995
    """decay of the policy's average"""
    average_every: int = 5
    """updates between two moves of the average"""
    average_from: int = 1000
    """updates before the average starts to move"""

    # --- variants, off by default (not in the paper)
    critic_layernorm: bool = False
    """LayerNorm in the critics before each Mish (RLPD, arXiv 2302.02948; ReBRAC, 2305.09836, has it after)"""
    num_critics: int = 2
    """K, the number of critics; with more than two, Eq. 3 raises their mean"""
    pessimism: float | None = None
    """b: Eq. 4 and acting take mean - b std over the K critics (DAC, arXiv 2405.20555). None: their minimum"""
    one_step_gradient: bool = False
    """Eq. 3 raises Q of an a^0 estimated from L_d's noisy action in one step, not by the chain (EDP, 2305.20081)"""

    # --- evaluation and logging
    eval_every: int | None = None
    """updates between evaluations"""
    eval_episodes: int | None = None
    """episodes per evaluation"""
    eval_candidates: int | None = None
    """actions sampled per state, of which one is chosen by Q: 50, and 1 when eta is 0"""
    eval_temperature: float = 1.0
    """temperature of that choice; 0 takes the best"""
    eval_average: bool = False
    """act with the policy's average, which stays as it began for the first --average-from updates"""
    offline_rank: int | None = None
    """offline selection: the evaluation with the (rank + 1)-th lowest denoising loss"""
    log_every: int = 1000
    """updates per row of metrics.csv"""
    checkpoint_every: int = 10_000
    """updates between checkpoints; there is also one after each evaluation, and on SIGTERM and Ctrl-C"""


class Settings(NamedTuple):
    """The paper's settings of one task (from its official code) and score in Table 1 (mean, std over seeds)."""

    eta: float
    max_q_backup: bool
    grad_norm: float
    learning_rate: float
    num_updates: int
    reward: str
    offline_rank: int
    paper: tuple[float, float] | None
    eval_every: int = 50_000
    eval_episodes: int = 100


def _locomotion(grad_norm: float, offline_rank: int, paper: tuple[float, float]) -> Settings:
    return Settings(1.0, False, grad_norm, 3e-4, 2_000_000, "none", offline_rank, paper, eval_episodes=10)


SETTINGS = {  # eta, max_q_backup, grad_norm, learning_rate, num_updates, reward, offline_rank, paper's score
    "maze-demo-v0": Settings(2.0, False, 9.0, 1e-3, 1_500, "none", 0, None, eval_every=500, eval_episodes=50),
    "halfcheetah-demo-v0": Settings(1.0, False, 9.0, 3e-4, 16_000, "none", 0, None, eval_every=8_000, eval_episodes=10),
    "halfcheetah-medium-v2": _locomotion(9.0, 1, (51.1, 0.5)),
    "hopper-medium-v2": _locomotion(9.0, 2, (90.5, 4.6)),
    "walker2d-medium-v2": _locomotion(1.0, 1, (87.0, 0.9)),
    "halfcheetah-medium-replay-v2": _locomotion(2.0, 0, (47.8, 0.3)),
    "hopper-medium-replay-v2": _locomotion(4.0, 2, (101.3, 0.6)),
    "walker2d-medium-replay-v2": _locomotion(4.0, 1, (95.5, 1.5)),
    "halfcheetah-medium-expert-v2": _locomotion(7.0, 0, (96.8, 0.3)),
    "hopper-medium-expert-v2": _locomotion(5.0, 2, (111.1, 1.3)),
    "walker2d-medium-expert-v2": _locomotion(5.0, 1, (110.1, 0.3)),
    "antmaze-umaze-v0": Settings(0.5, False, 2.0, 3e-4, 1_000_000, "antmaze", 2, (93.4, 3.4)),
    "antmaze-umaze-diverse-v0": Settings(2.0, True, 3.0, 3e-4, 1_000_000, "antmaze", 2, (66.2, 8.6)),
    "antmaze-medium-play-v0": Settings(2.0, True, 2.0, 1e-3, 1_000_000, "antmaze", 1, (76.6, 10.8)),
    "antmaze-medium-diverse-v0": Settings(3.0, True, 1.0, 3e-4, 1_000_000, "antmaze", 1, (78.6, 10.3)),
    "antmaze-large-play-v0": Settings(4.5, True, 10.0, 3e-4, 1_000_000, "antmaze", 2, (46.4, 8.3)),
    "antmaze-large-diverse-v0": Settings(3.5, True, 7.0, 3e-4, 1_000_000, "antmaze", 1, (56.6, 7.6)),
    "pen-human-v1": Settings(0.15, False, 7.0, 3e-5, 1_000_000, "standardize", 2, (72.8, 9.6)),
    "pen-cloned-v1": Settings(0.1, False, 8.0, 3e-5, 1_000_000, "standardize", 2, (57.3, 11.9)),
    "kitchen-complete-v0": Settings(0.005, False, 9.0, 3e-4, 250_000, "none", 2, (84.0, 7.4)),
    "kitchen-partial-v0": Settings(0.005, False, 10.0, 3e-4, 1_000_000, "none", 2, (60.5, 6.9)),
    "kitchen-mixed-v0": Settings(0.005, False, 10.0, 3e-4, 1_000_000, "none", 0, (62.6, 5.1)),
}

# Other tasks: the medians of the paper's gym tasks, and half as many updates
OTHERS = Settings(1.0, False, 5.0, 3e-4, 1_000_000, "none", 1, None, eval_episodes=50)


def with_settings(args: Args) -> Args:
    """Fills in every None that the task's settings answer. Raises BadInput if a value makes no sense."""
    args = arguments.typed(args)
    settings = SETTINGS.get(args.env_id, OTHERS)._asdict() | {"gamma": d4rl_tasks.reference_gamma(args.env_id)}
    args = replace(args, **{k: v for k, v in settings.items() if k != "paper" and getattr(args, k) is None})
    if args.eval_candidates is None:
        args = replace(args, eval_candidates=50 if args.eta > 0 else 1)
    arguments.check_ranges(args)
    return args


# ----------------------------------------------------------------------------- diffusion policy


def beta_schedule(name: str, num_steps: int) -> Tensor:
    """beta_1 .. beta_N of a noise schedule, float64, (N,).

    vp: the variance-preserving SDE of Song et al. 2021, discretised by Xiao et al. 2022 (the paper's choice).
    linear: Ho et al. 2020. cosine: Nichol and Dhariwal 2021.
    """
    if name == "vp":
        i = torch.arange(1, num_steps + 1, dtype=torch.float64)
        beta_min, beta_max = 0.1, 10.0
        return 1 - torch.exp(-beta_min / num_steps - 0.5 * (beta_max - beta_min) * (2 * i - 1) / num_steps**2)
    if name == "linear":
        return torch.linspace(1e-4, 2e-2, num_steps, dtype=torch.float64)
    if name == "cosine":
        x = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        alpha_bar = torch.cos((x + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, 0.999)
    raise BadInput(f"unknown --schedule {name}: choose vp, linear or cosine")


class Mish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """x tanh(log(1 + e^x)), in the form that torch.compile makes 1.7 times as fast as F.mish on a CPU."""
        return x * (2 / (1 + torch.sigmoid(-x).square()) - 1)


def mlp(*widths: int, layernorm: bool = False) -> nn.Sequential:
    """Linear layers of these widths, Mish between them; with layernorm, LayerNorm before each Mish."""
    layers = [nn.Linear(widths[0], widths[1])]
    for w_in, w_out in pairwise(widths[1:]):
        layers += [nn.LayerNorm(w_in)] if layernorm else []
        layers += [Mish(), nn.Linear(w_in, w_out)]
    return nn.Sequential(*layers)


TIME_DIM = 16


class DiffusionPolicy(nn.Module):
    """pi(a | s): the reverse chain of a diffusion model, noise predictor eps(a^i, i, s) (section 3, Eq. 1)."""

    def __init__(self, state_dim: int, action_dim: int, max_action: float = 1.0, num_steps: int = 5, schedule="vp",
                 hidden: Sequence[int] = (256, 256, 256)):  # fmt: skip
        super().__init__()
        self.max_action = max_action
        self.time_mlp = mlp(TIME_DIM, 2 * TIME_DIM, TIME_DIM)
        self.trunk = mlp(action_dim + TIME_DIM + state_dim, *hidden).append(Mish())
        self.output = nn.Linear(hidden[-1], action_dim)

        beta = beta_schedule(schedule, num_steps)
        alpha_bar = torch.cumprod(1 - beta, 0)
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=beta.dtype), alpha_bar[:-1]])
        variance = (beta * (1 - alpha_bar_prev) / (1 - alpha_bar)).clamp(min=1e-20)
        # Reverse step i, by Bayes' rule (DDPM, Eq. 7): a^0 = r a^i - m eps, then a^(i-1) ~ N(c0 a^0 + ci a^i, sigma^2)
        r, m = (1 / alpha_bar).sqrt(), (1 / alpha_bar - 1).sqrt()
        c0 = beta * alpha_bar_prev.sqrt() / (1 - alpha_bar)
        ci = (1 - alpha_bar_prev) * (1 - beta).sqrt() / (1 - alpha_bar)
        self.reverse = torch.stack([r, m, c0, ci, variance.sqrt()], 1).tolist()
        self.register_buffer("forward_scale", torch.stack([alpha_bar, 1 - alpha_bar], 1).sqrt(), persistent=False)
        frequency = torch.exp(-torch.arange(TIME_DIM // 2, dtype=beta.dtype) * math.log(10000) / (TIME_DIM // 2 - 1))
        angle = torch.arange(num_steps, dtype=beta.dtype)[:, None] * frequency
        self.register_buffer("sinusoid", torch.cat([angle.sin(), angle.cos()], 1), persistent=False)

    def predict_noise(self, action: Tensor, time: Tensor, state: Tensor) -> Tensor:
        """eps(a^i, i, s) = MLP([a^i, t_i, s]), (B, A): action (B, A), time (B or 1, 16), state (B, S)."""
        return self.output(self.trunk(torch.cat([action, time.expand(action.shape[0], -1), state], -1)))

    def sample(self, state: Tensor, noise: Tensor) -> Tensor:
        """Differentiable actions (C B, A) in [-max_action, max_action]: C adjacent rows for each of the states (B, S).

        noise (N + 1, C B, A): noise[0] is a^N, noise[1..N] drive the steps i = N..1; the last is not used.
        """
        state = state.repeat_interleave(noise.shape[1] // max(state.shape[0], 1), 0)  # there may be no states at all
        action, times = noise[0], self.time_mlp(self.sinusoid.to(noise.dtype))  # t_i of all N steps, (N, 16)
        for step_noise, i in zip(noise[1:], reversed(range(len(self.reverse))), strict=True):
            r, m, c0, ci, sigma = self.reverse[i]  # the paper's step i + 1
            eps = self.predict_noise(action, times[i], state)
            a0 = (r * action - m * eps).clamp(-self.max_action, self.max_action)
            action = c0 * a0 + ci * action
            if i > 0:
                action = action + sigma * step_noise
        return action.clamp(-self.max_action, self.max_action)

    def bc_loss(self, action: Tensor, state: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """L_d, Eq. 2: action (B, A), state (B, S), step (B,) in 0..N-1 with 0 least noisy, noise (B, A) -> ()."""
        return self.imitate(action, state, step, noise)[0]

    def imitate(self, action: Tensor, state: Tensor, step: Tensor, noise: Tensor) -> tuple[Tensor, Callable]:
        """L_d, (), and a function that gives the a^0 (B, A) estimated by its noise prediction, clipped."""
        scale = self.forward_scale.to(action.dtype)[step]
        noisy_action = scale[:, :1] * action + scale[:, 1:] * noise
        time = self.time_mlp(self.sinusoid.to(action.dtype)[step])
        eps = self.predict_noise(noisy_action, time, state)

        def estimate() -> Tensor:
            return ((noisy_action - scale[:, 1:] * eps) / scale[:, :1]).clamp(-self.max_action, self.max_action)

        return F.mse_loss(eps, noise), estimate


class Critics(nn.Module):
    """Q_1 .. Q_K, two by default: state (B, S), action (B, A) -> K of (B,)."""

    def __init__(self, state_dim: int, action_dim: int, hidden: Sequence[int] = (256, 256, 256), num_critics: int = 2,
                 layernorm: bool = False):  # fmt: skip
        super().__init__()
        for k in range(1, num_critics + 1):
            self.add_module(f"q{k}", mlp(state_dim + action_dim, *hidden, 1, layernorm=layernorm))

    def forward(self, state: Tensor, action: Tensor) -> tuple[Tensor, ...]:
        x = torch.cat([state, action], -1)
        return tuple(q(x).squeeze(-1) for q in self.children())


# ----------------------------------------------------------------------------- the algorithm


class Batch(NamedTuple):
    """Transitions: state (B, S), action (B, A), reward (B,), next_state (B, S), done (B,) of 0 and 1."""

    state: Tensor
    action: Tensor
    reward: Tensor
    next_state: Tensor
    done: Tensor


class Draws(NamedTuple):
    """The random numbers of one update: R is B, or 10 B with max_q_backup (ten adjacent rows per next state)."""

    next_noise: Tensor  # (N + 1, R, A) normal, the chain of the backup's actions
    bc_step: Tensor  # (B,) integers in 0..N-1
    bc_noise: Tensor  # (B, A) normal
    policy_noise: Tensor  # (N + 1, B, A) normal, the chain of the policy's actions (not read with --one-step-gradient)
    coin: Tensor  # () uniform: above 0.5, Q_1 is maximised and |Q_2| normalises


class ActDraws(NamedTuple):
    """The random numbers of acting in E states with C candidates: noise (N + 1, E C, A) normal, gumbel (E, C)."""

    noise: Tensor
    gumbel: Tensor


class Losses(NamedTuple):
    """What one update logs: device tensors of shape (), or (K,) of K replicas (see `fast_sampler.replicate`).

    To log another value: add a field here, at the end, compute it in policy_losses or critic_loss, and pass it on to
    `update`. (Not with --fused, whose kernels know these seven alone.)
    """

    critic: Tensor  # Eq. 4, all critics
    bc: Tensor  # L_d, Eq. 2
    q: Tensor  # L_q, Eq. 3
    policy: Tensor  # L_d + eta L_q
    target_q: Tensor  # mean of Eq. 4's target
    critic_grad_norm: Tensor  # before clipping
    policy_grad_norm: Tensor


NETWORKS = ("policy", "policy_ema", "critic", "critic_target")
LOSSES = ("critic_loss", "bc_loss", "q_loss", "policy_loss", *Losses._fields[4:])  # columns of metrics.csv
BACKUP_ACTIONS = 10


class DiffusionQL:
    """The agent: four networks, two optimizers, a step count. The task's settings fill in what args leaves at None."""

    critic_learning_rate = 3e-4

    def __init__(self, state_dim: int, action_dim: int, args: Args):
        self.args = args = with_settings(args)
        self.device = machine.choose_device(args.device)
        self.state_dim, self.action_dim = state_dim, action_dim
        hidden = args.hidden_layers * (args.hidden_dim,)
        self.policy = DiffusionPolicy(state_dim, action_dim, 1.0, args.num_steps, args.schedule, hidden).to(self.device)
        self.policy_ema = copy.deepcopy(self.policy).requires_grad_(False)
        critics = hidden, args.num_critics, args.critic_layernorm
        self.critic = Critics(state_dim, action_dim, *critics).to(self.device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.policy_opt = self.adam(self.policy, args.learning_rate)
        self.critic_opt = self.adam(self.critic, self.critic_learning_rate)
        self.step = torch.zeros((), dtype=torch.int64, device=self.device)
        self.has_critics = args.eta > 0  # behaviour cloning has none
        self.eta = torch.tensor(args.eta, dtype=torch.get_default_dtype(), device=self.device)

    def train_step(self, dataset: Batch, generator: torch.Generator) -> Tensor:
        """One iteration of Algorithm 1 on a random batch; its losses (7,), or (K, 7) for K replicas."""
        index = self.draw_index(len(dataset.state), generator)
        batch = Batch(*(x[index] for x in dataset))
        return torch.stack(self.update(batch, self.draw(generator)), -1)

    def update(self, batch: Batch, draws: Draws) -> Losses:
        """One iteration of Algorithm 1. Never waits for the device."""
        if self.args.lr_decay:
            self.decay_learning_rates()
        critic_norm = critic_loss = target_q = torch.zeros_like(self.eta)
        if self.has_critics:
            grads, critic_norm, critic_loss, target_q = self.critic_gradient(batch, draws)
            descend(self.critic_opt, grads)
        grads, policy_norm, bc_loss, q_loss, policy_loss = self.policy_gradient(batch, draws)
        descend(self.policy_opt, grads)
        self.move_averages()
        self.step += 1
        return Losses(critic_loss, bc_loss, q_loss, policy_loss, target_q, critic_norm, policy_norm)

    def critic_gradient(self, batch: Batch, draws: Draws) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """The critics' clipped gradient of Eq. 4; its norm before clipping, the loss, the mean target, each ()."""
        loss, target_q = self.critic_loss(batch, draws.next_noise)
        return *self.gradient(loss, self.critic), loss.detach(), target_q

    def policy_gradient(self, batch: Batch, draws: Draws) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
        """The policy's clipped gradient of Eq. 3; its norm before clipping, L_d, L_q and L_d + eta L_q, each ()."""
        bc, q = self.policy_losses(batch, draws)
        loss = bc + self.eta * q
        return *self.gradient(loss, self.policy), bc.detach(), q.detach(), loss.detach()

    def gradient(self, loss: Tensor, network: nn.Module) -> tuple[list[Tensor], Tensor]:
        """The clipped gradient of a loss () with respect to a network's parameters; its norm before clipping, ()."""
        # replicas have a loss each, (K,), which depends on their own parameters alone
        grads = torch.autograd.grad(loss.sum(), list(network.parameters()))
        # replicas' gradients come from vmap transposed in memory, and fused Adam needs the parameters' layout
        return self.clip([grad.contiguous() for grad in grads])

    def clip(self, grads: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The gradient scaled down to norm --grad-norm (0: never), as by clip_grad_norm_; its norm before, ()."""
        # no foreach operations: Inductor fuses them into one GPU kernel, in which blocks could read the norm too early
        norm = nn.utils.get_total_norm(grads, foreach=False)
        scale = ((self.args.grad_norm or math.inf) / (norm + 1e-6)).clamp(max=1)
        return [grad * scale for grad in grads], norm

    def critic_loss(self, batch: Batch, next_noise: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 4 and the mean of its target, each (). The averaged policy turns next_noise into the target's actions."""
        with torch.no_grad():
            copies = len(next_noise[0]) // len(batch.state)
            next_action = self.policy_ema.sample(batch.next_state, next_noise)
            qs = self.critic_target(batch.next_state.repeat_interleave(copies, 0), next_action)
            q = self.lower_bound([q.view(-1, copies).amax(1) for q in qs])
            target = batch.reward + (1 - batch.done) * self.args.gamma * q
        return sum(F.mse_loss(q, target) for q in self.critic(batch.state, batch.action)), target.mean()

    def lower_bound(self, qs: Sequence[Tensor]) -> Tensor:
        """The minimum of K critics' values, each (B,); with --pessimism b their lower confidence bound, mean - b std.

        The std is the population's, sqrt(mean((Q_k - mean)^2)): with two critics b = 1 is the minimum.
        """
        if self.args.pessimism is None:
            return reduce(torch.minimum, qs)
        std, mean = torch.std_mean(torch.stack(qs), 0, correction=0)
        return mean - self.args.pessimism * std

    def policy_losses(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """L_d (Eq. 2) and L_q (Eq. 3, here without its factor eta; 0 without critics), each ().

        L_q = -mean(Q_i) / mean(|Q_j|) at the policy's own actions; the coin decides which critic is i. With more than
        two, both Q are the mean of all, as in DAC: all are computed anyway, and their mean has the least noise.
        """
        bc, estimate = self.policy.imitate(batch.action, batch.state, draws.bc_step, draws.bc_noise)
        if not self.has_critics:
            return bc, torch.zeros_like(bc)
        one_step = self.args.one_step_gradient
        action = estimate() if one_step else self.policy.sample(batch.state, draws.policy_noise)
        qs = self.critic(batch.state, action)
        if len(qs) > 2:
            q = other_q = torch.stack(qs).mean(0)
        else:
            q1_is_maximised = draws.coin > 0.5
            q, other_q = torch.where(q1_is_maximised, *qs), torch.where(q1_is_maximised, *qs[::-1])
        return bc, -q.mean() / other_q.detach().abs().mean()

    @torch.no_grad()
    def move_averages(self) -> None:
        """Moves the critics' targets and, each --average-every updates from --average-from on, the policy's average."""
        args = self.args
        moves = (self.step >= args.average_from) & (self.step % args.average_every == 0)
        weight = moves * (1 - args.average_decay)  # otherwise 0: a captured graph has no branches
        average, policy = list(self.policy_ema.parameters()), list(self.policy.parameters())
        torch._foreach_lerp_(average, policy, len(policy) * [weight.to(policy[0].dtype)])
        torch._foreach_lerp_(list(self.critic_target.parameters()), list(self.critic.parameters()), args.tau)

    def decay_learning_rates(self) -> None:
        """Half a cosine, from the full rate at step 0 to 0 after the last update."""
        scale = 0.5 * (1 + torch.cos(self.step / self.args.num_updates * math.pi))
        self.policy_opt.param_groups[0]["lr"].copy_(self.args.learning_rate * scale)
        self.critic_opt.param_groups[0]["lr"].copy_(self.critic_learning_rate * scale)

    def draw_index(self, rows: int, generator: torch.Generator) -> Tensor:
        """The rows of a batch, (B,)."""
        return torch.randint(rows, (self.args.batch_size,), generator=generator, device=self.device)

    def draw(self, generator: torch.Generator) -> Draws:
        """The random numbers of one update, from a generator on the agent's device."""
        args, on = self.args, {"generator": generator, "device": self.device}
        shape = (args.batch_size, self.action_dim)
        rows = args.batch_size * (BACKUP_ACTIONS if args.max_q_backup else 1)
        return Draws(
            next_noise=torch.randn(args.num_steps + 1, rows, self.action_dim, **on),
            bc_step=torch.randint(args.num_steps, shape[:1], **on),
            bc_noise=torch.randn(shape, **on),
            policy_noise=torch.randn(args.num_steps + 1, *shape, **on),
            coin=torch.rand((), **on),
        )

    @torch.no_grad()
    def act(self, state: Tensor, draws: ActDraws) -> Tensor:
        """Actions (E, A) for states (E, S): of C candidates each, one drawn from the softmax of min target Q."""
        num_states, candidates = draws.gumbel.shape
        policy = self.policy_ema if self.args.eval_average else self.policy
        action = policy.sample(state, draws.noise)
        if candidates == 1:
            return action
        q = self.lower_bound(self.critic_target(state.repeat_interleave(candidates, 0), action))
        q = q.view(num_states, candidates)
        # Gumbel's trick: the argmax of Q / T plus Gumbel noise is a draw from softmax(Q / T)
        chosen = (q + self.args.eval_temperature * draws.gumbel).argmax(1)
        action = action.view(num_states, candidates, action.shape[-1])
        return action[torch.arange(num_states, device=self.device), chosen]

    def draw_act(self, num_states: int, generator: torch.Generator) -> ActDraws:
        """The random numbers of acting in num_states states, from a generator on the agent's device."""
        candidates, on = self.args.eval_candidates, {"generator": generator, "device": self.device}
        noise = torch.randn(self.args.num_steps + 1, num_states * candidates, self.action_dim, **on)
        exponential = torch.empty(num_states, candidates, device=self.device).exponential_(generator=generator)
        return ActDraws(noise, -exponential.log())  # minus the log of Exp(1) is Gumbel(0, 1)

    def act_fresh(self, states: Tensor, generator: torch.Generator) -> Tensor:
        """Actions (E, A) for states (E, S), with fresh noise; for K replicas (K E, A) and (K E, S)."""
        return self.act(states, self.draw_act(len(states), generator))

    def adam(self, network: nn.Module, learning_rate: float) -> torch.optim.Adam:
        """Adam with its learning rate in a device tensor: it can change without waiting for the device."""
        on_gpu = self.device.type == "cuda"  # its kernel reads a float32 rate
        lr = torch.tensor(learning_rate, dtype=torch.float32 if on_gpu else torch.float64, device=self.device)
        adam = torch.optim.Adam(network.parameters(), lr=lr, fused=True, capturable=on_gpu)
        adam._warned_capturable_if_run_uncaptured = True  # torch would advise against capturable in an eager step
        for p in network.parameters():  # as Adam's first step does; now, so that a checkpoint can be loaded into it
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            adam.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        return adam

    def state_dict(self) -> dict:
        """Everything an update reads and changes."""
        parts = {name: getattr(self, name).state_dict() for name in (*NETWORKS, "policy_opt", "critic_opt")}
        return {**parts, "step": self.step}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Copies into the existing tensors, which captured graphs read and write. Raises if state does not fit."""
        for name in NETWORKS:
            getattr(self, name).load_state_dict(state[name])
        for name in ("policy_opt", "critic_opt"):  # torch's own would put new tensors in the place of these
            own, saved = getattr(self, name).state_dict(), state[name]
            own["param_groups"][0]["lr"].copy_(saved["param_groups"][0]["lr"])
            for k, moments in own["state"].items():
                for moment, tensor in moments.items():
                    tensor.copy_(saved["state"][k][moment])
        self.step.copy_(state["step"])


def descend(optimizer: torch.optim.Adam, grads: list[Tensor]) -> None:
    """One step of an optimizer, given the gradients of its parameters."""
    for p, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        p.grad = grad
    optimizer.step()


def make_batch(data: dict[str, np.ndarray], reward: str, device: torch.device) -> Batch:
    """The whole data set on the device, with rewards transformed: "none", "standardize" or "antmaze"."""
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    batch = Batch(*(torch.as_tensor(data[name], dtype=torch.get_default_dtype()).to(device) for name in names))
    largest = batch.reward.abs().max()
    if largest > 1e15:
        raise BadInput(f"rewards reach {largest:.3g}, of which float32 cannot hold the squares: scale them down")
    if reward == "standardize":
        if len(batch.reward) < 2 or not batch.reward.std() > 0:
            raise BadInput("--reward standardize needs several rewards that differ: these are all the same")
        return batch._replace(reward=(batch.reward - batch.reward.mean()) / batch.reward.std())
    if reward == "antmaze":
        return batch._replace(reward=4 * (batch.reward - 0.5))
    return batch


def make_agent(args: Args, seed: int, widths: tuple[int, int] | None = None) -> DiffusionQL:
    """The agent of one seed, for states and actions of these widths, or else of D4RL's task."""
    torch.manual_seed(seed)
    return DiffusionQL(*(widths or d4rl_tasks.task_of(args.env_id).widths), replace(args, seed=seed))


# ----------------------------------------------------------------------------- evaluation


def evaluate(act: Callable[[Tensor], Tensor], envs: list, seeds: Sequence, device: torch.device,
             on_step: Callable[[int], None] = lambda ended: None) -> np.ndarray:  # fmt: skip
    """The returns of one episode in each environment, in the shape of their seeds: one batch of actions per time step.

    act maps the states (E, S) of all environments to actions (E, A). Finished ones keep their rows, so that shapes stay
    the same and each episode keeps its own noise. on_step is told after each step how many have ended, and may raise.
    """
    states = np.stack([env.reset(seed=int(seed))[0] for env, seed in zip(envs, np.ravel(seeds), strict=True)])
    returns, running = np.zeros(len(envs)), list(range(len(envs)))
    while running:
        actions = act(torch.as_tensor(states, dtype=torch.get_default_dtype(), device=device)).cpu().numpy()
        stepped = step_each([envs[k] for k in running], actions[running])
        for k, (state, reward, terminated, truncated, _) in zip(list(running), stepped, strict=True):
            states[k] = state
            returns[k] += reward
            if terminated or truncated:
                running.remove(k)
        on_step(len(envs) - len(running))
    return returns.reshape(np.shape(seeds))


def eval_noise_seed(seed: int, step: int) -> int:
    """The seed of an evaluation's noise after step updates; training has generators of its own."""
    return seed * 1_000_003 + step


# ----------------------------------------------------------------------------- the run


def train(args: Args, data: dict[str, np.ndarray] | None = None, make_env: Callable | None = None) -> dict:
    """Trains, evaluates and writes the run's folder; returns the contents of summary.json.

    data: arrays instead of a file: observations, actions, rewards, terminals, and next_observations or timeouts.
    make_env(): an environment of gymnasium's interface instead of the one that args.env_id names.
    Raises BadInput, Stopped (on SIGTERM, SIGHUP or SIGINT, after a checkpoint) and Diverged.
    """
    compile_asked = bool(args.compile)  # if it was asked for, a compiler that fails is an error
    args = arguments.typed(args)
    args = arguments.resumed(args, read_args(args.resume)) if args.resume else with_settings(args)
    if args.resume and (summary := report.finished(args, args.resume)):
        print(f"{args.resume} is finished: nothing is left to do")
        return summary | {"folder": str(args.resume)}
    device = machine.choose_device(args.device)
    args = fast_sampler.choose_path(args, device)
    seeds = range(args.seed, args.seed + args.num_seeds)

    task = find_task(args.env_id, args.env_backend, args.score_range, make_env)
    source = args.dataset_path if data is None else data
    data = load_dataset(task, source)
    paper = SETTINGS.get(args.env_id, OTHERS).paper if d4rl_tasks.is_published(task, source) else None
    dataset = make_batch(data, args.reward, device)
    env_seeds = np.add.outer(seeds, 100 + np.arange(args.eval_episodes))
    rounds = np.split(env_seeds, math.ceil(args.eval_episodes / arguments.SIDE_BY_SIDE), axis=1)  # of 100 at most
    envs = make_envs(task, rounds[0].size)
    video_env = rendering_env(task) if args.capture_video else None
    agents = [make_agent(args, seed, task.widths) for seed in seeds]
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    eval_generators = [torch.Generator(device) for _ in seeds]

    run = Run(args, device, data, LOSSES, paper, report.q_range(dataset.reward, args))
    with run.locked():
        run.restore(agents, generators)
        print(f"{run.folder}: {len(dataset.state):,} transitions, updates {run.step:,} to {args.num_updates:,} "
              f"of {len(seeds)} seed(s) on {device}, {fast_sampler.path_name(args)}", flush=True)  # fmt: skip
        # by the fastest path: updates(n) is `train_step` n times for each seed's agent, act(states) is `act_fresh`
        agents, updates, act = fast_sampler.make_steps(
            args, agents, dataset, generators, eval_generators, fall_back=not compile_asked
        )
        if args.compile and not fast_sampler.is_compiled(agents[0]):  # compiling failed: a resumed run is eager too
            args = replace(args, compile=False)
            run.use(args)

        def save() -> None:  # checkpoint.pt; also called when a signal stops the run
            run.save(fast_sampler.states_of(agents, len(seeds)), generators)

        with run.training(save):  # signals are held back, until check_signals raises Stopped
            while run.last_row < args.num_updates:
                run.advance(updates)  # draw and update (Algorithm 1), until a row, an evaluation or a checkpoint is due
                evaluation_due = run.step % args.eval_every == 0 or run.step == args.num_updates
                if run.step == run.next_row:  # every --log-every updates, and whenever an evaluation is due
                    rows = run.end_row()  # the mean losses since the last row, for each seed
                    if evaluation_due:
                        for seed, generator in zip(seeds, eval_generators, strict=True):
                            generator.manual_seed(eval_noise_seed(seed, run.step))
                        returns = [evaluate(act, envs, of_round, device, run.while_evaluating) for of_round in rounds]
                        run.add_scores(rows, normalized_score(task, np.concatenate(returns, axis=1)))
                    run.log(rows)  # metrics.csv, TensorBoard, curve.png
                if evaluation_due or run.step % args.checkpoint_every == 0:
                    save()
                run.check_signals()
        summary = run.summarize()
        if video_env:
            policy = load_policy(run.seeds[0][0], "last", args.seed, args.device)
            film(policy, video_env, args.seed + 100, run.folder / "video.mp4")
    return summary


def read_args(folder: Path) -> Args:
    """The arguments of the run in a folder. Raises BadInput."""
    return with_settings(arguments.read(Args, folder))


def load_agent(run: Path, device: str, which: str, **acting) -> tuple[DiffusionQL, dict]:
    """The agent of a run of one seed, to act as `load_policy` says, and the checkpoint it is of. Raises BadInput."""
    saved = read_args(run)
    if saved.num_seeds > 1:
        raise BadInput(f"{run} holds {saved.num_seeds} policies: give one of its folders seed-*")
    args = replace(saved, device=device, **acting)
    kept = checkpoint.read_policy(run, saved, machine.choose_device(device), which)
    with torch.random.fork_rng(devices=[]):  # weights are drawn, and overwritten: not from the caller's generator
        agent = make_agent(args, saved.seed, checkpoint.widths(kept, run))
    checkpoint.load(kept, run, [agent], [])
    return agent, kept


def load_policy(run: str | Path, which: str = "last", seed: int = 0, device: str = "auto", **acting) -> Callable:
    """A run's trained policy: a function from states (S,) or (E, S), numpy or torch, to actions of the same kind.

    which: "last", of the last checkpoint; "best" or "offline", of the evaluation that the run reports by that name.
    Its actions are in the environment's bounds. It acts as the run's evaluations do, unless told otherwise by
    eval_candidates, eval_temperature or eval_average.
    Raises BadInput if the folder holds no such run; the policy raises ValueError if states have another width.
    """
    agent, kept = load_agent(Path(run), device, which, **acting)
    generator = torch.Generator(agent.device).manual_seed(seed)
    act = partial(agent.act_fresh, generator=generator)
    return as_policy(act, agent.state_dim, agent.action_dim, agent.device, kept.get("action_bounds"))


def export_policy(run: str | Path, path: str | Path, which: str = "last", **acting) -> None:
    """Writes a run's policy as a torch.export program: actions (E, A) for states (E, S), in the environment's bounds.

    torch.export.load(path).module()(states, noise, gumbel) acts as `load_policy` says, in any program. Its random
    numbers are inputs: normal noise (N + 1, E, C, A), and Gumbel's (E, C), of which the C candidates are drawn.
    Raises BadInput.
    """
    agent, kept = load_agent(Path(run), "cpu", which, **acting)
    export(agent, agent.draw_act(2, torch.Generator()), kept.get("action_bounds"), Path(path))


def main() -> None:
    if "evaluate" in arguments.named(sys.argv[1:]):
        print(evaluating.run(sys.argv[1:], read_args, load_agent, evaluate, eval_noise_seed))
        return
    args = arguments.typed(arguments.parse(Args, sys.argv[1:]))
    if args.resume:  # a flag with its default value counts too, if it was given
        arguments.refuse_changes(args, read_args(args.resume), arguments.named(sys.argv[1:]))
    print(report.report(train(args)))


if __name__ == "__main__":
    run_main("dql.py", main)
