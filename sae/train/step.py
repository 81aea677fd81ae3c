"""TrainStep: forward, losses, backward, clipping, optimiser, schedules, dead-latent tracking."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.architecture import SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.train.accumulate import backward
from sae.train.averages import EMA, with_means
from sae.train.config import DictionaryConfig
from sae.train.forward.result import Forward, Moment, Power, Rows
from sae.train.forward.sharded import require_shardable
from sae.train.frozen import anchor_of, freeze, keep_near_
from sae.train.optim import optimizer_of
from sae.train.parts import gradient_norm, of_latents, part_of, sum_gradients, whole_of
from sae.train.ranks import ALONE, Batch, Ranks, batch_of, mean_figures
from sae.train.resample import candidates_of, is_due, resample_
from sae.train.rows import normalise_rows_
from sae.train.schedule import automatic_rate, holds_decoder, rate_factor
from sae.train.schedule_free import ScheduleFreeAdam
from sae.train.threshold import follow_, threshold_rate
from sae.train.watch import Watch


class StepMetrics(NamedTuple):
    """Figures of one step, as tensors on the device, so that nothing waits for them."""

    loss: Float[Tensor, ""]
    """What was minimised."""
    fvu: Float[Tensor, ""]
    """Squared error over this batch's variance, centred per dimension, of rows in the dictionary's
    units."""
    l0: Float[Tensor, ""]
    """Mean number of latents that fire in a row."""
    dead: Float[Tensor, ""]
    """Fraction of the latents that were silent for `dead_after_tokens` rows."""
    grad_norm: Float[Tensor, ""]
    """Norm of all gradients together, before clipping."""
    finite: Float[Tensor, ""]
    """1 where the step was taken, 0 where a non-finite loss or gradient skipped it."""


class TrainStep:
    """One optimiser step of one dictionary per call; everything that changes lives in here.

    `step(x)` takes rows (batch, d_in) in the model's units and returns StepMetrics;
    `step(x, target)` takes also the rows (batch, d_out) that are predicted, where these are others.
    The result depends on the autoencoder, the config, the number of steps and the rows alone.
    """

    def __init__(
        self,
        autoencoder: SparseAutoencoder,
        config: DictionaryConfig,
        total_steps: int,
        *,
        precision: str = "fp32",
        ranks: Ranks = ALONE,
    ) -> None:
        """Take the autoencoder, which the steps change in place.

        Args:
            autoencoder: An initialised autoencoder, on its device.
            config: Losses, optimiser and dead-latent care; its form is the autoencoder's.
            total_steps: Length of the schedules.
            precision: "fp32", or "bf16" for the encoder's and the dense products.
            ranks: The processes that train it; each gives the steps its own rows of every batch,
                and `self.autoencoder` has its own latents.
        """
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        _require_fit(autoencoder.config, config)
        require_shardable(config, ranks.latents.size)
        self.form = autoencoder.config
        self.autoencoder = autoencoder = part_of(autoencoder, ranks.latents)
        self.config = config
        self.total_steps = total_steps
        self.bf16 = precision == "bf16"
        self.ranks = ranks
        self.n_steps = 0
        self.power = Power()
        self.watch: Watch | None = None
        d_sae = autoencoder.config.d_sae
        device = autoencoder.enc_rows.device
        self.silent_rows = torch.zeros(d_sae, dtype=torch.int64, device=device)
        freeze(autoencoder, config.frozen)
        self.anchor = anchor_of(autoencoder, config)
        self.learned = {n: p for n, p in autoencoder.named_parameters() if p.requires_grad}
        self.params = [*self.learned.values()]
        unit = autoencoder.dec_rows if config.unit_norm else None
        if unit is not None:
            with torch.no_grad():
                normalise_rows_(unit)
        learns = unit is not None and unit.requires_grad
        self.optimizer = optimizer_of(self._groups(), config.optimizer, unit if learns else None)
        self.ema = None if config.ema is None else EMA(self.learned, config.ema)

    def _groups(self) -> list[dict[str, Any]]:
        """The parameters with their learning rates: JumpReLU's thresholds may have their own."""
        lr, penalty = self.config.optimizer.lr, self.config.l0 or self.config.tanh
        own = None if penalty is None else penalty.threshold_lr
        thresholds = [] if own is None else [self.autoencoder.get_parameter("threshold")]
        rest = [p for p in self.params if all(p is not t for t in thresholds)]
        groups = [{"params": rest, "base_lr": lr}]
        return [*groups, {"params": thresholds, "base_lr": own}] if thresholds else groups

    def __call__(
        self,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"] | None = None,
        *,
        loss_of: Callable[[Forward], Float[Tensor, ""]] | None = None,
    ) -> StepMetrics:
        """Train on these rows; a non-finite loss or gradient leaves everything but the count.

        Every figure is that of all processes' rows together.

        Args:
            x: Rows in the model's units.
            target: The rows that are predicted, where these are others.
            loss_of: What is minimised instead of the loss on these rows, made from it.

        Raises:
            ValueError: If there is a target where the rows themselves are predicted, or none where
                others are, or a width is wrong.
        """
        if (target is None) == bool(self.config.outputs):
            has = "a target" if self.config.outputs else "no target"
            raise ValueError(f"step must get {has} with outputs={self.config.outputs}")
        u = self.autoencoder.scaled(x)
        rows = Rows(u, u if target is None else self.autoencoder.scaled_out(target))
        batch = batch_of(rows.v, self.ranks)
        place = (self.n_steps, self.total_steps, self._dead, self.bf16, self.power)
        moment = Moment(*place, self.ranks, batch.n_rows, batch.share)
        self.optimizer.zero_grad(set_to_none=True)
        found = backward(self.autoencoder, self.config, rows, moment, loss_of)
        sum_gradients(self.learned, self.ranks)
        norm = gradient_norm(self.learned, self.ranks)
        figures = torch.stack([found.loss, found.error, found.l0])
        loss, error, l0 = mean_figures(figures, batch.share, self.ranks)
        finite = loss.isfinite() & norm.isfinite()
        if bool(finite):
            if self.watch is not None:
                self.watch.see(found, rows, batch.n_rows)
            clip = self.config.optimizer.clip
            if clip is not None:
                torch.nn.utils.clip_grads_with_norm_(self.params, clip, norm)
            self._update(found, batch)
            self._resample(rows)
        self.n_steps += 1
        dead = self.ranks.latents.mean(self._dead.float().mean())
        return StepMetrics(loss, error / batch.variance, l0, dead, norm, finite.float())

    def whole(self) -> SparseAutoencoder:
        """The dictionary with the latents of all processes; only the first one gets all of it.

        Where a mean of the weights is kept, it is a copy that has these.
        """
        means = {} if self.ema is None else self.ema.means
        if isinstance(self.optimizer, ScheduleFreeAdam):
            averaged = self.optimizer.means()
            means = {name: averaged[p] for name, p in self.learned.items() if p in averaged}
        own = self.autoencoder
        own = with_means(own, means, self.config.unit_norm) if means else own
        return own if self.ranks.latents.size == 1 else whole_of(own, self.form, self.ranks)

    def _update(self, found: Forward, batch: Batch) -> None:
        settings = self.config.optimizer
        factor = rate_factor(settings, self.n_steps, self.total_steps)
        auto = automatic_rate(self.config.d_sae, batch.n_rows, self.form.d_in)
        for group in self.optimizer.param_groups:
            base = auto if group["base_lr"] == "auto" else group["base_lr"]
            group["lr"] = base * factor
        refine = self.config.refine
        if refine is not None and holds_decoder(refine, self.n_steps, self.total_steps):
            self.autoencoder.dec_rows.grad = None  # optimisers pass over it
        self.optimizer.step()
        if self.anchor is not None:
            keep_near_(self.autoencoder.dec_rows, self.anchor)
        if self.autoencoder.config.activation.facts.threshold == "per latent":
            with torch.no_grad():  # below 0 it would let negative pre-activations through
                self.autoencoder.get_parameter("threshold").clamp_(min=0)
        if found.threshold is not None:
            running = self.autoencoder.get_buffer("threshold")
            follow_(running, found.threshold, threshold_rate(self.total_steps))
        self.power = found.power or self.power
        self.silent_rows += batch.n_rows
        fired = found.n_fired.nonzero().squeeze(1)
        self.silent_rows[self.ranks.any(fired, len(self.silent_rows))] = 0
        if self.ema is not None:
            self.ema.update(self.n_steps)

    def _resample(self, rows: Rows) -> None:
        """After the steps at which it is due, begin dead latents again."""
        settings, n_steps = self.config.resample, self.n_steps + 1
        if settings is None or not is_due(settings, n_steps, self.total_steps):
            return
        candidates = candidates_of(self.autoencoder, rows, self.ranks)
        latents = resample_(self.autoencoder, self._dead, candidates, settings, n_steps)
        self.silent_rows[latents] = 0
        for name in (name for name, p in self.learned.items() if of_latents(name, p)):
            self.optimizer.restart(self.learned[name], latents)
            if self.ema is not None:
                self.ema.restart(name, latents)

    @property
    def _dead(self) -> Bool[Tensor, " d_sae"]:
        return self.silent_rows >= self.config.dead_after_tokens

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs, as flat named tensors."""
        state = {f"param.{n}": p.detach() for n, p in self.autoencoder.named_parameters()}
        state |= {f"buffer.{n}": b for n, b in self.autoencoder.named_buffers()}
        state["silent_rows"] = self.silent_rows
        if self.anchor is not None:
            state["anchor"] = self.anchor
        state["n_steps"] = torch.tensor(self.n_steps)
        state["power"] = torch.tensor(self.power, dtype=torch.float64)
        names: dict[Tensor, str] = {p: n for n, p in self.autoencoder.named_parameters()}
        for param, moments in self.optimizer.state.items():
            for key, value in moments.items():
                state[f"adam.{names[param]}.{key}"] = value
        if self.ema is not None:
            state |= {f"ema.{name}": mean for name, mean in self.ema.means.items()}
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
                    k: v.clone().to(parameter.device if v.dim() else v.device)
                    for k, v in own.items()
                }
        for name, buffer in self.autoencoder.named_buffers():
            buffer.copy_(state[f"buffer.{name}"])
        for name, mean in ({} if self.ema is None else self.ema.means).items():
            mean.copy_(state[f"ema.{name}"])
        self.silent_rows.copy_(state["silent_rows"])
        if self.anchor is not None:
            self.anchor.copy_(state["anchor"])
        self.n_steps = int(state["n_steps"])
        self.power = Power(*state["power"].tolist())


def _require_fit(form: SAEConfig, config: DictionaryConfig) -> None:
    """Refuse an autoencoder that is not what the config says."""
    wanted = config.architecture(
        form.d_in,
        form.input_scale,
        d_out=form.d_out if config.outputs else None,
        output_scale=form.output_scale if config.outputs else None,
        inputs=form.inputs,
        outputs=form.outputs,
    )
    if form != wanted:
        raise ValueError(f"autoencoder must be what the config describes, {wanted}, got {form}")
