"""What training does on a GPU, done on a CPU: its branches, with the kernels in the interpreter."""

import collections
import importlib
import pkgutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

import sae_kernels

ROOT = str(Path(__file__).parents[3])
CHECKS = ("check_indices", "check_row_ptr", "_check_prefixes")
"""What is looked at on a CPU alone."""
WAITS = {"_local_scalar_dense": 1, "nonzero": 1, "bincount": 2, "masked_select": 1, "_unique2": 1}
"""Operations whose result or shape the host has to know, and how often it waits for it."""
MASKED = ("index", "index_put", "index_put_", "_index_put_impl_")
# fmt: off
NO_KERNEL = (
    "view", "expand", "slice", "select", "t", "transpose", "unsqueeze", "squeeze", "detach",
    "alias", "as_strided", "_unsafe_view", "split", "split_with_sizes", "empty", "empty_like",
    "new_empty", "unbind", "permute", "_reshape_alias", "lift_fresh", "is_same_size",
)
# fmt: on
"""Operations that launch nothing."""


def filled_in(numbers: Sequence[float], device: torch.device) -> torch.Tensor:
    """Do what `launch.on_device` does where the device is a GPU."""
    dtype = torch.int64 if isinstance(numbers[0], int) else torch.float64
    return torch.cat([torch.full((1,), n, dtype=dtype, device=device) for n in numbers])


def branches_of_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Let every op take the path that it takes for CUDA tensors."""
    names = [module.name for module in pkgutil.iter_modules(sae_kernels.__path__)]
    modules = [importlib.import_module(f"sae_kernels.{name}") for name in names]
    for module in modules:
        if hasattr(module, "choose"):
            patch.setattr(module, "choose", lambda _, backend: backend or "triton")
        for name in CHECKS:
            if hasattr(module, name):
                patch.setattr(module, name, lambda *_: None)
        if hasattr(module, "on_device"):
            patch.setattr(module, "on_device", filled_in)
    auxk = sys.modules["sae_kernels.auxk"]
    patch.setattr(auxk, "_largest", lambda v, k: auxk._keep(v, auxk.topk_select(v, k).indices))


class Counted(TorchDispatchMode):
    """Counts the host's waits, by the line that waits, and what is launched."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        super().__init__()
        self.waits: collections.Counter[str] = collections.Counter()
        self.ops: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at an operation and run it."""
        name = func.overloadpacket.__name__
        waits = WAITS.get(name, 0)
        if name in MASKED:
            kinds = [i.dtype for i in args[1] if i is not None]
            waits = int(torch.bool in kinds or torch.uint8 in kinds)
        if name == "repeat_interleave" and not (kwargs or {}).get("output_size"):
            waits = 1
        if waits:
            self.add_waits(waits)
        if name not in NO_KERNEL:
            self.ops[name] += 1
        return func(*args, **(kwargs or {}))

    def add_waits(self, n: int) -> None:
        """Count waits at the innermost line of the project's own."""
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(ROOT)]
        own = [f for f in frames if "/tests/" not in f.filename] or frames
        self.waits[f"{own[-1].filename.removeprefix(ROOT)}:{own[-1].lineno} {own[-1].line}"] += n


@contextmanager
def counted(patch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """Count what happens inside; a tensor made of the host's numbers is a copy that waits."""
    mode, call, make = Counted(), GridExecutor.__call__, torch.tensor

    def launch(self: Any, *args: Any, **named: Any) -> Any:
        mode.ops[f"triton {self.fn.__name__}"] += 1
        with _disable_current_modes():
            return call(self, *args, **named)

    def tensor(*args: Any, **named: Any) -> Any:
        mode.add_waits(1)
        with _disable_current_modes():
            return make(*args, **named)

    with patch.context() as inner, mode:
        inner.setattr(GridExecutor, "__call__", launch)
        inner.setattr(torch, "tensor", tensor)
        yield mode


class _Tape(TorchDispatchMode):
    """Keeps what is called on which tensors, in order; refuses what would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in WAITS:
            raise RuntimeError(f"{name} waits while a step is recorded")
        out = func(*args, **kwargs)
        if name.rstrip("_") not in NO_KERNEL and func.namespace != "profiler":
            self.calls.append((func, args, kwargs, out))
        return out


def tape(work: Any, state_of: Any, patch: pytest.MonkeyPatch) -> Any:
    """Do what a CUDA graph does: keep the calls of `work`, which changes nothing; replay them."""
    mode, call = _Tape(), GridExecutor.__call__
    before = {name: value.clone() for name, value in state_of().items()}

    def launch(self: Any, *args: Any, **named: Any) -> None:
        mode.calls.append((self, args, named, None))
        with _disable_current_modes():
            call(self, *args, **named)

    with patch.context() as inner, mode:
        inner.setattr(GridExecutor, "__call__", launch)
        work()
    with torch.no_grad():
        for name, value in state_of().items():
            value.copy_(before[name])

    @torch.no_grad()
    def replay() -> None:
        for func, args, named, old in mode.calls:
            if isinstance(func, GridExecutor):
                call(func, *args, **named)
                continue
            new = func(*args, **named)
            if old is not None and not func._schema.is_mutable:
                for place, value in zip(tree_leaves(old), tree_leaves(new), strict=True):
                    place.copy_(value.view(place.shape))  # it may have been squeezed since

    return replay
