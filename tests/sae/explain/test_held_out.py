"""The permutation null of a label on unseen documents, and its score by strength of firing."""

import numpy as np
import pytest

from sae.explain.config import ExplainConfig
from sae.explain.held_out import LEAST_STRONG, STRONGEST, held_out, strong_from
from sae.explain.labels import make_labels
from sae.explain.scores import score_rules
from sae.explain.statistics import permuted_rows

N_EXAMPLES, N_POS, N_WORDS = 83, 29, 31


def config(**more) -> ExplainConfig:
    return ExplainConfig(kinds=("word",), min_word_count=2, **more)


@pytest.fixture
def split(text_of, codes_of):
    """Words at random; latents that fire by them, and how strongly, as the caller says."""

    def make(activation, seed: int):
        made = np.random.default_rng(seed)
        words = made.integers(0, N_WORDS, N_EXAMPLES * N_POS)
        return codes_of(activation(words, made)), text_of(N_EXAMPLES, N_POS, word=words)

    return make


def graded(words: np.ndarray, made: np.random.Generator) -> np.ndarray:
    """Latents 0 to 4: strong on one word each, weak on a fifth of all rows; 5 and 6: only weak."""
    acts = np.zeros((len(words), 7))
    weak = made.random(acts.shape) < 0.2
    acts[weak] = made.uniform(0.1, 0.5, weak.sum())
    for latent in range(5):
        has_word = words == latent
        acts[has_word, latent] = made.uniform(0.6, 1.0, has_word.sum())
    return acts


def brute(values: np.ndarray, weights: dict[int, float], positive: np.ndarray, silent: np.ndarray):
    score = np.array([weights.get(int(v), 0.0) for v in values])
    up, down = score[positive], score[silent]
    return ((up[:, None] > down) + 0.5 * (up[:, None] == down)).mean()


def test_scores_and_p_values_are_those_of_a_plain_count(split):
    made_from, text = split(graded, 0)
    codes, unseen = split(graded, 1)
    settings = config(null_permutations=7)
    labels = make_labels(made_from, text, settings)
    wanted = np.ones(7, bool)
    result = held_out(labels, made_from, codes, unseen, wanted, settings)
    bars = strong_from(made_from)
    for latent in range(7):
        rows, acts = codes.of(latent)
        silent = np.setdiff1d(np.arange(codes.n_rows), rows)
        strong = rows[acts >= bars[latent]]
        listed = labels.rules.value[latent]
        weights = dict(zip(listed.tolist(), labels.rules.weight[latent].tolist(), strict=True))
        values = unseen.values["word"]
        assert result.auc_strong[latent] == pytest.approx(brute(values, weights, strong, silent))
        observed = brute(values, weights, rows, silent)
        orders = [
            permuted_rows(unseen.example, np.random.default_rng([0, number])) for number in range(7)
        ]
        null = [brute(values[order], weights, rows, silent) for order in orders]
        expected = (1 + sum(value >= observed - 1e-12 for value in null)) / 8
        assert result.p_value[latent] == pytest.approx(expected)
        assert result.n_strong[latent] == len(strong)
        step = np.ceil(acts / acts.max() * 5).clip(1, 5).astype(int) - 1
        has_word = np.isin(values[rows], listed[listed >= 0])
        for number in range(5):
            inside = step == number
            assert result.curve_n[latent, number] == inside.sum()
            if inside.any():
                assert result.curve[latent, number] == pytest.approx(has_word[inside].mean())


def test_strong_firings_show_what_weak_ones_hide(split):
    made_from, text = split(graded, 2)
    codes, unseen = split(graded, 3)
    labels = make_labels(made_from, text, config())
    wanted = np.ones(7, bool)
    result = held_out(labels, made_from, codes, unseen, wanted, config())
    auc = score_rules(labels.rules, labels.kinds, codes, unseen, wanted).auc
    assert (auc[:5] < 0.65).all()  # four of five firings are weak and anywhere
    assert (result.auc_strong[:5] > 0.95).all()
    assert (result.curve[:5, 4] == 1.0).all()
    assert (result.curve[:5, 0] < result.base[:5] + 0.1).all()
    assert result.beats(0.01)[:5].all()
    assert result.beats(0.01, strong=True)[:5].all()
    assert not result.beats(0.01)[5:].any()


def test_labels_that_say_nothing_beat_their_null_as_often_as_the_level(split):
    n_latents = 601

    def noise(words, made):
        return (made.random((len(words), n_latents)) < 0.03) * made.uniform(
            0.5, 1, (len(words), n_latents)
        )

    made_from, text = split(noise, 4)
    codes, unseen = split(noise, 5)
    labels = make_labels(made_from, text, config(permutations=2))
    wanted = np.ones(n_latents, bool)
    result = held_out(labels, made_from, codes, unseen, wanted, config())
    assert result.beats(0.01).mean() <= 0.03
    assert 0.05 < result.beats(0.1).mean() < 0.15
    assert result.p_value.min() >= 0.01


def test_latents_without_a_score_beat_nothing(split):
    made_from, text = split(graded, 6)
    codes, unseen = split(graded, 7)
    labels = make_labels(made_from, text, config())
    wanted = np.arange(7) < 3
    result = held_out(labels, made_from, codes, unseen, wanted, config(null_permutations=1))
    assert np.isnan(result.p_value[3:]).all()
    assert np.isnan(result.auc_strong[3:]).all()
    assert result.beats(1.0).tolist() == [True] * 3 + [False] * 4


def test_too_few_strong_firings_have_no_score(split):
    made_from, text = split(graded, 8)
    codes, unseen = split(lambda words, made: graded(words, made) * 0.55, 9)
    labels = make_labels(made_from, text, config())
    result = held_out(labels, made_from, codes, unseen, np.ones(7, bool), config())
    few = result.n_strong < LEAST_STRONG
    assert few[:5].all()
    assert np.isnan(result.auc_strong[few]).all()
    assert not result.beats(1.0, strong=True)[few].any()


def test_a_tenth_of_the_firings_are_strong(split):
    made_from, _ = split(graded, 10)
    bars = strong_from(made_from)
    for latent in range(7):
        share = (made_from.of(latent).values >= bars[latent]).mean()
        assert share == pytest.approx(STRONGEST, abs=0.02)
