"""The logit lens reads the direct path from a decoder row to the tokens."""

import numpy as np
import pytest
import torch

from sae.architecture import SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder
from sae.explain import logit_lens as module
from sae.explain.examples import SplitFirings
from sae.explain.logit_lens import frequent_words, promoted_tokens, weight_labels, word_vectors

D_MODEL, D_SAE, VOCAB = 7, 23, 101


@pytest.fixture
def dictionary() -> SparseAutoencoder:
    config = SAEConfig(d_in=D_MODEL, d_sae=D_SAE, activation=TopK(k=3), input_scale=0.25)
    dictionary = SparseAutoencoder(config)
    with torch.no_grad():
        dictionary.dec_rows.copy_(
            torch.randn(D_SAE, D_MODEL, generator=torch.Generator().manual_seed(0))
        )
    return dictionary


@pytest.fixture
def unembed() -> torch.Tensor:
    return torch.randn(VOCAB, D_MODEL, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cells", [1, 301, 1 << 25])
@pytest.mark.parametrize("with_norm", [True, False])
def test_ends_of_the_logits(dictionary, unembed, cells: int, with_norm: bool, monkeypatch):
    monkeypatch.setattr(module, "_CELLS", cells)
    weight = torch.linspace(0.5, 2.0, D_MODEL) if with_norm else None
    done = []
    result = promoted_tokens(
        dictionary, unembed, weight, k=5, progress=lambda d, t, unit: done.append((d, t))
    )
    assert result.with_final_norm is with_norm
    for latent in range(D_SAE):
        direction = dictionary.direction(latent) * (1 if weight is None else weight)
        logits = unembed @ direction
        order = logits.argsort(descending=True)
        assert result.promoted[latent].tolist() == order[:5].tolist()
        assert result.suppressed[latent].tolist() == order.flip(0)[:5].tolist()
        torch.testing.assert_close(result.promoted_logits[latent], logits[order[:5]])
        torch.testing.assert_close(result.suppressed_logits[latent], logits[order.flip(0)[:5]])
    assert done[-1] == (D_SAE, D_SAE)
    assert not result.promoted_logits.requires_grad


def test_latent_that_points_at_a_token_promotes_it(unembed):
    dictionary = SparseAutoencoder(SAEConfig(d_in=D_MODEL, d_sae=VOCAB, activation=TopK(k=3)))
    unit = unembed / unembed.norm(dim=1, keepdim=True)
    with torch.no_grad():
        dictionary.dec_rows.copy_(unit)
    assert promoted_tokens(dictionary, unit, None, k=1).promoted[:, 0].tolist() == list(
        range(VOCAB)
    )


def test_wrong_widths_are_refused(dictionary, unembed):
    with pytest.raises(ValueError, match="unembed must be as wide as the decoder rows, 7, got 5"):
        promoted_tokens(dictionary, unembed[:, :5], None)
    with pytest.raises(
        ValueError, match="k must lie between 1 and the vocabulary's size 101, got 0"
    ):
        promoted_tokens(dictionary, unembed, None, k=0)


N_WORDS, N_PER_LABEL = 211, 3


@pytest.fixture
def planted_words(codes_of, text_of):
    """Latents that fire on three words each, whose vectors their encoder rows are the sum of."""
    made = np.random.default_rng(0)
    vectors = torch.from_numpy(made.normal(size=(N_WORDS, 61))).float()
    sets = made.permutation(N_WORDS)[: 17 * N_PER_LABEL].reshape(17, N_PER_LABEL)
    word = made.integers(0, N_WORDS, 53 * 97)
    fires = np.stack([np.isin(word, one) for one in sets], axis=1).astype(float)
    config = SAEConfig(d_in=61, d_sae=17, activation=TopK(k=3), input_scale=0.25)
    dictionary = SparseAutoencoder(config)
    with torch.no_grad():
        dictionary.enc_rows.copy_(torch.stack([vectors[one].sum(0) for one in sets]))
    scored_on = SplitFirings("score", codes_of(fires), text_of(53, 97, word=word))
    return dictionary, vectors, sets, scored_on


@pytest.mark.parametrize("words_at_once", [1, 37, 256])
def test_labels_from_weights_are_the_planted_words_and_tell_unseen_rows(
    planted_words, words_at_once, monkeypatch
):
    monkeypatch.setattr(module, "_WORDS_AT_ONCE", words_at_once)
    dictionary, vectors, sets, scored_on = planted_words
    order = np.random.default_rng(1).permutation(N_WORDS)  # words are numbers of a longer list
    wanted = np.arange(17) != 5
    labels = weight_labels(
        dictionary, vectors[order], order.tolist(), scored_on, wanted, n=N_PER_LABEL
    )
    share = np.mean([len({*a} & {*b}) / 3 for a, b in zip(labels.words, sets, strict=True)])
    assert share > 0.95
    unit = torch.nn.functional.normalize(dictionary.enc_rows, dim=1)
    by_hand = (unit @ vectors.T).log_softmax(dim=0) + np.log(17)
    for latent in range(17):
        shown = by_hand[latent, labels.words[latent]]
        assert labels.pmi[latent].tolist() == pytest.approx(shown.tolist(), abs=1e-6)
    assert np.isnan(labels.auc[5])
    assert labels.summary["auc"]["mean"] > 0.97
    assert labels.summary["control_auc"]["mean"] == pytest.approx(0.5, abs=0.05)
    assert labels.summary["n_scored"] == 16


def test_labels_from_weights_that_say_nothing_are_at_chance(planted_words):
    dictionary, vectors, _, scored_on = planted_words
    with torch.no_grad():
        dictionary.enc_rows.normal_(generator=torch.Generator().manual_seed(3))
    labels = weight_labels(
        dictionary, vectors, [*range(N_WORDS)], scored_on, np.ones(17, bool), n=N_PER_LABEL
    )
    assert labels.summary["auc"]["mean"] == pytest.approx(0.5, abs=0.05)
    assert labels.summary["share_frequent"] == 1.0  # fewer than 250 words


def test_words_of_another_width_are_refused(planted_words):
    dictionary, vectors, _, scored_on = planted_words
    with pytest.raises(ValueError, match="weights must be 0 for rows of another width, 61, than"):
        weight_labels(dictionary, vectors[:, :7], [0], scored_on, np.ones(17, bool))


def test_frequent_words_have_a_letter_or_digit(codes_of, text_of):
    text = text_of(2, 5, word=np.array([0, 0, 0, 1, 1, 2, 3, 3, 3, 3]))
    part = SplitFirings("explain", codes_of(np.ones((10, 1))), text)
    assert frequent_words(part, [".", "b", "3rd", "d", "never"], 9) == [3, 1, 2]


def test_a_word_s_vector_is_the_mean_of_its_tokens(tiny_model):
    unembed = torch.randn(tiny_model.tokenizer.vocab_size, 5)
    ids = tiny_model.tokenizer(" cede", add_special_tokens=False)["input_ids"]
    (vector,) = word_vectors(tiny_model.tokenizer, unembed)(["cede"])
    torch.testing.assert_close(vector, unembed[ids].mean(dim=0))
