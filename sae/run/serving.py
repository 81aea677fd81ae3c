"""The feature browser on a local address: for the command, and in a cell of a notebook."""

import threading
from pathlib import Path

from activations_cache.checks import Progress, silent
from sae import notebook
from sae.browser.server import BrowserServer, PromptView
from sae.read_out import ReadOutName
from sae.run.browse_latents import PromptReader
from sae.run.browsing import INDEX, browser_folder, write_browser
from sae.run.config import RunConfig, browsed_config
from sae.run.context import Run

HEIGHT = 720
"""Of a cell's frame, in pixels: the table, and a latent's label and first examples."""


class BrowserInCell:
    """A folder of the feature browser, served to a notebook on this machine.

    As the last value of a cell it is shown in a frame. It is served until `close`, or until the
    process ends.
    """

    def __init__(
        self, folder: Path, prompts: PromptView | None = None, height: int = HEIGHT
    ) -> None:
        """Serve the folder on a free port of this machine alone.

        Raises:
            ValueError: If there is no browser in the folder.
        """
        self.server = BrowserServer(folder, prompts=prompts, in_frames=True)
        self.height = height
        self._thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Serve no more; what is shown stays as it is."""
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def __repr__(self) -> str:
        return f"feature browser: {self.server.url} ({self.server.folder / INDEX})"

    def _repr_html_(self) -> str:
        note = (
            f"{self!r}. An empty frame: the notebook runs on another machine; forward the port, or "
            "open the file"
        )
        return notebook.frame(self.server.url, self.height, note)


def prompt_view(config: RunConfig | None) -> PromptView | None:
    """What reads texts with the model of a run of texts; None for all else."""
    if config is None or config.cache.images is not None:
        return None
    run = Run(config)
    shown = [name for name in config.train.saes if not run.is_frozen(name)]
    return PromptView(PromptReader(run), {f"d{i}": name for i, name in enumerate(shown)})


def show(
    path: str | Path,
    *,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    force: bool = False,
    read_out: ReadOutName = "linear",
    height: int = HEIGHT,
    progress: Progress = silent,
) -> BrowserInCell:
    """Open the feature browser in a notebook's cell.

    Of a run its prompt view reads texts too.

    Args:
        path: What `sae.run.browse` returned; or what it takes, and then it is written first.
        out: As `sae.run.browse` has it, and so are `cache`, `force`, `read_out` and `progress`.
        cache: The same.
        force: The same.
        read_out: The same.
        height: Of the frame, in pixels.
        progress: The same.

    Raises:
        ConfigError: If the path is neither.
    """
    folder = Path(path).parent if Path(path).name == INDEX else Path(path)
    if (folder / INDEX).is_file():
        return BrowserInCell(folder, None, height)
    config = browsed_config(path)
    folder = browser_folder(path, config, out)
    write_browser(path, config, folder, cache, progress, force=force, read_out=read_out)
    return BrowserInCell(folder, prompt_view(config), height)
