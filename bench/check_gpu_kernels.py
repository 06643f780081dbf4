"""Checks, without a GPU, the kernels into which torch.compile turns an update and acting on a GPU.

    pip install triton==3.7.1          # beside torch 2.13.0's build for CPUs; Linux; a C++ compiler too
    python bench/check_gpu_kernels.py

The graphs that torch.compile makes of dql.py are moved to a pretended H100, for which Inductor, the compiler, writes
Triton kernels and calls of cuBLAS. Triton's interpreter executes the kernels on the CPU, block by block, PyTorch's own
products take cuBLAS's place, and what comes out is compared with what dql.py computes eagerly. Buffers of floats start
as NaN, so that a read before a write shows.

It also checks that no reduction has several candidates, among which a GPU would choose by timing them: other sizes of
blocks sum in another order, and a resumed run would not have the same bits.

What this leaves unproved is what the interpreter does not have: machine code, blocks that run at once, cuBLAS, capture
and speed; and the sizes of blocks with which a GPU runs the kernels.

It relies on the insides of torch 2.13 and is not part of the tests. Writes bench/results/gpu_kernels.json. Exit code: 0
all equal and nothing timed, 1 not (or, with a traceback, the check itself failed), 2 something is missing.
"""

import argparse
import contextlib
import copy
import functools
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import compiling  # noqa: E402  (also for its setting for torch.autograd.grad)
import fast_sampler  # noqa: E402
from dql import Args, Batch, DiffusionQL  # noqa: E402

STATE_DIM, ACTION_DIM = 17, 6  # HalfCheetah's
SETUPS = {  # agents, and what differs from the task's settings
    "one agent": (1, {}),
    "three agents": (3, {}),
    "Max-Q": (1, {"max_q_backup": True}),
    "cloning": (1, {"eta": 0.0}),
}
GRAD_NORM = 0.01  # so small that all gradients are clipped
TOLERANCE = 1e-6  # of float32 results, relative, in the L2 norm
MOVED = -0.01  # added to averages and targets, which otherwise equal what they follow
BLOCK = {"XBLOCK": 1024, "YBLOCK": 32, "R0_BLOCK": 256}  # elements of a block
REDUCTION_XBLOCK = 16  # reductions have few results: a small block makes several programs of them
H100 = SimpleNamespace(
    gcnArchName="", major=9, multi_processor_count=132, warp_size=32, max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
)  # fmt: skip


# ----------------------------------------------------------------------------- a pretended GPU


def pretend_gpu(folder: Path) -> None:
    """Lets Inductor compile for a GPU that is not there. Compiles a few lines of C++ in the folder."""
    import triton
    from torch._dynamo import device_interface
    from triton.backends.compiler import GPUTarget

    source, library = folder / "guard.cpp", folder / "guard.so"  # PyTorch for CPUs has no notion of a current GPU
    source.write_text(
        "#include <c10/core/impl/FakeGuardImpl.h>\n"
        "using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;\n"
        "C10_REGISTER_GUARD_IMPL(CUDA, Guard);\n"
    )
    home, compiler = Path(torch.__path__[0]), shlex.split(os.environ.get("CXX") or "g++")
    words = ["-std=c++20", "-shared", "-fPIC", source, "-o", library, f"-I{home}/include", f"-L{home}/lib", "-lc10"]
    subprocess.run([*compiler, *words], check=True)
    torch.ops.load_library(library)

    class Interface(device_interface.CudaInterface):
        class Worker:
            get_device_properties = staticmethod(lambda device=None: H100)

        is_available = staticmethod(lambda: True)
        get_device_properties = staticmethod(lambda device=None: H100)
        get_compute_capability = staticmethod(lambda device=None: 90)
        is_triton_capable = staticmethod(lambda device=None: True)
        raise_if_triton_unavailable = staticmethod(lambda device=None: None)

    device_interface.init_device_reg()
    device_interface.register_interface_for_device("cuda", Interface)
    torch.cuda.get_device_properties = Interface.get_device_properties
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.current_device = lambda: 0
    torch.cuda._exchange_device = lambda device: 0
    torch.cuda._maybe_exchange_device = lambda device: 0  # another function: dynamo wants them distinct
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))


class Recorded(NamedTuple):
    """What torch.compile hands to Inductor for one function."""

    graph: torch.fx.GraphModule
    options: dict  # that go with the graph
    inputs: list[Tensor]


def recorded(function: Callable, inputs: tuple) -> Recorded:
    """Runs torch.compile up to Inductor."""
    from torch._inductor import compile_fx

    found = []

    def inner_compile(graph: torch.fx.GraphModule, _: list, **options: object) -> Callable:
        def run(args: list[Tensor]) -> list[Tensor]:
            found.append(Recorded(copy.deepcopy(graph), options, [x.detach() for x in args]))
            return graph(*args)

        run._boxed_call = True
        return run

    backend = functools.partial(compile_fx.compile_fx, inner_compile=inner_compile)
    torch.compile(function, fullgraph=True, dynamic=False, backend=backend)(*inputs)
    (only,) = found
    return only


class Written(Exception):
    """Ends a compilation when the code is written: args are the code."""


def code_for_gpu(graph: torch.fx.GraphModule, options: dict, inputs: list[Tensor]) -> str:
    """The module that Inductor writes for the graph on the pretended GPU."""
    from torch._inductor import compile_fx, config
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    with FakeTensorMode():  # traced anew: some operations are taken apart in another way on a GPU
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0") for x in inputs]
        moved = make_fx(torch.fx.Interpreter(graph).run, decomposition_table=select_decomp_table())(*fakes)
    moved.graph.output_node().meta.update(graph.graph.output_node().meta)

    def stop(self) -> None:
        raise Written(self.codegen()[0].value)

    whole, GraphLowering.compile_to_module = GraphLowering.compile_to_module, stop
    try:
        wanted = compiling.inductor_options(torch.device("cuda"))
        with config.patch({**wanted, "force_disable_caches": True, "compile_threads": 1}):
            compile_fx.compile_fx_inner(moved, fakes, **options)
    except Exception as error:
        written = error if isinstance(error, Written) else error.__cause__ or error.__context__
        if isinstance(written, Written):
            return written.args[0]
        raise
    finally:
        GraphLowering.compile_to_module = whole
    raise AssertionError("Inductor wrote no code")


# ----------------------------------------------------------------------------- Triton's interpreter


class Kernel:
    """A Triton kernel, launched as Inductor would launch it, but with our sizes of blocks."""

    def __init__(self, function, grid_type: str):
        self.function, self.grid_type = function, grid_type

    def run(self, *args, stream=None) -> None:
        import triton

        if self.grid_type not in ("Grid1D", "Grid2D"):
            raise NotImplementedError(f"kernels with {self.grid_type}")
        names = self.function.arg_names
        numel = {name[0]: arg for name, arg in zip(names, args, strict=False) if name.endswith("numel")}  # of x, y, r
        largest = BLOCK | ({"XBLOCK": REDUCTION_XBLOCK} if "r" in numel else {})
        size = {name: triton.next_power_of_2(numel[name[0].lower()]) for name in names[len(args) :]}
        blocks = {name: min(size[name], largest[name]) for name in size}
        grid = [triton.cdiv(numel[axis], blocks.get(f"{axis.upper()}BLOCK", 1)) for axis in "xy" if axis in numel]
        self.function[tuple(grid)](*args, **blocks)


def replaced(code: str, *pairs: tuple[str, str]) -> str:
    """code with each old text replaced by a new one. Raises NotImplementedError if one is not there."""
    for old, new in pairs:
        if old not in code:
            raise NotImplementedError(f"this version of torch does not write {old!r}")
        code = code.replace(old, new)
    return code


def execute(code: str, inputs: list[Tensor], folder: Path) -> tuple[list[Tensor], int]:
    """Runs a module that Inductor wrote for a GPU on the CPU, its kernels in Triton's interpreter.

    Returns the results and how many reductions a GPU would first try with several sizes of blocks.
    """
    from torch._inductor.runtime import triton_heuristics

    timed = 0

    def heuristic(kind: str) -> Callable:
        def decorator(*_, inductor_meta: dict, **keywords) -> Callable:
            nonlocal timed
            if kind != "pointwise":
                candidates = getattr(triton_heuristics, kind)(
                    **keywords, inductor_meta=dict(inductor_meta), return_configs=True
                )
                timed += len(candidates) > 1
            return lambda function: Kernel(function, inductor_meta["grid_type"])

        return decorator

    def load(name: str, source: str, device_str: str) -> Kernel:
        source = replaced(source, (", triton_heuristics", "; from gpu_heuristics import triton_heuristics"),
                          ("triton_helpers.set_driver_to_gpu()", ""))  # fmt: skip
        path = folder / f"{name}.py"  # the interpreter reads a kernel's text from its file
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)

    def empty(shape: tuple, stride: tuple, dtype: torch.dtype) -> Tensor:
        out = torch.empty_strided(shape, stride, dtype=dtype)
        return out.fill_(float("nan")) if dtype.is_floating_point else out

    kinds = ("pointwise", "reduction", "persistent_reduction")
    heuristics = SimpleNamespace(**{kind: heuristic(kind) for kind in kinds})
    sys.modules["gpu_heuristics"] = SimpleNamespace(triton_heuristics=heuristics)
    code = replaced(
        code,
        ("from torch._C import _cuda_getCurrentRawStream as get_raw_stream", "get_raw_stream = lambda device: None"),
        ("async_compile = AsyncCompile()", "async_compile = SimpleNamespace(triton=load, wait=lambda names: None)"),
        ("empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda", "empty_strided_cuda = empty"),
        ("torch.cuda._DeviceGuard(0)", "contextlib.nullcontext()"),
        ("torch.cuda.set_device(0)", "pass"),
    )
    module = {"SimpleNamespace": SimpleNamespace, "contextlib": contextlib, "load": load, "empty": empty}
    exec(compile(code, "<what Inductor wrote>", "exec"), module)
    return module["call"]([x.clone() for x in inputs]), timed


# ----------------------------------------------------------------------------- what is checked


def cases() -> Iterator[tuple[str, Callable, tuple]]:
    """(name, function, its arguments) of all that is compiled."""
    for name, (num_agents, flags) in SETUPS.items():
        torch.manual_seed(0)
        args = Args(env_id="halfcheetah-medium-v2", device="cpu", compile=False, grad_norm=GRAD_NORM, **flags)
        agents = [DiffusionQL(STATE_DIM, ACTION_DIM, args) for _ in range(num_agents)]
        generators = [torch.Generator().manual_seed(k) for k in range(num_agents)]
        agent, generator, lead = agents[0], generators[0], ()
        if num_agents > 1:
            agent, generator, lead = fast_sampler.replicate(agents), generators, (num_agents,)
        follows = [*agent.policy_ema.parameters(), *agent.critic_target.parameters()]
        torch._foreach_add_(follows, MOVED)
        rows = (*lead, args.batch_size)
        batch = Batch(torch.randn(*rows, STATE_DIM), torch.rand(*rows, ACTION_DIM) * 2 - 1, torch.randn(rows),
                      torch.randn(*rows, STATE_DIM), (torch.rand(rows) < 0.1).float())  # fmt: skip
        states = torch.randn(10 * num_agents, STATE_DIM)
        if agent.has_critics:
            yield f"{name}: critic_gradient", agent.critic_gradient, (batch, agent.draw(generator))
        if not agent.args.max_q_backup:  # which concerns the critics alone
            yield f"{name}: policy_gradient", agent.policy_gradient, (batch, agent.draw(generator))
            yield f"{name}: act", agent.act, (states, agent.draw_act(len(states), generator))


def difference(got: Tensor, want: Tensor) -> float:
    """Relative, in the L2 norm; infinite if one is not finite, or if shapes, strides or types differ."""
    if (got.shape, got.stride(), got.dtype) != (want.shape, want.stride(), want.dtype):
        return math.inf
    relative = ((got - want).norm() / want.norm().clamp(min=1e-30)).item()
    return relative if math.isfinite(relative) else math.inf


def check(function: Callable, inputs: tuple, folder: Path) -> dict:
    """Compiles, runs and compares one function: its launches of kernels, its products, the largest difference."""
    found = recorded(function, inputs)
    code = code_for_gpu(*found)
    (got, timed), want = execute(code, found.inputs, folder), tree_leaves(function(*inputs))
    body = code[code.index("def call(") :]
    return {
        "kernels": len(re.findall(r"^\s+triton_\w+\.run\(", body, re.MULTILINE)),
        "products": len(re.findall(r"^\s+extern_kernels\.\w+\(", body, re.MULTILINE)),
        "timed_reductions": timed,
        "results": len(got),
        "largest_difference": max(difference(x, y) for x, y in zip(got, want, strict=True)),
    }


def lacks() -> str:
    """What this check needs and does not find; "" if nothing."""
    if torch.__version__ != "2.13.0+cpu":
        return f"torch 2.13.0's build for CPUs, not {torch.__version__}"
    try:
        if importlib.metadata.version("triton").startswith("3.7."):
            return fast_sampler.lacks_to_compile(on_gpu=False)
    except importlib.metadata.PackageNotFoundError:
        pass
    return "Triton 3.7: pip install triton==3.7.1 (Linux)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/gpu_kernels.json")
    args = parser.parse_args()
    missing = lacks() if args.out.parent.is_dir() else f"the folder {args.out.parent}"
    if missing:
        print(f"check_gpu_kernels.py needs {missing}", file=sys.stderr)
        return 2
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)  # it would report each compilation as broken off
    warnings.simplefilter("ignore", RuntimeWarning)  # 0 / 0 in what a block has beyond the end of the data
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # what is broken off is left there
        pretend_gpu(Path(folder))
        for name, function, inputs in cases():
            row = rows[name] = check(function, inputs, Path(folder))
            print(f"{name}: {row['kernels']} kernels ({row['timed_reductions']} reductions to be timed), "
                  f"{row['products']} products, {row['results']} results, largest relative difference "
                  f"{row['largest_difference']:.1e}", flush=True)  # fmt: skip
            torch._dynamo.reset()
    found = {"torch": torch.__version__, "triton": importlib.metadata.version("triton"), "rows": rows}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    equal = all(row["largest_difference"] < TOLERANCE for row in rows.values())
    return 0 if equal and not any(row["timed_reductions"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
