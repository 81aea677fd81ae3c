"""The permutation null of a label on unseen documents, and its score by strength of firing."""

import numpy as np
import pytest

from sae.explain.config import ExplainConfig
from sae.explain.examples import SplitFirings
from sae.explain.held_out import (
    LEAST_STRONG,
    STRONGEST,
    asked_for,
    concepts_with_a_latent,
    held_out,
    strong_from,
)
from sae.explain.labels import make_labels
from sae.explain.scores import score_rules
from sae.explain.statistics import permuted_rows
from sae.explain.text_at_rows import Concept, ConceptFamily, concept_families, concepts_in

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


def zipf_words(seed: int, n_words: int = 61) -> np.ndarray:
    share = 1 / np.arange(1, n_words + 1)
    return np.random.default_rng(seed).choice(n_words, 499 * 41, p=share / share.sum())


def one_per_word(words: np.ndarray, has: np.ndarray) -> np.ndarray:
    """Latent i fires on word i where it has one, strongly, and weakly on a tenth of all rows."""
    acts = np.where(np.random.default_rng(1).random((len(words), len(has))) < 0.1, 0.1, 0.0)
    acts[np.arange(len(words)), words] = np.where(has[words], 1.0, 0.0)
    return acts


def test_concepts_are_complete_where_they_are_frequent(codes_of, text_of):
    """Only the frequent words have a latent; firing weakly does not hide it."""
    n_words, n_with = 61, 20
    has = np.arange(n_words) < n_with
    has[[13, 25]] = ~has[[13, 25]]
    concepts = [Concept(f"w{i}", "words", "word", (i,)) for i in range(n_words)]
    concepts.append(Concept("two of them", "pairs", "word", (13, 25), safety=True))
    concepts.append(Concept("all", "what a gloss is about", "supersense", (0,)))
    parts = []
    for seed, name in enumerate(("explain", "score")):
        words = zipf_words(seed)
        codes, text = (
            codes_of(one_per_word(words, has)),
            text_of(499, 41, word=words, supersense=np.zeros_like(words)),
        )
        parts.append(SplitFirings(name, codes, text))
    result = concepts_with_a_latent(concepts, parts, 100)
    assert result["n"] == n_words + 1
    assert sum(n for _, _, n in result["points"]) == n_words + 1
    assert result["points"][0][1] < 0.2 < 0.8 < result["points"][-1][1]
    assert result["families"]["what a gloss is about"] == {"n": 1, "share_present": 0.0}
    assert result["families"]["words"] == {"n": n_words, "share_present": has.mean()}
    share = 1 / np.arange(1, n_words + 1)
    boundary = share[n_with] / share.sum()
    assert boundary / 2 < result["f50"] < boundary * 2
    assert "says nothing about" in result["caution"]
    (safety,) = result["safety"]
    assert safety["concept"] == "two of them"
    assert safety["recall"] < 0.5  # of both words none has a latent but 25, the rarer one


def test_a_latent_chosen_by_chance_is_no_latent_of_its_concept(codes_of, text_of):
    """What goes along with a rare word on the split that chose it does not on other documents."""
    made, parts = np.random.default_rng(0), []
    concepts = [Concept(f"w{i}", "words", "word", (i,)) for i in range(61)]
    for seed, name in enumerate(("explain", "score")):
        words = zipf_words(seed)
        fires = (made.random((len(words), 211)) < 0.001).astype(float)
        if name == "explain":
            fires[:, :61] = words[:, None] == np.arange(61)
        parts.append(SplitFirings(name, codes_of(fires), text_of(499, 41, word=words)))
    result = concepts_with_a_latent(concepts, parts, 100)
    assert result["share_present"] == 0
    assert "present must hold both" in result["reason"]
    assert concepts_with_a_latent([], parts, 100)["n"] == 0


def test_concepts_are_asked_for_evenly_over_frequency_and_of_both_splits(text_of):
    texts = [text_of(499, 41, word=zipf_words(seed)) for seed in range(2)]
    concepts = [Concept(f"w{i}", "words", "word", (i,)) for i in range(61)]
    absent = Concept("absent", "words", "word", (61,))
    rare = Concept("rare", "safety", "word", (60,), safety=True)
    chosen, tables = asked_for([*concepts, absent, rare], texts, 12)
    assert len(chosen) == 12
    assert rare in chosen
    assert absent not in chosen
    numbers = [concept.values[0] for concept in chosen if concept != rare]
    assert {0, 1} <= set(numbers)  # alone in their steps of frequency
    counts = np.bincount(texts[1].values["word"], minlength=61)
    assert np.diff(tables[1].indptr).tolist() == [counts[c.values[0]] for c in chosen]


def test_shipped_families_and_nouns_of_one_sense_are_concepts():
    families = concept_families()
    assert {family.family for family in families if family.safety} == {
        "deception and power", "criminal content", "bias", "sycophancy", "unsafe code",
        "self-representation",
    }  # fmt: skip
    words = ["it", "liar", "zebra", "zzyx", "bank", "zebras"]
    names = {"word": words, "supersense": ["noun.food"]}
    found = concepts_in(names, families)
    assert Concept("noun.food", "what a gloss is about", "supersense", (0,)) in found
    assert Concept("lie", "deception and power", "word", (1,), True) in found
    assert Concept("zebra", "noun.animal", "word", (2, 5)) in found
    assert not {"it", "bank", "zzyx"} & {concept.name for concept in found}
    alone = concepts_in({"word": ["zzyx", "!"], "supersense": []}, families)
    assert alone == [Concept("zzyx", "words", "word", (0,))]


def test_a_family_has_as_many_controls_as_texts(tmp_path):
    with pytest.raises(ValueError, match=r"neg of family 'a' must be as many as pos, .* got 1"):
        ConceptFamily(family="a", words={}, pos=("x", "y"), neg=("z",))
    file = tmp_path / "families.json"
    for text in ("{", '[{"family": "a"}]', '[{"family": "a", "words": {}, "more": 1}]'):
        file.write_text(text)
        with pytest.raises(ValueError, match="families must be a JSON list of objects"):
            concept_families(str(file))
