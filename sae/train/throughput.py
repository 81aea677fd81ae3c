"""Figures of a run at the steps that are logged: of each dictionary, and of where time goes."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor

from sae.train.diagnostics import Watch
from sae.train.ranks import Ranks
from sae.train.step import StepMetrics, TrainStep

STUCK = 0.9
"""A share of JumpReLU's thresholds without a gradient from which on something is wrong."""
PATIENCE = 3
"""Logged points at which that has to be so, one after the other, before it is said."""
MOST_IN_A_ROW = 3
"""Steps in a row that are not finite, after which a run ends."""

logger = logging.getLogger(__name__)


class Meter:
    """Measures between two logged steps; the device is waited for at logged steps alone.

    Figures are by name: `DICTIONARY/FIGURE`, and without a dictionary those of the run. All
    processes have to call `read` at the same steps.
    """

    def __init__(
        self, steps: Mapping[str, TrainStep], rows_per_step: int, every: int, ranks: Ranks
    ) -> None:
        """Take the dictionaries' steps, which are watched from now on.

        Args:
            steps: By name.
            rows_per_step: Rows of a step, over all processes.
            every: Steps between two logged ones.
            ranks: The processes that train together.
        """
        self.rows_per_step, self.every, self.ranks = rows_per_step, every, ranks
        self.watches = {name: Watch(step.autoencoder, ranks) for name, step in steps.items()}
        for name, step in steps.items():
            step.watch = self.watches[name]
        self.windows = {name: step.config.activation.window for name, step in steps.items()}
        self.stuck = dict.fromkeys(steps, 0)
        self.seconds = dict.fromkeys((*steps, ""), 0.0)
        self.n_steps = 0
        self.began = self.read_at = time.perf_counter()
        self.n_since_began = 0
        self.lines: tuple[str, ...] = ()

    def start(self) -> None:
        """Begin to count time."""
        self.began = self.read_at = time.perf_counter()

    def before(self, n_steps: int, total_steps: int) -> bool:
        """Whether the step with this number, from 1 on, is logged; the watches are told."""
        is_due = n_steps % self.every == 0 or n_steps == total_steps
        for watch in self.watches.values():
            watch.is_due = is_due
        self.n_steps += 1
        self.n_since_began += 1
        return is_due

    @contextmanager
    def timed(self, name: str = "") -> Iterator[None]:
        """Count the time inside as that of a dictionary, or without a name as waiting for rows."""
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began

    def read(
        self, metrics: Mapping[str, StepMetrics], n_steps: int, total_steps: int
    ) -> dict[str, float]:
        """All figures of a step that is logged; what is counted begins anew."""
        found = {}
        for name, of_step in metrics.items():
            own = {key: float(value) for key, value in of_step._asdict().items()}
            own |= self.watches[name].read()
            own["rows_per_second"] = self.n_steps * self.rows_per_step / self.seconds[name]
            self._warn_of_stuck(name, own)
            found |= {f"{name}/{key}": value for key, value in own.items()}
        found |= self._pace(total_steps - n_steps)
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self.n_steps = 0
        found["rows"] = float(n_steps * self.rows_per_step)
        self.lines = tuple(_line(name, found) for name in metrics)
        return found

    def _pace(self, n_left: int) -> dict[str, float]:
        now = time.perf_counter()
        since, waited = now - self.read_at, self.seconds[""]
        self.read_at = now
        micros = self.ranks.largest(round(1e6 * waited))  # the slowest process holds up all
        return {
            "rows_per_second": self.n_steps * self.rows_per_step / since,
            "loader_wait": min(micros / 1e6 / since, 1.0),
            "eta_seconds": (now - self.began) / self.n_since_began * n_left,
        }

    def _warn_of_stuck(self, name: str, figures: Mapping[str, float]) -> None:
        """Say once that JumpReLU's thresholds do not learn: the kernel is too narrow."""
        share = figures.get("threshold_stuck", 0.0)
        self.stuck[name] = self.stuck[name] + 1 if share > STUCK else 0
        if self.stuck[name] == PATIENCE and self.ranks.is_first:
            logger.warning(
                "saes.%s: %.0f %% of the thresholds got no gradient over %d steps, because no "
                "pre-activation came within half of activation.bandwidth=%g of them; raise "
                "activation.bandwidth",
                name,
                100 * share,
                PATIENCE * self.every,
                self.windows[name],
            )


def _line(name: str, figures: Mapping[str, float]) -> str:
    fvu, l0, dead = (figures[f"{name}/{key}"] for key in ("fvu", "l0", "dead"))
    return f"{name}: FVU {fvu:.3f}, L0 {l0:.1f}, dead {dead:.1%}"


class Failures:
    """Counts, where the dictionaries are, the steps in a row in which one was not finite.

    The host looks when it looks at other figures, so a GPU is not waited for after each step.
    """

    def __init__(self, names: tuple[str, ...], *, looks_at_once: bool = False) -> None:
        """Take the dictionaries' names, and whether each step is looked at; none has failed."""
        self.names, self.looks_at_once = names, looks_at_once
        self.state: Int[Tensor, " figure"] | None = None

    def see(self, metrics: Mapping[str, StepMetrics], n_steps: int) -> None:
        """Take a step in: how many in a row failed, at which the third did, and whose it was."""
        finite = [metrics[name].finite for name in self.names]
        if self.looks_at_once and all(map(bool, finite)):
            self.state = None  # counting in tensors costs a twentieth of a small step
            return
        bad = torch.stack([one == 0 for one in finite])
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
