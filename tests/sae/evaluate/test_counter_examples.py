import pytest
import torch

from sae.evaluate.counter_examples import audit, scr, strongest, tpp, without


@pytest.fixture
def world():
    """Four concepts along orthogonal directions, each in half of the rows, in 7 dimensions."""
    generator = torch.Generator().manual_seed(0)
    concepts = torch.rand(1009, 4, generator=generator) < 0.5
    x = concepts.float() @ torch.eye(4, 7) * 4
    return x + 0.3 * torch.randn(1009, 7, generator=generator), concepts


def test_the_truth_removes_a_concept_and_no_other(world):
    x, concepts = world
    acts = concepts.float() * 4
    assert tpp(x, acts, torch.eye(4, 7), concepts, 1) == pytest.approx(0.5, abs=0.05)
    arguments = (x, acts, torch.eye(4, 7), concepts[:, 0], concepts[:, 1], 1)
    assert scr(*arguments, to_mean=True) == pytest.approx(1, abs=0.05)
    # As published, by setting the latent to 0, the truth hardly scores.
    assert scr(*arguments) < 0.2


def test_latents_of_other_concepts_change_nothing(world):
    x, concepts = world
    acts = concepts[:, 2:].float() * 4
    assert scr(x, acts, torch.eye(4, 7)[2:], concepts[:, 0], concepts[:, 1], 1) == pytest.approx(
        0, abs=0.1
    )


def test_the_truth_loses_to_a_dictionary_that_splits_it(world):
    """The audit: with n above the concept's own latents the truth is made to lose others."""
    x, concepts = world
    truth = concepts.float() * 4
    turn = torch.arange(1009) % 3
    split = torch.cat([truth * (turn == i)[:, None] for i in range(3)], 1)
    own = tpp(x, truth, torch.eye(4, 7), concepts, 3)
    other = tpp(x, split, torch.eye(4, 7).repeat(3, 1), concepts, 3)
    assert own < 0.3 < other
    found = audit([other, other * 1.01], oracle=own)
    assert not found.is_fit


def test_the_audit_knows_noise_and_the_truth():
    assert audit([0.4, 0.4], oracle=0.5).is_fit
    assert not audit([0.1, 0.7], oracle=0.9).is_fit
    assert audit([0.3, 0.5], oracle=1.0).reseed_cv == pytest.approx(0.02**0.5 / 0.4)
    with pytest.raises(ValueError, match="at least 2 seeds, got 1"):
        audit([0.4], oracle=1.0)


def test_the_strongest_latents_and_their_removal(world):
    x, concepts = world
    acts, rows = concepts.float(), torch.eye(4, 7)
    chosen = strongest(acts, rows, concepts[:, 2], torch.eye(7)[2].double(), 1)
    assert chosen.tolist() == [2]
    assert torch.equal(without(x, acts, rows, chosen)[:, 2], x[:, 2] - acts[:, 2])
    with pytest.raises(ValueError, match=r"n must be in 1\.\.4, the number of latents, got 5"):
        strongest(acts, rows, concepts[:, 2], torch.eye(7)[2].double(), 5)


def test_a_bias_that_costs_nothing_cannot_be_removed(world):
    x, concepts = world
    with pytest.raises(ValueError, match="must be worse than the clean one"):
        scr(x, concepts.float(), torch.eye(4, 7), concepts[:, 0], concepts[:, 0], 1)
