"""Products in bfloat16 on processors that have no instruction for them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_LEAST_ROWS = 2
"""With one row, as when single tokens are generated, widening the weights costs more."""


class WideLinear(nn.Linear):
    """A linear layer in bfloat16 that multiplies in float32 and rounds the result once.

    Products of two bfloat16 numbers are exact in float32, so it computes what a processor with
    instructions for bfloat16 does, but for the order of the sum. The weights are widened in each
    call: that costs little beside the product, and memory for one layer only.
    """

    def forward(self, input: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row d_out"]:
        """Multiply as `nn.Linear` does."""
        is_narrow = input.dtype == self.weight.dtype == torch.bfloat16
        rows = input.numel() // self.in_features
        if not is_narrow or input.device.type != "cpu" or rows < _LEAST_ROWS:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias).to(input.dtype)


def widen_products(model: nn.Module) -> None:
    """Let the linear layers of a model multiply in float32 where that is faster.

    PyTorch's own product in bfloat16 takes 6 to 10 times as long as float32 on a processor that
    oneDNN knows no bfloat16 for (x86 without AVX-512, for one). Elsewhere nothing is changed.

    Args:
        model: Its weights, and what it is called, stay as they are.
    """
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            module.__class__ = WideLinear
