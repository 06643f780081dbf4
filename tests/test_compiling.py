"""compiling.py: which products go to oneDNN, what a compiled graph is left with, and what float32 makes of it."""

import itertools
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import compiling
import dql
import fast_sampler
from dql import ActDraws, Batch, DiffusionQL, Draws
from housekeeping import machine
from test_dql import can_compile, official_batch, official_draws, tiny_agent

HERE = Path(__file__).parents[1]
onednn_wanted = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")


@onednn_wanted
@pytest.mark.parametrize("shapes", [(50, 39, 256), (256, 256, 256), (7, 256, 6)])
def test_products_by_onednn(shapes):
    """x w + bias, also of transposed matrices, equals float64's up to the rounding of k float32 terms, below 1e-6 k."""
    m, k, n = shapes
    x, w, narrow, wide = torch.randn(m, k), torch.randn(k, n), torch.randn(2 * n), torch.randn(m, n)
    biases = (None, narrow[:n], narrow[::2], narrow[:1].expand(n), wide, wide.t().contiguous().t())
    for a, b in itertools.product((x, x.t().contiguous().t()), (w, w.t().contiguous().t())):
        for bias in biases:
            want = x.double() @ w.double() + (0 if bias is None else bias.double())
            got = torch.ops.diffusion_ql.product(a, b, bias)
            assert got.is_contiguous() and (got - want).abs().max() < 1e-6 * k


def test_what_becomes_of_products(monkeypatch):
    """On AMD's processors with AVX-512, float32 products of contiguous or transposed matrices, none of them thin, go to
    oneDNN; all others stay as they are, except that unscaled biases are taken out of them."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def kinds(function: Callable, *inputs: torch.Tensor) -> list[str]:
        traced = make_fx(function, tracing_mode="fake")(*inputs)
        compiling.FASTER_PRODUCTS(traced.graph)
        traced.recompile()
        torch.testing.assert_close(traced(*inputs), function(*inputs), rtol=1e-4, atol=1e-4)  # float32, of order 10
        names = [str(node.target).split(".")[1] for node in traced.graph.nodes if node.op == "call_function"]
        return [name for name in names if name in ("mm", "addmm", "add", "product")]

    x, w, wide, bias = torch.randn(64, 40), torch.randn(50, 40), torch.randn(50, 60), torch.randn(50)
    linear = torch.nn.functional.linear
    for where in ("AMD AVX512", "AMD AVX512 in halves", "Intel AVX512", "AMD AVX2"):
        monkeypatch.setattr(compiling, "instructions", lambda where=where: where)
        onednn = where == "AMD AVX512" and torch.backends.mkldnn.is_available()
        product, with_bias = (["product"], ["product"]) if onednn else (["mm"], ["mm", "add"])
        assert kinds(lambda x, w: x @ w.t(), x, w) == kinds(lambda x, w: w @ x.t(), x, w) == product
        assert kinds(linear, x, w, bias) == kinds(torch.addmm, torch.randn(64, 50), x, w.t()) == with_bias
        assert kinds(torch.addmm, torch.randn(1), x, w.t()) == ["mm", "add"]
        assert kinds(lambda x, w, b: torch.addmm(b, x, w.t(), beta=2), x, w, bias) == ["addmm"]
        assert kinds(lambda x, w: x @ w.t(), x.double(), w.double()) == ["mm"]
        assert kinds(lambda x, w: x @ w[:, :40].t(), x, wide) == ["mm"]
        assert kinds(lambda x, w: x @ w.t(), x[:31], w) == ["mm"]
        assert kinds(linear, x[:31], w, bias) == ["mm", "add"]


@pytest.mark.parametrize(
    "cpuinfo, capability, want",
    [
        ("vendor_id : AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2", "AVX512", "AMD AVX512"),
        ("vendor_id : AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17", "AVX512", "AMD AVX512 in halves"),
        ("vendor_id : AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1", "AVX2", "AMD AVX2"),
        ("AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", "AVX512", "AMD AVX512 in halves"),
        ("vendor_id : GenuineIntel\ncpu family\t: 6\nmodel\t\t: 207", "AVX512", "Intel AVX512"),
        ("", "DEFAULT", "other DEFAULT"),
    ],
)
def test_processors_are_told_apart(cpuinfo, capability, want, monkeypatch):
    monkeypatch.setattr(machine, "cpuinfo", lambda: cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert machine.instructions() == want


@pytest.fixture
def nothing_compiled():
    """Clears compiled code before and after: code for one pretended processor must not be reused for another."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@can_compile
def test_what_compiled_graphs_are_left_with(monkeypatch, nothing_compiled):
    """Loss and gradient become one graph, in which no product adds a bias and no sigmoid is computed twice."""
    counts = []

    class Counting(compiling.FasterProducts):
        def uuid(self) -> object:
            return os.urandom(8)  # or torch would take the graph from its cache, without this pass

        def __call__(self, graph: torch.fx.Graph) -> None:
            super().__call__(graph)
            kinds = torch.ops.aten.sigmoid.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default
            counts.append([len(graph.find_nodes(op="call_function", target=kind)) for kind in kinds])

    monkeypatch.setattr(compiling, "processor_vendor", lambda: "Intel")
    monkeypatch.setattr(compiling, "FASTER_PRODUCTS", Counting())
    network, x = dql.mlp(8, 8, 8), torch.randn(4, 8)
    parameters = list(network.parameters())
    compiling.compiled(lambda x: torch.autograd.grad(network(dql.Mish()(x)).square().sum(), parameters), x.device)(x)
    assert counts == [[2, 0, 5]]


@onednn_wanted
@can_compile
@pytest.mark.parametrize("processor", ["AMD AVX512", "Intel AVX512"])
def test_compiled_float32_updates(processor, monkeypatch, nothing_compiled):
    """On a CPU that passes for AMD's with AVX-512, oneDNN computes all large products of an update and of acting, and
    elsewhere none. Losses, gradients and actions equal those of eager float64: float32's rounding over some dozen
    layers is far below 1e-4 of the largest entry."""
    monkeypatch.setattr(compiling, "instructions", lambda: processor)
    monkeypatch.setattr(compiling, "processor_vendor", lambda: processor.split()[0])
    calls = Counter()

    def outcome(agent: DiffusionQL) -> list[torch.Tensor]:
        calls.clear()
        dtype, rng = torch.get_default_dtype(), np.random.RandomState(0)
        batch = Batch(*(x.to(dtype) for x in official_batch(rng, 17, 6, 256)))
        draws = Draws(*(x.to(dtype) if x.is_floating_point() else x for x in official_draws(rng, 6, 256, 5, 256)))
        with torch.profiler.profile() as profile:
            critic_grads, *critic_losses = agent.critic_gradient(batch, draws)
            policy_grads, *policy_losses = agent.policy_gradient(batch, draws)
            acting = ActDraws(torch.as_tensor(rng.standard_normal((6, 500, 6)), dtype=dtype), torch.zeros(10, 50))
            actions = agent.act(batch.state[:10], acting)
        calls.update(event.name for event in profile.events())
        return [*critic_losses, *policy_losses, actions, *critic_grads, *policy_grads]

    single = tiny_agent(17, 6, batch_size=256, grad_norm=9.0)
    state = single.state_dict()
    fast_sampler.compile_agent(single)
    outcome(single)  # compiling itself calls operations, which must not be counted
    got = outcome(single)
    # policy: 3 in each of 16 forward passes, 6 in each of 6 backward; critics: 4 in each of 4 forward, 8 + 4 backward
    assert calls["mkldnn::_linear_pointwise"] == (48 + 36 + 16 + 12 if processor == "AMD AVX512" else 0)
    try:
        torch.set_default_dtype(torch.float64)
        double = tiny_agent(17, 6, batch_size=256, grad_norm=9.0)
        for name in ("policy", "policy_ema", "critic", "critic_target"):
            getattr(double, name).load_state_dict(state[name])
        want = outcome(double)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


FAULTS = """
import resource, torch, dql, fast_sampler
torch.set_num_threads(1)
args = dql.Args("halfcheetah-demo-v0", device="cpu", batch_size=64, max_q_backup=True, compile=False, cudagraphs=False)
args = dql.with_settings(args)
agent, generator = dql.make_agent(args, 0), torch.Generator()
data = dql.Batch(torch.rand(9, 17), torch.rand(9, 6), torch.rand(9), torch.rand(9, 17), torch.zeros(9))
updates = fast_sampler.make_steps(args, [agent], data, [generator], [generator])[1]
updates(10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
updates(30)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 30)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_updates_take_no_memory_from_the_system():
    """In a process of its own, for what was freed before decides when glibc gives memory back."""
    run = subprocess.run([sys.executable, "-c", FAULTS], cwd=HERE, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 80  # page faults an update: here 1 to 20, and 190 to 1,100 if glibc is left alone
