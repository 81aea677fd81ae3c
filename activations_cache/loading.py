"""What reading models through transformers needs.

Its chatter is silenced, and a failure is one error in one line. Products in bfloat16 are made in
float32 on processors that have no instruction for them.
"""

import contextlib
import re
import struct
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import modeling_gguf_pytorch_utils as gguf_reader
from transformers.utils import logging as transformers_logging

from activations_cache.checks import MissingPackageError, MonosemaError

_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
    struct.error,
)
"""What readers of model files raise for damaged bytes, besides a bare Exception (tokenizers)."""

_BAR = "tqdm"


class ModelError(MonosemaError):
    """A model cannot be read, is not whole, or is not the one that was asked for."""


class Refusing:
    """A block that reads model files; what it raises for damaged bytes becomes a ModelError."""

    def __init__(self, rule: str, advice: str):
        """Take the beginning and the end of the message: `<rule>, got <reason>; <advice>`."""
        self._rule = rule
        self._advice = advice

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Translate the error, if there is one and it is not ours already."""
        if isinstance(error, ModelError | MissingPackageError):
            return
        if isinstance(error, _DAMAGE) or kind is Exception:
            raise self.error(one_line(error)) from error

    def error(self, got: str) -> ModelError:
        """Return the error for a reason found otherwise."""
        return ModelError(f"{self._rule}, got {got}; {self._advice}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the bars, log lines and warnings with which transformers accompanies a load.

    What they could tell of consequence, weights that the files lack, is checked by the callers.
    """
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    gguf_bar = getattr(gguf_reader, _BAR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # The bar of the GGUF reader is tqdm's own and knows no switch.
    setattr(gguf_reader, _BAR, lambda items, **_: items)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        setattr(gguf_reader, _BAR, gguf_bar)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def one_line(error: BaseException | None) -> str:
    """Return the error's class and its message in one line of bearable length.

    Objects that are named by their address are left out: it is another in each process.
    """
    message = re.sub(r" <[^<>]* at 0x[0-9a-f]+>", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {message[:200]}".rstrip(": ")


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
