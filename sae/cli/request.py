"""What a command that takes a config file asks for, and the chain that does it."""

from typing import Annotated

import typer

from sae.cli.run_config import RunConfig
from sae.config import load

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.saes.topk.d_sae=9216."),
]


def run_to(step: str, config: str, overrides: list[str] | None) -> None:
    """Check a config, then do its steps up to the named one; torch loads only after the check."""
    checked = load(RunConfig, config, overrides or [])
    from sae.cli.chain import run_chain

    run_chain(checked, step)
