"""TrainStep: forward, losses, backward, clipping, optimiser, schedules, dead-latent tracking.

BatchTopK's threshold, which follows what the batches say of it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from monosema.checks import MonosemaError, at_least
from sae.architecture import SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.losses import Loss
from sae.train.config import DictionaryConfig
from sae.train.diagnostics import Watch
from sae.train.forward import sparse
from sae.train.forward.common import (
    DeadBound,
    Forward,
    Moment,
    Power,
    Rows,
    Taken,
    WeightedLoss,
)
from sae.train.forward.run import backward
from sae.train.forward.sharded import require_shardable
from sae.train.gradients import GradientSums, gradient_norm
from sae.train.optim import (
    EMA,
    LatentAdam,
    ScheduleFreeAdam,
    normalise_rows_,
    optimizer_of,
    with_means,
)
from sae.train.optim_config import automatic_rate, holds_decoder, rate_factor, travel_rate
from sae.train.ranks import (
    ALONE,
    GlobalBatch,
    Ranks,
    batch_of,
    mean_figures,
    of_latents,
    part_of,
    whole_of,
)
from sae.train.weights import (
    anchor_of,
    blank_,
    blank_gradients_,
    candidates_of,
    freeze,
    groups_of,
    is_resampling_due,
    keep_near_,
    open_,
    resample_,
)

THRESHOLD_BATCHES = 100
"""BatchTopK's threshold is a mean over about so many batches, or the last 20th of a short run."""


def threshold_rate(total_steps: int) -> float:
    """By how much BatchTopK's threshold follows what a batch says of it."""
    return 1 / min(max(total_steps / 20, 1), THRESHOLD_BATCHES)


@torch.no_grad()
def follow_(
    threshold: Float[Tensor, ""],
    seen: Float[Tensor, ""],
    rate: float,
    taken: Taken = None,
) -> None:
    """Move a running threshold towards the one of a batch, in place; the first is taken as it is.

    A batch in which nothing fires says nothing.
    """
    start = torch.where(threshold.isnan(), seen, threshold)
    moved = start + rate * (seen - start)
    says = seen.isfinite() if taken is None else seen.isfinite() & taken
    threshold.copy_(torch.where(says, moved, threshold))


class StepMetrics(NamedTuple):
    """Figures of one step, as tensors on the device, so that nothing waits for them."""

    loss: Float[Tensor, ""]
    """What was minimised."""
    fvu: Float[Tensor, ""]
    """Squared error over a batch's variance, centred per dimension, in the dictionary's units."""
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
    On a GPU the host waits for nothing in a step: what it would look at stays there, and whether
    the step was taken is a mask over what it changes.
    """

    def __init__(
        self,
        autoencoder: SparseAutoencoder,
        config: DictionaryConfig,
        total_steps: int,
        *,
        precision: str = "fp32",
        ranks: Ranks = ALONE,
        losses: Sequence[Loss] = (),
    ) -> None:
        """Take the autoencoder, which the steps change in place.

        Args:
            autoencoder: An initialised autoencoder, on its device.
            config: Losses, optimiser and dead-latent care; its form is the autoencoder's.
            total_steps: Length of the schedules.
            precision: "fp32", or "bf16" for the encoder's and the dense products.
            ranks: The processes that train it; each gives the steps its own rows of every batch,
                and `self.autoencoder` has its own latents.
            losses: Losses of your own, added to those of the config.
        """
        at_least("total_steps", total_steps, 1)
        _require_fit(autoencoder.config, config)
        if not bool(autoencoder.dec_rows.any()):
            raise MonosemaError(
                "autoencoder must have decoder rows that are not all 0, which never learn; fill it "
                "by initialise(autoencoder, generator), or take one from sae.load"
            )
        _require_float32(autoencoder)
        require_shardable(config, ranks.latents.size, losses)
        self.form = autoencoder.config
        self.autoencoder = autoencoder = part_of(autoencoder, ranks.latents)
        self.config = config
        self.total_steps = total_steps
        self.bf16 = precision == "bf16"
        self.losses = tuple(WeightedLoss(each.coefficient, each.make()) for each in config.losses)
        self.losses += tuple(WeightedLoss(1.0, loss) for loss in losses)
        self.ranks = ranks
        self.n_steps = 0
        self.power = Power()
        self.watch: Watch | None = None
        d_sae, device = autoencoder.config.d_sae, autoencoder.enc_rows.device
        self.looks, self.sets_rates = device.type == "cpu", True
        self.bound, self.shadows = DeadBound(), sparse.Shadows()
        self.silent_rows = torch.zeros(d_sae, dtype=torch.int64, device=device)
        if config.cross_layer:
            blank_(autoencoder)
        freeze(autoencoder, config.frozen)
        self.anchor = anchor_of(autoencoder, config)
        self.learned = {n: p for n, p in autoencoder.named_parameters() if p.requires_grad}
        self.params = [*self.learned.values()]
        self.sums = GradientSums(self.learned, ranks, self.bf16)
        unit = autoencoder.dec_rows if config.unit_norm else None
        if unit is not None:
            with torch.no_grad():
                normalise_rows_(unit)
        groups = groups_of(self.learned, config, self.form)
        self.optimizer = optimizer_of(groups, config.optimizer, unit)
        self.optimizer.shadows = self.shadows
        self.ema = None if config.ema is None else EMA(self.learned, config.ema)

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
            raise MonosemaError(f"step must get {has} with outputs={self.config.outputs}")
        _require_float32(self.autoencoder)
        u = self.autoencoder.scaled(x)
        rows = Rows(u, u if target is None else self.autoencoder.scaled_out(target))
        batch = batch_of(rows.v, self.ranks)
        moment = self.moment(batch.n_rows, batch.share)
        self.optimizer.zero_grad(set_to_none=True)
        of = (self.autoencoder, self.config)
        found = backward(*of, rows, moment, loss_of, self.shadows, self.sums)
        self.sums.finish()
        if self.config.cross_layer:
            blank_gradients_(self.autoencoder)
            found = found._replace(squares=None)
        norm = gradient_norm(self.learned, self.ranks, found.squares)
        figures = torch.stack([found.loss, found.error, found.l0])
        loss, error, l0 = mean_figures(figures, batch.share, self.ranks)
        finite = loss.isfinite() & norm.isfinite()
        if not self.looks or bool(finite):
            taken = None if self.looks else finite
            if self.watch is not None:
                self.watch.see(found, rows, batch.n_rows, taken)
            self._clip(norm)
            self._update(found, batch, taken)
            self._resample(rows, taken)
        self.n_steps += 1
        dead = self.ranks.latents.mean(self._dead.float().mean())
        return StepMetrics(loss, error / batch.variance, l0, dead, norm, finite.float())

    def moment(self, n_rows: int, share: float = 1.0) -> Moment:
        """Where training stands, at a step with so many rows of which this process has a share."""
        place = (self.n_steps, self.total_steps, self._dead, self.bf16, self.power)
        most = self._most_dead(n_rows)
        return Moment(*place, self.ranks, n_rows, share, self.losses, most, self.looks)

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

    def _clip(self, norm: Float[Tensor, ""]) -> None:
        """Bring the gradients' norm down; on a GPU Adam does so while it reads them."""
        clip = self.config.optimizer.clip
        if clip is None:
            return
        if isinstance(self.optimizer, LatentAdam) and not self.looks:
            self.optimizer.clip = (clip / (norm + 1e-6)).clamp(max=1.0)
        else:
            torch.nn.utils.clip_grads_with_norm_(self.params, clip, norm)

    def set_rates(self, n_rows: int) -> None:
        """Bring the learning rates to those of the coming step, which has so many rows."""
        factor = rate_factor(self.config.optimizer, self.n_steps, self.total_steps)
        for group in self.optimizer.param_groups:
            base, (d_sae, d_in) = group["base_lr"], group["of"]
            if base == "auto":
                dense = self.config.control is not None
                base = automatic_rate(d_sae, d_in, n_rows, self.total_steps, starts_dense=dense)
                base = max(base, travel_rate(group["fires"], self.total_steps))
            group["attempt"] = self.n_steps
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor

    @property
    def holds_decoder(self) -> bool:
        """Whether the coming step leaves the decoder as it is."""
        refine, at = self.config.refine, (self.n_steps, self.total_steps)
        return refine is not None and holds_decoder(refine, *at)

    def _update(self, found: Forward, batch: GlobalBatch, taken: Taken) -> None:
        if self.sets_rates:
            self.set_rates(batch.n_rows)
        if self.holds_decoder:
            self.autoencoder.dec_rows.grad = None  # optimisers pass over it
        self.optimizer.found_inf = None if taken is None else (~taken).float()
        self.optimizer.step()
        if self.anchor is not None:
            keep_near_(self.autoencoder.dec_rows, self.anchor, taken)
        if self.config.auxk is not None:
            open_(self.autoencoder, self.optimizer, self._dead, self.ranks, taken)
        if self.autoencoder.config.activation.facts.threshold == "per latent":
            with torch.no_grad():  # below 0 it would let negative pre-activations through
                self.autoencoder.get_parameter("threshold").clamp_(min=0)
        if found.threshold is not None:
            running = self.autoencoder.get_buffer("threshold")
            follow_(running, found.threshold, threshold_rate(self.total_steps), taken)
        if found.power is not None:
            self.power = self.power.followed_by(found.power, taken)
        fired = self.ranks.any(found.n_fired > 0)
        self.silent_rows += batch.n_rows if taken is None else taken * batch.n_rows
        self.silent_rows.masked_fill_(fired if taken is None else fired & taken, 0)
        if self.ema is not None:
            self.ema.update(self.n_steps, taken)

    def _most_dead(self, n_rows: int) -> int | None:
        """A bound on the dead latents for losses that ask for it; None where the host may look."""
        if self.looks or (self.config.auxk is None and self.config.preact is None):
            return None
        after, n_steps = self.config.dead_after_tokens, self.n_steps
        return self.bound.of(self.silent_rows, after, n_steps, n_rows, self.ranks)

    def _resample(self, rows: Rows, taken: Taken) -> None:
        """After the steps at which it is due, begin dead latents again; then the host looks."""
        settings, n_steps = self.config.resample, self.n_steps + 1
        if settings is None or not is_resampling_due(settings, n_steps, self.total_steps):
            return
        if taken is not None and not bool(taken):
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
        state |= {} if self.anchor is None else {"anchor": self.anchor}
        state["n_steps"] = torch.tensor(self.n_steps)
        state["power"] = torch.tensor([float(part) for part in self.power], dtype=torch.float64)
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
            ValueError: If names, shapes or dtypes are not those of this step.
        """
        parameters = dict(self.autoencoder.named_parameters())
        expected = {f"param.{n}": (p.shape, p.dtype) for n, p in parameters.items()}
        found = {n: (t.shape, t.dtype) for n, t in state.items() if n.startswith("param.")}
        if found != expected:
            raise MonosemaError(f"a checkpoint must hold {expected}, got {found}")
        for name, parameter in parameters.items():
            parameter.copy_(state[f"param.{name}"])
            moments = f"adam.{name}."
            own = {k.removeprefix(moments): v for k, v in state.items() if k.startswith(moments)}
            if own:
                self.optimizer.state[parameter] = {
                    k: v.clone().to(parameter.device) for k, v in own.items()
                }
        for name, buffer in self.autoencoder.named_buffers():
            buffer.copy_(state[f"buffer.{name}"])
        for name, mean in ({} if self.ema is None else self.ema.means).items():
            mean.copy_(state[f"ema.{name}"])
        self.silent_rows.copy_(state["silent_rows"])
        if self.anchor is not None:
            self.anchor.copy_(state["anchor"])
        self.n_steps, self.bound = int(state["n_steps"]), DeadBound()
        self.power = Power(*state["power"].tolist())


def _require_float32(autoencoder: SparseAutoencoder) -> None:
    """Refuse weights of 16 bits, in which most of Adam's steps are lost; products may have them."""
    for name, value in (*autoencoder.named_parameters(), *autoencoder.named_buffers()):
        if value.dtype.itemsize < 4:
            raise MonosemaError(
                f"{name} must be float32 to be trained, got {value.dtype}; call .float() and pass "
                "precision='bf16' for products of 16 bits"
            )


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
        raise MonosemaError(f"autoencoder must be what the config describes, {wanted}, got {form}")
