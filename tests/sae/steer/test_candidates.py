import pytest

from sae.steer.choice import Candidate, fit_candidates, named, target_tokens


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
