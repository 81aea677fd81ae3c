import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from sae.evaluate.ground_truth.config import (
    TIERS,
    GroundTruthConfig,
    Hierarchy,
    Orthogonalised,
    ToyModel,
    Zipf,
)
from sae.evaluate.ground_truth.world import _chosen, make_world


def test_a_world_is_a_function_of_config_and_seed():
    first, again, other = (make_world(TIERS["ci"], seed) for seed in (3, 3, 4))
    for name in ("directions", "bias", "chance", "rates", "loadings", "mean", "std"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert not torch.equal(first.directions, other.directions)


def test_directions_and_bias_have_their_norms():
    world = make_world(TIERS["ci"], 0)
    torch.testing.assert_close(world.directions.norm(dim=1), torch.ones(211))
    assert float(world.bias.norm()) == pytest.approx(0.5)


def test_the_full_recipe_has_the_published_number_of_firing_features():
    # SynthSAEBench-16k: about 34 in a row, about 25 of them among the 4096 most frequent.
    config = replace(TIERS["full"], d_model=2, geometry=Orthogonalised(steps=0))
    world = make_world(config, 0)
    assert float(world.rates.sum()) == pytest.approx(34, abs=1)
    assert float(world.rates[:4096].sum()) == pytest.approx(25, abs=0.5)


def test_zipf_falls_between_its_bounds_as_a_power():
    config = GroundTruthConfig(n_features=101, d_model=3, firing=Zipf(highest=0.4, lowest=0.01))
    chance = make_world(config, 0).chance.double()
    assert float(chance[0]) == pytest.approx(0.4)
    assert float(chance[-1]) == pytest.approx(0.01)
    above = (chance - 0.01) / (0.4 - 0.01)
    power = torch.arange(1, 102).double() ** -0.5
    torch.testing.assert_close(above, (power - power[-1]) / (1 - power[-1]), atol=1e-6, rtol=1e-5)


def test_orthogonalising_lowers_the_overlap_and_the_loss_needs_no_gram_matrix():
    config = replace(TIERS["ci"], geometry=Orthogonalised(steps=0))
    random = make_world(config, 0).directions
    apart = make_world(replace(config, geometry=Orthogonalised(steps=300, lr=3e-3)), 0).directions

    def overlap(rows):
        return float((rows @ rows.T - torch.eye(len(rows))).square().sum())

    # 211 unit rows in 37 dimensions cannot do better than a tight frame: 211^2 / 37 - 211.
    best = 211**2 / 37 - 211
    assert overlap(apart) < best * 1.02 < overlap(random)
    assert overlap(apart) >= best * 0.999


def test_a_candidate_is_chosen_as_counting_says():
    chance = torch.tensor([[0.2, 0.9, 0.5, 1.0], [0.3, 0.3, 0.3, 0.3]], dtype=torch.float64)
    expected = torch.zeros_like(chance)
    for parent, place in product(range(2), range(4)):
        others = [float(chance[parent, i]) for i in range(4) if i != place]
        for fires in product((0, 1), repeat=3):
            weight = math.prod(q if f else 1 - q for q, f in zip(others, fires, strict=True))
            expected[parent, place] += weight / (1 + sum(fires))
    torch.testing.assert_close(_chosen(chance), expected)


def test_without_rivals_children_reach_the_wanted_rates():
    config = GroundTruthConfig(
        n_features=53,
        d_model=5,
        firing=Zipf(highest=0.4, lowest=0.01),
        hierarchy=Hierarchy(n_roots=5, branching=2, depth=2, exclusive=False),
    )
    world = make_world(config, 0)
    wanted = make_world(replace(config, hierarchy=None), 0).chance
    torch.testing.assert_close(world.rates, wanted)


def test_five_features_in_two_dimensions_make_a_pentagon():
    directions = make_world(TIERS["pentagon"], 0).directions
    angles = torch.atan2(directions[:, 1], directions[:, 0]).rad2deg().sort().values
    gaps = torch.cat([angles.diff(), angles[:1] + 360 - angles[-1:]])
    torch.testing.assert_close(gaps, torch.full((5,), 72.0), atol=3, rtol=0)


def test_a_toy_model_drops_what_does_not_matter():
    toy = TIERS["toy"]
    geometry = replace(toy.geometry, importance=0.8, steps=300, restarts=2)
    world = make_world(replace(toy, geometry=geometry), 0)
    assert 16 <= world.n_features < 64
    assert len(world.chance) == len(world.mean) == len(world.rates) == world.n_features


def test_a_feature_that_is_dropped_takes_its_chance_along():
    toy = TIERS["toy"]
    geometry = replace(toy.geometry, importance=1.25, steps=300, restarts=2)  # the last matter most
    config = replace(toy, geometry=geometry, firing=Zipf(highest=0.06, lowest=0.02))
    world = make_world(config, 0)
    assert world.n_features < 64
    assert float(world.chance[-1]) == pytest.approx(0.02)
    assert float(world.chance[0]) < 0.05


def test_a_world_is_made_alike_where_gradients_are_off():
    config = replace(TIERS["pentagon"], geometry=ToyModel(steps=10, restarts=2))
    for each in (config, TIERS["ci"]):
        with torch.no_grad():
            made = make_world(each, 0)
        assert torch.equal(made.directions, make_world(each, 0).directions)
        assert not made.directions.requires_grad
