import re
from dataclasses import replace

import pytest

from sae.evaluate.ground_truth.config import (
    TIERS,
    Correlation,
    GroundTruthConfig,
    Hierarchy,
    ToyModel,
    Zipf,
)


def test_the_full_tier_is_the_published_recipe():
    full = TIERS["full"]
    assert (full.n_features, full.d_model, full.bias, full.noise) == (16_384, 768, 0.5, 0)
    assert full.firing == Zipf(exponent=0.5, highest=0.4, lowest=5e-4)
    assert full.correlation == Correlation(rank=25, scale=0.1)
    assert full.hierarchy == Hierarchy(n_roots=128, branching=4, depth=3)


def test_the_size_of_trees_counts_every_level():
    assert Hierarchy(n_roots=3, branching=2, depth=3).size == 3 * (1 + 2 + 4 + 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroundTruthConfig(n_features=0, d_model=5), "n_features must be at least 1"),
        (
            lambda: GroundTruthConfig(n_features=5, d_model=5, noise=-1.0),
            "noise must be at least 0",
        ),
        (lambda: Zipf(highest=0.1, lowest=0.2), "highest must be at least lowest=0.2, got 0.1"),
        (lambda: Zipf(highest=1.5), "highest must lie between 0 and 1, got 1.5"),
        (lambda: Correlation(rank=25, scale=0.2), "scale must be below 1 / sqrt(rank=25), got 0.2"),
        (
            lambda: GroundTruthConfig(n_features=20, d_model=5, hierarchy=Hierarchy(n_roots=1)),
            "hierarchy must fit into n_features=20, got 85",
        ),
        (
            lambda: replace(TIERS["ci"], geometry=ToyModel()),
            "hierarchy must be absent beside a toy model's geometry",
        ),
        (lambda: ToyModel(restarts=0), "restarts must be at least 1, got 0"),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make()
