"""The optimiser and whole training steps, ours beside dense autocast PyTorch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_suite.case import Case, Inputs, Shape, Variant, relative, rows_checked
from benchmarks.gpu_suite.ops import Draw
from sae.architecture import TopK
from sae.autoencoder import SparseAutoencoder
from sae.train import optim_config as config_of
from sae.train.config import DictionaryConfig
from sae.train.step import TrainStep
from sae_kernels import adam_triton

LR, BETAS, EPS, CLIP = 1e-3, (0.9, 0.999), 1e-8, 1.0


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


class SuiteWeights(NamedTuple):
    """Parameters in float32 with the states of Adam, and the 16-bit copies."""

    enc_rows: Tensor
    dec_rows: Tensor
    b_enc: Tensor
    b_dec: Tensor

    @classmethod
    def draw(cls, s: Shape, device: str) -> "SuiteWeights":
        """Unit decoder rows, the encoder equal to them, no biases."""
        dec_rows = functional.normalize(Draw(0, device).normal(s.d_sae, s.d_model), dim=1)
        zeros = (torch.zeros(width, device=device) for width in (s.d_sae, s.d_model))
        return cls(dec_rows.clone(), dec_rows, *zeros)


def _adam(parameters: tuple[Tensor, ...]) -> torch.optim.Adam:
    """Torch's fused Adam, in the form that a CUDA graph can hold."""
    return torch.optim.Adam(parameters, lr=LR, fused=True, capturable=parameters[0].is_cuda)


class ProductStep:
    """`sae.train.TrainStep`, which is what `sae train` runs: with clipping, figures and all."""

    def __init__(self, s: Shape, dtype: torch.dtype, device: str) -> None:
        config = DictionaryConfig(
            activation=TopK(k=s.k),
            d_sae=s.d_sae,
            optimizer=config_of.Adam(lr=LR, clip=CLIP, warmup=0.0, decay=0.0),
        )
        dictionary = SparseAutoencoder(config.architecture(s.d_model)).to(device)
        with torch.no_grad():
            drawn = SuiteWeights.draw(s, device)
            dictionary.enc_rows.copy_(drawn.enc_rows)
            dictionary.dec_rows.copy_(drawn.dec_rows)
        precision = "fp32" if dtype == torch.float32 else "bf16"
        self.step = TrainStep(dictionary, config, 1 << 20, precision=precision)

    def __call__(self, x: Tensor) -> Tensor:
        """Take one step; return the mean squared error before it."""
        return self.step(x).loss


class PlainStep:
    """The same step of plain PyTorch under autocast: dense products, torch.topk, fused Adam."""

    def __init__(self, s: Shape, dtype: torch.dtype, device: str) -> None:
        self.shape, self.dtype, self.device = s, dtype, device
        self.weights = SuiteWeights(*(w.requires_grad_() for w in SuiteWeights.draw(s, device)))
        self.adam = _adam(self.weights)

    def __call__(self, x: Tensor) -> Tensor:
        """Take one step; return the squared error of each row before it."""
        enc_rows, dec_rows, b_enc, b_dec = self.weights
        self.adam.zero_grad()
        kind = torch.device(self.device).type
        with torch.autocast(kind, dtype=self.dtype, enabled=self.dtype != torch.float32):
            pre = functional.linear(x.float() - b_dec, enc_rows, b_enc)
            values, indices = pre.topk(self.shape.k, dim=1)
            acts = torch.zeros_like(pre).scatter(1, indices, values.relu())
            x_hat = functional.linear(acts, dec_rows.T, b_dec)
        loss = (x_hat.float() - x.float()).square().sum(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        grad = dec_rows.grad
        assert grad is not None
        with torch.no_grad():
            grad -= dec_rows * (grad * dec_rows).sum(1, keepdim=True)
            self.adam.step()
            dec_rows.div_(torch.linalg.vector_norm(dec_rows, dim=1, keepdim=True))
        return loss.detach()


STEPS = {"TrainStep": ProductStep, "dense autocast": PlainStep}


def step_error(s: Shape, dtype: torch.dtype, device: str, name: str) -> float:
    """The first step's loss against float64 on some rows; infinite where training does not help."""
    x = Draw(1, device).normal(s.batch, s.d_model, dtype=dtype)
    given = x[rows_checked(s.batch).to(device)]
    rows, right = SuiteWeights.draw(s, device).dec_rows.double(), given.double()
    values, indices = (right @ rows.T).topk(s.k, dim=1)
    x_hat = torch.einsum("nk,nkd->nd", values.relu(), rows[indices])
    loss = STEPS[name](s, dtype, device)(given)
    error = relative(loss, (x_hat - right).square().sum(1).mean())
    step = STEPS[name](s, dtype, device)
    first, last = float(step(x)), 0.0
    for _ in range(5):
        last = float(step(x))
    return error if last < first else float("inf")


def step_flops(s: Shape) -> float:
    """The least: the encoder's product and the products of k latents a row."""
    return 2 * s.batch * s.d_model * (s.d_sae + 4 * s.k)


def step_bytes(s: Shape) -> float:
    """The least: Adam's traffic over both matrices."""
    return 2 * 30 * s.d_sae * s.d_model
