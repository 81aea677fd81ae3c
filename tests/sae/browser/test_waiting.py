"""How long a reader waits at 65,536 latents; the limits are generous, the figures are elsewhere."""

from pathlib import Path

import pytest

from benchmarks.browser import measure
from benchmarks.browser_example import example_site
from sae.browser import write_site


def test_a_small_browser_is_measured(example: Path) -> None:
    result = measure(example, 1, 151)
    assert {"overview first paint", "table drawn", "latent drawn", "search", "sort, drawn"} <= {
        *result
    }
    assert all(0 <= values["median"] <= values["max"] for values in result.values())


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_paint_and_search_at_65_536_latents(tmp_path: Path) -> None:
    result = measure(write_site(example_site(65_536), tmp_path / "site"), 3)
    for name in ("overview", "table", "latent"):
        assert result[f"{name} first paint"]["median"] <= 1000
        assert result[f"{name} drawn"]["median"] <= 3000
    assert result["search"]["median"] <= 100
    assert result["search, drawn"]["median"] <= 300
