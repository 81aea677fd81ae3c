"""Write a browser's folder where it is not there yet, and serve it."""

from pathlib import Path
from typing import NamedTuple

from sae.browser import write_site
from sae.browser.server import BrowserServer, Prompts
from sae.cli import console
from sae.cli.browse_prompt import PromptReader
from sae.cli.browse_run import site_of_dictionary, site_of_run
from sae.cli.chain import Run
from sae.cli.run_config import RunConfig

INDEX = "index.html"


class Asked(NamedTuple):
    """What is to be browsed."""

    path: Path
    config: RunConfig | None
    """A run's; None for a single dictionary."""
    out: str | None
    cache: str | None
    """Of a single dictionary."""


def show(asked: Asked, address: tuple[str, int, str | None] | None) -> None:
    """Write the folder if it is asked for or missing, and serve it where an address is given."""
    run = None if asked.config is None else Run(asked.config)
    own = run.path("browse") if run else asked.path / "browse"
    folder = Path(asked.out) if asked.out else own
    is_yaml = asked.path.is_file()
    if asked.out or not (is_yaml or (address and (folder / INDEX).is_file())):
        with console.step("browse") as report:
            site = (
                site_of_run(run, report)
                if run
                else site_of_dictionary(asked.path, asked.cache, report)
            )
            write_site(site, folder, progress=report)
        console.OUT.print(f"page: {(folder / INDEX).resolve()}", soft_wrap=True)
    if address is not None:
        serve(folder, address, _prompts(run))


def _prompts(run: Run | None) -> Prompts | None:
    if run is None or run.of_images:
        return None
    shown = [name for name in run.config.train.saes if not run.is_frozen(name)]
    return Prompts(PromptReader(run), {f"d{i}": name for i, name in enumerate(shown)})


def serve(folder: Path, address: tuple[str, int, str | None], prompts: Prompts | None) -> None:
    """Answer until Ctrl-C."""
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
