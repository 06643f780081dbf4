"""Compiles the kernels of an update and of acting ahead of time, without a GPU, at HalfCheetah's shapes.

    python bench/compile_kernels.py [--arch 90] [--replicas 1 5] [--quick]   registers, shared memory, spills
    python bench/compile_kernels.py --predict                                microseconds, by costs measured on an H200

Exit code 1 if a kernel spills registers or wants more shared memory than there is. The launches are those that
fused.py makes, recorded and not run.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dql
import fast_sampler
import fused

SHARED = {80: 163, 89: 99, 90: 227, 120: 99}  # KiB that a block may have
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin"


def recorded(replicas: int = 1, states: int = 0, precision: str = "tf32x3", **args) -> list[tuple]:
    """(kernel, grid, args, constants) of each launch of a training step, or of acting in so many states."""
    args = dql.with_settings(dql.Args(env_id="halfcheetah-medium-v2", device="cpu", compile=False, **args))
    many = fast_sampler.replicate([dql.make_agent(args, seed) for seed in range(replicas)])
    for optimizer in (many.policy_opt, many.critic_opt):  # as on a GPU
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"].float()
    agent = fused.FusedDiffusionQL(many)
    launches, launch = [], fused.launch

    def record(kernel, grid: tuple, *args, of: dict | None = None, **own) -> None:
        constants = {name: value for name, value in (of or {}).items() if name in kernel.arg_names} | own
        launches.append((kernel, grid, args, constants | ({"PREC": precision} if "PREC" in constants else {})))

    fused.launch = record
    try:
        generators = [torch.Generator().manual_seed(k) for k in range(replicas)]
        if states:
            agent.act_fresh(torch.zeros(replicas * states, agent.state_dim), generators)
        else:
            rows, A, S = 1000, agent.action_dim, agent.state_dim
            data = dql.Batch(*(torch.zeros(shape) for shape in ((rows, S), (rows, A), rows, (rows, S), rows)))
            agent.train_step(data, generators)
    finally:
        fused.launch = launch
    return launches


def source(kernel, args: tuple, constants: dict, target: GPUTarget) -> ASTSource:
    """What Triton would compile at such a launch: its own steps, up to the compiler."""
    backend, options = make_backend(target), {"debug": False, "instrumentation_mode": ""}
    bound = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **constants, **options)
    _, signature, constexprs, attrs = kernel._pack_args(backend, constants | options, *bound)
    return ASTSource(kernel, signature, constexprs, attrs)


def compiled(kernel, args: tuple, constants: dict, arch: int) -> dict:
    """Registers of a thread, bytes of shared memory and of spills, and matrix instructions."""
    target = GPUTarget("cuda", arch, 32)
    code = triton.compile(source(kernel, args, constants, target), target=target)
    ptxas = PTXAS / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(code.asm["ptx"])
        file.flush()
        told = subprocess.run([ptxas, "-v", f"-arch=sm_{arch}{'a' * (arch >= 90)}", file.name, "-o", "/dev/null"],
                              capture_output=True, text=True, check=True).stderr  # fmt: skip
    number = lambda pattern: int((re.search(pattern, told) or [0, 0])[1])  # noqa: E731
    return {
        "registers": number(r"Used (\d+) registers"), "spills": number(r"(\d+) bytes spill stores"),
        "shared": code.metadata.shared, "mma": len(re.findall(r"mma\.sync|wgmma\.mma_async", code.asm["ptx"])),
    }  # fmt: skip


def kinds(launches: list[tuple]) -> dict[tuple, tuple]:
    """One launch of each kind that compiles differently."""
    found = {}
    for kernel, _, args, constants in launches:
        key = source(kernel, args, constants, GPUTarget("cuda", 90, 32)).hash()
        found.setdefault((kernel.__name__, key), (kernel, args, constants))
    return found


# Microseconds of a launch on an H200, captured in a chain: one layer of so many groups of 256 rows (tf32x3), and
# (constant, for each agent) of other kernels. Measured: layers, weight gradients of the hidden layers, sum_parts, adam,
# and the products of four words; the rest are estimates from kernels of the same size.
LAYER = [(1, 4.3), (2, 5.2), (4, 6.1), (10, 12.7), (128, 113.0)]
OTHERS = {
    "draw": (4, 0.2), "gather": (4, 0.2), "start": (1.8, 0.1), "time_forward": (3, 0.1), "reverse_step": (3.3, 0.3),
    "critic_losses": (4.5, 0.4), "q_values": (2.5, 0.2), "to_action": (3.3, 0.2), "first_weight_gradient": (4, 1.5),
    "sum_parts": (1.7, 0.5), "adam": (2.0, 1.3), "time_backward": (6, 0.1), "finish": (2, 0), "choose": (2, 0),
}  # fmt: skip


def predicted(kernel, grid: tuple, constants: dict, agents: int) -> float:
    """Microseconds of a launch."""
    name = kernel.__name__
    if name in ("layer", "first_layer", "layer_backward"):
        groups = grid[0] * constants["BM"] * grid[2] / 256
        (g0, t0), (g1, t1) = next(((a, b) for a, b in pairwise(LAYER) if groups <= b[0]), LAYER[-2:])
        thin = name == "first_layer" or constants.get("OUT", 256) < 256  # a tenth of the product; stores remain
        return (t0 + (t1 - t0) * (groups - g0) / (g1 - g0)) * (0.55 if thin else 1)
    if name == "weight_gradient":
        share = constants["TRAINED"] * constants["OUT"] * grid[2] / (1280 * 256 * agents)  # of the sketch's work
        return 4 + 9.5 * share * agents if constants["OUT"] == 256 else 5 + 0.6 * agents
    constant, each = OTHERS[name]
    return constant + each * agents


def predict() -> None:
    for states in (0, 1, 10):
        for K in (1, 5, 64) if not states else (1,):
            kinds, total = {}, 0.0
            for kernel, grid, _, constants in (launches := recorded(K, states)):
                us = predicted(kernel, grid, constants, K)
                count, sum_ = kinds.get(kernel.__name__, (0, 0.0))
                kinds[kernel.__name__], total = (count + 1, sum_ + us), total + us
            gaps = 0.3 * len(launches)
            print(f"{K} agents, {f'acting in {states} states' if states else 'an update'}: {len(launches)} launches, "
                  f"{total:.0f} us and gaps {gaps:.0f} us:", f"{(total + gaps) / 1e3:.3f} ms")  # fmt: skip
            for name, (count, us) in sorted(kinds.items(), key=lambda item: -item[1][1]):
                print(f"    {name:22} {count:3} x {us / count:7.1f} = {us:7.1f} us")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 120])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--quick", action="store_true", help="an update only, not acting")
    parser.add_argument("--precision", default="tf32x3")
    parser.add_argument("--predict", action="store_true", help="compile nothing; predict the time of an update")
    options = parser.parse_args()
    if options.predict:
        return predict() or 0
    found = {}
    for k in options.replicas:
        launches = recorded(k, precision=options.precision)
        print(f"{k} agents: {len(launches)} launches an update:", dict(Counter(x[0].__name__ for x in launches)))
        found |= kinds(launches if options.quick else launches + recorded(k, 10, options.precision))
    bad = False
    for arch in options.arch:
        for (name, *_), launched in found.items():
            row = compiled(*launched, arch)
            bad |= row["spills"] > 0 or row["shared"] > 1024 * SHARED.get(arch, 99)
            print(f"sm_{arch} {name:22}", *(f"{key} {value:6}" for key, value in row.items()), flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
