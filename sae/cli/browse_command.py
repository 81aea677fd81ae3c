"""`sae browse`: the feature browser as a folder, or through a local server."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae.cli import console
from sae.cli.request import ForceOption, ReadOutOption, of_run, run_to
from sae.config import is_config
from sae.run.config import RunConfig, browsed_config

if TYPE_CHECKING:
    from sae.browser.server import Prompts


def browse(  # noqa: PLR0913
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CONFIG|DICT",
            help="A run's directory, a YAML file, a recipe, or a labelled dictionary.",
        ),
    ],
    out: Annotated[str | None, typer.Option(help="Folder to write; RUN/browse.")] = None,
    cache: Annotated[str | None, typer.Option(help="DICT: the cache it was explained on.")] = None,
    force: ForceOption = False,
    read_out: ReadOutOption = "linear",
    serve: Annotated[bool, typer.Option("--serve", help="Show it on a local address.")] = False,
    host: Annotated[str, typer.Option(help="Of the server; others need --token.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of the server; 0 takes a free one.")
    ] = 8765,
    token: Annotated[str | None, typer.Option(help="What a reader must know.")] = None,
) -> None:
    """Write the feature browser of a run as a folder of pages that opens by double click.

    Of a config every step before it is made sure of, as `sae run` does. With --serve the same
    folder is shown on a local address, where texts can be read with the model as well.
    """
    config = browsed_config(run)
    is_yaml = is_config(run)
    if is_yaml:
        run_to("browse", run, of_run(read_out))
    from sae.run.browsing import INDEX, browser_folder, write_browser

    folder = browser_folder(run, config, out)
    is_there = is_yaml or (serve and (folder / INDEX).is_file())
    if out or not is_there:
        with console.step("browse") as progress:
            write_browser(run, config, folder, cache, progress, force=force, read_out=read_out)
        console.say(f"page: {(folder / INDEX).resolve()}")
    if serve:
        _serve(folder, (host, port, token), _prompts(config))


def _prompts(config: RunConfig | None) -> "Prompts | None":
    if config is None or config.cache.images is not None:
        return None
    from sae.browser.server import Prompts
    from sae.run.browse_latents import PromptReader
    from sae.run.context import Run

    run = Run(config)
    shown = [name for name in config.train.saes if not run.is_frozen(name)]
    return Prompts(PromptReader(run), {f"d{i}": name for i, name in enumerate(shown)})


def _serve(folder: Path, address: tuple[str, int, str | None], prompts: "Prompts | None") -> None:
    """Answer until Ctrl-C."""
    from sae.browser.server import BrowserServer

    host, port, token = address
    try:
        server = BrowserServer(folder, host, port, token=token, prompts=prompts)
    except OSError as error:
        raise OSError(
            f"--port must be free on {host}, got {port}: {error.strerror}; name another one"
        ) from error
    with server:
        console.OUT.print(f"browser: {server.url}  (Ctrl-C ends it)", soft_wrap=True, markup=False)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.OUT.print("ended")
