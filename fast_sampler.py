"""The fast paths of dql.py: which to take, its update and sampler captured as CUDA graphs, and many agents at once.

Why a graph: the networks are small, so an update on a GPU is hundreds of kernels of a few microseconds each, which take
the CPU longer to launch than the GPU to run. A CUDA graph records the launches once (index draw, gather, draws,
losses, gradients, clipping, both Adams, targets and average) and replays them in one call, without any input, and
without any output that the host waits for: losses add up on the device and are read once per log line. torch.compile,
inside, fuses kernels; the graph, outside, removes the cost of launching; replicas fill what one agent leaves idle.
What it costs: seconds of capture (minutes with torch.compile), memory for the graph's buffers, and fixed shapes:
another batch size needs another graph. Whatever changes from update to update (learning rates, the coin, whether the
average moves, the step count) must be a device tensor; random numbers come from generators registered with the graph.

`choose_path` decides what pays, by device and length of run. No loss and no network is defined here: `replicate` maps
those of dql.py over a leading axis of replicas, and the graphs record dql.py's `train_step` and `act_fresh`. The tests
hold every path equal to the eager one.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib.util
import os
import platform
import shlex
import shutil
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from d4rl_tasks import BadInput
from run_folder import NETWORKS

if TYPE_CHECKING:
    from dql import Args, Batch, DiffusionQL

WARM_UPS = 3  # lets libraries make their workspaces and torch.compile its kernels before a capture


# ----------------------------------------------------------------------------- which path


def choose_path(args: Args, device: torch.device) -> Args:
    """Chooses --compile and --cudagraphs where they are None, by device and length of run. Raises BadInput."""
    on_gpu = device.type == "cuda"
    if args.cudagraphs and not on_gpu:
        raise BadInput("--cudagraphs (given, or the resumed run's) needs --device cuda and a GPU")
    lacks = lacks_to_compile(on_gpu)
    if args.compile and lacks:
        raise BadInput(f"--compile needs {lacks}: install it, or give --no-compile")
    long = args.num_updates >= 50_000 if on_gpu else args.num_updates * args.num_seeds >= 5_000
    return replace(
        args,
        compile=long and not lacks if args.compile is None else args.compile,
        cudagraphs=on_gpu and args.num_updates >= 2_000 if args.cudagraphs is None else args.cudagraphs,
    )


def lacks_to_compile(on_gpu: bool) -> str:
    """What torch.compile needs and this machine lacks; "" if nothing."""
    variable, usual = ("CC", "gcc") if on_gpu else ("CXX", "g++")
    if on_gpu and importlib.util.find_spec("triton") is None:
        return "the package triton"
    if shutil.which(shlex.split(os.environ.get(variable) or usual)[0]) is None:
        return f"a compiler, {usual} or what {variable} names"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h (python3-dev)"
    return ""


def make_steps(
    args: Args, agents: list[DiffusionQL], dataset: Batch, generators: list, eval_generators: list
) -> tuple[list[DiffusionQL], Callable[[int], Tensor], Callable[[Tensor], Tensor]]:
    """(agents, updates, act): updates(n) makes n updates and returns their summed losses (K, 7); act maps states
    (K E, S) of K seeds to actions (K E, A).

    On a GPU `replicate` makes several agents one. On a CPU, which one agent keeps busy, they take turns.
    """
    if agents[0].device.type == "cpu":
        keep_freed_memory()
    elif len(agents) > 1:
        agents = [replicate(agents, args.compile)]
        generators, eval_generators = [generators], [eval_generators]
    if args.cudagraphs:
        act = FastSampler(agents[0], args.eval_episodes, eval_generators[0])
        return agents, FastUpdate(agents[0], dataset, generators[0]), act

    def updates(n: int) -> Tensor:
        turns = zip(agents, generators, strict=True)
        sums = [sum(agent.train_step(dataset, g) for _ in range(n)) for agent, g in turns]
        return torch.cat([torch.atleast_2d(of_agent) for of_agent in sums])

    def act(states: Tensor) -> Tensor:
        turns = zip(agents, states.chunk(len(agents)), eval_generators, strict=True)
        # a copy, for the bits of a product can depend on how its memory is aligned
        return torch.cat([agent.act_fresh(own.clone(), g) for agent, own, g in turns])

    return agents, updates, act


def keep_freed_memory() -> None:
    """Stops glibc from giving what an update frees back to the system, to get it again page by page in the next."""
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # as in malloc.h
        libc.mallopt(trim_threshold, 2**30)
        libc.mallopt(mmap_threshold, 2**25)  # the manual's largest; the line above stops it from growing by itself


# ----------------------------------------------------------------------------- replicas


def stack(states: Sequence):
    """Stacks K states of agents (nested dicts of tensors) into one whose tensors are (K, ...).

    Tensors without axes (step counts, learning rates) are the same for all, and stay as they are.
    """
    first = states[0]
    if isinstance(first, Tensor):
        return torch.stack(list(states)) if first.dim() else first.clone()
    if isinstance(first, dict):
        return {key: stack([state[key] for state in states]) for key in first}
    if isinstance(first, list):
        return [stack(items) for items in zip(*states, strict=True)]
    return first


def unstack(state, k: int):
    """A copy of the k-th of the states that were stacked."""
    if isinstance(state, Tensor):
        return (state[k] if state.dim() else state).clone()
    if isinstance(state, dict):
        return {key: unstack(value, k) for key, value in state.items()}
    if isinstance(state, list):
        return [unstack(value, k) for value in state]
    return state


def states_of(agents: Sequence[DiffusionQL], num_seeds: int) -> list[dict]:
    """The state of each seed; agents has one agent per seed, or the single one that `replicate` made of them."""
    if len(agents) == num_seeds:
        return [agent.state_dict() for agent in agents]
    return [unstack(agents[0].state_dict(), k) for k in range(num_seeds)]


class Networks(nn.Module):
    """An agent's networks as one module, for functional_call to lend them a replica's parameters."""

    def __init__(self, agent: DiffusionQL):
        super().__init__()
        for name in NETWORKS:
            setattr(self, name, getattr(agent, name))

    def forward(self, method: Callable, *inputs):
        return method(*inputs)


def replicate(agents: Sequence[DiffusionQL], compile: bool = False) -> DiffusionQL:
    """K agents as one: parameters, optimizer state and losses have a leading axis (K, ...). Given the same draws, an
    update does to each replica what it would do to that agent alone.

    The agents may differ in all that is learned, in seed, and in eta (all 0 or none), not in their number of updates;
    other arguments are the first's.
    `draw`, `draw_index` and `draw_act` take a list of K generators; batches and draws are (K, ...), states to act in
    (K E, S), replica by replica. Raises ValueError if the agents do not fit together.
    """
    etas = [agent.args.eta for agent in agents]
    if len({agent.has_critics for agent in agents}) > 1:
        raise ValueError("replicas with eta 0 (no critics) and above do not fit together")
    if len({agent.step.item() for agent in agents}) > 1:
        raise ValueError("replicas must have made the same number of updates")
    K, one = len(agents), agents[0]
    many = copy.copy(one)
    for name in ("critic_gradient", "policy_gradient", "act"):  # if compiled, they are bound to that one agent
        vars(many).pop(name, None)
    for name in NETWORKS:
        network = copy.deepcopy(getattr(one, name))
        for p in network.parameters():
            p.data = p.data.new_empty(K, *p.shape)
        setattr(many, name, network)
    many.policy_opt = one.adam(many.policy, one.args.learning_rate)
    many.critic_opt = one.adam(many.critic, one.critic_learning_rate)
    many.step = one.step.clone()
    many.eta = torch.tensor(etas, device=one.device, dtype=torch.get_default_dtype())
    many.load_state_dict(stack([agent.state_dict() for agent in agents]))

    networks, replica = Networks(many), copy.copy(many)
    del replica.eta  # that of all replicas: where one is computed, nothing may read it
    parameters = dict(networks.named_parameters())

    def each(method: Callable) -> Callable:
        """A method of a single replica, mapped over all."""

        def of_one(own: dict[str, Tensor], *inputs):
            return functional_call(networks, own, (method, *inputs))

        return lambda *inputs: torch.vmap(of_one)(parameters, *inputs)

    def stacked(draws: list):
        return type(draws[0])(*map(torch.stack, zip(*draws, strict=True)))

    act = each(replica.act)
    many.critic_loss, many.policy_losses = each(replica.critic_loss), each(replica.policy_losses)
    many.act = lambda states, draws: act(states.unflatten(0, (K, -1)), draws).flatten(0, 1)
    many.clip = torch.vmap(one.clip)
    many.draw_index = lambda rows, generators: torch.stack([one.draw_index(rows, g) for g in generators])
    many.draw = lambda generators: stacked([one.draw(g) for g in generators])
    many.draw_act = lambda states, generators: stacked([one.draw_act(states // K, g) for g in generators])
    if compile:
        many.compile()
    return many


# ----------------------------------------------------------------------------- CUDA graphs


@contextmanager
def unchanged(agents: Sequence[DiffusionQL], generators: list[torch.Generator]) -> Iterator[None]:
    """Restores agents and generators at the end of the block, unless it raises."""
    before = [copy.deepcopy(agent.state_dict()) for agent in agents]
    numbers = [generator.get_state() for generator in generators]
    yield
    for agent, state in zip(agents, before, strict=True):
        agent.load_state_dict(state)
    for generator, state in zip(generators, numbers, strict=True):
        generator.set_state(state)


class FastUpdate:
    """Captured training steps: `fast(n)` replays n of them and returns their summed losses, (K, 7).

    agent: a DiffusionQL on a GPU with its generator, or what `replicate` makes of several with theirs. Building one
    compiles and captures but changes nothing: parameters, optimizers, averages, step and generators are as before.
    """

    def __init__(self, agent: DiffusionQL, dataset: Batch, generator: torch.Generator | list[torch.Generator]):
        def step() -> None:
            losses = agent.train_step(dataset, generator)
            self.sums = losses.clone() if self.sums is None else self.sums.add_(losses)

        self.sums: Tensor | None = None
        self.step = step  # keeps agent and data alive: a graph does not hold tensors that were made outside it
        generators = generator if isinstance(generator, list) else [generator]
        with unchanged([agent], generators):
            self.graph = capture(step, generators, agent.device)

    def __call__(self, n: int) -> Tensor:
        self.sums.zero_()
        for _ in range(n):
            self.graph.replay()
        return torch.atleast_2d(self.sums.clone())


class FastSampler:
    """agent.act with fresh draws, captured for num_states states per replica: `sampler(states)` gives their actions.

    states: (E, S), or (K E, S) for K replicas; actions: (E, A) or (K E, A). It acts with the agent's parameters as they
    are at the time of the call.
    """

    def __init__(self, agent: DiffusionQL, num_states: int, generator: torch.Generator | list[torch.Generator]):
        def step() -> None:
            self.actions = agent.act_fresh(self.states, generator)

        self.step = step  # keeps the agent alive: a graph does not hold tensors that were made outside it
        generators = generator if isinstance(generator, list) else [generator]
        self.states = torch.zeros(len(generators) * num_states, agent.state_dim, device=agent.device)
        with unchanged([agent], generators):
            self.graph = capture(step, generators, agent.device)

    def __call__(self, states: Tensor) -> Tensor:
        if states.shape != self.states.shape:
            raise ValueError(f"captured for states of shape {tuple(self.states.shape)}, not {tuple(states.shape)}")
        self.states.copy_(states)
        self.graph.replay()
        return self.actions.clone()


def capture(step: Callable[[], None], generators: list[torch.Generator], device: torch.device):
    """A graph of one step, run by `.replay()`. The step first runs a few times, as capturing demands.

    On a CPU (tests only) replaying runs the step itself.
    """
    if device.type != "cuda":
        for _ in range(WARM_UPS):
            step()
        return SimpleNamespace(replay=step)
    with torch.cuda.device(device):  # a capture is made on the current device
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)  # its position must be on the device, to move at each replay
        gc.collect()  # an older, unreferenced graph must not be destroyed while this one is captured
        with torch.cuda.graph(graph, stream=stream):
            step()
    return graph
