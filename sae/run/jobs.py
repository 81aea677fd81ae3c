"""Training, and the whole job of a config, from Python."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from activations_cache.checks import Progress, silent
from sae import train as training  # imports Lightning when it trains
from sae.architecture import TopK
from sae.browser import ResultTable
from sae.config import load
from sae.evaluate.report import EvaluationReport, read_json
from sae.run.browsing import INDEX
from sae.run.config import RunConfig
from sae.run.context import CacheOrPath, Run, opened, wrong_class
from sae.run.pipeline import pending_steps
from sae.run.steps import REPORT
from sae.run.tables import result_table, training_table
from sae.train.config import DictionaryConfig, TrainConfig
from sae.train.curves import PICTURE


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


def run_steps(run: Run, last: str, progress: Progress = silent) -> None:
    """Do the steps up to `last` that are not done."""
    for step in pending_steps(run, last):
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
