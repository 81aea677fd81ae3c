"""An example of the browser as a folder, and a Chromium that reads it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.browser_example import example_site
from benchmarks.chromium import Chromium
from sae.browser import write_site


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., Path]:
    """Writes the example of every part as a folder and gives its index.html."""

    def make(name: str = "site", n_latents: int = 251, payload: str | None = None) -> Path:
        return write_site(example_site(n_latents, payload), tmp_path / name)

    return make


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Chromium]:
    """A browser with an empty profile."""
    browser = Chromium(tmp_path / "profile")
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """One browser for all tests of a file: what a test sets of it, it sets back."""
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """index.html of the example of every part, made once for all tests; only to read."""
    return write_site(example_site(), tmp_path_factory.mktemp("example") / "site")
