"""A command that takes a config file: its arguments, and the run that does it."""

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from sae.cli import console
from sae.config import config_file, is_config, load
from sae.config.recipes import for_another_model
from sae.run.config import CacheRunConfig, RunConfig, part_of, require_installed

if TYPE_CHECKING:
    from sae.run.context import Run
    from sae.run.pipeline import RunStep

T = TypeVar("T", RunConfig, CacheRunConfig)

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or a name that `sae recipes` lists.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print tables and facts as one JSON object.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.saes.topk.d_sae=9216."),
]

PartOption = Annotated[
    str | None,
    typer.Option(
        "--part",
        metavar="I/N",
        help="Each Nth dictionary, from the Ith on, into OUTPUT/part-I-of-N; for array jobs.",
    ),
]

EstimateOption = Annotated[
    str | None,
    typer.Option(
        "--estimate",
        metavar="GPUS",
        help="Only tell what training takes on GPUs, such as 8xH200: time, memory, GPU hours.",
    ),
]

ForceOption = Annotated[
    bool,
    typer.Option("--force", help="Go on with another model or hook point; the result names it."),
]

ReadOutOption = Annotated[
    Literal["linear", "refined"],
    typer.Option("--read-out", help="How latents are read: by the encoder alone, or refined."),
]


def of_run(read_out: str) -> list[str]:
    """The override of a run's config that says how latents are read."""
    return [] if read_out == "linear" else [f"read_out={read_out}"]


def with_json(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the option --json, which prints what it shows as one JSON object."""

    @functools.wraps(command)
    def run(*args: object, as_json: bool = False, **options: object) -> None:
        with console.as_json() if as_json else contextlib.nullcontext():
            command(*args, **options)

    signature = inspect.signature(command)
    option = inspect.Parameter(
        "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JsonOption
    )
    parameters = [*signature.parameters.values(), option]
    run.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {**command.__annotations__, "as_json": JsonOption}
    run.__doc__ = paragraphs(command.__doc__ or "")
    return run


def paragraphs(text: str) -> str:
    """A docstring with a line for each paragraph, so that a terminal breaks them where it ends."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n"))


def checked_config(schema: type[T], config: str, overrides: list[str] | None) -> T:
    """Return the config that a file or a recipe and overrides describe, ready to be run.

    Raises:
        ConfigError: If there is no such config, or it is wrong.
        FileNotFoundError: If a package that carries its model or data is missing.
        ValueError: If another package that it needs is missing.
    """
    path = config_file(config)
    checked = load(schema, path, for_another_model(path, overrides or []))
    require_installed(checked)
    return checked


def refuse_without_cache(text: str) -> None:
    """Refuse a dictionary's path or name where a config is expected, for want of a cache.

    Raises:
        BadParameter: If it is one.
    """
    is_name = ":" in text and not Path(text).exists() and not is_config(text)
    if Path(text).is_dir() or is_name:
        raise typer.BadParameter(f"--cache must be given for a dictionary, got none for {text}")


def run_to(last: str, config: str, overrides: list[str] | None, part: str | None = None) -> None:
    """Check a config, then do its steps up to the named one; torch loads only after the check."""
    checked = checked_config(RunConfig, config, overrides)
    checked = checked if part is None else part_of(checked, part)
    from activations_cache.builder import rank_of_this_process
    from sae.run.context import Run
    from sae.run.pipeline import run_steps

    run = Run(checked)
    if rank_of_this_process()[0] > 0:
        run_steps(run, last)  # the first process shows what all do
        return
    began = time.monotonic()
    do_steps(run, last)
    from sae.run.pipeline import result_of

    result = result_of(run, last)
    console.table(checked.title, result.table)
    if last == "train":
        console.say(f"train: {run.path(last)}")
        if result.curves is not None:
            console.say(f"curves: {result.curves}")
    if result.page is not None:
        console.say(f"page: {result.page}  ({time.monotonic() - began:.0f} s)")


def tell_cost(config: str, overrides: list[str] | None, gpus: str, part: str | None = None) -> None:
    """Print what training a config takes on GPUs; nothing is begun, and no package is missed."""
    path = config_file(config)
    checked = load(RunConfig, path, for_another_model(path, overrides or []))
    from sae.run.costs import training_cost

    cost = training_cost(checked if part is None else part_of(checked, part), gpus)
    console.table(f"training on {gpus}", cost.table)
    console.say(
        f"{cost.n_rows:,} rows for each of {len(cost.steps)} dictionaries: "
        f"{cost.seconds / 3600:,.2f} hours, {cost.gpu_hours:,.2f} GPU hours"
    )


def do_steps(run: "Run", last: str, steps: "Sequence[RunStep] | None" = None) -> None:
    """Do what is not done yet, and show each step; those of `sae run` where none are named."""
    from sae.run.costs import estimate_time
    from sae.run.label_tables import llm_facts
    from sae.run.pipeline import SHARED, STEPS, pending_steps

    is_estimated = False
    for step in pending_steps(run, last, steps or STEPS):
        if step.is_done:
            console.skipped(step.name, step.path, step.place)
            continue
        if not is_estimated and step.name in SHARED:  # later there is nothing to train
            expected, n = estimate_time(run.config), len(run.config.train.saes)
            if expected is not None:
                console.say(
                    f"[dim]{expected.where}: training about {max(expected.seconds / 60, 0.1):.1f} "
                    f"min for {n} dictionaries; every step shows its own ETA[/]"
                )
            is_estimated = True
        with console.step(step.name, step.place) as progress:
            summaries = step.do(progress)
        for name, summary in (summaries or {}).items():
            console.facts(llm_facts(name, summary, step.path / name))
