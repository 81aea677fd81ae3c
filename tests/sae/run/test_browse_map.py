"""The map of a dictionary: layouts of the live latents, and no groups where there are none."""

import math
from dataclasses import fields
from typing import Any

import pytest
import torch

from activations_cache.checks import silent
from sae.explain.tables import LatentRecord
from sae.run.browse_map import completeness_of, map_of


def records(n: int, dead: tuple[int, ...] = ()) -> list[LatentRecord]:
    """Latents whose label lists a word of their planted group of 25."""
    plain = {field.name: None for field in fields(LatentRecord)}
    numbers = dict.fromkeys(("n_fired_explain", "n_fired_score"), 0)
    reals = dict.fromkeys(("density", "max_activation"), 0.0)
    empty = ("weights", "joint", "information", "npmi", "histogram", "curve", "curve_n")
    same: dict[str, Any] = plain | numbers | reals | dict.fromkeys(empty, ())
    return [
        LatentRecord(**same | {
            "latent": i, "label": "", "kind": "word", "words": (f"w{i // 25}",),
            "status": "dead" if i in dead else "scored",
        })
        for i in range(n)
    ]  # fmt: skip


def test_planted_groups_are_laid_out_and_named() -> None:
    made = torch.Generator().manual_seed(1)
    centres = torch.randn(4, 64, generator=made).repeat_interleave(25, 0)
    rows = centres + 0.3 * torch.randn(100, 64, generator=made)
    result = map_of(rows, records(100, dead=(7, 30)), silent)
    assert [layout.name for layout in result.layouts] == ["t-SNE", "PCA"]
    for layout in result.layouts:
        assert [i for i, x in enumerate(layout.x) if math.isnan(x)] == [7, 30]
        assert "100% of the latents have a neighbour" in layout.note
        assert "No neighbourhoods" not in layout.note
    assert {result.clusters[group].split(",")[0] for group in result.cluster if group >= 0} == {
        "w0", "w1", "w2", "w3"
    }  # fmt: skip
    assert [i for i, group in enumerate(result.cluster) if group < 0] == [7, 30]


@pytest.mark.parametrize("seed", [0, 1])  # 0: what a dictionary of torch's seed 0 starts from
def test_random_directions_get_no_groups_and_say_so(seed: int) -> None:
    rows = torch.randn(600, 64, generator=torch.Generator().manual_seed(seed))
    result = map_of(rows, records(600), silent)
    assert (result.clusters, result.cluster) == ((), ())
    assert all("No neighbourhoods" in layout.note for layout in result.layouts)
    assert all(math.isfinite(x) for layout in result.layouts for x in layout.x)


def test_the_curve_of_completeness_is_shown_with_what_a_random_decoder_has() -> None:
    found = {
        "f50": 1e-3, "low": 5e-4, "high": 2e-3, "slope": 1.5, "times_alive": 0.9, "n": 40,
        "share_present": 0.3, "points": [[1e-4, 0.1, 20.0], [1e-2, 0.5, 20.0]], "note": "a proxy",
    }  # fmt: skip
    null = {"of": "random directions", "share_present": 0.05, "f50": 0.02}
    shown = completeness_of({"completeness": found | {"null": null}})
    assert shown is not None
    assert shown.points == ((1e-4, 0.1, 20), (1e-2, 0.5, 20))
    assert shown.note == (
        "random directions: 5% of the concepts have one; half of those of frequency 0.02. A proxy."
    )
    assert completeness_of({"completeness": {"reason": "none", "n": 3, "points": []}}) is None
    assert completeness_of({}) is None
