"""Checks, without a GPU, the kernels into which torch.compile turns an update and acting on a GPU.

    pip install triton==3.7.1          # for torch 2.13.0; Linux; a C++ compiler too
    python bench/check_gpu_kernels.py

The graphs that torch.compile makes of dql.py are moved to a pretended H100, for which Inductor, the compiler, writes
Triton kernels and calls of cuBLAS. Triton's interpreter executes the kernels on the CPU, block by block, PyTorch's own
products take cuBLAS's place, and what comes out is compared with the same graph run by PyTorch. Memory starts as NaN,
so that nothing can be read before it is written. What this leaves unproved is what the interpreter does not have:
the machine code, blocks that run at once, cuBLAS, capture and speed.

It relies on the insides of torch 2.13 and is not part of the tests. Writes bench/results/gpu_kernels.json. Exit code: 0
all equal, 1 not, 2 something is missing.
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import compiling  # noqa: E402, F401  (its setting for torch.autograd.grad)
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
XBLOCK, YBLOCK, R0_BLOCK = 1024, 32, 256  # elements of a block; several blocks make up all but the smallest kernels
H100 = SimpleNamespace(
    name="H100", gcnArchName="", major=9, minor=0, multi_processor_count=132, warp_size=32,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, shared_memory_per_block_optin=232448,
    total_memory=80 << 30, L2_cache_size=50 << 20,
)  # fmt: skip


# ----------------------------------------------------------------------------- a pretended GPU


def pretend_gpu() -> None:
    """Lets Inductor compile for a GPU that is not there."""
    import triton
    from torch._dynamo import device_interface
    from triton.backends.compiler import GPUTarget

    with tempfile.TemporaryDirectory() as folder:  # PyTorch for CPUs has no notion of "the current GPU"
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(
            "#include <c10/core/impl/FakeGuardImpl.h>\n"
            "using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;\n"
            "C10_REGISTER_GUARD_IMPL(CUDA, Guard);\n"
        )
        home = Path(torch.__path__[0])
        compiler = [os.environ.get("CXX") or "g++", "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run([*compiler, f"-I{home}/include", f"-L{home}/lib", "-lc10"], check=True)
        torch.ops.load_library(library)

    class Interface(device_interface.CudaInterface):
        class Worker:
            current_device = staticmethod(lambda: 0)
            get_device_properties = staticmethod(lambda device=None: H100)

        is_available = staticmethod(lambda: True)
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: H100)
        get_compute_capability = staticmethod(lambda device=None: 90)
        is_triton_capable = staticmethod(lambda device=None: True)
        raise_if_triton_unavailable = staticmethod(lambda device=None: None)

    device_interface.init_device_reg()
    device_interface.register_interface_for_device("cuda", Interface)
    torch.cuda.get_device_properties = Interface.get_device_properties
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.current_device = Interface.current_device
    torch.cuda._exchange_device = lambda device: 0
    torch.cuda._maybe_exchange_device = lambda device: 0  # another function: dynamo wants them distinct
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    triton.runtime.driver.set_active(target)


def recorded(function: Callable, inputs: tuple) -> tuple[torch.fx.GraphModule, list[Tensor], list[Tensor]]:
    """The graph that torch.compile hands to Inductor for function(*inputs), what goes into it and what comes out."""
    from torch._inductor import compile_fx

    graph, arguments, results = None, [], []

    def inner_compile(gm: torch.fx.GraphModule, _: list, **__: object) -> Callable:
        nonlocal graph
        graph = copy.deepcopy(gm)

        def run(args: list[Tensor]) -> list[Tensor]:
            arguments.extend(args)
            results.extend(gm(*args))
            return list(results)

        run._boxed_call = True
        return run

    backend = functools.partial(compile_fx.compile_fx, inner_compile=inner_compile)
    torch.compile(function, fullgraph=True, dynamic=False, backend=backend)(*inputs)
    return graph, [a.detach() for a in arguments], results


class Written(Exception):
    """Ends a compilation when the code is written: args are the code."""


def code_for_gpu(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> str:
    """The module that Inductor writes for the graph on the pretended GPU."""
    from torch._inductor import compile_fx, config
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
        node.meta.clear()
    graph.recompile()
    mode = FakeTensorMode()
    with mode:
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0") for x in inputs]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*fakes)

    def stop(self) -> None:
        raise Written(self.codegen()[0].value)

    whole, GraphLowering.compile_to_module = GraphLowering.compile_to_module, stop
    compile_fx.preserve_rng_state = contextlib.nullcontext
    try:
        with config.patch(force_disable_caches=True, compile_threads=1):
            compile_fx.compile_fx_inner(graph, fakes)
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

        names = self.function.arg_names
        numels = {name: arg for name, arg in zip(names, args, strict=False) if name.endswith("numel")}
        limits = {"XBLOCK": XBLOCK, "YBLOCK": YBLOCK, "R0_BLOCK": R0_BLOCK}
        blocks = {}
        for name in names[len(args) :]:
            numel = numels[{"XBLOCK": "xnumel", "YBLOCK": "ynumel", "R0_BLOCK": "r0_numel"}[name]]
            blocks[name] = min(triton.next_power_of_2(numel), limits[name])
        grid = [triton.cdiv(numels["xnumel"], blocks.get("XBLOCK", 1))]
        if self.grid_type == "Grid2D":
            grid.append(triton.cdiv(numels["ynumel"], blocks["YBLOCK"]))
        elif self.grid_type != "Grid1D":
            raise NotImplementedError(self.grid_type)
        self.function[tuple(grid)](*args, **blocks)


def execute(code: str, inputs: list[Tensor], folder: Path) -> list[Tensor]:
    """Runs a module that Inductor wrote for a GPU on the CPU, its kernels in Triton's interpreter."""

    def heuristic(*_, inductor_meta: dict, **__) -> Callable:
        return lambda function: Kernel(function, inductor_meta["grid_type"])

    def load(name: str, source: str, device_str: str) -> Kernel:
        source = source.replace(", triton_heuristics", "; from gpu_heuristics import triton_heuristics")
        source = source.replace("triton_helpers.set_driver_to_gpu()", "")
        path = folder / f"{name}.py"  # the interpreter reads a kernel's text from its file
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)

    def empty(shape: tuple, stride: tuple, dtype: torch.dtype) -> Tensor:
        out = torch.empty_strided(shape, stride, dtype=dtype)
        return out.fill_(float("nan")) if dtype.is_floating_point else out

    heuristics = SimpleNamespace(pointwise=heuristic, reduction=heuristic, persistent_reduction=heuristic)
    sys.modules["gpu_heuristics"] = SimpleNamespace(triton_heuristics=heuristics)
    for old, new in (
        ("from torch._C import _cuda_getCurrentRawStream as get_raw_stream", "get_raw_stream = lambda device: None"),
        ("async_compile = AsyncCompile()", "async_compile = SimpleNamespace(triton=load, wait=lambda names: None)"),
        ("empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda", "empty_strided_cuda = empty"),
        ("torch.cuda._DeviceGuard(0)", "contextlib.nullcontext()"),
        ("torch.cuda.set_device(0)", "pass"),
    ):
        if old not in code:
            raise NotImplementedError(f"this version of torch writes no line {old!r}")
        code = code.replace(old, new)
    module = {"SimpleNamespace": SimpleNamespace, "contextlib": contextlib, "load": load, "empty": empty}
    exec(compile(code, "<what Inductor wrote>", "exec"), module)
    return module["call"]([x.clone() for x in inputs])


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


def check(function: Callable, inputs: tuple) -> dict:
    """Compiles, runs and compares one function: its numbers of kernels and products, and the largest difference."""
    graph, arguments, want = recorded(function, inputs)
    code = code_for_gpu(graph, arguments)
    with tempfile.TemporaryDirectory() as folder:
        got = execute(code, arguments, Path(folder))
    differences = [((x - y).norm() / y.norm().clamp(min=1e-30)).item() for x, y in zip(got, want, strict=True)]
    body = code[code.index("def call(") :]
    return {
        "kernels": len(re.findall(r"^\s+triton_\w+\.run\(", body, re.MULTILINE)),
        "products": len(re.findall(r"^\s+extern_kernels\.\w+\(", body, re.MULTILINE)),
        "outputs": len(got),
        "largest_difference": max(differences, key=lambda x: x if x == x else float("inf")),  # NaN is the worst
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/gpu_kernels.json")
    args = parser.parse_args()
    lacks = fast_sampler.lacks_to_compile(on_gpu=False)
    if importlib.util.find_spec("triton") is None:
        lacks = "the package triton (pip install triton==3.7.1, Linux)"
    if not torch.__version__.startswith("2.13."):
        lacks = f"torch 2.13, not {torch.__version__}"
    if lacks:
        print(f"check_gpu_kernels.py needs {lacks}", file=sys.stderr)
        return 2
    import triton

    logging.getLogger("torch._inductor").setLevel(logging.ERROR)  # it would report each compilation as broken off
    warnings.simplefilter("ignore", RuntimeWarning)  # 0 / 0 in what a block has beyond the end of the data
    pretend_gpu()
    rows = {}
    for name, function, inputs in cases():
        row = rows[name] = check(function, inputs)
        print(f"{name}: {row['kernels']} kernels, {row['products']} products, {row['outputs']} results, "
              f"largest relative difference {row['largest_difference']:.1e}", flush=True)  # fmt: skip
        torch._dynamo.reset()
    args.out.write_text(
        json.dumps({"torch": torch.__version__, "triton": triton.__version__, "rows": rows}, indent=1) + "\n"
    )
    return 0 if all(row["largest_difference"] < TOLERANCE for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
