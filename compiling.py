"""How dql.py's losses and acting are compiled, and what carries out their matrix products on a CPU.

PyTorch's float32 products on x86 are MKL's, which on AMD's processors keeps to AVX2. oneDNN, in PyTorch too, takes
AVX-512 wherever there is any and then needs half the time for a layer of 256 x 256. A pass over each compiled graph,
forward and backward alike, puts the one in the place of the other; mathematics and dql.py's text stay as they are.
Which of the two is chosen is a matter of the processor, never of a measurement: a resumed run has the same bits.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

THIN = 32  # a product with a dimension below gains nothing: measured with batches of 50 to 500


def compiled(function: Callable, device: torch.device) -> Callable:
    """function, compiled whole for the shapes it is called with, and so its gradient."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    options = {"post_grad_custom_post_pass": PRODUCTS_TO_ONEDNN} if device.type == "cpu" and wide else {}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


class ProductsToOneDNN(CustomGraphPass):
    """Replaces the float32 products of a compiled graph, thin ones and those with part of a wider matrix aside."""

    def uuid(self) -> object:
        return get_hash_for_files((__file__,))  # graphs that another version of this compiled are not reused

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if node.target is torch.ops.aten.mm.default:
                x, w, bias = *node.args, None
            elif node.target is torch.ops.aten.addmm.default and not node.kwargs:
                bias, x, w = node.args
            else:
                continue
            (m, k), n = x.meta["val"].shape, w.meta["val"].shape[1]
            fits = bias is None or bias.meta["val"].shape in ((n,), (m, n))
            if min(m, k, n) >= THIN and fits and is_packed_float32(x.meta["val"]) and is_packed_float32(w.meta["val"]):
                node.target, node.args = torch.ops.diffusion_ql.product.default, (x, w, bias)


PRODUCTS_TO_ONEDNN = ProductsToOneDNN()  # one, or the code compiled for one agent would not serve the next


def is_packed_float32(matrix: Tensor) -> bool:
    """Whether oneDNN takes the matrix as it is, or transposed; for part of a wider one it has only a slow reference."""
    return matrix.dtype == torch.float32 and (matrix.is_contiguous() or matrix.mT.is_contiguous())


def product(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x w + bias by oneDNN, float32: (m, k), (k, n), and (n,), (m, n) or None -> (m, n)."""
    if bias is not None and bias.dim() == 2:
        return product(x, w, None).add_(bias)
    bias = None if bias is None else bias.contiguous()  # it reads memory in a row, whatever the stride
    return torch.ops.mkldnn._linear_pointwise(x, w.t(), bias, "none", [], "")


library = torch.library.Library("diffusion_ql", "DEF")
library.define("product(Tensor x, Tensor w, Tensor? bias) -> Tensor", tags=(torch.Tag.flexible_layout,))
library.impl("product", product, "CPU")
library.impl("product", lambda x, w, bias: x.new_empty(len(x), w.shape[1]), "Meta")
