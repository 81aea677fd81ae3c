"""The ops of the suite, each with its baselines, its least bytes and its float64 reference."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_suite import tuning
from benchmarks.gpu_suite.case import Case, Inputs, Shape, Variant, relative, rows_checked
from sae_kernels import decode_triton, encode_triton, grads_triton, select_triton


class Draw:
    """Random tensors on a device, a function of the seed."""

    def __init__(self, seed: int, device: str) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device = device

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers."""
        options = {"generator": self.generator, "device": self.device}
        return torch.randn(shape, dtype=dtype, **options)

    def latents(self, s: Shape, pattern: str) -> tuple[Tensor, Tensor]:
        """Positive values and ascending, distinct indices, all alike or by a power law."""
        share = torch.rand(s.batch, s.k, generator=self.generator, device=self.device)
        place = share if pattern == "uniform" else (s.d_sae**share - 1) / (s.d_sae - 1)
        free = s.d_sae - s.k + 1
        indices = (place * free).long().clamp_max(free - 1).sort(1).values
        distinct = indices + torch.arange(s.k, device=self.device)
        return self.normal(s.batch, s.k).abs(), distinct


def selection_error(pre: Tensor, values: Tensor, indices: Tensor) -> float:
    """How far the chosen are from the best, and the values from the chosen; `pre` in float64."""
    if bool((indices.sort(1).values.diff(dim=1) <= 0).any()):
        return float("inf")  # an index twice
    best = pre.sort(dim=1, descending=True).values[:, : indices.shape[1]]
    chosen = pre.gather(1, indices)
    largest = best.abs().max()
    off = (chosen.sort(dim=1, descending=True).values - best).abs().max()
    off = torch.maximum(off, (values.double() - chosen).abs().max()) / largest
    return float(off) if bool(off.isfinite()) else float("inf")


def select(s: Shape, dtype: torch.dtype, device: str) -> Case:
    """Top k of given pre-activations; bound by one read of them."""

    def error(inputs: Inputs, result: Any) -> float:
        rows = rows_checked(s.batch).to(device)
        return selection_error(inputs[0][rows].double(), result[0][rows], result[1][rows])

    return Case(
        op="select",
        shape=s,
        dtype=dtype,
        n_bytes=s.batch * (s.d_sae * dtype.itemsize + s.k * (dtype.itemsize + 8)),
        flops=0,
        make=lambda seed: (Draw(seed, device).normal(s.batch, s.d_sae, dtype=dtype),),
        error=error,
        candidates={
            "triton": Variant(lambda v: select_triton.topk_select(v, s.k, False, False), 0.0),
            "torch.topk": Variant(lambda v: v.topk(s.k, dim=1), 0.0),
            "torch.topk unsorted": Variant(lambda v: v.topk(s.k, dim=1, sorted=False), 0.0),
        },
    )


def encode(s: Shape, dtype: torch.dtype, device: str) -> Case:
    """Product, bias and top k; bound by the product."""

    def make(seed: int) -> Inputs:
        draw = Draw(seed, device)
        rows = draw.normal(s.d_sae, s.d_model, dtype=dtype) * s.d_model**-0.5
        return draw.normal(s.batch, s.d_model, dtype=dtype), rows, 0.1 * draw.normal(s.d_sae)

    def error(inputs: Inputs, result: Any) -> float:
        picked = rows_checked(s.batch).to(device)
        x, rows, bias = (tensor.double() for tensor in (inputs[0][picked], *inputs[1:]))
        return selection_error(x @ rows.T + bias, result[0][picked], result[1][picked])

    def dense(x: Tensor, rows: Tensor, bias: Tensor) -> Any:
        return functional.linear(x, rows, bias.to(x.dtype)).topk(s.k, dim=1)

    def mixed(x: Tensor, rows: Tensor, bias: Tensor) -> Any:
        pre = functional.linear(x, rows, bias.to(x.dtype))
        return select_triton.topk_select(pre, s.k, False, False)

    def ours(gated: bool | None) -> Variant:
        def run(x: Tensor, rows: Tensor, bias: Tensor) -> Any:
            return encode_triton.encode_topk(x, rows, bias, s.k, False, gated)

        return Variant(run, 1e-4)

    n = s.batch
    can_be_gated = encode_triton.row_gate(s.d_sae, s.k) is not None
    return Case(
        op="encode",
        shape=s,
        dtype=dtype,
        n_bytes=(n + s.d_sae) * s.d_model * dtype.itemsize + 12 * n * s.k,
        flops=2 * n * s.d_sae * s.d_model,
        make=make,
        error=error,
        candidates={
            "triton": ours(None),
            **({tuning.GATED: ours(True)} if can_be_gated else {}),
            "linear + triton select": Variant(mixed, 2e-2),
            "linear + torch.topk": Variant(dense, 2e-2),
        },
    )


def _dense_latents(values: Tensor, indices: Tensor, s: Shape, dtype: torch.dtype) -> Tensor:
    dense = torch.zeros(s.batch, s.d_sae, dtype=dtype, device=values.device)
    return dense.scatter_(1, indices, values.to(dtype))


def decode(s: Shape, dtype: torch.dtype, device: str) -> Case:
    """Weighted sums of decoder rows; bound by reading k rows for each batch row."""

    def make(seed: int) -> Inputs:
        draw = Draw(seed, device)
        return *draw.latents(s, "uniform"), draw.normal(s.d_sae, s.d_model, dtype=dtype)

    def error(inputs: Inputs, result: Tensor) -> float:
        picked = rows_checked(s.batch).to(device)
        values, indices = inputs[0][picked].double(), inputs[1][picked]
        right = torch.einsum("nk,nkd->nd", values, inputs[2][indices].double())
        return relative(result[picked], right)

    def bags(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
        weights = values.to(table.dtype)
        return functional.embedding_bag(indices, table, per_sample_weights=weights, mode="sum")

    def dense(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
        return _dense_latents(values, indices, s, dtype) @ table

    return Case(
        op="decode",
        shape=s,
        dtype=dtype,
        n_bytes=s.batch * (s.k + 1) * s.d_model * dtype.itemsize,
        flops=2 * s.batch * s.k * s.d_model,
        make=make,
        error=error,
        candidates={
            "triton": Variant(decode_triton.weighted_rows, 1e-2),
            "embedding_bag": Variant(bags, 2e-2),
            "scatter + matmul": Variant(dense, 2e-2),
        },
    )


def decode_mse(s: Shape, dtype: torch.dtype, device: str) -> Case:
    """Decode, compare with the target and go back to the values; bound by one gather."""

    def make(seed: int) -> Inputs:
        draw = Draw(seed, device)
        table = draw.normal(s.d_sae, s.d_model, dtype=dtype)
        target = draw.normal(s.batch, s.d_model, dtype=dtype)
        return *draw.latents(s, "uniform"), table, draw.normal(s.d_model, dtype=dtype), target

    def error(inputs: Inputs, result: Any) -> float:
        picked = rows_checked(s.batch).to(device)
        values, indices, target = inputs[0][picked].double(), inputs[1][picked], inputs[4][picked]
        rows = inputs[2][indices].double()
        off = torch.einsum("nk,nkd->nd", values, rows) + inputs[3].double() - target.double()
        products = torch.einsum("nd,nkd->nk", off, rows)
        right = off + target.double(), off.square().sum(1), off, products
        got = (tensor[picked] for tensor in result)
        return max(relative(one, other) for one, other in zip(got, right, strict=True))

    def fused(*inputs: Tensor) -> Any:
        return decode_triton.decode_mse(*inputs, 0.5)  # pyright: ignore[reportCallIssue]

    def parts(values: Tensor, indices: Tensor, table: Tensor, bias: Tensor, target: Tensor) -> Any:
        x_hat = decode_triton.weighted_rows(values, indices, table) + bias
        off = x_hat.float() - target.float()
        products = decode_triton.row_products(off, table, indices)
        return x_hat, off.square().sum(1), off, products

    return Case(
        op="decode_mse",
        shape=s,
        dtype=dtype,
        n_bytes=s.batch * (s.k + 3) * s.d_model * dtype.itemsize,
        flops=4 * s.batch * s.k * s.d_model,
        make=make,
        error=error,
        candidates={
            "triton": Variant(fused, 1e-2),
            "triton in parts": Variant(parts, 2e-2),
        },
    )


def row_products(s: Shape, dtype: torch.dtype, device: str) -> Case:
    """The gradient of the values; bound by reading k rows for each batch row."""

    def make(seed: int) -> Inputs:
        draw = Draw(seed, device)
        grad = draw.normal(s.batch, s.d_model, dtype=dtype)
        table = draw.normal(s.d_sae, s.d_model, dtype=dtype)
        return grad, table, draw.latents(s, "uniform")[1]

    def error(inputs: Inputs, result: Tensor) -> float:
        picked = rows_checked(s.batch).to(device)
        rows = inputs[1][inputs[2][picked]].double()
        return relative(
            result[picked], torch.einsum("nd,nkd->nk", inputs[0][picked].double(), rows)
        )

    return Case(
        op="values_grad",
        shape=s,
        dtype=dtype,
        n_bytes=s.batch * (s.k + 1) * s.d_model * dtype.itemsize,
        flops=2 * s.batch * s.k * s.d_model,
        make=make,
        error=error,
        candidates={
            "triton": Variant(decode_triton.row_products, 1e-4),
            "matmul + gather": Variant(lambda g, w, i: (g @ w.T).gather(1, i), 2e-2),
        },
    )


def weight_grads(s: Shape, dtype: torch.dtype, device: str, pattern: str) -> Case:
    """Both weights' gradients; bound by reading the inputs and writing the gradients once."""

    def make(seed: int) -> Inputs:
        draw = Draw(seed, device)
        values, indices = draw.latents(s, pattern)
        grad, x = (draw.normal(s.batch, s.d_model, dtype=dtype) for _ in range(2))
        return values, draw.normal(s.batch, s.k), indices, grad, x

    def error(inputs: Inputs, result: Any) -> float:
        values, d_values, indices, grad, x = inputs
        errors = []
        for weights, rows, out in ((values, grad, result[0]), (d_values, x, result[1])):
            latents = indices[rows_checked(s.batch).to(device), 0]
            hits = [torch.where(indices == j, weights, 0).sum(1).double() for j in latents]
            errors.append(relative(out[latents], torch.stack(hits) @ rows.double()))
        return max(errors)

    def dense(values: Tensor, d_values: Tensor, indices: Tensor, grad: Tensor, x: Tensor) -> Any:
        acts, d_pre = (_dense_latents(v, indices, s, dtype) for v in (values, d_values))
        return (acts.T @ grad).float(), (d_pre.T @ x).float()

    def ours(*inputs: Tensor) -> Any:
        return grads_triton.weight_grads(*inputs, s.d_sae)  # pyright: ignore[reportCallIssue]

    return Case(
        op="weight_grads",
        shape=s,
        dtype=dtype,
        n_bytes=2 * s.d_model * (s.batch * dtype.itemsize + 4 * s.d_sae) + 16 * s.batch * s.k,
        flops=4 * s.batch * s.k * s.d_model,
        make=make,
        error=error,
        pattern=pattern,
        candidates={"triton": Variant(ours, 1e-2), "scatter + matmul": Variant(dense, 2e-2)},
    )


def all_ops(s: Shape, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """The ops of a training step but the optimiser."""
    yield select(s, torch.float32, device)
    yield select(s, dtype, device)
    yield encode(s, dtype, device)
    yield decode(s, dtype, device)
    yield row_products(s, dtype, device)
    yield decode_mse(s, dtype, device)
    for pattern in ("uniform", "power law"):
        yield weight_grads(s, dtype, device, pattern)
