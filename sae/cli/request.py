"""What a command that takes a config file asks for, and the chain that does it."""

from typing import Annotated, TypeVar

import typer

from sae.cli.installed import require_installed
from sae.cli.run_config import CacheRunConfig, RunConfig
from sae.config import config_file, load
from sae.config.recipes import for_another_model

T = TypeVar("T", RunConfig, CacheRunConfig)

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or a name that `sae recipes` lists.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.saes.topk.d_sae=9216."),
]


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


def run_to(step: str, config: str, overrides: list[str] | None) -> None:
    """Check a config, then do its steps up to the named one; torch loads only after the check."""
    checked = checked_config(RunConfig, config, overrides)
    from sae.cli.chain import run_chain

    run_chain(checked, step)
