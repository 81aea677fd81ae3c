"""`sae`: the commands and their exit codes: 0 done, 1 failed, 2 wrong request."""

import enum
import sys
from typing import Annotated

import typer

from sae.cli import console, release_commands
from sae.cli.bench_command import PASSED_ON, bench
from sae.cli.browse_command import browse
from sae.cli.cache_commands import app as cache_app
from sae.cli.evaluate_commands import compare, evaluate
from sae.cli.explain_command import explain
from sae.cli.find_command import find
from sae.cli.request import ConfigArgument, Overrides, run_to
from sae.cli.scaling import app as scaling_app
from sae.cli.steer_command import steer
from sae.config import ConfigError, config_file
from sae.config import recipes as recipe_lines
from sae.train.signals import Stopped

app = typer.Typer(
    name="sae",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn a model's activations into a dictionary of labelled, steerable features.",
    epilog="The steps of a run take a config file, or a recipe's name, and dotted overrides: "
    "sae run demo train.seed=1 output=runs/seed-1",
)

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
def run(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Do every step whose result is not there yet, and print the page's path under one table."""
    run_to(Step.BROWSE, config, overrides)


@app.command()
def train(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Train the config's dictionaries side by side, after the cache."""
    run_to(Step.TRAIN, config, overrides)


app.command()(evaluate)
app.command()(compare)


app.command()(explain)
app.command()(find)
app.command()(steer)


app.command()(browse)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(metavar="CACHE", help="A cache directory.")],
    model: Annotated[
        bool, typer.Option("--model", help="Also compute 64 random rows again.")
    ] = False,
    model_path: Annotated[
        str | None, typer.Option(help="Where the model is now, if it has moved.")
    ] = None,
) -> None:
    """Check every committed file of a cache by its checksum, and its rows by the model."""
    from sae.cli.caches import verify_cache

    raise typer.Exit(verify_cache(path, with_model=model or bool(model_path), moved=model_path))


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A directory or org/name.")],
    format: Annotated[str | None, typer.Option(help="Where two formats fit.")] = None,
    allow_pt: Annotated[bool, typer.Option(help="Read a pickle in a closed process.")] = False,
) -> None:
    """Print what a dictionary is and how it will be applied."""
    from sae.cli.inspection import inspect_dictionary

    inspect_dictionary(path, format, allow_pt)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Write out this one.")
    ] = None,
) -> None:
    """List the recipes that come with the package, or write one out: sae recipes demo > my.yaml."""
    if name is not None:
        typer.echo(config_file(name).read_text(encoding="utf-8"), nl=False)
        return
    known = recipe_lines()
    width = max(map(len, known))
    for recipe, line in known.items():
        typer.echo(f"{recipe:<{width}}  {line}")


app.command()(release_commands.convert)
app.command()(release_commands.push)
app.command(name="verify-release")(release_commands.verify_release)
app.command(context_settings=PASSED_ON)(bench)


def main() -> None:
    """Run the command line; a request or a run that fails ends in one line, not a traceback."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
    except (ConfigError, typer.TyperException) as problem:
        is_usage = isinstance(problem, typer.TyperException)
        code = _fail(problem.format_message() if is_usage else str(problem), 2)
    except Stopped as stop:
        code = _fail(stop.message, int(str(stop.code)))
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted; run the same command again, it goes on from here", 1)
    except (OSError, ValueError, FloatingPointError) as problem:
        code = _fail(str(problem), 1)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> int:
    console.error(message)
    return code
