"""A trained policy as a function for users, a film of it, and a file of it for other programs."""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from d4rl_tasks import to_bounds
from housekeeping.folder import write_whole


def as_policy(act: Callable, state_dim: int, action_dim: int, device: torch.device,
              bounds: Tensor | None = None) -> Callable:  # fmt: skip
    """act, from states (E, S) to actions (E, A), as a function of (S,) or (..., S), numpy or torch, to the same kind.

    bounds (2, A) are the environment's: its actions are scaled to them from [-1, 1].

    It raises ValueError if states have another width.
    """

    def policy(states):
        x = torch.as_tensor(states, dtype=torch.get_default_dtype(), device=device)
        if x.shape[-1:] != (state_dim,):
            raise ValueError(f"states have {state_dim} numbers each in this task, not shape {tuple(x.shape)}")
        actions = act(x.reshape(-1, state_dim)).reshape(*x.shape[:-1], action_dim)
        if bounds is not None:
            actions = to_bounds(actions, *bounds.to(actions))
        return actions.to(states.device) if isinstance(states, Tensor) else actions.cpu().numpy()

    return policy


def film(policy: Callable, env, seed: int, path: Path) -> None:
    """Writes a video of one episode. Raises BadInput if it cannot be written."""
    from moviepy.video.io.ImageSequenceClip import ImageSequenceClip

    (state, _), ended = env.reset(seed=seed), False
    frames = [env.render()]
    while not ended:
        state, _, terminated, truncated, _ = env.step(policy(state))
        frames.append(env.render())
        ended = terminated or truncated
    clip = ImageSequenceClip(frames, fps=env.metadata.get("render_fps", 30))
    write_whole(path, lambda beside: clip.write_videofile(str(beside), logger=None))


class Exported(nn.Module):
    """An agent's act as a module: (states, noise, gumbel) -> actions, in the environment's bounds (2, A)."""

    def __init__(self, agent, draws: type, bounds: Tensor | None):
        super().__init__()
        self.act, self.draws = agent.act, draws
        self.networks = nn.ModuleList([agent.policy, agent.policy_ema, agent.critic_target])
        self.register_buffer("bounds", None if bounds is None else bounds.to(torch.get_default_dtype()))

    def forward(self, states: Tensor, noise: Tensor, gumbel: Tensor) -> Tensor:
        actions = self.act(states, self.draws(noise.flatten(1, 2), gumbel))
        return actions if self.bounds is None else to_bounds(actions, *self.bounds)


def export(agent, draws, bounds: Tensor | None, path: Path) -> None:
    """Writes an agent's act as a torch.export program, for any number of states. Raises BadInput if that fails.

    draws are those of acting in two or more states; the program's noise has an axis for the states.
    """
    shape = len(draws.noise), *draws.gumbel.shape, agent.action_dim
    example = torch.zeros(shape[1], agent.state_dim), draws.noise.view(shape), draws.gumbel
    states, buffer = torch.export.Dim("states", min=1), io.BytesIO()
    program = torch.export.export(Exported(agent, type(draws), bounds), example,
                                  dynamic_shapes=({0: states}, {1: states}, {0: states}))  # fmt: skip
    torch.export.save(program, buffer)
    write_whole(path, lambda beside: beside.write_bytes(buffer.getbuffer()))
