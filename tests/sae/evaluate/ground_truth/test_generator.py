import math
from dataclasses import replace

import pytest
import torch

from sae.activations import to_dense
from sae.evaluate.ground_truth.config import (
    TIERS,
    Correlation,
    GroundTruthConfig,
    Hierarchy,
    Normal,
    Uniform,
    Zipf,
)
from sae.evaluate.ground_truth.world import BLOCK, batches, make_world, rows

N = 100_003


@pytest.fixture(scope="module")
def trees():
    """Independent features with exclusive children, over N rows."""
    world = make_world(replace(TIERS["ci"], correlation=None, noise=0.0), 1)
    return world, rows(world, 0, N)


def test_the_stream_does_not_depend_on_the_batches_it_is_cut_into():
    world = make_world(TIERS["ci"], 0)
    whole = rows(world, 0, 3 * BLOCK)
    for batch in (7, BLOCK, BLOCK + 1):
        results = list(batches(world, batch, 3 * BLOCK // batch))
        x = torch.cat([made.x for made in results])
        acts = torch.cat([to_dense(made.truth, 211) for made in results])
        assert torch.equal(x, whole.x[: len(x)])
        assert torch.equal(acts, whole.acts[: len(x)])


def test_a_batch_is_reached_without_those_before_it():
    world = make_world(TIERS["ci"], 0)
    *_, last = batches(world, 101, 7)
    (again,) = batches(world, 101, 1, start=6)
    assert torch.equal(last.x, again.x)
    assert torch.equal(last.truth.indices, again.truth.indices)


def test_seeds_and_splits_share_no_row():
    world = make_world(TIERS["ci"], 0)
    train, score = rows(world, 0, BLOCK), rows(world, 0, BLOCK, split="score")
    other = rows(make_world(TIERS["ci"], 1), 0, BLOCK)
    assert not torch.equal(train.acts, score.acts)
    assert not torch.equal(train.acts, other.acts)
    assert not torch.equal(train.acts, rows(world, BLOCK, 2 * BLOCK).acts)


@pytest.mark.parametrize(("first", "end"), [(-1, 5), (5, 5)])
def test_rows_need_an_order(first, end):
    with pytest.raises(ValueError, match="rows must begin at 0 or later and before their end"):
        rows(make_world(TIERS["ci"], 0), first, end)


def test_rows_are_bias_plus_activations_times_directions_plus_noise():
    world = make_world(TIERS["ci"], 0)
    made = rows(world, 0, 20_011)
    noise = made.x - made.acts @ world.directions - world.bias
    assert float(noise.std()) == pytest.approx(0.1, rel=0.01)
    assert float(noise.mean(dim=0).abs().max()) < 5 * 0.1 / math.sqrt(20_011)


def test_features_fire_at_their_rates(trees):
    world, made = trees
    fired = (made.acts > 0).double().mean(dim=0)
    error = (world.rates.double() * (1 - world.rates.double()) / N).sqrt()
    deviation = (fired - world.rates) / error
    assert float(deviation.abs().max()) < 4.5  # of 211: 1 world in 700 would fail by chance
    assert float(deviation.square().mean()) == pytest.approx(1, abs=0.4)


def test_a_child_fires_only_where_its_parent_fires(trees):
    world, made = trees
    fires = made.acts > 0
    assert [(level.children.start, level.children.stop) for level in world.levels] == [
        (11, 33),
        (33, 77),
    ]
    assert world.levels[1].parents[:4].tolist() == [11, 11, 12, 12]
    for level in world.levels:
        children, parents = fires[:, level.children], fires[:, level.parents]
        assert int(children.sum()) > 1000
        assert not bool((children & ~parents).any())
        assert bool((parents & ~children).any())


def test_exclusive_siblings_never_fire_together_and_others_do(trees):
    world, made = trees
    free = make_world(
        replace(world.config, hierarchy=replace(world.config.hierarchy, exclusive=False)), 1
    )
    fires = rows(free, 0, 10_007).acts > 0
    for level in world.levels:
        siblings = (made.acts[:, level.children] > 0).unflatten(1, (-1, 2))
        assert int(siblings.sum(dim=2).max()) == 1
        assert bool(fires[:, level.children].unflatten(1, (-1, 2)).all(dim=2).any())


def test_children_are_scaled_by_their_parents():
    config = GroundTruthConfig(
        n_features=2,
        d_model=3,
        firing=Zipf(highest=0.9, lowest=0.8),
        hierarchy=Hierarchy(n_roots=1, branching=1, depth=1),
        magnitude=Normal(first=5.0, last=4.0, std_mean=0.0, std_std=0.0),
    )
    acts = rows(make_world(config, 0), 0, 1009).acts
    assert set(acts[:, 0].tolist()) == {0.0, 5.0}
    assert set(acts[:, 1].tolist()) == {0.0, 4.0}  # 4 * 5 / 5
    # With spread in the parent alone, the child follows it.
    world = make_world(config, 0)
    spread = replace(world, std=torch.tensor([1.0, 0.0]))
    acts = rows(spread, 0, 1009).acts
    both = acts[:, 1] > 0
    torch.testing.assert_close(acts[both, 1], acts[both, 0] * 4 / 5)


def test_magnitudes_have_their_mean_and_spread():
    config = GroundTruthConfig(
        n_features=3,
        d_model=5,
        firing=Zipf(exponent=0.0, highest=0.5, lowest=0.5),
        magnitude=Normal(first=5.0, last=4.0, std_mean=0.3, std_std=0.0),
    )
    acts = rows(make_world(config, 0), 0, 20_011).acts
    for feature, mean in enumerate((5, 4.5, 4)):
        fired = acts[:, feature][acts[:, feature] > 0]
        assert float(fired.mean()) == pytest.approx(mean, abs=4 * 0.3 / math.sqrt(len(fired)))
        assert float(fired.std()) == pytest.approx(0.3, rel=0.04)


def test_toy_magnitudes_are_uniform_up_to_the_norm():
    world = make_world(GroundTruthConfig(n_features=5, d_model=2, magnitude=Uniform()), 0)
    acts = rows(world, 0, 50_021).acts
    fired = acts[:, 0][acts[:, 0] > 0] / (2 * world.mean[0])
    assert float(fired.max()) <= 1
    assert float(fired.mean()) == pytest.approx(0.5, abs=4 * 12**-0.5 / math.sqrt(len(fired)))


def test_pairs_fire_together_as_the_copula_says():
    # For two features that fire in half of the rows: P(both) = 1/4 + asin(rho) / (2 pi).
    config = GroundTruthConfig(
        n_features=7,
        d_model=3,
        firing=Zipf(exponent=0.0, highest=0.5, lowest=0.5),
        correlation=Correlation(rank=2, scale=0.6),
    )
    world = make_world(config, 0)
    fires = (rows(world, 0, N).acts > 0).double()
    both = fires.T @ fires / N
    rho = world.loadings @ world.loadings.T
    expected = 0.25 + rho.asin() / (2 * math.pi)
    off = ~torch.eye(7, dtype=torch.bool)
    assert float(rho[off].abs().max()) > 0.3
    error = 4.5 * math.sqrt(0.25 * 0.75 / N)
    torch.testing.assert_close(both[off], expected[off].double(), atol=error, rtol=0)
    torch.testing.assert_close(
        fires.mean(dim=0), torch.full((7,), 0.5).double(), atol=error, rtol=0
    )
