"""Adam over latent-major weights in one pass: projection, step, norm, 16-bit copy of the rows."""

import math
import random
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import BFloat16, Float, UInt8
from torch import Tensor

from sae_kernels import blocks
from sae_kernels.adam_states import Packed, n_blocks, pack_, unpack
from sae_kernels.launch import KernelError, check_floating, check_shape, choose, workspace

Norm = Literal["none", "unit", "max"]

CHUNK = 1 << 18  # elements of a matrix stepped at a time, so that the passes meet them in the cache
PASSING = 32  # bytes for each element that those passes hold at once


class _Settings(NamedTuple):
    lr: float | Float[Tensor, ""]
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int | Float[Tensor, ""]
    project: bool
    norm: Norm
    clip: Float[Tensor, ""] | None
    skip: Float[Tensor, ""] | None

    def number(self) -> int | Float[Tensor, ""]:
        """The number of the step, in float64 where the device knows it."""
        return self.step.double() if isinstance(self.step, Tensor) else self.step

    def on(self, device: torch.device) -> Float[Tensor, ""]:
        """The number of the step on the device."""
        if isinstance(self.step, Tensor):
            return self.step
        return torch.full((), float(self.step), device=device)


class _States(NamedTuple):
    """Adam's states in fewer bits, and what their rounding is drawn from."""

    exp_avg: Packed
    exp_avg_sq: Packed
    seed: int


class _AdamRows(NamedTuple):
    """Some rows of the weights, their gradient and Adam's two states, and the shadow if any."""

    rows: Float[Tensor, "d_sae d_out"]
    grad: Float[Tensor, "d_sae d_out"]
    exp_avg: Float[Tensor, "d_sae d_out"]
    exp_avg_sq: Float[Tensor, "d_sae d_out"]
    shadow: BFloat16[Tensor, "d_sae d_out"] | None

    def chunk(self, start: int, n_rows: int) -> "_AdamRows":
        rows, grad, exp_avg, exp_avg_sq = (t[start : start + n_rows] for t in self[:4])
        shadow = None if self.shadow is None else self.shadow[start : start + n_rows]
        return _AdamRows(rows, grad, exp_avg, exp_avg_sq, shadow)


def _rows_at_a_time(rows: Float[Tensor, "d_sae d_out"]) -> int:
    """Choose how many rows the passes go over together."""
    n_elements = workspace(rows.device, PASSING * CHUNK) // PASSING
    return max(1, n_elements // max(1, rows.shape[1]))


def _renorm_(
    rows: Float[Tensor, "d_sae d_out"], norm: Norm, skip: Float[Tensor, ""] | None = None
) -> None:
    """Bring rows to norm 1 (a row of zeros stays), or those above norm 1 down to it."""
    if norm == "none":
        return
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    norms.clamp_min_(1.0 if norm == "max" else torch.finfo(rows.dtype).tiny)
    rows.div_(norms if skip is None else norms.masked_fill_(skip > 0, 1.0))


def _step_reference(t: _AdamRows, s: _Settings) -> None:
    """Write Adam out, one equation a line (Kingma and Ba 2015; decay by Loshchilov and Hutter)."""
    if s.skip is not None and bool(s.skip):
        return
    grad = t.grad if s.clip is None else t.grad * s.clip
    if s.project:
        along = (grad * t.rows).sum(1, keepdim=True) / t.rows.square().sum(1, keepdim=True)
        grad = grad - t.rows * along.nan_to_num()
    t.exp_avg.mul_(s.beta1).add_(grad * (1 - s.beta1))
    t.exp_avg_sq.mul_(s.beta2).add_(grad.square() * (1 - s.beta2))
    denominator = (t.exp_avg_sq / (1 - s.beta2 ** s.number())).sqrt() + s.eps
    t.rows.mul_(1 - s.lr * s.weight_decay)
    t.rows.sub_(s.lr * (t.exp_avg / (1 - s.beta1 ** s.number())) / denominator)
    _renorm_(t.rows, s.norm)


def _step_plain(t: _AdamRows, s: _Settings) -> None:
    _step_reference(t, s)
    if t.shadow is not None:
        t.shadow.copy_(t.rows)


def _prepared(
    t: _AdamRows, s: _Settings, space: Float[Tensor, "row d_out"]
) -> Float[Tensor, "d_sae d_out"]:
    """Return the clipped and projected gradient, in `space` where it differs from the given one."""
    grad, space = t.grad.contiguous(), space[: len(t.grad)]  # the fused Adam reads no strides
    if s.clip is not None:
        grad = torch.mul(grad, s.clip, out=space)
    if not s.project:
        return grad
    square = torch.linalg.vector_norm(t.rows, dim=1).square_()
    along = torch.linalg.vecdot(grad, t.rows) / square.clamp_min_(torch.finfo(square.dtype).tiny)
    return torch.addcmul(grad, t.rows, along[:, None], value=-1, out=space)


def _step_torch(whole: _AdamRows, s: _Settings) -> None:
    """Step some rows at a time with torch's fused Adam, which leaves them in the cache."""
    d_sae = len(whole.rows)
    n_rows = _rows_at_a_time(whole.rows)
    space = torch.empty_like(whole.rows[:n_rows])
    step = s.on(space.device)
    for start in range(0, d_sae, n_rows):
        t = whole.chunk(start, n_rows)
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            [t.rows],
            [_prepared(t, s, space)],
            [t.exp_avg],
            [t.exp_avg_sq],
            [],
            [step],
            lr=s.lr,
            beta1=s.beta1,
            beta2=s.beta2,
            weight_decay=s.weight_decay,
            eps=s.eps,
            amsgrad=False,
            maximize=False,
            found_inf=s.skip,
        )
        _renorm_(t.rows, s.norm, s.skip)
        if t.shadow is not None:
            t.shadow.copy_(t.rows)


def _step_triton(t: _AdamRows, s: _Settings) -> None:
    from sae_kernels import adam_triton

    adam_triton.latent_adam_(
        t.rows,
        t.grad.contiguous(),
        t.exp_avg,
        t.exp_avg_sq,
        lr=s.lr,
        beta1=s.beta1,
        beta2=s.beta2,
        eps=s.eps,
        weight_decay=s.weight_decay,
        step=s.on(t.rows.device),
        skip=s.skip,
        project=s.project,
        norm=s.norm,
        clip=s.clip,
        shadow=t.shadow,
    )


def _step_packed(
    t: _AdamRows, s: _Settings, states: _States, step: Callable[[_AdamRows, _Settings], None]
) -> None:
    """Step some rows at a time with states of 32 bits, which are packed again."""
    d_sae = len(t.rows)
    n_rows = _rows_at_a_time(t.rows)
    number = states.seed if isinstance(s.step, Tensor) else f"{states.seed} {s.step}"
    mixed = random.Random(f"adam {number}").getrandbits(32)  # the CPU takes 32 bits
    generator = torch.Generator(t.rows.device).manual_seed(mixed)
    for start in range(0, d_sae, n_rows):
        first, second = (state.chunk(start, n_rows) for state in states[:2])
        part = t.chunk(start, n_rows)
        part = part._replace(
            exp_avg=unpack(first, signed=True), exp_avg_sq=unpack(second, signed=False)
        )
        step(part, s)
        pack_(first, part.exp_avg, generator, signed=True, skip=s.skip)
        pack_(second, part.exp_avg_sq, generator, signed=False, skip=s.skip)


def _check_packed(t: _AdamRows, s: _Settings, states: _States) -> None:
    """Check the states of fewer bits; the rest as if they had 32."""
    if t.rows.dtype != torch.float32:
        raise TypeError(f"rows must be float32 beside states of fewer bits, got {t.rows.dtype}")
    for name, state in (("exp_avg", states.exp_avg), ("exp_avg_sq", states.exp_avg_sq)):
        check_shape(name, state.numbers, *t.rows.shape)
        if state.numbers.dtype != states.exp_avg.numbers.dtype:
            raise TypeError(f"{name} must have the dtype of exp_avg, got {state.numbers.dtype}")
        if not state.numbers.is_contiguous():
            raise KernelError(
                f"{name} must be contiguous, got the strides {state.numbers.stride()}"
            )
        if state.numbers.dtype == torch.uint8:
            if state.scales is None:
                raise KernelError(f"scales must be given for {name} of 8 bits, got none")
            check_shape("scales", state.scales, len(t.rows), n_blocks(t.rows.shape[1]))
    _check(t, s)


def _check(t: _AdamRows, s: _Settings) -> None:
    check_floating(**{n: v for n, v in t._asdict().items() if n != "shadow"})
    check_shape("rows", t.rows, None, None)
    for name, tensor in t._asdict().items():
        check_shape(name, tensor, *t.rows.shape)
        if tensor is not None and name != "grad" and not tensor.is_contiguous():
            raise KernelError(f"{name} must be contiguous, got the strides {tensor.stride()}")
    if t.shadow is not None and t.shadow.dtype != torch.bfloat16:
        raise TypeError(f"shadow must have the dtype torch.bfloat16, got {t.shadow.dtype}")
    check_shape("clip", s.clip)
    check_shape("skip", s.skip)
    if not isinstance(s.step, Tensor) and s.step < 1:
        raise KernelError(f"step must be at least 1, got {s.step}; the first step is number 1")
    if s.norm not in get_args(Norm):
        raise KernelError(f"norm must be one of 'none', 'unit', 'max', got {s.norm!r}")
    for name in ("beta1", "beta2"):
        value = getattr(s, name)
        if not 0 <= value < 1:
            raise KernelError(f"{name} must be at least 0 and below 1, got {value}")
    check_shape("lr", s.lr if isinstance(s.lr, Tensor) else None)
    for name in ("lr", "eps", "weight_decay"):
        value = getattr(s, name)
        if not isinstance(value, Tensor) and not 0 <= value < math.inf:
            raise KernelError(f"{name} must be finite and at least 0, got {value}")


def _dispatch(t: _AdamRows, s: _Settings, states: _States, backend: str) -> None:
    """Take the step, with states of as many bits as they have; those in `t` are nobody's."""
    exp_avg, exp_avg_sq = states.exp_avg.numbers, states.exp_avg_sq.numbers
    if exp_avg.dtype in (torch.bfloat16, torch.uint8) and t.rows.dtype != exp_avg.dtype:
        _check_packed(t, s, states)
        _step_packed(t, s, states, _step_plain if backend == "reference" else _step_torch)
        return
    t = t._replace(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    _check(t, s)
    if backend == "triton":
        _step_triton(t, s)
    elif backend == "torch":
        _step_torch(t, s)
    else:
        _step_plain(t, s)


@torch.no_grad()
def latent_adam_(  # noqa: PLR0913
    rows: Float[Tensor, "d_sae d_out"],
    grad: Float[Tensor, "d_sae d_out"],
    exp_avg: Float[Tensor, "d_sae d_out"] | UInt8[Tensor, "d_sae d_out"],
    exp_avg_sq: Float[Tensor, "d_sae d_out"] | UInt8[Tensor, "d_sae d_out"],
    step: int | Float[Tensor, ""],
    *,
    lr: float | Float[Tensor, ""],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    project: bool = False,
    norm: str = "none",
    clip: Float[Tensor, ""] | None = None,
    shadow: BFloat16[Tensor, "d_sae d_out"] | None = None,
    scales: tuple[Float[Tensor, "d_sae block"], Float[Tensor, "d_sae block"]] | None = None,
    seed: int = 0,
    skip: Float[Tensor, ""] | None = None,
    backend: str | None = None,
) -> None:
    """Take one step of Adam in place, with what a dictionary does around it, in one pass.

    In this order: the gradient times `clip`, less its component along the row (`project`), AdamW
    (RMSprop with betas[0] = 0), the rows to their norm, the shadow. The states start as zeros.

    Beside float32 rows the states may be bfloat16, or uint8 codes with a scale for each 256
    neighbours of a row, the second one as its root (block-wise dynamic quantisation, Dettmers et
    al. 2022, arXiv 2110.02861). Both are rounded at random, drawn from `seed` and `step` alone.

    Args:
        rows: weights (d_sae, d_out) in float32 or float64, contiguous.
        grad: their gradient, which is left as it is.
        exp_avg: first state, contiguous.
        exp_avg_sq: second state, contiguous.
        step: number of this step, from 1 on; a float32 scalar tensor where the device alone knows
            it, and states of fewer bits then need another `seed` at each step.
        lr: learning rate; a scalar tensor where a recorded step reads it.
        betas: decay of the two states.
        eps: what is added to the denominator.
        weight_decay: each step takes lr * weight_decay of the weights off.
        project: take out the component along the row, which would only change its norm.
        norm: "unit" brings each row to norm 1 (a row of zeros stays), "max" those above 1 down
            to it, "none" leaves them.
        clip: factor of the gradient as a scalar tensor, so that no device is waited for.
        shadow: copy of the rows in bfloat16 that is brought up to date.
        scales: those of both states (d_sae, blocks of 256), where they are uint8.
        seed: decides, with the number of the step, how states of fewer bits are rounded.
        skip: a scalar tensor; where it is not 0 everything stays as it is.
        backend: a forced backend; the fastest one by default.

    Raises:
        ValueError: if shapes, devices, strides or settings do not fit (dtypes: TypeError).
    """
    s = _Settings(lr, *betas, eps, weight_decay, step, project, norm, clip, skip)  # pyright: ignore[reportArgumentType]
    first, second = (None, None) if scales is None else scales
    states = _States(Packed(exp_avg, first), Packed(exp_avg_sq, second), seed)
    name = choose(rows, backend)
    if backend is None and rows.dim() == 2 and rows.shape[1] > blocks.MAX_ROW:
        name = "torch"  # no program of Triton's holds so wide a row
    _dispatch(_AdamRows(rows, grad, rows, rows, shadow), s, states, name)
