"""Compiles the kernels for GPUs that need not be there, and reports what came out.

`python benchmarks/compile_all_kernels.py REPORT.json` runs the host functions on tensors without
memory, under a driver that names a GPU and launches nothing. So a kernel is compiled exactly as a
launch with these shapes would compile it. The report has one row for each kernel: registers,
spills, shared memory, and counts of the instructions that tell whether the code is what was meant.
Needs a process without TRITON_INTERPRET, and none of CUDA.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sae_kernels import adam_triton, decode_triton, encode_triton, grads_triton, select_triton
from sae_kernels.launch import Segments

ARCHES = (80, 90)
BATCH = 8192
INSTRUCTIONS = {
    "LDG": r"\bLDG\.",
    "LDG.128": r"\bLDG\.\S*128",
    "LDGSTS.128": r"\bLDGSTS\.\S*128",
    "STG": r"\bSTG\.",
    "STG.128": r"\bSTG\.\S*128",
    "HMMA": r"\bHMMA\.",
    "HGMMA": r"\bHGMMA\.",
    "spill": r"\b(?:LDL|STL)\b",
}


class _Driver:
    """What Triton asks of a GPU when it compiles; the device's number is its architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


class KernelCall(NamedTuple):
    """A call whose kernels are compiled."""

    name: str
    call: Callable[[], object]


def _floats(*shape: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "..."]:
    return torch.empty(shape, dtype=dtype, device="meta")


def _integers(*shape: int, dtype: torch.dtype = torch.int64) -> Int[Tensor, "..."]:
    return torch.empty(shape, dtype=dtype, device="meta")


def _select(d_sae: int, k: int, dtype: torch.dtype, batch: int = BATCH) -> KernelCall:
    pre = _floats(batch, d_sae, dtype=dtype)
    name = f"topk_select d_sae={d_sae} k={k} {dtype}"
    return KernelCall(name, partial(select_triton.topk_select, pre, k, True, False))


def _encode(
    width: int, k: int, dtype: torch.dtype, batch: int = BATCH, gated: bool = False
) -> KernelCall:
    x, rows = _floats(batch, width, dtype=dtype), _floats(131072, width, dtype=dtype)
    call = partial(encode_triton.encode_topk, x, rows, _floats(131072), k, True, gated)
    way = "gated " * gated
    return KernelCall(f"{way}encode_topk d_in={width} d_sae=131072 k={k} {dtype}", call)


def _gated(width: int, size: int, of_groups: bool) -> KernelCall:
    """Name the product behind bounds that are known before: one of each group, or one for all."""
    x, rows = (_floats(n, width, dtype=torch.bfloat16) for n in (2048, 131072))
    bounds = _integers(*([131072 // size] if of_groups else []), dtype=torch.int32)
    operands = encode_triton.Operands(x, rows, _floats(131072))
    gate = encode_triton.Gate(size, 0, lambda _: bounds)
    call = partial(encode_triton.gated_product, operands, _floats(2048, 131072), gate)
    name = "bounds of groups" if of_groups else "one bound"
    return KernelCall(f"gated_product d_in={width} size={size} {name}", call)


def _decode(width: int, k: int, dtype: torch.dtype, batch: int = BATCH) -> Iterator[KernelCall]:
    values, indices = _floats(batch, k), _integers(batch, k)
    table, wide = _floats(65536, width, dtype=dtype), _floats(batch, width, dtype=dtype)
    bias = _floats(width, dtype=dtype)
    name = f"width={width} k={k} {dtype}"
    mse = partial(decode_triton.decode_mse, values, indices, table, bias, wide, 0.5)
    yield KernelCall(
        f"weighted_rows {name}", partial(decode_triton.weighted_rows, values, indices, table)
    )
    yield KernelCall(
        f"row_products {name}", partial(decode_triton.row_products, wide, table, indices)
    )
    yield KernelCall(f"decode_mse {name}", mse)


def _csr(width: int, dtype: torch.dtype) -> Iterator[KernelCall]:
    values, indices = _floats(BATCH * 32), _integers(BATCH * 32)
    row_ptr = _integers(BATCH + 1)
    table, wide = _floats(65536, width, dtype=dtype), _floats(BATCH, width, dtype=dtype)
    weighted = partial(decode_triton.csr_weighted_rows, values, indices, row_ptr, table)
    yield KernelCall(f"csr_weighted_rows width={width} {dtype}", weighted)
    products = partial(decode_triton.csr_row_products, wide, table, indices, row_ptr)
    yield KernelCall(f"csr_row_products width={width} {dtype}", products)


def _fused(width: int, k: int, batch: int = BATCH) -> Iterator[KernelCall]:
    """Yield what the fused step launches: copies of 16 bits against rows and sums of 32."""
    table, target = _floats(65536, width, dtype=torch.bfloat16), _floats(batch, width)
    values, indices, name = _floats(batch, k), _integers(batch, k), f"width={width} k={k}"
    latents, single = (values, indices, table), torch.float32
    mse = partial(decode_triton.decode_mse, *latents, _floats(width), target, 0.5, single)
    yield KernelCall(f"fused decode_mse {name}", mse)
    flat, row_ptr = (_floats(batch * k), _integers(batch * k)), _integers(4 * batch + 1)
    pieces = partial(decode_triton.csr_weighted_rows, *flat, row_ptr, table, single)
    yield KernelCall(f"fused pieces {name}", pieces)


def _grads(width: int, k: int, dtype: torch.dtype, batch: int = BATCH) -> KernelCall:
    values, indices = _floats(batch, k), _integers(batch, k)
    rows = _floats(batch, width, dtype=dtype)
    call = partial(grads_triton.weight_grads, values, values, indices, rows, rows, 65536)
    return KernelCall(f"weight_grads width={width} k={k} {dtype}", call)


def _square(width: int, dtype: torch.dtype) -> KernelCall:
    """Name what the fused step launches for a gradient: the squares as well."""
    order, rows = _integers(BATCH * 32), _floats(BATCH, width, dtype=dtype)
    latents, per_latent = _integers(BATCH * 32, dtype=torch.int32), _integers(65536)
    parts = Segments(latents, order, order, per_latent, per_latent)
    call = partial(grads_triton.product_and_square, parts, _floats(BATCH * 32), rows)
    return KernelCall(f"product_and_square width={width} {dtype}", call)


def _adam(width: int, norm: str) -> KernelCall:
    full = norm != "none"
    rows = _floats(65536, width)
    call = partial(
        adam_triton.latent_adam_,
        rows,
        rows,
        rows,
        rows,
        lr=_floats() if full else 1e-3,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        step=_floats(),
        skip=_floats() if full else None,
        project=full,
        norm=norm,
        clip=_floats() if full else None,
        shadow=_floats(65536, width, dtype=torch.bfloat16) if full else None,
    )
    return KernelCall(f"latent_adam_ width={width} norm={norm}", call)


def cases() -> list[KernelCall]:
    """List the calls: each kernel in each of its forms, at widths of real models."""
    half, single = torch.bfloat16, torch.float32
    return [
        _select(131072, 32, half),
        _select(131072, 1024, single),
        _encode(768, 32, half, gated=True),
        _gated(768, 32, of_groups=False),
        _gated(1536, 64, of_groups=True),
        _encode(2304, 32, half),
        *_decode(768, 32, half),
        *_decode(2304, 64, single),
        *_decode(4096, 128, half),
        *_csr(768, half),
        *_fused(768, 32),
        *_fused(2304, 64),
        _grads(768, 32, half),
        _grads(2304, 64, single),
        _square(768, half),
        _square(2304, half),
        _adam(768, "max"),
        _adam(2304, "unit"),
        _adam(16384, "unit"),
    ]


def annealed_cases() -> list[KernelCall]:
    """List calls that differ from some of `cases` in k and in the batch: nothing is compiled."""
    half = torch.bfloat16
    cases = [
        case
        for k, batch in ((31, 8191), (17, 8177))
        for case in (
            _select(131072, k, half, batch),
            _encode(768, k, half, batch, gated=True),
            _encode(2304, k, half, batch),
            *_decode(768, k, half, batch),
            _grads(768, k, half, batch),
        )
    ]
    return [KernelCall(f"annealed {case.name}", case.call) for case in cases]


def _describe(kernel: Any) -> dict[str, int]:
    """Disassemble a compiled kernel and count what matters."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, text[:500]
    counts = {name: len(re.findall(pattern, text)) for name, pattern in INSTRUCTIONS.items()}
    sizes = {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    return sizes | {"registers": int(usage[1]), "stack": int(usage[2])} | counts


@contextmanager
def _recording(arch: int, record: Callable[[str, Any], None]) -> Iterator[None]:
    """Compile for `arch` where kernels are launched, and give what came out to `record`."""
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = launch(self, *args, **(kwargs | {"warmup": True}))
        record(self.__name__, kernel)
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_Driver(arch))  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        JITFunction.run = launch


def report(arch: int, workers: ThreadPoolExecutor) -> dict[str, Future[dict[str, int]]]:
    """Compile all cases for an architecture; kernels are named by the first case that has them."""
    rows: dict[str, Future[dict[str, int]]] = {}
    seen: set[str] = set()
    case = KernelCall("", object)

    def record(name: str, kernel: Any) -> None:
        if kernel.hash in seen:
            return
        seen.add(kernel.hash)
        key = f"sm_{arch} {case.name}: {name.strip('_').removesuffix('_kernel')}"
        key += f" {sum(row.startswith(key) for row in rows) + 1}" if key in rows else ""
        rows[key] = workers.submit(_describe, kernel)

    with _recording(arch, record):
        for case in [*cases(), *annealed_cases()]:
            case.call()
    return rows


def main(path: str) -> None:
    """Write the report on all architectures to a file."""
    rows: dict[str, dict[str, int]] = {}
    with ThreadPoolExecutor(2) as workers:  # the disassembler takes as long as the compiler
        for arch in ARCHES:
            rows |= {name: row.result() for name, row in report(arch, workers).items()}
    text = json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1)
    Path(path).write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
