"""A trained policy as a function for users, and a film of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from housekeeping.folder import files_beside


def as_policy(act: Callable, state_dim: int, action_dim: int, device: torch.device) -> Callable:
    """act, from states (E, S) to actions (E, A), as a function of (S,) or (..., S), numpy or torch, to the same kind.

    It raises ValueError if states have another width.
    """

    def policy(states):
        x = torch.as_tensor(states, dtype=torch.get_default_dtype(), device=device)
        if x.shape[-1:] != (state_dim,):
            raise ValueError(f"states have {state_dim} numbers each in this task, not shape {tuple(x.shape)}")
        actions = act(x.reshape(-1, state_dim)).reshape(*x.shape[:-1], action_dim)
        return actions.to(states.device) if isinstance(states, Tensor) else actions.cpu().numpy()

    return policy


def film(policy: Callable, env, seed: int, folder: Path) -> None:
    """Writes a video of one episode into a run's folder. Raises BadInput if it cannot be written."""
    from gymnasium.wrappers import RecordVideo

    with files_beside(folder) as beside, RecordVideo(env, str(beside), name_prefix="video", disable_logger=True) as env:
        (state, _), ended = env.reset(seed=seed), False
        while not ended:
            state, _, terminated, truncated, _ = env.step(policy(state))
            ended = terminated or truncated
