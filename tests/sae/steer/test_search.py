import pytest
import torch

from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.steer.search import Counting, contrast, find_latents, nearest_latents

POSITIVES, NEGATIVES = ["w1 w7 w9 w2", "w3 w7 w4"], ["w1 w8 w9 w2"]


def peaks(model, placed, tokenizer, text, start=1):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    rows = model.model(ids, output_hidden_states=True).hidden_states[2][0, start:]
    return placed.encode_dense(rows).amax(0)


def test_latents_that_fire_in_all_positives_and_no_negative(model, placed, tokenizer):
    result = find_latents(model, tokenizer, placed, POSITIVES, NEGATIVES)
    weakest = torch.stack([peaks(model, placed, tokenizer, t) for t in POSITIVES]).amin(0)
    common = weakest * (peaks(model, placed, tokenizer, NEGATIVES[0]) == 0)
    assert {f.latent for f in result} == set(common.nonzero().flatten().tolist())
    scores = common / placed.stats.max_activation.clamp_min(1e-12)
    assert [f.score for f in result] == sorted((f.score for f in result), reverse=True)
    for entry in find_latents(model, tokenizer, placed, POSITIVES):
        assert entry.weakest == pytest.approx(float(weakest[entry.latent]), rel=1e-4)
    assert all(f.score == pytest.approx(float(scores[f.latent]), rel=1e-4) for f in result)


def test_a_confound_in_both_sets_is_dropped(model, placed, tokenizer):
    assert find_latents(model, tokenizer, placed, POSITIVES)
    assert find_latents(model, tokenizer, placed, POSITIVES, POSITIVES[:1]) == []


def test_only_the_last_token_may_count(model, placed, tokenizer):
    (text,) = POSITIVES[:1]
    result = find_latents(model, tokenizer, placed, [text], counting=Counting("last"))
    last = peaks(model, placed, tokenizer, text, start=3)
    assert {f.latent for f in result} == set(last.nonzero().flatten().tolist())
    assert all(f.tokens == (3,) for f in result)


def test_texts_without_a_token_that_counts_are_refused(model, placed, tokenizer):
    with pytest.raises(ValueError, match="positives must hold at least one text, got none"):
        find_latents(model, tokenizer, placed, [])
    with pytest.raises(ValueError, match=r"more than 1 tokens, got 'w1' with 1"):
        find_latents(model, tokenizer, placed, ["w1"])


def planted(d_sae, seed, d_in=11):
    dictionary = SparseAutoencoder(SAEConfig(d_in=d_in, d_sae=d_sae, activation=ReLU()))
    generator = torch.Generator().manual_seed(seed)
    dictionary.dec_rows.data = torch.randn(d_sae, d_in, generator=generator)
    return dictionary


def test_planted_pairs_are_found_within_and_across(monkeypatch):
    one, other = planted(23, 0), planted(29, 1)
    one.dec_rows.data[7] = 3 * one.dec_rows.data[2]
    other.dec_rows.data[5] = one.dec_rows.data[4] + 0.01
    other.dec_rows.data[6] = -one.dec_rows.data[4]
    latents = torch.tensor([2, 7, 4])
    within = nearest_latents(one, latents, k=3)
    assert within.latent[:2, 0].tolist() == [7, 2]
    across = nearest_latents(one, latents, other, k=29)
    assert int(across.latent[2, 0]) == 5
    assert int(across.latent[2, -1]) == 6
    exact = torch.nn.functional.cosine_similarity(
        one.dec_rows[latents, None], other.dec_rows[None], dim=2
    )
    torch.testing.assert_close(across.cosine, exact.sort(dim=1, descending=True).values)
    monkeypatch.setattr("sae.neighbours._CELLS", 1)
    assert torch.equal(nearest_latents(one, latents, other, k=29).latent, across.latent)


def test_neighbours_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="latents must be below d_sae=23, got 23"):
        nearest_latents(planted(23, 0), torch.tensor([23]))
    with pytest.raises(ValueError, match="rows of one width, got 11 and 13"):
        nearest_latents(planted(23, 0), torch.tensor([2]), planted(29, 1, d_in=13))


def peaks_of_pairs(n_pairs: int, d_sae: int, seed: int) -> torch.Tensor:
    """Texts and controls alike; latents fire on half of them."""
    made = torch.Generator().manual_seed(seed)
    return torch.randn(2, n_pairs, d_sae, generator=made).clamp_min(0)


def test_a_planted_latent_is_found_and_chance_is_not():
    sides = peaks_of_pairs(8, 997, 0)
    sides[0, :, 7], sides[1, :, 7] = 1.0, 0.0
    found = contrast(*sides, n_exchanges=199)
    assert found.latents[0] == 7
    assert found.auc == 1.0
    assert found.n_common >= 1
    assert found.p <= 0.02  # 2 of 256 exchanges leave the sides as they are, or all turned over
    assert found.chance < 0.7
    p_values = [contrast(*peaks_of_pairs(8, 97, seed), n_exchanges=39).p for seed in range(60)]
    assert sum(p <= 0.1 for p in p_values) <= 14  # nominal 6; the tail beyond 14 is 1 in 1,000
    with pytest.raises(ValueError, match="texts must be at least 4 with controls, got 3"):
        contrast(*sides[:, :3])
