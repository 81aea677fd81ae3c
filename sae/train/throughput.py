"""Figures of a run at the steps that are logged: of each dictionary, and of where time goes.

Steps that a GPU repeats from a CUDA graph, so that the host's launches take no time.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.train.config import DictionaryConfig
from sae.train.diagnostics import Watch
from sae.train.forward import run
from sae.train.optim import LatentAdam
from sae.train.ranks import Ranks
from sae.train.step import StepMetrics, TrainStep
from sae.train.weights import is_resampling_due

STUCK = 0.9
"""A share of JumpReLU's thresholds without a gradient from which on something is wrong."""
PATIENCE = 3
"""Logged points at which that has to be so, one after the other, before it is said."""
OFF, BEGUN, SETTLED = 0.05, 0.1, 0.75
"""How far from the L0 that is asked for it is said; the shares of the steps from which on too few
latents of the k count, and from which on a penalty has had its time."""
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
        self.asked = {name: _asked(step.config) for name, step in steps.items()}
        self.stuck, self.off = dict.fromkeys(steps, 0), dict.fromkeys(steps, 0)
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
            self._warn_of_l0(name, own["l0"], n_steps / total_steps)
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

    def _warn_of_l0(self, name: str, l0: float, done: float) -> None:
        """Say once that as many latents as are asked for do not fire, or more."""
        key, wanted = self.asked[name]
        is_k = key == "activation.k"
        is_off = l0 < (1 - OFF) * wanted or (not is_k and l0 > (1 + OFF) * wanted)
        counts = is_off and wanted > 0 and done > (BEGUN if is_k else SETTLED)
        self.off[name] = self.off[name] + 1 if counts else 0
        if self.off[name] == PATIENCE and self.ranks.is_first:
            logger.warning(
                "saes.%s: L0 is %.3g and has not been the %g of %s for %d steps; ask for as many "
                "latents as rows hold, or train longer",
                name,
                l0,
                wanted,
                key,
                PATIENCE * self.every,
            )


def _asked(config: DictionaryConfig) -> tuple[str, float]:
    """The key that asks for an L0, and the L0; 0 where none does."""
    found = {
        "activation.k": config.activation.per_row,
        "control.target": config.control and config.control.target,
        "l0.target": config.l0 and config.l0.target,
    }
    return next(((key, float(l0)) for key, l0 in found.items() if l0), ("", 0.0))


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


WARM_UP = 4
"""Steps with the same choices of the host before they are recorded: the kernels are compiled."""


def cuda_graph(work: Callable[[], None]) -> Callable[[], None]:
    """Record what `work` launches, and run none of it; what is returned runs it.

    The recording keeps the memory of a step, and steps that are launched take theirs beside it.

    Raises:
        RuntimeError: If there is not so much of it, or something waits for the device.
    """
    step = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free = torch.cuda.mem_get_info()[0]
    if free < step:
        raise RuntimeError(f"it takes {step >> 20} MiB, and {free >> 20} MiB are free")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a reader may pin memory
        work()
    return graph.replay


class _Recording(NamedTuple):
    key: tuple[Any, ...]
    given: tuple[Tensor, ...]
    """Where a replay reads its rows."""
    metrics: Tensor
    """Where it writes its figures."""
    replay: Callable[[], None]


class StepGraph:
    """A TrainStep that is recorded once and replayed for as long as the host decides nothing new.

    What a step does depends on its number (learning rates aside, which lie on the device) only
    through `run.choices` and a few more, which are compared; whatever cannot be recorded is
    launched as ever, which is said once.
    """

    def __init__(
        self,
        step: TrainStep,
        name: str = "sae",
        record: Callable[[Callable[[], None]], Callable[[], None]] = cuda_graph,
    ) -> None:
        """Take the step, its dictionary's name, and how launches are recorded."""
        self.step, self.name, self.record = step, name, record
        self.recording: _Recording | None = None
        self.is_refused = step.looks
        self._key: tuple[Any, ...] | None = None
        self._n_alike = 0

    def __call__(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"] | None = None
    ) -> StepMetrics:
        """Take the step, as `TrainStep` does."""
        step, given = self.step, (x,) if target is None else (x, target)
        is_new = step.sets_rates and not self.is_refused
        if is_new and (why := self._why_not(len(x))):
            self._refuse(logging.INFO, why)
        if self.is_refused:
            return step(*given)
        if is_new:
            for group in step.optimizer.param_groups:
                group |= {"lr": torch.zeros((), device=x.device), "capturable": x.is_cuda}
            step.sets_rates = False
        step.set_rates(len(x))
        key = self._choices(given)
        if key is None:
            return step(*given)
        self._n_alike = self._n_alike + 1 if key == self._key else 0
        self._key = key
        if self._n_alike < WARM_UP or not self._is_recorded(key, given):
            return step(*given)
        return self._replayed(given)

    def _why_not(self, n_rows: int) -> str | None:
        """What keeps this step from ever being recorded, if anything does."""
        step, optimizer = self.step, self.step.optimizer
        if not step.ranks.alone:
            return "several processes train it"
        if not isinstance(optimizer, LatentAdam) or optimizer.dtype != torch.float32:
            return "its optimiser is not Adam with states in float32"
        if run.choices(step.autoencoder, step.config, step.moment(n_rows)) is None:
            return "its kind of step is not recorded"
        return None

    def _choices(self, given: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
        """All that the host decides of the coming step; None where it looks at figures of it."""
        step, resample, n_steps = self.step, self.step.config.resample, self.step.n_steps + 1
        if step.watch is not None and step.watch.is_due:
            return None
        if resample is not None and is_resampling_due(resample, n_steps, step.total_steps):
            return None
        moment = step.moment(len(given[0]))
        rate = None if step.ema is None else step.ema.rate(step.n_steps)
        shapes = tuple((x.shape, x.dtype) for x in given)
        chosen = run.choices(step.autoencoder, step.config, moment)
        # a checkpoint that is taken up brings states of its own
        states = tuple(state["step"].data_ptr() for state in step.optimizer.state.values())
        return (chosen, moment.most_dead, step.holds_decoder, rate, shapes, states)

    def _is_recorded(self, key: tuple[Any, ...], given: tuple[Tensor, ...]) -> bool:
        """Whether there is a recording of this step, now or already."""
        if self.recording is not None and self.recording.key == key:
            return True
        self.recording = None  # whose memory goes back
        held, figures, n_steps = tuple(x.clone() for x in given), [], self.step.n_steps

        def work() -> None:
            figures.append(torch.stack([figure.float() for figure in self.step(*held)]))

        try:
            with torch.cuda.device_of(held[0]):
                replay = self.record(work)
        except RuntimeError as error:
            self._refuse(logging.WARNING, str(error).strip().split("\n")[0][:200])
            self.step.sets_rates = True
        else:
            self.recording = _Recording(key, held, figures[0], replay)
        self.step.n_steps = n_steps
        return self.recording is not None

    def _replayed(self, given: tuple[Tensor, ...]) -> StepMetrics:
        recording = self.recording
        assert recording is not None
        for place, x in zip(recording.given, given, strict=True):
            place.copy_(x)
        recording.replay()
        self.step.n_steps += 1
        return StepMetrics(*recording.metrics.clone().unbind())

    def _refuse(self, level: int, why: str) -> None:
        self.is_refused = True
        logger.log(level, "saes.%s: no CUDA graph, its steps are launched: %s", self.name, why)
