"""The optimiser, and whole training steps: `TrainStep` itself beside those of `peers.py`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_suite import peers
from benchmarks.gpu_suite.case import Case, Inputs, Shape, Variant, relative, rows_checked
from benchmarks.gpu_suite.ops import Draw
from benchmarks.gpu_suite.peers import (
    BANDWIDTH,
    BETAS,
    CLIP,
    EPS,
    L0_WEIGHT,
    LR,
    THRESHOLD,
    SuiteWeights,
)
from sae.architecture import BatchTopK, JumpReLU, TopK
from sae.autoencoder import SparseAutoencoder
from sae.train import optim_config as config_of
from sae.train.config import DictionaryConfig
from sae.train.loss_config import L0, AuxK, FixedPrefixes, Refine
from sae.train.step import TrainStep
from sae.train.throughput import StepGraph
from sae_kernels import adam_triton

Step = Callable[[Tensor], Tensor]


def step_rows(
    rows: Tensor, grad: Tensor, state: tuple[Tensor, Tensor], step: int, shadow: Tensor, unit: bool
) -> None:
    """Our optimiser; with `unit` also the projection before and the norm after it."""
    adam_triton.latent_adam_(
        rows,
        grad,
        *state,
        lr=LR,
        beta1=BETAS[0],
        beta2=BETAS[1],
        eps=EPS,
        weight_decay=0.0,
        step=torch.full((), float(step), device=rows.device),
        skip=None,
        project=unit,
        norm="unit" if unit else "none",
        clip=None,
        shadow=shadow,
    )


def eager_rows(
    rows: Tensor, grad: Tensor, state: tuple[Tensor, Tensor], step: int, shadow: Tensor, unit: bool
) -> None:
    """The same of torch: its fused Adam, with the other passes around it."""
    if unit:
        grad = grad - rows * ((grad * rows).sum(1, keepdim=True) / rows.square().sum(1, True))
    count = torch.full((), float(step), device=rows.device)
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        [rows], [grad], [state[0]], [state[1]], [], [count],
        lr=LR, beta1=BETAS[0], beta2=BETAS[1], weight_decay=0.0, eps=EPS,
        amsgrad=False, maximize=False,
    )  # fmt: skip
    if unit:
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
    shadow.copy_(rows)


def adam(s: Shape, device: str, unit: bool) -> Case:
    """Adam over one matrix and its 16-bit copy; bound by the states' traffic."""

    def make(seed: int) -> Inputs:
        draw = Draw(seed, device)
        rows, grad = (draw.normal(s.d_sae, s.d_model) for _ in range(2))
        moments = draw.normal(s.d_sae, s.d_model), draw.normal(s.d_sae, s.d_model).square()
        return rows, grad, *moments, torch.empty_like(rows, dtype=torch.bfloat16)

    def run(step: Any) -> Any:
        def call(rows: Tensor, grad: Tensor, mean: Tensor, square: Tensor, shadow: Tensor) -> Any:
            step(rows, grad, (mean, square), 7, shadow, unit)
            return rows, mean, square, shadow

        return call

    def error(inputs: Inputs, result: Any) -> float:
        picked = rows_checked(s.d_sae).to(device)
        rows, grad, mean, square = (tensor[picked].double() for tensor in inputs[:4])
        if unit:
            along = (grad * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True)
            grad = grad - rows * along
        mean = BETAS[0] * mean + (1 - BETAS[0]) * grad
        square = BETAS[1] * square + (1 - BETAS[1]) * grad.square()
        root = (square / (1 - BETAS[1] ** 7)).sqrt() + EPS
        rows = rows - LR * mean / (1 - BETAS[0] ** 7) / root
        rows = rows / rows.norm(dim=1, keepdim=True) if unit else rows
        coarse = relative(result[3][picked], rows) * 1e-3  # 16 bits; the others are exact to 1e-5
        pairs = zip(result[:3], (rows, mean, square), strict=True)
        return max(coarse, *(relative(one[picked], other) for one, other in pairs))

    return Case(
        op="adam, projected, unit norm" if unit else "adam",
        shape=s,
        dtype=torch.float32,
        n_bytes=s.d_sae * s.d_model * 30,
        flops=0,
        make=make,
        error=error,
        in_place=True,
        candidates={
            "triton": Variant(run(step_rows), 1e-5),
            "torch fused": Variant(run(eager_rows), 1e-5),
        },
    )


def _topk(s: Shape) -> dict[str, Any]:
    return {"activation": TopK(k=s.k)}


def _jumprelu(s: Shape) -> dict[str, Any]:  # noqa: ARG001
    activation = JumpReLU(threshold=THRESHOLD, bandwidth=BANDWIDTH)
    return {"activation": activation, "l0": L0(coefficient=L0_WEIGHT, ramp=0.0)}


def _default(s: Shape) -> dict[str, Any]:
    """What the recipe `default` has, in the middle of its run: all terms at once."""
    ends = tuple(max(1, s.d_sae // part) for part in (16, 8, 4, 2))
    return {
        "activation": BatchTopK(k=s.k),
        "matryoshka": FixedPrefixes(ends=ends),
        "refine": Refine(),
        "auxk": AuxK(),
    }


class ProductStep:
    """`sae.train.TrainStep`, which is what `sae train` runs: with clipping, figures and all.

    As there it is replayed from a CUDA graph where it can be, unless it is `launched`.
    """

    def __init__(
        self,
        fields: Callable[[Shape], dict[str, Any]],
        s: Shape,
        dtype: torch.dtype,
        device: str,
        launched: bool = False,
    ) -> None:
        config = DictionaryConfig(
            d_sae=s.d_sae,
            optimizer=config_of.Adam(lr=LR, clip=CLIP, warmup=0.0, decay=0.0),
            **fields(s),
        )
        dictionary = SparseAutoencoder(config.architecture(s.d_model)).to(device)
        with torch.no_grad():
            drawn = SuiteWeights.draw(s, device)
            dictionary.enc_rows.copy_(drawn.enc_rows)
            dictionary.dec_rows.copy_(drawn.dec_rows)
            if isinstance(config.activation, JumpReLU):
                dictionary.get_parameter("threshold").fill_(config.activation.threshold)
        precision = "fp32" if dtype == torch.float32 else "bf16"
        self.step = TrainStep(dictionary, config, 1 << 20, precision=precision)
        self.call = self.step if launched else StepGraph(self.step)

    def __call__(self, x: Tensor) -> Tensor:
        """Take one step; return the loss before it."""
        return self.call(x).loss


def _fired(x: Tensor, rows: Tensor, op: str, k: int) -> Tensor:
    """The latents' activations in float64, where all weights are those that are drawn."""
    pre = x @ rows.T
    if op == "step, jumprelu":
        return pre * (pre > THRESHOLD)
    values, indices = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, indices, values.relu())


STEPS: dict[str, dict[str, Callable[[Shape, torch.dtype, str], Step]]] = {
    "step": {
        "TrainStep": partial(ProductStep, _topk),
        "TrainStep, launched": partial(ProductStep, _topk, launched=True),
        "dense, compiled": peers.CompiledDenseStep,
        "sparse decoder and gradients": partial(peers.SparseDecoderStep, True),
        "sparse decoder alone": partial(peers.SparseDecoderStep, False),
    },
    "step, jumprelu": {
        "TrainStep": partial(ProductStep, _jumprelu),
        "dense, compiled": partial(peers.CompiledDenseStep, kind="jump"),
        "dense ReLU, compiled": partial(peers.CompiledDenseStep, kind="relu"),
    },
    "step, default": {"TrainStep": partial(ProductStep, _default)},
}
"""By op and candidate; ours first. What the peers' steps are, `peers.py` says."""


def step_error(op: str, step: Step, s: Shape, dtype: torch.dtype, device: str) -> float:
    """A fresh step's first loss against float64 on some rows; infinite where it does not learn."""
    x = Draw(1, device).normal(s.batch, s.d_model, dtype=dtype)
    given = x[rows_checked(s.batch).to(device)]
    rows, right = SuiteWeights.draw(s, device).dec_rows.double(), given.double()
    x_hat = _fired(right, rows, op, s.k) @ rows
    loss = step(given)
    error = 0.0  # of a loss of several terms, which checks.py has
    if op != "step, default":
        error = relative(loss, (x_hat - right).square().sum(1).mean())
    first, *later = (float(step(x)) for _ in range(4))
    return error if min(later) < (1 - 1e-5) * first else float("inf")  # more than is rounded


def step_flops(s: Shape) -> float:
    """The least: the encoder's product and the products of k latents a row."""
    return 2 * s.batch * s.d_model * (s.d_sae + 4 * s.k)


def step_bytes(s: Shape) -> float:
    """The least: Adam's traffic over both matrices."""
    return 2 * 30 * s.d_sae * s.d_model
