"""TrainStep: forward, losses, backward, clipping, optimiser, schedules, dead-latent tracking."""

from typing import NamedTuple, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from sae import losses
from sae.architecture import ReLU, TopK
from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.optim import LatentAdam, normalise_rows_
from sae.train.schedule import ramp, warmup_decay
from sae_kernels import auxk


class StepMetrics(NamedTuple):
    """Figures of one step, as tensors on the device, so that nothing waits for them."""

    loss: Float[Tensor, ""]
    """What was minimised."""
    fvu: Float[Tensor, ""]
    """Squared error over this batch's variance, centred per dimension."""
    l0: Float[Tensor, ""]
    """Mean number of latents that fire in a row."""
    dead: Float[Tensor, ""]
    """Fraction of the latents that were silent for `dead_after_tokens` rows."""
    grad_norm: Float[Tensor, ""]
    """Norm of all gradients together, before clipping."""
    finite: Float[Tensor, ""]
    """1 where the step was taken, 0 where a non-finite loss or gradient skipped it."""


class _Forward(NamedTuple):
    loss: Float[Tensor, ""]
    error: Float[Tensor, ""]
    fired: Tensor
    l0: Float[Tensor, ""]


class TrainStep:
    """One optimiser step of one dictionary per call; everything that changes lives in here.

    `step(x)` takes rows (batch, d_in) in the model's units and returns StepMetrics. The result
    depends on the autoencoder, the config, the number of steps and the rows alone.
    """

    def __init__(
        self,
        autoencoder: SparseAutoencoder,
        config: DictionaryConfig,
        total_steps: int,
        *,
        precision: str = "fp32",
    ) -> None:
        """Take the autoencoder, which the steps change in place.

        Args:
            autoencoder: An initialised autoencoder, on its device.
            config: Losses, optimiser and dead-latent care; its form is the autoencoder's.
            total_steps: Length of the schedules.
            precision: "fp32", or "bf16" for the encoder's and the dense products.
        """
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        self.autoencoder = autoencoder
        self.config = config
        self.total_steps = total_steps
        self.bf16 = precision == "bf16"
        self.n_steps = 0
        d_sae = autoencoder.config.d_sae
        device = autoencoder.b_enc.device
        self.silent_rows = torch.zeros(d_sae, dtype=torch.int64, device=device)
        autoencoder.dec_rows.requires_grad_(config.frozen != "decoder")
        self.params = [p for p in autoencoder.parameters() if p.requires_grad]
        unit = autoencoder.dec_rows if config.unit_norm else None
        if unit is not None:
            with torch.no_grad():
                normalise_rows_(unit)
        learns = unit is not None and unit.requires_grad
        self.optimizer = LatentAdam(self.params, config.optimizer, unit if learns else None)

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> StepMetrics:
        """Train on these rows; a non-finite loss or gradient leaves everything but the count."""
        u = self.autoencoder.scaled(x)
        forward = self._forward(u)
        self.optimizer.zero_grad(set_to_none=True)
        forward.loss.backward()
        clip = self.config.optimizer.clip
        norm = torch.nn.utils.clip_grad_norm_(self.params, float("inf") if clip is None else clip)
        finite = forward.loss.isfinite() & norm.isfinite()
        if bool(finite):
            self._update(forward, x.shape[0])
        self.n_steps += 1
        dead = (self.silent_rows >= self.config.dead_after_tokens).float().mean()
        fvu = forward.error.detach() / losses.batch_variance(u)
        return StepMetrics(forward.loss.detach(), fvu, forward.l0, dead, norm, finite.float())

    def _update(self, forward: _Forward, n_rows: int) -> None:
        settings = self.config.optimizer
        factor = warmup_decay(self.n_steps, self.total_steps, settings.warmup, settings.decay)
        self.optimizer.param_groups[0]["lr"] = settings.lr * factor
        self.optimizer.step()
        self.silent_rows += n_rows
        self.silent_rows[forward.fired] = 0

    def _forward(self, u: Float[Tensor, "batch d_in"]) -> _Forward:
        match self.autoencoder.config.activation:
            case TopK():
                return self._forward_topk(u)
            case ReLU():
                return self._forward_relu(u)
            case _:
                assert_never(self.autoencoder.config.activation)

    def _forward_topk(self, u: Float[Tensor, "batch d_in"]) -> _Forward:
        with self._autocast(u.device):
            latents = self.autoencoder.encode_scaled(u)
        y = self.autoencoder.decode_scaled(latents)
        error = losses.squared_error(u, y)
        loss = error
        dead = self.silent_rows >= self.config.dead_after_tokens
        if self.config.auxk is not None and bool(dead.any()):
            loss = loss + self.config.auxk.coefficient * self._auxk(u, (u - y).detach(), dead)
        fires = latents.values > 0
        fired = latents.indices[fires].unique()
        return _Forward(loss, error, fired, fires.sum(dim=1).float().mean())

    def _auxk(
        self, u: Float[Tensor, "batch d_in"], residual: Float[Tensor, "batch d_out"], dead: Tensor
    ) -> Float[Tensor, ""]:
        settings, weights = self.config.auxk, self.autoencoder.encoder()
        assert settings is not None
        k = settings.k or max(u.shape[1] // 2, 1)
        b_in = None if weights.b_in is None else weights.b_in.detach()
        with self._autocast(u.device):
            guess = auxk(
                u, weights.enc_rows, weights.b_enc, self.autoencoder.dec_rows, dead, k, b_in=b_in
            )
        return losses.squared_error(residual, guess.float())

    def _forward_relu(self, u: Float[Tensor, "batch d_in"]) -> _Forward:
        assert self.config.l1 is not None
        with self._autocast(u.device):
            acts = self.autoencoder.encode_dense_scaled(u)
            y = self.autoencoder.decode_scaled(acts)
        error = losses.squared_error(u, y.float())
        settings = self.config.l1
        weight = settings.coefficient * ramp(self.n_steps, self.total_steps, settings.ramp)
        penalty = losses.l1_decoder_norm(acts, self.autoencoder.dec_rows.norm(dim=1))
        fires = acts.detach() > 0
        fired = fires.any(dim=0).nonzero().squeeze(1)
        return _Forward(error + weight * penalty, error, fired, fires.sum(dim=1).float().mean())

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs, as flat named tensors."""
        state = {f"param.{n}": p.detach() for n, p in self.autoencoder.named_parameters()}
        state["silent_rows"] = self.silent_rows
        state["n_steps"] = torch.tensor(self.n_steps)
        names: dict[Tensor, str] = {p: n for n, p in self.autoencoder.named_parameters()}
        for param, moments in self.optimizer.state.items():
            for key, value in moments.items():
                state[f"adam.{names[param]}.{key}"] = value
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`'s tensors.

        Raises:
            ValueError: If names or shapes are not those of this step.
        """
        parameters = dict(self.autoencoder.named_parameters())
        expected = {f"param.{n}": p.shape for n, p in parameters.items()}
        found = {n: t.shape for n, t in state.items() if n.startswith("param.")}
        if found != expected:
            raise ValueError(f"a checkpoint must hold {expected}, got {found}")
        for name, parameter in parameters.items():
            parameter.copy_(state[f"param.{name}"])
            moments = f"adam.{name}."
            own = {k.removeprefix(moments): v for k, v in state.items() if k.startswith(moments)}
            if own:
                self.optimizer.state[parameter] = {
                    k: v.clone().to(parameter.device if k != "step" else v.device)
                    for k, v in own.items()
                }
        self.silent_rows.copy_(state["silent_rows"])
        self.n_steps = int(state["n_steps"])
