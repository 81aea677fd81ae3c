"""Training, and the whole job of a config: its steps in their order.

A step whose result is there and fits is skipped.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from activations_cache import io, seals
from activations_cache.builder import rank_of_this_process
from activations_cache.checks import Progress, silent
from activations_cache.shared_text import require_launched
from sae import train as training  # imports Lightning when it trains
from sae.architecture import TopK
from sae.browser import ResultTable
from sae.config import ConfigError, digest, dump, load
from sae.evaluate.report import EvaluationReport, read_json
from sae.run import steps
from sae.run.browsing import INDEX
from sae.run.config import RUN_CONFIG, RunConfig
from sae.run.context import CacheOrPath, Run, opened, wrong_class
from sae.run.steps import MARKER, REPORT, mark
from sae.run.tables import result_table, training_table
from sae.train.config import DictionaryConfig, TrainConfig
from sae.train.curves import PICTURE


class RunStep(NamedTuple):
    """One step: what it does, what decides it, what it leaves."""

    name: str
    action: Callable[[Run, Progress], dict[str, Any] | None]
    config: Callable[[RunConfig], object]
    """The part of the config that decides this step's result, besides the steps before it."""
    results: Callable[[Run], list[Path]]
    """The files that it makes and that are read back; they must be as it left them."""
    of_images: bool = True
    """Whether it is done where the cache is of images."""


STEPS = (
    RunStep("cache", steps.cache, lambda c: c.cache, steps.cache_files),
    RunStep("train", steps.train, lambda c: c.train, steps.train_files),
    RunStep("evaluate", steps.evaluate, lambda c: c.evaluate, steps.evaluate_files),
    RunStep("explain", steps.explain, lambda c: c.explain, steps.explain_files),
    RunStep("steer", steps.steer, lambda c: c.steer, steps.steer_files, of_images=False),
    RunStep("browse", steps.browse, lambda c: {"title": c.title}, steps.browse_files),
)

_log = logging.getLogger(__name__)


SHARED = ("cache", "train")
"""What all processes of a launcher do; the first one marks it as done."""


class Pending(NamedTuple):
    """A step of a run, before it is done."""

    name: str
    place: tuple[int, int]
    """Which of how many steps it is, from 1."""
    path: Path
    """Directory of its result."""
    is_done: bool
    """Whether its result is there and fits the config."""
    do: Callable[[Progress], dict[str, Any] | None]
    """Do it, and mark it as done; explaining by a language model returns summaries by name."""


def pending_steps(
    run: Run, last: str, steps_of_job: Sequence[RunStep] = STEPS
) -> Iterator[Pending]:
    """Yield the steps up to `last`; the caller does a step that is not done before the next one.

    A step is done when its marker names the same digest of all the configs that decide it, and its
    results are as the marker says. Each step writes its result before its marker, so a killed run
    repeats at most that step. Of the processes of a launcher, all but the first are given the steps
    that they share alone. From the first step that is to be done the run's directory is locked.

    Raises:
        ConfigError: If a run of images has no such step.
    """
    rank, _ = rank_of_this_process()
    with contextlib.ExitStack() as held:
        identity = ""
        steps_of_run = _steps_to(run, last, steps_of_job)
        if any(step.name == "train" for step in steps_of_run):
            require_launched()
        for number, step in enumerate(steps_of_run, start=1):
            if rank > 0 and step.name not in SHARED:
                return  # what follows is the first process's alone
            identity = digest({"after": identity, step.name: step.config(run.config)})
            do = partial(_do, run, step, identity, held) if rank == 0 else partial(step.action, run)
            place, is_done = (number, len(steps_of_run)), not _undone(run, step, identity)
            yield Pending(step.name, place, run.path(step.name), is_done, do)
            if step.name != last:
                steps.check(run, step.name, last)
        if rank == 0 and not _records_config(run):
            _begin(run, held)


def _begin(run: Run, held: contextlib.ExitStack) -> None:
    """Lock the run's directory, once, and record the config that is run in it."""
    if run.is_held:
        return
    held.enter_context(io.only_one(run.output / ".run.lock", f"the run in {run.output}"))
    run.is_held = True
    held.callback(run.release)
    if not _records_config(run):
        io.write_files({run.output / RUN_CONFIG: dump(run.config).encode()})


def _records_config(run: Run) -> bool:
    file = run.output / RUN_CONFIG
    return file.is_file() and file.read_bytes() == dump(run.config).encode()


def _do(
    run: Run, step: RunStep, identity: str, held: contextlib.ExitStack, progress: Progress
) -> dict[str, Any] | None:
    _begin(run, held)
    for file in _undone(run, step, identity):
        if file.is_file() and file.name != MARKER:  # or it is taken for the step's own again
            _log.warning("%s is not as it was written; it is removed and made again", file)
            io.unlink(file)
    path = run.path(step.name)
    io.unlink(path / MARKER)
    run.identity = identity
    result = step.action(run, progress)
    mark(path, identity, step.results(run))
    return result


def _steps_to(run: Run, last: str, steps_of_job: Sequence[RunStep]) -> list[RunStep]:
    """The steps of the run up to `last`."""
    if run.config.study is not None and last == "browse":
        raise ConfigError("study must be absent for `sae run`, got one; `sae study` reads it")
    selected = [step for step in steps_of_job if step.of_images or not run.of_images]
    names = [step.name for step in selected]
    if last not in names:
        raise ConfigError(
            f"cache must be of texts for `sae {last}`, got images; they end with `sae run`"
        )
    return selected[: names.index(last) + 1]


def _undone(run: Run, step: RunStep, identity: str) -> list[Path]:
    """Why a step is not done: its results that are missing or damaged, or else its marker.

    A marker of an older version names no results; then they must only be there.
    """
    path = run.path(step.name)
    try:
        record = json.loads((path / MARKER).read_bytes())
        is_same = record.pop("identity") == identity
        files = record.pop("files", None)
        if not is_same or record or not isinstance(files, dict | None):
            return [path / MARKER]
        if files is None:
            return [f for f in step.results(run) if not f.is_file() or not f.stat().st_size]
        wrong = [path / name for name, entry in files.items() if io.problem(path / name, entry)]
        return wrong + [d / seals.LIST for d in _directories(path, files) if seals.is_damaged(d)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [path / MARKER]


def _directories(path: Path, files: Iterable[str]) -> list[Path]:
    return list(dict.fromkeys((path / name).parent for name in files))


class JobResult(NamedTuple):
    """What a run has made."""

    output: Path
    """Directory of everything."""
    dictionaries: dict[str, Path]
    """By name."""
    table: ResultTable
    """One row per dictionary."""
    report: EvaluationReport | None = None
    """All figures, once they are measured."""
    curves: Path | None = None
    """Picture of the training, if that is the last step."""
    page: Path | None = None
    """First page of the browser, once it is written."""


def job(
    config: RunConfig | str | Path, last: str = "browse", *, progress: Progress = silent
) -> JobResult:
    """Do every step of a config whose result is not there yet, as `sae run` does.

    Args:
        config: What is run, or its YAML file.
        last: The last step: cache, train, evaluate, explain, steer or browse.
        progress: Called in every step.

    Raises:
        ConfigError: If the config is wrong, or has no such step.
        TypeError: If an argument is of another class.
    """
    if isinstance(config, str | Path):
        config = load(RunConfig, config)
    if not isinstance(config, RunConfig):
        raise wrong_class("config", "be a RunConfig or the path of a YAML file", config, "see docs")
    run = Run(config)
    run_steps(run, last, progress)
    return result_of(run, last)


def run_steps(
    run: Run, last: str, progress: Progress = silent, steps_of_job: Sequence[RunStep] = STEPS
) -> None:
    """Do the steps up to `last` that are not done."""
    for step in pending_steps(run, last, steps_of_job):
        if not step.is_done:
            step.do(progress)


def result_of(run: Run, last: str) -> JobResult:
    """Return what the steps up to `last` have made."""
    dictionaries = {name: run.path("train") / name for name in run.config.train.saes}
    if last == "cache":
        return JobResult(run.output, {}, ResultTable((), (), ""))
    if last == "train":
        picture = run.path("train") / PICTURE
        table = training_table(run.path("train"))
        curves = picture if picture.exists() else None
        return JobResult(run.output, dictionaries, table, curves=curves)
    report = read_json(run.path("evaluate") / REPORT)
    table = result_table(run, report, with_labels=last != "evaluate")
    page = (run.path("browse") / INDEX).resolve() if last == "browse" else None
    return JobResult(run.output, dictionaries, table, report, page=page)


def train(  # noqa: PLR0913
    cache: CacheOrPath,
    config: TrainConfig | Mapping[str, DictionaryConfig] | None = None,
    *,
    k: int = 32,
    d_sae: int | None = None,
    batch: int | None = None,
    epochs: int = 1,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> dict[str, Path]:
    """Train dictionaries on a cache; returns each one's directory.

    A run that was stopped goes on from its newest checkpoint.

    Args:
        cache: The rows.
        config: All about the training, or the dictionaries by name; one of TopK when absent.
        k: Latents of a row, where no config is given.
        d_sae: Latents of the dictionary, where no config is given; 8 times the width when absent.
        batch: Rows of a step, where no TrainConfig is given; its default when absent.
        epochs: Times that each row is seen, where no TrainConfig is given.
        seed: Of weights and order, where no TrainConfig is given.
        out: Directory of the result; `train` next to the cache when absent.
        progress: Called after every step.

    Raises:
        TypeError: If an argument is of another class.
        ValueError: If the config does not fit the cache.
    """
    cache = opened(cache)
    if config is None:
        width = cache.d_model(cache.hook_points[0])
        config = {"topk": DictionaryConfig(d_sae=d_sae or 8 * width, activation=TopK(k=k))}
    if isinstance(config, Mapping):
        size = TrainConfig.batch if batch is None else batch
        config = TrainConfig(saes=dict(config), epochs=epochs, seed=seed, batch=size)
    if not isinstance(config, TrainConfig):
        raise wrong_class("config", "be a TrainConfig or dictionaries by name", config, "see docs")
    return training.train(cache, config, out or cache.path.parent / "train", progress=progress)
