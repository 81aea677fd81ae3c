"""`sae browse`: the feature browser as a folder, or through a local server."""

from pathlib import Path
from typing import Annotated

import typer

from sae.cli.request import run_to
from sae.cli.run_config import RunConfig
from sae.config import ConfigError, config_file, is_config, load

RUN_CONFIG = "run.yaml"


def browse(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CONFIG|DICT",
            help="A run's directory, a YAML file, a recipe, or a labelled dictionary.",
        ),
    ],
    out: Annotated[str | None, typer.Option(help="Folder to write; RUN/browse.")] = None,
    cache: Annotated[str | None, typer.Option(help="DICT: the cache it was explained on.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Show it on a local address.")] = False,
    host: Annotated[str, typer.Option(help="Of the server; others need --token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the server; 0 takes a free one.")] = 8765,
    token: Annotated[str | None, typer.Option(help="What a reader must know.")] = None,
) -> None:
    """Write the feature browser of a run as a folder of pages that opens by double click.

    Of a config every step before it is made sure of, as `sae run` does. With --serve the same
    folder is shown on a local address, where texts can be read with the model as well.
    """
    path = config_file(run) if is_config(run) else Path(run)
    if path.is_file():
        checked = load(RunConfig, path)
        run_to("browse", run, None)
    elif (path / RUN_CONFIG).is_file():
        own = [f"output={_quoted(path)}"]
        if not Path(load(RunConfig, path / RUN_CONFIG).cache_path or "").is_dir():
            own.append(f"cache_path={_quoted(path / 'cache')}")
        checked = load(RunConfig, path / RUN_CONFIG, own)
    elif (path / "sae.safetensors").is_file():
        checked = None
    else:
        raise ConfigError(
            f"RUN must be a directory with {RUN_CONFIG}, which `sae run` writes, a YAML file, a "
            f"recipe or a dictionary, got {run}"
        )
    from sae.cli.browsing import Asked, show

    show(Asked(path, checked, out, cache), (host, port, token) if serve else None)


def _quoted(path: Path) -> str:
    text = str(path).replace("'", "''")
    return f"'{text}'"
