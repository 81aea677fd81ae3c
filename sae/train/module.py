"""The LightningModule: several TrainSteps over the same batches; no model in here."""

import time
from collections.abc import Iterator, Mapping

import lightning
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.train.checkpoint import Saver
from sae.train.column_layout import Columns
from sae.train.latent_shards import own_state, whole_state
from sae.train.step import StepMetrics, TrainStep
from sae.train.throughput import Meter

MOMENT = 0.1
"""Seconds after which Lightning has its turn again: it takes a third of a millisecond."""
MOST_IN_A_ROW = 3
"""Steps in a row that are not finite, after which a run ends."""


class Failures:
    """Counts, where the dictionaries are, the steps in a row in which one was not finite.

    The host looks when it looks at other figures, so a GPU is not waited for after each step.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        """Take the dictionaries' names; nothing has failed yet."""
        self.names = names
        self.state: Int[Tensor, " figure"] | None = None

    def see(self, metrics: Mapping[str, StepMetrics], n_steps: int) -> None:
        """Take a step in: how many in a row failed, at which the third did, and whose it was."""
        bad = torch.stack([metrics[name].finite == 0 for name in self.names])
        if self.state is None:
            self.state = bad.new_zeros(2 + len(self.names), dtype=torch.int64)
        in_a_row = (self.state[:1] + 1) * bad.any()
        now = torch.cat([in_a_row, torch.full_like(in_a_row, n_steps), bad.long()])
        is_third = (in_a_row >= MOST_IN_A_ROW) & (self.state[1] == 0)
        self.state = torch.where(is_third, now, torch.cat([in_a_row, self.state[1:]]))

    def require_few(self) -> None:
        """Look, and refuse to go on after three in a row.

        Raises:
            FloatingPointError: If there were three.
        """
        _, at, *bad = (0, 0) if self.state is None else self.state.tolist()
        if at:
            named = ", ".join(name for name, is_bad in zip(self.names, bad, strict=True) if is_bad)
            raise FloatingPointError(
                f"the loss of {named} must be finite, got three steps in a row that are not, up "
                f"to step {at}; lower optimizer.lr or check the cache"
            )


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
        self.failures = Failures(tuple(steps))

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
        self.failures.see(metrics, self.n_steps)
        if is_due or self.device.type == "cpu":
            self.failures.require_few()
        if is_due:
            self._log(metrics)
        self.after_step(self.n_steps, self.total_steps, self.full_state)

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
