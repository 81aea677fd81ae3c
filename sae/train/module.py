"""The LightningModule: several TrainSteps over the same batches; no model in here."""

import time
from collections.abc import Iterator, Mapping

import lightning
import torch
from jaxtyping import Float
from torch import Tensor

from sae.train.checkpoint import Saver
from sae.train.column_layout import Columns
from sae.train.latent_shards import own_state, whole_state
from sae.train.step import StepMetrics, TrainStep
from sae.train.throughput import Meter

MOMENT = 0.1
"""Seconds after which Lightning has its turn again: it takes a third of a millisecond."""


class SAEModule(lightning.LightningModule):
    """Trains dictionaries side by side; the result of each is what it would be alone.

    Optimisation is manual: a TrainStep owns its optimiser, and Lightning's `global_step` stays
    0, so this module counts the steps and stops the Trainer itself. What Lightning takes for a
    batch is the iterator of all batches, again and again.
    """

    def __init__(
        self,
        steps: dict[str, TrainStep],
        total_steps: int,
        after_step: Saver,
        columns: Mapping[str, Columns],
        meter: Meter,
    ) -> None:
        """Take the steps by name, and what is called after each of them (progress, saving).

        `columns` says which columns of a batch each dictionary reads and predicts; `meter` makes
        the figures that are logged.
        """
        super().__init__()
        self.automatic_optimization = False
        self.steps = steps
        self.autoencoders = torch.nn.ModuleDict({n: s.autoencoder for n, s in steps.items()})
        self.total_steps = total_steps
        self.after_step = after_step
        self.columns = columns
        self.meter = meter
        self.n_steps = 0
        self.skipped = 0

    def configure_optimizers(self) -> None:
        """None: the TrainSteps hold the optimisers."""

    def on_train_start(self) -> None:
        """Hear signals; Lightning, which has just begun to do so, saves nothing of ours."""
        self.after_step.signals.listen()
        self.meter.start()

    def training_step(self, batches: Iterator[Tensor]) -> None:
        """As many steps as begin within a moment; Lightning's own work is done once for them."""
        until = time.monotonic() + MOMENT
        for x in batches:
            self.step(x.to(self.device, non_blocking=True))
            if self.n_steps >= self.total_steps:
                break
            if time.monotonic() >= until:
                return
        self.trainer.should_stop = True

    def step(self, x: Float[Tensor, "batch width"]) -> None:
        """One step of every dictionary on the same rows, of each its own hook points."""
        is_due = self.meter.before(self.n_steps + 1, self.total_steps)
        metrics = {}
        for name, step in self.steps.items():
            with self.meter.timed(name):
                metrics[name] = step(*self.columns[name].pick(x))
        self.n_steps += 1
        self._require_finite(metrics)
        if is_due:
            self._log(metrics)
        self.after_step(self.n_steps, self.total_steps, self.full_state)

    def _require_finite(self, metrics: dict[str, StepMetrics]) -> None:
        bad = [name for name, m in metrics.items() if not bool(m.finite)]
        self.skipped = self.skipped + 1 if bad else 0
        if self.skipped == 3:
            raise FloatingPointError(
                f"the loss of {', '.join(bad)} must be finite, got three steps in a row that are "
                f"not, up to step {self.n_steps}; lower optimizer.lr or check the cache"
            )

    def _log(self, metrics: dict[str, StepMetrics]) -> None:
        figures = self.meter.read(metrics, self.n_steps, self.total_steps)
        for logger in self.loggers:
            logger.log_metrics(figures, step=self.n_steps)
        self.after_step.lines = self.meter.lines

    def full_state(self) -> dict[str, Tensor]:
        """The state of all dictionaries, flat, each name prefixed by its dictionary's.

        It does not depend on the number of processes; only the first one gets all of it.
        """
        whole = {n: whole_state(s.state_dict(), s.ranks) for n, s in self.steps.items()}
        return {f"{n}/{k}": v for n, state in whole.items() for k, v in state.items()}

    def load_full_state(self, n_steps: int, state: dict[str, Tensor]) -> None:
        """Go on from `full_state` after `n_steps` steps."""
        for name, step in self.steps.items():
            own = {
                k.removeprefix(f"{name}/"): v for k, v in state.items() if k.startswith(f"{name}/")
            }
            step.load_state_dict(own_state(own, step.ranks))
        self.n_steps = n_steps
