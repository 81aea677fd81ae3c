"""Every recipe trains to the recorded bits; elsewhere (another CPU) to nearly the same losses."""

import json
import math
import struct
from pathlib import Path

import pytest

from tests.exact import numerics
from tests.golden.recipes import ENTRIES, golden_run

NEAR = 1e-2
"""Relative, between kinds of CPU."""
VALUES = json.loads((Path(__file__).parent / "recipes.json").read_text())


def losses(text: str) -> tuple[float, ...]:
    return struct.unpack(f"<{len(text) // 8}f", bytes.fromhex(text))


def test_every_recipe_is_recorded():
    assert all(recorded.keys() == ENTRIES.keys() for recorded in VALUES.values())


@pytest.mark.parametrize("name", ENTRIES)
def test_a_recipe_gives_the_recorded_numbers(name):
    result = golden_run(ENTRIES[name])
    if numerics() in VALUES:
        assert result._asdict() == VALUES[numerics()][name]
    else:
        recorded = losses(next(iter(VALUES.values()))[name]["losses"])
        pairs = zip(losses(result.losses), recorded, strict=True)
        assert all(math.isclose(a, b, rel_tol=NEAR) for a, b in pairs)
