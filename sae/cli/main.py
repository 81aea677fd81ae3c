"""`sae`: the commands. Exit codes: 0 done, 1 failed, 2 wrong request, 70 a bug of this program.

After a signal: 143 (SIGTERM) and 138 (SIGUSR1); what is finished is saved.
"""

import enum
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from sae.cli import console, troubles
from sae.cli.cache_commands import app as cache_app
from sae.cli.cache_commands import convert, inspect, push, releases, verify, verify_release
from sae.cli.evaluate_commands import app as scaling_app
from sae.cli.evaluate_commands import compare, evaluate, similar, study
from sae.cli.latent_commands import browse, concepts, explain, find, refine, steer
from sae.cli.request import (
    ConfigArgument,
    EstimateOption,
    Overrides,
    PartOption,
    run_to,
    tell_cost,
    with_json,
)
from sae.config import ConfigError, config_file
from sae.config import recipes as recipe_lines

app = typer.Typer(
    name="sae",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn a model's activations into a dictionary of labelled, steerable features.",
    epilog="The steps of a run take a config file, or a recipe's name, and dotted overrides: "
    "sae run demo train.seed=1 output=runs/seed-1",
)

Bench = Literal[
    "auto", "gpu", "cpu", "cache", "storage", "loop", "labels", "image-labels", "windows",
    "browser", "run", "ground-truth", "ground-truth-grid", "compare-recipes", "gate",
]  # fmt: skip
MODULES: dict[Bench, tuple[str, str]] = {
    "gpu": ("benchmarks.gpu_suite", "every kernel and whole steps on a CUDA device"),
    "cpu": ("benchmarks.bench_cpu_step", "training steps against their products"),
    "cache": ("benchmarks.bench_cache", "building and reading a cache, beside peers"),
    "storage": ("benchmarks.bench_storage", "int8 and zstd: size, error, what is trained on it"),
    "loop": ("benchmarks.bench_loop", "the training loop against its bare steps"),
    "labels": ("benchmarks.bench_labels", "labels without a language model, beside baselines"),
    "image-labels": ("benchmarks.bench_image_labels", "labels of image latents by folders"),
    "windows": ("benchmarks.bench_windows", "the pass that collects windows"),
    "browser": ("benchmarks.browser", "the feature browser in Chromium"),
    "run": ("benchmarks.bench_run", "a whole run, step by step"),
    "ground-truth": ("benchmarks.ground_truth", "what recipes find of known features"),
    "ground-truth-grid": ("benchmarks.ground_truth_grid", "every kind over a grid of worlds"),
    "compare-recipes": ("benchmarks.compare_recipes", "tables of what `sae compare` measured"),
    "gate": ("benchmarks.bench_gate", "bytes that the encoder's gate saves, by arithmetic"),
}
"""The module of each benchmark, and what it measures."""

ROOT = Path(__file__).resolve().parents[2]
PASSED_ON = {"ignore_unknown_options": True}
"""Settings of the command: options that it does not know are the benchmark's."""

INTERRUPTED = 130
"""What typer returns after Ctrl-C."""


class Step(enum.StrEnum):
    """The steps of `sae run`, in their order; each is a command as well."""

    TRAIN = "train"
    EXPLAIN = "explain"
    STEER = "steer"
    BROWSE = "browse"


app.add_typer(cache_app, name="cache")
app.add_typer(scaling_app, name="scaling")


@app.command()
@with_json
def run(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Do every step whose result is not there yet, and print the page's path under one table."""
    run_to(Step.BROWSE, config, overrides)


@app.command()
@with_json
def train(
    config: ConfigArgument,
    overrides: Overrides = None,
    part: PartOption = None,
    estimate: EstimateOption = None,
) -> None:
    """Train the config's dictionaries side by side, after the cache."""
    if estimate is not None:
        tell_cost(config, overrides, estimate, part)
        return
    run_to(Step.TRAIN, config, overrides, part)


for command in (
    evaluate, compare, similar, study, concepts, explain, find, refine, steer, browse, verify,
    inspect, convert, push, releases,
):  # fmt: skip
    app.command()(with_json(command))
app.command(name="verify-release")(with_json(verify_release))


@app.command(context_settings=PASSED_ON)
def bench(
    name: Annotated[
        Bench | None,
        typer.Argument(help="None: a list; auto: gpu where there is one, else cpu."),
    ] = None,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[OPTION]...", help="Those of the benchmark.")
    ] = None,
) -> None:
    """Measure kernels, steps, caches, the browser; e.g. sae bench cpu --rounds 5.

    Nothing is written into the checkout without --record.
    """
    if not (ROOT / "benchmarks").is_dir():
        raise ConfigError(
            f"sae bench must run from a source checkout, got the installed package in {ROOT}; "
            "clone the repository and run `make install`"
        )
    if name is None:
        width = max(map(len, MODULES))
        for known, (_, measures) in MODULES.items():
            console.say(escape(f"{known:<{width}}  {measures}"))
        return
    module, _ = MODULES[_here() if name == "auto" else name]
    raise typer.Exit(subprocess.call([sys.executable, "-m", module, *(options or ())], cwd=ROOT))


def _here() -> Literal["gpu", "cpu"]:
    import torch  # half a second, for this alone

    return "gpu" if torch.cuda.is_available() else "cpu"


@app.command()
@with_json
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Write out this one.")
    ] = None,
) -> None:
    """List the recipes that come with the package, or write one out: sae recipes demo > my.yaml."""
    if name is not None:
        console.written(config_file(name).read_text(encoding="utf-8"))
        return
    known = recipe_lines()
    console.data(lambda: known)
    width = max(map(len, known))
    for recipe, line in known.items():
        console.say(escape(f"{recipe:<{width}}  {line}"))


def main() -> None:
    """Run the command line; a request or a run that fails ends in one line, not a traceback."""
    code = 0
    with troubles.listening(), console.showing_logs():
        try:
            code = app(standalone_mode=False)
            if code == INTERRUPTED:
                raise KeyboardInterrupt
        except BaseException as problem:  # noqa: BLE001  (each has its line or its report)
            if troubles.is_unread(problem):
                sys.stdout = None
                sys.exit(troubles.FAILED)
            message, code = troubles.ended_by(problem)
            console.error(message)
            if getattr(problem, "wants_requeue", False) and isinstance(
                problem, troubles.TerminatedError
            ):
                _requeue()
    sys.exit(code or 0)


def _requeue() -> None:
    """Ask SLURM, if it runs this process, to start the job again."""
    if not troubles.in_slurm():
        return
    from activations_cache.builder import rank_of_this_process
    from sae.train.launch import requeue

    if rank_of_this_process()[0] == 0 or troubles.in_array():
        requeue()
