"""Where Triton's kernels run: compiled on a GPU, or on the CPU in the interpreter."""

from typing import cast

import torch
import triton
from jaxtyping import Shaped
from torch import Tensor
from triton.backends.compiler import GPUTarget


@triton.jit
def _nothing() -> None:
    pass


def interprets() -> bool:
    """Tell whether kernels are interpreted, which is decided when they are defined."""
    return not isinstance(_nothing, triton.JITFunction)


def arch_of(tensor: Shaped[Tensor, "..."]) -> int:
    """Return the compute capability of a tensor's GPU as one number, 90 for 9.0.

    Other tensors get that of the GPU for which kernels are compiled, 80 in the interpreter.
    """
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return 10 * major + minor
    if interprets():
        return 80
    return int(cast(GPUTarget, triton.runtime.driver.active.get_current_target()).arch)
