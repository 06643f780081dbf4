"""How dql.py's losses, gradients and acting are compiled, and what carries out their matrix products on a CPU.

A loss and its gradient are one graph: no autograd engine runs, and kernels may span both.
On x86 a pass over the graph works around two weaknesses of PyTorch's products, which are MKL's; the mathematics and the
text of dql.py stay as they are. First, a product with a bias copies the bias into every row of its result: here the
kernel that reads the result adds it. Second, MKL uses only AVX2 on AMD's processors. Where these have AVX-512 in full
width (from Zen 5 on), all but thin float32 products go to oneDNN, which is part of PyTorch, uses AVX-512, and takes
half the time for a layer of 256 x 256. Zen 4 executes AVX-512 in halves and gains nothing by it; on Intel's processors
MKL uses AVX-512 too, and is faster. Neither this choice, which depends on the processor, nor one of Inductor's that
changes results depends on a measurement: a resumed run has the same bits.
"""

import copy
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from housekeeping.machine import instructions, processor_vendor

torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad may be called in what is compiled
warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # torch suggests them; float32 is meant
THIN = 32  # a product with a smaller dimension gains nothing: measured with batches of 50 to 500


def compiled(function: Callable, device: torch.device) -> Callable:
    """Compiles function whole, with the gradients that it takes, for the shapes it is called with."""
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):  # torch sets it when it is imported
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = private_folder()
    return torch.compile(function, fullgraph=True, dynamic=False, options=inductor_options(device))


def private_folder() -> str:
    """A folder for compiled code, which is run when it is found: not in /tmp, where another user can have made it."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffusion-ql"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
            raise PermissionError
        return str(folder)
    except OSError:
        return tempfile.mkdtemp()


def inductor_options(device: torch.device) -> dict:
    """The options of Inductor, PyTorch's compiler, on a device."""
    if device.type == "cuda":
        # otherwise it times kernels, and picks the order of a sum and the padding of a product by what was faster
        return {"deterministic": True}
    if processor_vendor() == "other":
        return {}
    # one C++ file for a graph's kernels and their calls compiles faster; torch 2.11 writes invalid C++ at times
    return {"post_grad_custom_post_pass": FASTER_PRODUCTS, "cpp_wrapper": torch.__version__ >= (2, 13)}


class FasterProducts(CustomGraphPass):
    """Takes biases out of a compiled graph's products; a product that oneDNN computes faster goes there, bias and all.

    Thin products, and those with part of a wider matrix, do not go to oneDNN.
    """

    def uuid(self) -> object:  # no reuse of graphs that another version of this, or another processor, compiled
        return get_hash_for_files((__file__,)), instructions()

    def __call__(self, graph: torch.fx.Graph) -> None:
        to_onednn = instructions() == "AMD AVX512" and torch.backends.mkldnn.is_available()
        for node in graph.nodes:
            if node.target is torch.ops.aten.mm.default:
                (x, w), bias = node.args, None
            elif node.target is torch.ops.aten.addmm.default and not node.kwargs:
                bias, x, w = node.args
            else:
                continue
            if to_onednn and suits_onednn(*(matrix and matrix.meta["val"] for matrix in (x, w, bias))):
                node.target, node.args = torch.ops.diffusion_ql.product.default, (x, w, bias)
            elif bias is not None:
                with graph.inserting_before(node):
                    mm = graph.call_function(torch.ops.aten.mm.default, (x, w))
                mm.meta = copy.copy(node.meta)
                node.target, node.args = torch.ops.aten.add.Tensor, (mm, bias)


FASTER_PRODUCTS = FasterProducts()  # one object for all, or code compiled for one agent would not serve the next


def suits_onednn(x: Tensor, w: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN is faster at x w + bias: (m, k), (k, n), and any bias that is broadcast to (m, n)."""
    (m, k), n = x.shape, w.shape[1]
    fits = bias is None or bias.shape in ((n,), (m, n))
    return min(m, k, n) >= THIN and fits and is_packed_float32(x) and is_packed_float32(w)


def is_packed_float32(matrix: Tensor) -> bool:
    """Whether oneDNN reads the matrix as it is, or transposed; for part of a wider one it has only slow code."""
    return matrix.dtype == torch.float32 and (matrix.is_contiguous() or matrix.mT.is_contiguous())


def product(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x w + bias by oneDNN, float32: (m, k), (k, n), and (n,), (m, n) or None -> (m, n)."""
    if bias is not None and bias.dim() == 2:
        return product(x, w, None).add_(bias)
    bias = None if bias is None else bias.contiguous()  # oneDNN ignores a bias's stride
    return torch.ops.mkldnn._linear_pointwise(x, w.t(), bias, "none", [], "")


library = torch.library.Library("diffusion_ql", "DEF")
library.define("product(Tensor x, Tensor w, Tensor? bias) -> Tensor", tags=(torch.Tag.flexible_layout,))
library.impl("product", product, "CPU")
library.impl("product", lambda x, w, bias: x.new_empty(len(x), w.shape[1]), "Meta")
