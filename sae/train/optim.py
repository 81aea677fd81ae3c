"""The optimisers; Adam for latent-major weights, with the decoder's rows kept at norm 1.

A running mean of the weights, which is what is saved where it is asked for.

What optimisers do with rows: turning without growing, and forgetting.

Muon for the matrices of a dictionary, Adam for its vectors.

Schedule-free Adam (Defazio et al. 2024, arXiv 2405.15682).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, assert_never

import torch
from jaxtyping import BFloat16, Bool, Float, Int
from torch import Tensor
from torch.optim import Muon, Optimizer
from torch.optim.adam import Adam

from sae.autoencoder import SparseAutoencoder
from sae.train import optim_config
from sae_kernels import latent_adam_, launch
from sae_kernels.adam_states import n_blocks


def normalise_rows_(rows: Float[Tensor, "d_sae d_out"]) -> None:
    """Bring each row to norm 1, in place; a row of zeros stays."""
    rows.div_(rows.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(rows.dtype).tiny))


def across(
    grad: Float[Tensor, "d_sae d_out"], rows: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "d_sae d_out"]:
    """The gradient less its part along the unit rows, which would only change their norm."""
    return grad - rows * (grad * rows).sum(dim=1, keepdim=True)


def forget(
    self: torch.optim.Optimizer, parameter: torch.nn.Parameter, latents: Int[Tensor, " latent"]
) -> None:
    """Bring all states of some latents' weights to 0."""
    for value in self.state.get(parameter, {}).values():
        if value.dim():
            value[latents] = 0


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}


def optimizer_of(
    params: list[dict[str, Any]],
    settings: optim_config.Optimizer,
    unit_rows: torch.nn.Parameter | None,
) -> "LatentAdam | LatentMuon | ScheduleFreeAdam":
    """The optimiser of these groups of parameters; `unit_rows` stay at norm 1 while they learn."""
    if unit_rows is not None and not unit_rows.requires_grad:
        unit_rows = None
    match settings:
        case optim_config.Adam():
            return LatentAdam(params, settings, unit_rows)
        case optim_config.Muon():
            return LatentMuon(params, settings, unit_rows)
        case optim_config.ScheduleFree():
            return ScheduleFreeAdam(params, settings, unit_rows)
        case _:
            assert_never(settings)


class Copies(Protocol):
    """Copies of matrices in 16 bits, which are written with them."""

    def to_write(self, rows: Float[Tensor, "d_sae width"]) -> BFloat16[Tensor, "..."] | None:
        """The copy of this matrix, if there is one."""
        ...


class LatentAdam(Adam):
    """Fused Adam; rows of `unit_rows` stay at norm 1 and only turn.

    The part of a row's gradient along the row is taken out before the step (it would only
    change the norm), and the row is brought back to norm 1 after it (Bricken et al. 2023).
    States in fewer bits are those of matrices; vectors keep float32.
    """

    restart = forget

    def __init__(
        self,
        params: list[torch.nn.Parameter] | list[dict[str, Any]],
        settings: optim_config.Adam,
        unit_rows: torch.nn.Parameter | None = None,
    ) -> None:
        """Take Adam's settings; `unit_rows` is one of the params, (d_sae, d_out), or None."""
        betas = (settings.beta1, settings.beta2)
        lr = settings.first_lr
        super().__init__(params, lr=lr, betas=betas, eps=settings.eps, fused=True)
        self.found_inf: Float[Tensor, ""] | None = None
        self.unit_rows = unit_rows
        self.dtype = DTYPES[settings.states]
        self.clip: Float[Tensor, ""] | None = None
        self.shadows: Copies | None = None
        self.matrices: list[tuple[torch.nn.Parameter, dict[str, Any]]] = [
            (p, group)
            for group in self.param_groups
            for p in group["params"]
            if p is unit_rows or (p.dim() == 2 and self._goes_by_rows(p))
        ]

    def _goes_by_rows(self, matrix: torch.nn.Parameter) -> bool:
        """Whether the states have fewer bits, or the device a kernel that does all in one pass."""
        return self.dtype != torch.float32 or launch.choose(matrix, None) == "triton"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step, with the norm of the unit rows unchanged."""
        grads = [p.grad for p, _ in self.matrices]
        for parameter, _ in self.matrices:
            parameter.grad = None  # Adam passes over what has no gradient
        if self.clip is not None:
            for parameter in (p for group in self.param_groups for p in group["params"]):
                if parameter.grad is not None:
                    parameter.grad.mul_(self.clip)
        super().step(closure)
        for seed, (parameter, group) in enumerate(self.matrices):
            parameter.grad = grads[seed]
            if parameter.grad is not None:
                self._move(parameter, parameter.grad, group, seed)

    def _move(
        self,
        rows: torch.nn.Parameter,
        grad: Float[Tensor, "d_sae d_out"],
        group: dict[str, Any],
        seed: int,
    ) -> None:
        state, is_unit = self.state[rows], rows is self.unit_rows
        if not state:
            state.update(self._start(rows))
        skip, seen = self.found_inf, state["step"]
        seen += 1 if skip is None else 1 - skip
        packed = self.dtype == torch.uint8
        # the device alone knows how many steps were taken: the noise goes by what was tried
        seed += 0 if skip is None else len(self.matrices) * group["attempt"]
        latent_adam_(
            rows.data,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            int(seen) if skip is None else seen,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            project=is_unit,
            norm="unit" if is_unit else "none",
            scales=(state["exp_avg_scale"], state["exp_avg_sq_scale"]) if packed else None,
            seed=seed,
            skip=skip,
            clip=self.clip,
            shadow=None if self.shadows is None else self.shadows.to_write(rows),
        )

    def _start(self, rows: torch.nn.Parameter) -> dict[str, Tensor]:
        """States of 0; a code of 8 bits with a scale of 0 is 0."""
        names = ("exp_avg", "exp_avg_sq")
        dtype = self.dtype if self.dtype != torch.float32 else rows.dtype
        start = {name: torch.zeros_like(rows.data, dtype=dtype) for name in names}
        start["step"] = torch.zeros((), device=rows.device)
        if dtype == torch.uint8:
            shape = (len(rows), n_blocks(rows.shape[1]))
            start |= {f"{name}_scale": rows.data.new_zeros(shape) for name in names}
        return start


class EMA:
    """mean += (1 - decay) * (weights - mean) after each step.

    The decay of step n is at most (1 + n) / (10 + n), so that the first weights are soon forgotten.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """Begin at these weights, which are named as in the autoencoder."""
        self.parameters, self.decay = parameters, decay
        self.means = {name: p.detach().clone() for name, p in parameters.items()}

    def rate(self, n_steps: int) -> float:
        """By how much the mean follows after step number `n_steps`, from 0 on."""
        return 1 - min(self.decay, (1 + n_steps) / (10 + n_steps))

    @torch.no_grad()
    def update(self, n_steps: int, taken: Bool[Tensor, ""] | None = None) -> None:
        """Take the weights in after step number `n_steps`, from 0 on, if that is taken."""
        rate = self.rate(n_steps)
        for name, parameter in self.parameters.items():
            mean = self.means[name]
            mean.lerp_(parameter if taken is None else parameter.where(taken, mean), rate)

    @torch.no_grad()
    def restart(self, name: str, latents: Int[Tensor, " latent"]) -> None:
        """Take the newest weights of some latents for their mean."""
        if name in self.means:
            self.means[name][latents] = self.parameters[name][latents]


@torch.no_grad()
def with_means(
    autoencoder: SparseAutoencoder, means: Mapping[str, Float[Tensor, "..."]], unit_norm: bool
) -> SparseAutoencoder:
    """A copy that has these weights, with what holds for weights: unit rows, thresholds from 0."""
    made = copy.deepcopy(autoencoder)
    for name, mean in means.items():
        made.get_parameter(name).copy_(mean)
    if unit_norm and "dec_rows" in means:
        normalise_rows_(made.dec_rows)
    if "threshold" in means:
        made.get_parameter("threshold").clamp_(min=0)
    return made


class LatentMuon(Adam):
    """torch's Muon and Adam over one set of states; unit rows stay at norm 1 and only turn."""

    restart = forget

    def __init__(
        self,
        params: list[dict[str, Any]],
        settings: optim_config.Muon,
        unit_rows: torch.nn.Parameter | None = None,
    ) -> None:
        """Take Muon's settings; `unit_rows` is one of the params, (d_sae, d_out), or None."""
        super().__init__(params, lr=settings.first_lr, fused=True)
        self.found_inf: Float[Tensor, ""] | None = None
        self.shadows: Copies | None = None  # which it does not write
        every = [p for group in self.param_groups for p in group["params"]]
        self.matrices = [p for p in every if p.dim() == 2]
        self.unit_rows = unit_rows
        self.muon = Muon(
            self.matrices,
            lr=settings.first_lr,
            weight_decay=0.0,
            momentum=settings.momentum,
            ns_steps=settings.newton_schulz,
            adjust_lr_fn="match_rms_adamw",
        )
        self.muon.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step, with the norm of the unit rows unchanged."""
        unit = self.unit_rows
        grads = [p.grad for p in self.matrices]
        for parameter in self.matrices:
            parameter.grad = None  # Adam passes over what has no gradient
        super().step(closure)
        for parameter, grad in zip(self.matrices, grads, strict=True):
            parameter.grad = grad
        if unit is not None and unit.grad is not None:
            unit.grad = across(unit.grad, unit)
        self.muon.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        skips = None if self.found_inf is None else self.found_inf > 0
        moved = [p for p in self.matrices if p.grad is not None]
        before = [] if skips is None else [self._held_back(p, skips) for p in moved]
        self.muon.step()
        if unit is not None:
            normalise_rows_(unit)
        if skips is not None:
            for parameter, old in zip(moved, before, strict=True):
                parameter.copy_(old.where(skips, parameter))

    def _held_back(self, parameter: torch.nn.Parameter, skips: Bool[Tensor, ""]) -> Tensor:
        """Let a skipped step leave the momentum as it is; return the weights before it."""
        momentum, grad = self.state[parameter].get("momentum_buffer"), parameter.grad
        assert grad is not None, "only what has a gradient is moved"
        momentum = torch.zeros_like(grad) if momentum is None else momentum
        parameter.grad = momentum.where(skips, grad)
        return parameter.detach().clone()


class ScheduleFreeAdam(Optimizer):
    """z: the newest weights; x: their mean; the parameters are y = beta1 x + (1 - beta1) z.

    z -= lr g / (sqrt(v) + eps), g taken at y;  x += c (z - x), c the step's share of the sum of
    lr^2. Unit rows are brought to norm 1 in all three.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        settings: optim_config.ScheduleFree,
        unit_rows: torch.nn.Parameter | None = None,
    ) -> None:
        """Take the settings; `unit_rows` is one of the params, (d_sae, d_out), or None."""
        super().__init__(params, {"lr": settings.first_lr})
        self.settings = settings
        self.found_inf: Float[Tensor, ""] | None = None
        self.shadows: Copies | None = None  # which it does not write
        self.unit_rows = unit_rows

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # noqa: ARG002
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group["lr"])

    def _move(self, y: torch.nn.Parameter, grad: Tensor, lr: float) -> None:
        of, is_unit = self.settings, y is self.unit_rows
        state = self.state[y]
        if not state:
            state["step"] = torch.zeros((), device=y.device)
            state["weight"] = torch.zeros((), dtype=torch.float64, device=y.device)
            state["z"], state["x"] = y.detach().clone(), y.detach().clone()
            state["exp_avg_sq"] = torch.zeros_like(y)
        z, x, square = state["z"], state["x"], state["exp_avg_sq"]
        skip = self.found_inf
        old = [] if skip is None else [t.detach().clone() for t in (z, x, square, y)]
        state["step"] += 1 if skip is None else 1 - skip
        state["weight"] += lr**2 if skip is None else lr**2 * (1 - skip).double()
        grad = across(grad, y) if is_unit else grad
        square.mul_(of.beta2).addcmul_(grad, grad, value=1 - of.beta2)
        root = (square / (1 - of.beta2 ** state["step"].double())).sqrt_().add_(of.eps)
        z.addcdiv_(grad, root, value=-lr)
        if is_unit:
            normalise_rows_(z)
        x.lerp_(z, (lr**2 / state["weight"]).to(x.dtype))
        y.copy_(x.lerp(z, 1 - of.beta1))
        if is_unit:
            normalise_rows_(x)
            normalise_rows_(y)
        if skip is not None:
            for now, before in zip((z, x, square, y), old, strict=True):
                now.copy_(before.where(skip > 0, now))

    def restart(self, parameter: torch.nn.Parameter, latents: Int[Tensor, " latent"]) -> None:
        """Take the parameter's values for what was known of some latents' weights."""
        state = self.state.get(parameter, {})
        if state:
            state["z"][latents] = state["x"][latents] = parameter.detach()[latents]
            state["exp_avg_sq"][latents] = 0

    def means(self) -> dict[Tensor, Tensor]:
        """The averaged weights by parameter: what is worth saving."""
        return {parameter: state["x"] for parameter, state in self.state.items()}


class OneOptimizer(Optimizer):
    """What Lightning sees of the steps' optimisers: their rates, and that a step is done."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        """Show the parameter groups of all of them."""
        super().__init__([group for one in optimizers for group in one.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Nothing: the steps took it already."""
        if closure is not None:
            closure()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the state of the steps is in the checkpoint already."""
        return {"state": {}, "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing, as there is nothing in it."""
