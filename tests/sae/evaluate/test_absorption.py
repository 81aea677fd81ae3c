"""A hierarchy of one parent and three children, and dictionaries that absorb it or do not."""

import pytest
import torch

from sae.evaluate.structure import absorption


@pytest.fixture
def hierarchy():
    """The parent is in half of the rows; in six of ten of these one child is with it."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(10, (2003,), generator=generator)  # 0-5 no parent
    parent = torch.randint(2, (2003,), generator=generator).bool()
    child = torch.stack([parent & (kind // 2 == i) for i in range(3)], 1)
    truth = torch.cat([parent[:, None], child], 1).float()
    return truth, parent


def directions():
    return torch.eye(4, 7)


def test_a_dictionary_of_the_truth_absorbs_nothing(hierarchy):
    truth, parent = hierarchy
    result = absorption(truth, directions(), directions()[0], parent, truth[:, 0])
    assert result.main == (0,)
    assert (result.f1, result.full, result.fraction, result.n_split) == (1.0, 0.0, 0.0, 1)


def test_one_child_that_speaks_for_its_parent_is_counted_exactly(hierarchy):
    truth, parent = hierarchy
    acts, dec_rows = truth.clone(), directions()
    acts[truth[:, 1] > 0, 0] = 0  # silent where the first child is
    dec_rows[1, 0] = 1.0  # whose direction brings the parent along
    result = absorption(acts, dec_rows, directions()[0], parent, truth[:, 0])
    share = float(truth[parent, 1].mean())
    assert 0.15 < share < 0.25
    assert result.main == (0, 1)  # as F1 sees it, the feature is split
    few = acts.clone()
    rare = (truth[:, 1] > 0) & (torch.arange(2003) % 8 == 0)
    few[truth[:, 1] > 0, 0] = 1.0
    few[rare, 0] = 0
    result = absorption(few, dec_rows, directions()[0], parent, truth[:, 0])
    assert result.main == (0,)
    assert result.full == pytest.approx(float(rare[parent].double().mean()))
    # Where both speak, half of the projection is the child's.
    expected = float((truth[parent, 1] > 0).double().mean()) - result.full
    assert result.fraction == pytest.approx(result.full + expected / 2)


def test_a_split_feature_has_several_main_latents(hierarchy):
    truth, parent = hierarchy
    halves = torch.arange(2003) % 2 == 0
    acts = torch.cat([truth * halves[:, None], truth * ~halves[:, None]], 1)
    dec_rows = directions().repeat(2, 1)
    result = absorption(acts, dec_rows, directions()[0], parent, truth[:, 0])
    assert sorted(result.main) == [0, 4]
    assert (result.f1, result.full, result.n_split) == (1.0, 0.0, 2)


def test_a_silent_latent_without_a_stand_in_is_a_miss_and_no_absorption(hierarchy):
    truth, parent = hierarchy
    acts = truth.clone()
    acts[torch.arange(2003) % 5 == 0, 0] = 0
    result = absorption(acts, directions(), directions()[0], parent, truth[:, 0])
    assert (result.full, result.fraction) == (0.0, 0.0)
    assert result.f1 < 0.95


def test_a_feature_in_all_rows_or_none_is_refused(hierarchy):
    truth, parent = hierarchy
    for present, n in ((torch.zeros_like(parent), 0), (torch.ones_like(parent), 2003)):
        with pytest.raises(ValueError, match=f"others, got {n} of 2003; take more rows"):
            absorption(truth, directions(), directions()[0], present, truth[:, 0])
