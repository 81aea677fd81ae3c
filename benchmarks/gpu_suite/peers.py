"""Steps of other projects, written from what their papers and pages say of them; no code of theirs.

`dense, compiled`: the plain step of PyTorch under autocast, which most projects have, through
torch.compile; JumpReLU's thresholds learn through a rectangle (arXiv 2407.14435). `sparse decoder
and gradients`: Gao et al. (arXiv 2406.04093, appendix D) and sparsify: a dense product and
torch.topk, then sparse products forward and backward. `sparse decoder alone`: BioNeMo's recipes,
whose encoder is differentiated densely. The sparse products are ours, in float32 as theirs, so what
they are slower by is not in these rows.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_suite.case import Shape
from benchmarks.gpu_suite.ops import Draw
from sae_kernels import sparse_decode
from sae_kernels.grads import segment_product, segment_sum
from sae_kernels.launch import Entries, choose

LR, BETAS, EPS, CLIP = 1e-3, (0.9, 0.999), 1e-8, 1.0
THRESHOLD, BANDWIDTH, L0_WEIGHT = 1e-3, 1e-2, 1e-3


class SuiteWeights(NamedTuple):
    """Parameters in float32."""

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


class PeerStep(ABC):
    """What these steps share: fused Adam, clipping, decoder rows that stay at norm 1."""

    def __init__(self, s: Shape, dtype: torch.dtype, device: str, *more: Tensor) -> None:
        self.shape, self.dtype, self.device = s, dtype, torch.device(device)
        self.weights = SuiteWeights(*(w.requires_grad_() for w in SuiteWeights.draw(s, device)))
        self.params = (*self.weights, *more)
        self.adam = torch.optim.Adam(self.params, lr=LR, betas=BETAS, eps=EPS, fused=True)

    @abstractmethod
    def loss(self, x: Tensor) -> Tensor:
        """What is minimised: the mean squared error of these rows."""

    def project(self) -> None:
        """Take the part of the decoder's gradient along its rows out."""
        rows, grad = self.weights.dec_rows, self.weights.dec_rows.grad
        assert grad is not None
        grad -= rows * (grad * rows).sum(1, keepdim=True)

    def renorm(self) -> None:
        """Bring the decoder's rows to norm 1."""
        rows = self.weights.dec_rows
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))

    def autocast(self) -> torch.autocast:
        """Products of 16 bits, unless all is float32."""
        is_on = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=is_on)

    def __call__(self, x: Tensor) -> Tensor:
        """Take one step; return the loss before it."""
        self.adam.zero_grad()
        loss = self.loss(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, CLIP)
        with torch.no_grad():
            self.project()
            self.adam.step()
            self.renorm()
        return loss.detach()


Kind = Literal["topk", "jump", "relu"]


class CompiledDenseStep(PeerStep):
    """Dense products and top-k, JumpReLU or a ReLU, compiled; on a CPU traced and not compiled."""

    def __init__(
        self,
        s: Shape,
        dtype: torch.dtype,
        device: str,
        kind: Literal["topk", "jump", "relu"] = "topk",
    ) -> None:
        threshold = torch.full((s.d_sae,), THRESHOLD, device=device).requires_grad_()
        self.kind, self.threshold = kind, threshold if kind == "jump" else None
        super().__init__(s, dtype, device, *([threshold] if kind == "jump" else []))
        torch.compiler.reset()  # or after eight of these the next one is not compiled any more
        backend = "inductor" if self.device.type == "cuda" else "eager"
        for name in ("loss", "project", "renorm"):
            compiled = torch.compile(getattr(self, name), dynamic=False, backend=backend)
            setattr(self, name, compiled)

    def loss(self, x: Tensor) -> Tensor:
        """The mean squared error of these rows, and for JumpReLU the weighed L0."""
        enc_rows, dec_rows, b_enc, b_dec = self.weights
        with self.autocast():
            pre = functional.linear(x.float() - b_dec, enc_rows, b_enc)
            if self.threshold is not None:
                acts, l0 = _jump(pre, self.threshold)
            elif self.kind == "relu":
                acts, l0 = pre.relu(), 0.0
            else:
                values, indices = pre.topk(self.shape.k, dim=1)
                acts, l0 = torch.zeros_like(pre).scatter(1, indices, values.relu()), 0.0
            x_hat = functional.linear(acts, dec_rows.T, b_dec)
        return (x_hat.float() - x.float()).square().sum(1).mean() + L0_WEIGHT * l0

    def renorm(self) -> None:
        """Bring the decoder's rows to norm 1, and thresholds to what they may be."""
        super().renorm()
        if self.threshold is not None:
            self.threshold.clamp_(min=0)


def _jump(pre: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """JumpReLU and its mean L0; terms of value 0 carry the gradients of the thresholds."""
    fixed = threshold.detach()
    fires = pre.detach() > fixed
    near = (pre.detach() - fixed).abs() < BANDWIDTH / 2
    moved = near / BANDWIDTH * (threshold - fixed)
    l0 = (fires.float() - moved).sum(1).mean()
    return torch.where(fires, pre, 0.0) - fixed * moved, l0


class _SparseEncode(torch.autograd.Function):
    """A dense product and torch.topk; the gradients are those of what was kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, enc_rows: Tensor, b_enc: Tensor, b_dec: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        centred = x.float() - b_dec
        values, indices = functional.linear(centred, enc_rows, b_enc).topk(k, dim=1)
        values = values.float().relu()
        ctx.save_for_backward(centred, enc_rows, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        centred, enc_rows, values, indices = ctx.saved_tensors
        d_values = grads[0].masked_fill(values <= 0, 0.0)
        entries = Entries(indices, len(enc_rows))
        d_bias = segment_sum(entries, d_values)
        d_rows = segment_product(entries, d_values, centred, choose(centred, None))
        return None, d_rows, d_bias, -(d_bias @ enc_rows), None


class SparseDecoderStep(PeerStep):
    """A sparse decoder; the encoder's gradients are sparse as well, or those of autograd."""

    def __init__(self, sparse: bool, s: Shape, dtype: torch.dtype, device: str) -> None:
        super().__init__(s, dtype, device)
        self.sparse = sparse

    def loss(self, x: Tensor) -> Tensor:
        """The mean squared error of these rows."""
        enc_rows, dec_rows, b_enc, b_dec = self.weights
        with self.autocast():
            if self.sparse:
                encoder = (x, enc_rows, b_enc, b_dec, self.shape.k)
                values, indices = _SparseEncode.apply(*encoder)  # pyright: ignore[reportGeneralTypeIssues]
            else:
                pre = functional.linear(x.float() - b_dec, enc_rows, b_enc)
                values, indices = pre.topk(self.shape.k, dim=1)
                values = values.float().relu()
        x_hat = sparse_decode(values, indices, dec_rows, b_dec)
        return (x_hat - x.float()).square().sum(1).mean()
