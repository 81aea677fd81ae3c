"""How long a reader waits at 65,536 latents; the limits are generous, the figures are elsewhere."""

from pathlib import Path

import pytest

from benchmarks.browser import measure
from benchmarks.browser_example import example_site
from sae.browser import write_site


def test_a_small_browser_is_measured(example: Path) -> None:
    found = measure(example, 1, 151)
    assert {"overview first paint", "table drawn", "latent drawn", "search", "sort, drawn"} <= {
        *found
    }
    assert all(0 <= values["median"] <= values["max"] for values in found.values())


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_paint_and_search_at_65_536_latents(tmp_path: Path) -> None:
    found = measure(write_site(example_site(65_536), tmp_path / "site"), 3)
    for name in ("overview", "table", "latent"):
        assert found[f"{name} first paint"]["median"] <= 1000
        assert found[f"{name} drawn"]["median"] <= 3000
    assert found["search"]["median"] <= 100
    assert found["search, drawn"]["median"] <= 300
