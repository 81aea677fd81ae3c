"""What follows each step: progress, a checkpoint when it is time, the end when a signal says so."""

import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from activations_cache.progress import Progress
from sae.train import checkpoint
from sae.train.config import TrainConfig
from sae.train.ranks import Ranks
from sae.train.signals import Signals, Stopped

LATE = 1
"""It is time for a checkpoint: below the numbers of the signals that stop a run."""


class Saver:
    """Called after each step with what gives the state of the run.

    The first process writes, and its clock counts; a signal to any of them stops all.
    """

    def __init__(
        self,
        root: Path,
        identity: str,
        config: TrainConfig,
        ranks: Ranks,
        progress: Progress,
    ) -> None:
        """Take where to write, what is trained, and how often."""
        self.root, self.identity, self.config = root, identity, config
        self.ranks, self.progress = ranks, progress
        self.signals = Signals()
        self.saved_at = time.monotonic()
        self.lines: tuple[str, ...] = ()

    def __call__(
        self, n_steps: int, total_steps: int, state: Callable[[], dict[str, Tensor]]
    ) -> None:
        """Report, and save or stop if any process asks for it.

        Raises:
            Stopped: If a signal came; the checkpoint of this step is written.
        """
        if self.ranks.is_first:
            done, total = n_steps * self.config.batch, total_steps * self.config.batch
            self.progress(done, total, "\n".join(("rows", *self.lines)))
        late = time.monotonic() - self.saved_at >= self.config.checkpoint_seconds
        wish = LATE if late and self.ranks.is_first and n_steps < total_steps else 0
        wish = self.ranks.largest(self.signals.received or wish)
        if wish:
            self.save(n_steps, state())
        if wish > LATE:
            raise Stopped(wish, n_steps)

    def save(self, n_steps: int, state: dict[str, Tensor]) -> None:
        """Write a checkpoint; the others wait until it is there."""
        if self.ranks.is_first:
            checkpoint.save(self.root, n_steps, state, self.identity)
        self.ranks.largest(n_steps)
        self.saved_at = time.monotonic()
