import pytest
import torch

from sae.metrics import Firing
from sae.steer.choice import Candidate, alike, fit_candidates, named, target_tokens


def candidate(latent, **fields):
    known = {"label": f"label {latent}", "auc": 0.9, "density": 0.01, "targets": (1, 2, 3)}
    return Candidate(latent=latent, **{**known, **fields})


def test_only_fit_candidates_are_kept():
    result = fit_candidates([
        candidate(1, auc=0.71),
        candidate(2, auc=0.69),
        candidate(3, density=0.5),
        candidate(4, density=1e-6),
        candidate(5, targets=(1, 2)),
        candidate(6),
    ])  # fmt: skip
    assert [c.latent for c in result] == [1, 6]


def test_nothing_fit_is_said():
    with pytest.raises(ValueError, match=r"AUC >= 0\.7.* got none among 1; name a latent"):
        fit_candidates([candidate(1, auc=0.5)])


def test_a_named_latent_need_not_be_fit():
    assert [c.latent for c in named([candidate(1), candidate(2, auc=0.1)], 2)] == [2]
    with pytest.raises(ValueError, match="latent must be one of the labelled ones, got 2"):
        named([candidate(1)], 2)


def test_targets_are_words_that_are_one_token(tokenizer):
    words = ["milk", "butter", "milk", "of", "w3", "1999", "buttermilk"]
    forms = ["milk", "Milk", "butter"]
    assert target_tokens(tokenizer, words) == tuple(tokenizer.convert_tokens_to_ids(forms))
    assert target_tokens(tokenizer, []) == ()


def test_a_word_with_a_common_form_gives_no_target(tokenizer):
    milk = tokenizer.convert_tokens_to_ids("Milk")
    left = target_tokens(tokenizer, ["milk", "butter"], common={milk})
    assert left == target_tokens(tokenizer, ["butter"])
    assert 0 < len(left) < len(target_tokens(tokenizer, ["milk", "butter"]))


def test_a_random_counterpart_fires_like_its_latent():
    stats = Firing(101)
    stats.n_rows = 1000
    stats.n_fired = torch.arange(101)  # 0 never fires
    stats.max_activation = torch.ones(101)
    made = torch.Generator().manual_seed(0)
    seen = {alike(stats, [50, 90], made) for _ in range(50)}
    assert len(seen) > 20
    for first, second in seen:
        assert 40 <= first <= 61  # of the 20 nearest of 50 in log, 50 and 90 left out
        assert 80 <= second <= 100
        assert 90 != second != first
    stats.max_activation[51:62] = 1e6  # as often, much more strongly
    assert all(not 50 < alike(stats, [50], made)[0] < 62 for _ in range(50))


def test_too_few_latents_to_draw_from_are_refused():
    stats = Firing(5)
    stats.n_fired = torch.tensor([1, 1, 1, 0, 0])
    with pytest.raises(ValueError, match="as many other latents must fire as are steered, 2, got"):
        alike(stats, [0, 1], torch.Generator())
