"""The fast paths of dql.py: which to take, its update and sampler captured as CUDA graphs, and many agents at once.

Why a graph: the networks are small, so an update on a GPU is hundreds of kernels of a few microseconds each, which take
the CPU longer to launch than the GPU to run. A CUDA graph records the launches once (index draw, gather, draws,
losses, gradients, clipping, both Adams, targets and average) and replays them in one call, without any input, and
without any output that the host waits for: losses add up on the device and are read once per log line. torch.compile,
inside, fuses kernels; the graph, outside, removes the cost of launching; replicas fill what one agent leaves idle.
What it costs: seconds of capture (34 s with torch.compile on an H200), memory for the graph's buffers, and fixed
shapes: another batch size needs another graph. Whatever changes from update to update (learning rates, the coin,
whether the average moves, the step count) must be a device tensor; random numbers come from generators registered
with the graph.

`choose_path` decides by device and length of run. Eager is the reference and serves short runs. Longer ones are
compiled on a CPU; on a GPU they are captured and, longer still, compiled too. --fused, on a GPU, takes the 68
launches of fused.py for an update; no GPU has run it yet, so it is not the default. No loss and no network is defined
here: `replicate` maps those of dql.py over a leading axis of replicas, and the graphs record `train_step` and
`act_fresh`. The tests hold every path equal to the eager one.
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
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from d4rl_tasks import BadInput, reason
from housekeeping import machine
from housekeeping.arguments import SIDE_BY_SIDE, variants
from housekeeping.ending import out_of_memory

Args = Batch = DiffusionQL = Any  # dql.py's, which are passed in: no file imports it
WARM_UPS = 3  # lets libraries make their workspaces and torch.compile its kernels before a capture
COMPILED = ("critic_gradient", "policy_gradient", "act")  # methods of an agent


# ----------------------------------------------------------------------------- which path


def choose_path(args: Args, device: torch.device) -> Args:
    """Chooses --compile and --cudagraphs where they are None, by device and length of run. Raises BadInput."""
    on_gpu = device.type == "cuda"
    if args.cudagraphs and not on_gpu:
        raise BadInput("--cudagraphs (given, or the resumed run's) needs --device cuda and a GPU")
    lacks = lacks_to_compile(on_gpu)
    if args.compile and lacks:
        raise BadInput(f"--compile needs {lacks}: install it, or give --no-compile")
    if args.fused and (lacks or not on_gpu):
        raise BadInput(f"--fused (given, or the resumed run's) needs {lacks if on_gpu else '--device cuda and a GPU'}")
    if args.fused and (args.compile or args.hidden_dim % 64 or args.num_steps > 32):
        raise BadInput("--fused goes with --num-steps up to 32 and a --hidden-dim of 64, 128 ..., not with --compile")
    if args.fused and (unknown := variants(replace(args, one_step_gradient=False))):
        raise BadInput(f"--fused does not compute {unknown}: leave out one or the other")
    if args.tf32 and not args.fused:
        raise BadInput("--tf32 is for --fused alone")
    # on an H200 compiling takes 34 s and then saves 1.6 ms of an update's 2.9
    long = args.num_updates >= 20_000 if on_gpu else args.num_updates * args.num_seeds >= 5_000
    return replace(
        args,
        compile=long and not lacks and not args.fused if args.compile is None else args.compile,
        cudagraphs=on_gpu and args.num_updates >= 2_000 if args.cudagraphs is None else args.cudagraphs,
    )


def path_name(args: Args) -> str:
    """The chosen path in words."""
    name = "fused" if args.fused else "compiled (which takes a minute or more)" if args.compile else "eager"
    return f"{name} and captured" if args.cudagraphs else name


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
    args: Args, agents: list[DiffusionQL], dataset: Batch, generators: list, eval_generators: list, fall_back=False
) -> tuple[list[DiffusionQL], Callable[[int], Tensor], Callable[[Tensor], Tensor]]:
    """(agents, updates, act): updates(n) is n times `train_step` of each agent and returns their summed losses (K, 7);
    act is their `act_fresh`, from states (K E, S) to actions (K E, A).

    On a GPU `replicate` makes several agents one. On a CPU, which one agent keeps busy, they take turns. All is tried
    once, without a trace, before it is returned: with fall_back the steps are eager where compiling fails.
    Raises BadInput if it fails otherwise, or for lack of memory.
    """
    on_cpu = agents[0].device.type == "cpu"
    if on_cpu:
        keep_freed_memory()
    if args.fused or (len(agents) > 1 and not on_cpu):
        agents, generators, eval_generators = [replicate(agents)], [generators], [eval_generators]
    check_memory(args, agents[0])
    if args.fused:
        from fused import FusedDiffusionQL

        agents = [FusedDiffusionQL(agents[0], args.tf32)]
    eager = [{name: getattr(agent, name) for name in COMPILED if hasattr(agent, name)} for agent in agents]
    build = captured_steps if args.cudagraphs else steps_in_turn
    try:
        for agent in agents if args.compile else ():
            compile_agent(agent)
        return agents, *build(args, agents, dataset, generators, eval_generators)
    except Exception as error:  # of a compiler: of any kind
        if isinstance(error, BadInput) or not args.compile:
            raise
        why = reason(getattr(error, "inner_exception", error))  # which dynamo wraps in one that says little
        if not fall_back:
            raise BadInput(f"--compile fails here ({why}): give --no-compile") from None
        print(f"warning: compiling fails here ({why}): runs are eager, and slower", file=sys.stderr)
    for agent, methods in zip(agents, eager, strict=True):
        vars(agent).update(methods)
    return agents, *build(args, agents, dataset, generators, eval_generators)


def check_memory(args: Args, agent: DiffusionQL) -> None:
    """Raises BadInput if the layers' outputs alone, of a batch or of an evaluation's candidates, exceed memory."""
    layers = [4 * layer.out_features for layer in agent.policy.trunk if isinstance(layer, nn.Linear)]  # bytes a row
    chain = args.num_steps if agent.has_critics else 1  # kept for the gradient
    at_once = args.num_seeds if agent.device.type == "cuda" else 1
    machine.check_memory("--batch-size", args.batch_size, at_once * chain * sum(layers), agent.device)
    states = at_once * min(args.eval_episodes, SIDE_BY_SIDE)
    machine.check_memory("--eval-candidates", args.eval_candidates, states * 2 * max(layers), agent.device)


def is_compiled(agent: DiffusionQL) -> bool:
    """Whether an agent's steps are compiled: they are not where `make_steps` fell back."""
    return hasattr(agent.act, "_torchdynamo_orig_callable")


def captured_steps(args, agents, dataset, generators, eval_generators) -> tuple[Callable, Callable]:
    """`make_steps` with CUDA graphs, of the one agent there is."""
    with enough_memory("--batch-size"):
        updates = FastUpdate(agents[0], dataset, generators[0])
    with enough_memory("--eval-candidates"):
        return updates, FastSampler(agents[0], min(args.eval_episodes, SIDE_BY_SIDE), eval_generators[0])


def steps_in_turn(args, agents, dataset, generators, eval_generators) -> tuple[Callable, Callable]:
    """`make_steps` without CUDA graphs: one agent after the other."""

    def updates(n: int) -> Tensor:
        turns = zip(agents, generators, strict=True)
        sums = [sum(agent.train_step(dataset, g) for _ in range(n)) for agent, g in turns]
        return torch.cat([torch.atleast_2d(of_agent) for of_agent in sums])

    def act(states: Tensor) -> Tensor:
        turns = zip(agents, states.chunk(len(agents)), eval_generators, strict=True)
        # a copy, for the bits of a product can depend on how its memory is aligned
        return torch.cat([agent.act_fresh(own.clone(), g) for agent, own, g in turns])

    with unchanged(agents, [*generators, *eval_generators]):
        with enough_memory("--batch-size"):
            updates(1)
        with enough_memory("--eval-candidates"):
            states = args.num_seeds * min(args.eval_episodes, SIDE_BY_SIDE)
            act(torch.zeros(states, agents[0].state_dim, dtype=agents[0].eta.dtype, device=agents[0].device))
    return updates, act


@contextmanager
def enough_memory(flag: str) -> Iterator[None]:
    """Raises BadInput, which names the flag, if the block runs out of memory."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise BadInput(f"out of memory ({reason(error)}): try a smaller {flag} or --num-seeds") from None


def compile_agent(agent: DiffusionQL) -> None:
    """Compiles each network's loss together with its gradient, and acting."""
    from compiling import compiled

    for name in COMPILED:
        setattr(agent, name, compiled(getattr(agent, name), agent.device))


def keep_freed_memory() -> None:
    """Stops glibc from giving what an update frees back to the system, to get it again page by page in the next."""
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # as in malloc.h
        libc.mallopt(trim_threshold, 2**30)
        libc.mallopt(mmap_threshold, 2**25)  # the manual's largest; the line above stops it from growing by itself


# ----------------------------------------------------------------------------- replicas


def stack(states: Sequence[dict]) -> dict:
    """Stacks K states of agents (nested dicts of tensors) into one whose tensors are (K, ...).

    Tensors without axes (step counts, learning rates) are the same for all, and stay as they are.
    """

    def together(first, *others):
        is_own = isinstance(first, Tensor) and first.dim() > 0
        return torch.stack([first, *others]) if is_own else copy.deepcopy(first)

    return tree_map(together, *states)


def unstack(state: dict, k: int) -> dict:
    """A copy of the k-th of the states that were stacked."""
    return tree_map(lambda x: (x[k] if x.dim() else x).clone() if isinstance(x, Tensor) else x, state)


def states_of(agents: Sequence[DiffusionQL], num_seeds: int) -> list[dict]:
    """The state of each seed; agents has one agent per seed, or the single one that `replicate` made of them."""
    if agents[0].eta.dim() == 0:
        return [agent.state_dict() for agent in agents]
    return [unstack(agents[0].state_dict(), k) for k in range(num_seeds)]


class Networks(nn.Module):
    """An agent's networks as one module, for functional_call to lend them a replica's parameters."""

    def __init__(self, agent: DiffusionQL):
        super().__init__()
        for name, network in vars(agent).items():
            if isinstance(network, nn.Module):
                setattr(self, name, network)

    def forward(self, method: Callable, *inputs):
        return method(*inputs)


def replicate(agents: Sequence[DiffusionQL]) -> DiffusionQL:
    """K agents as one: parameters, optimizer state and losses have a leading axis (K, ...). Given the same draws, an
    update does to each replica what it would do to that agent alone.

    The agents may differ in all that is learned, in seed, and in eta (all 0 or none), not in their number of updates;
    other arguments are the first's.
    `draw`, `draw_index` and `draw_act` take a list of K generators; batches and draws are (K, ...), states to act in
    (K E, S), replica by replica. Raises ValueError if the agents do not fit together.
    """
    if len({agent.has_critics for agent in agents}) > 1:
        raise ValueError("replicas with eta 0 (no critics) and above do not fit together")
    if len({agent.step.item() for agent in agents}) > 1:
        raise ValueError("replicas must have made the same number of updates")
    K, first = len(agents), agents[0]
    whole = copy.copy(first)  # the agent that is returned
    for name in COMPILED:  # if compiled, they are bound to the first agent
        vars(whole).pop(name, None)
    for name, network in Networks(first).named_children():
        network = copy.deepcopy(network)
        for p in network.parameters():
            p.data = p.data.new_empty(K, *p.shape)
        setattr(whole, name, network)
    whole.policy_opt = first.adam(whole.policy, first.args.learning_rate)
    whole.critic_opt = first.adam(whole.critic, first.critic_learning_rate)
    whole.step = first.step.clone()
    whole.eta = torch.stack([agent.eta for agent in agents])
    whole.load_state_dict(stack([agent.state_dict() for agent in agents]))

    networks, single = Networks(whole), copy.copy(whole)  # single: one replica, while its parameters are lent
    del single.eta  # it has all K values, and the methods below compute for one replica at a time
    parameters = dict(networks.named_parameters())

    def for_each(method: Callable) -> Callable:
        """A method of a single replica, mapped over all of them."""

        def of_one(own: dict[str, Tensor], *inputs):
            return functional_call(networks, own, (method, *inputs))

        return lambda *inputs: torch.vmap(of_one)(parameters, *inputs)

    def stacked(draws: list):
        return type(draws[0])(*map(torch.stack, zip(*draws, strict=True)))

    act = for_each(single.act)
    whole.critic_loss, whole.policy_losses = for_each(single.critic_loss), for_each(single.policy_losses)
    whole.act = lambda states, draws: act(states.unflatten(0, (K, -1)), draws).flatten(0, 1)
    whole.clip = torch.vmap(first.clip)
    whole.draw_index = lambda rows, generators: torch.stack([first.draw_index(rows, g) for g in generators])
    whole.draw = lambda generators: stacked([first.draw(g) for g in generators])
    whole.draw_act = lambda states, generators: stacked([first.draw_act(states // K, g) for g in generators])
    return whole


# ----------------------------------------------------------------------------- CUDA graphs


@contextmanager
def unchanged(agents: Sequence[DiffusionQL], generators: list[torch.Generator]) -> Iterator[None]:
    """Restores agents and generators at the end of the block."""
    before = [copy.deepcopy(agent.state_dict()) for agent in agents]
    generators = [g for g in tree_leaves(generators) if g]
    numbers = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
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

        self.agent = agent  # stays alive with this: a graph does not hold tensors that were made outside it
        self.generators = generator if isinstance(generator, list) else [generator]
        self.states = torch.zeros(len(self.generators) * num_states, agent.state_dim, device=agent.device)
        with unchanged([agent], self.generators):
            self.graph = capture(step, self.generators, agent.device)

    def __call__(self, states: Tensor) -> Tensor:
        if hasattr(self.agent, "reseed"):  # fused.py's own random numbers follow a generator's seed
            self.agent.reseed(self.generators)
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
