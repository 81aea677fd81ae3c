"""Labels name what was planted, and nothing where nothing was."""

from collections import Counter

import numpy as np
import pytest
import torch

from sae.explain.config import ExplainConfig
from sae.explain.firings import encode_rows
from sae.explain.labels import fires_enough, make_labels, n_examples
from sae.explain.run import TextUnits, explain
from sae.explain.subject import rule_of
from sae.explain.text_at_rows import TextReader

N_EX, N_POS = 151, 47
NAMES = {
    "word": [f"w{i}" for i in range(99)],
    "previous word": [f"w{i}" for i in range(99)],
    "token": [f" w{i}" for i in range(199)],
    "supersense": ["noun.animal", "noun.food", "verb.motion"],
    "source": ["novels", "glosses"],
    "position": ["0", "1", "2-3", "4-7", "8-15", "16-31", "32-63"],
}


@pytest.fixture
def prose(text_of):
    """Words that come in bursts, with all other kinds beside them."""
    made = np.random.default_rng(0)
    shape = (N_EX, N_POS)
    zipf = 1 / np.arange(1, 60)
    word = made.choice(59, shape, p=zipf / zipf.sum())
    burst = made.integers(59, 79, (N_EX, 1)) * np.ones(shape, int)
    word = np.where(made.random(shape) < 0.1, burst, word).ravel()
    previous = np.roll(word, 1)
    previous[::N_POS] = -1
    sense = np.repeat(made.integers(-1, 3, N_EX * N_POS // 5 + 1), 5)[: N_EX * N_POS]
    return text_of(
        N_EX, N_POS,
        word=word,
        previous_word=previous,
        token=word + 99 * (made.random(N_EX * N_POS) < 0.5),
        supersense=sense,
        source=np.repeat(made.integers(0, 2, N_EX), N_POS),
        position=np.frexp(np.arange(N_EX * N_POS) % N_POS)[1],
    )  # fmt: skip


def _noisy(fires: np.ndarray) -> np.ndarray:
    """Nine in ten of the firings, and one row in two hundred elsewhere."""
    made = np.random.default_rng(1)
    return np.where(fires, made.random(fires.shape) < 0.9, made.random(fires.shape) < 0.005)


def _labels(prose, codes_of, fires: np.ndarray, **settings: object):
    config = ExplainConfig(**settings)  # type: ignore[arg-type]
    return make_labels(codes_of(np.atleast_2d(fires.T).T), prose, config)


@pytest.mark.parametrize(
    ("kind", "planted", "label"),
    [
        ("word", [70, 61], {'word: "w70", "w61"', 'word: "w61", "w70"'}),
        ("previous word", [65], {'after "w65"'}),
        ("token", [2, 101 + 3], {'token: " w2", " w104"', 'token: " w104", " w2"'}),
        ("supersense", [1], {"glosses about noun.food"}),
        ("source", [1], {"source: glosses"}),
        ("position", [2], {"position in text: 2-3"}),
    ],
)
def test_label_names_the_planted_kind_and_values(prose, codes_of, kind, planted, label):
    fires = _noisy(np.isin(prose.values[kind], planted))
    labels = _labels(prose, codes_of, fires[:, None])
    assert labels.text(0, NAMES) in label
    assert labels.p_value[0] < 0.06  # 1 / (100 permutations + 1), times six kinds


def test_three_planted_words_lead_the_label_where_frequent_words_do_not(planted):
    reader = TextReader(planted.cache, planted.strings)
    split = reader.read("explain")
    d_sae = planted.cache.acts.shape[2]
    from_latents = np.zeros((split.text.n_rows, d_sae), np.float32)
    example, position = split.text.example, split.text.position
    from_latents[:] = planted.cache.acts.numpy()[example, position]
    codes = _codes(from_latents)
    labels = make_labels(codes, split.text, ExplainConfig())
    by_information = [set(labels.words(t, reader.names)[:3]) for t in range(planted.n_topics)]
    by_frequency = [
        _frequent_around_the_top(codes, split.text, reader.names["word"], t)
        for t in range(planted.n_topics)
    ]
    assert _recall(by_information, planted.words) >= 0.95
    assert _recall(by_frequency, planted.words) <= 0.2
    assert (labels.p_value[: planted.n_topics] < 0.02).all()
    assert labels.p_value[planted.random] > 0.05
    assert not labels.eligible[planted.silent]
    assert labels.text(planted.rare, reader.names) == ""


def _codes(dense: np.ndarray):
    from sae.explain.firings import Codes

    latent, row = np.nonzero(dense.T)
    n_fired = np.bincount(latent, minlength=dense.shape[1])
    return Codes(n_fired, row.astype(np.int32), dense.T[latent, row], len(dense))


def _frequent_around_the_top(codes, text, names, latent: int) -> set[str]:
    """What looking at the largest activations gives: the words that stand there most often."""
    rows, values = codes.of(latent)
    top = rows[np.argsort(-values)[:20]]
    around = np.clip(top[:, None] + np.arange(-8, 9), 0, text.n_rows - 1)
    counts = Counter(text.values["word"][around].ravel().tolist())
    return {names[word] for word, _ in counts.most_common(3)}


def _recall(results: list[set[str]], wanted: list[set[str]]) -> float:
    return float(np.mean([len(a & b) / len(b) for a, b in zip(results, wanted, strict=True)]))


def test_words_that_chance_could_give_are_not_listed(prose, codes_of):
    fires = _noisy(prose.values["word"] == 77)
    assert _labels(prose, codes_of, fires[:, None]).text(0, NAMES) == 'word: "w77"'


def test_latents_that_know_nothing_are_rarely_significant(prose, codes_of, bursty):
    n = 307
    fires = np.stack(
        [bursty((N_EX, N_POS), 0.02, (0.01, 3.0)[seed % 2], seed).ravel() for seed in range(n)],
        axis=1,
    )
    labels = _labels(prose, codes_of, fires)
    p = labels.p_value[labels.eligible]
    assert labels.eligible.sum() > 250
    assert (p < 0.05).mean() < 0.06
    assert (p < 0.01).mean() < 0.025


def test_permuting_single_rows_instead_would_find_significance_everywhere(
    prose, codes_of, bursty, monkeypatch
):
    """The reason why whole examples are permuted."""
    from sae.explain import labels as module

    monkeypatch.setattr(
        module, "permuted_rows", lambda example, generator: generator.permutation(len(example))
    )
    fires = np.stack(
        [bursty((N_EX, N_POS), 0.02, 3.0, seed).ravel() for seed in range(103)], axis=1
    )
    labels = _labels(prose, codes_of, fires)
    assert (labels.p_value[labels.eligible] < 0.05).mean() > 0.1


def test_weights_are_shrunken_frequencies(prose, codes_of):
    fires = _noisy(prose.values["word"] == 77)
    labels = _labels(prose, codes_of, fires[:, None], prior_rows=7.0)
    has = prose.values["word"] == 77
    joint, present, rate = (fires & has).sum(), has.sum(), fires.mean()
    assert labels.rules.value[0, 0] == 77
    assert labels.joint[0, 0] == joint
    assert labels.rules.weight[0, 0] == pytest.approx((joint + 7 * rate) / (present + 7))
    assert labels.rules.weight[0, 1] == 0


def test_larger_rule_begins_with_the_label_and_goes_on(prose, codes_of):
    fires = _noisy(np.isin(prose.values["word"], np.arange(60, 75)))
    labels = _labels(prose, codes_of, fires[:, None])
    narrow, wide = labels.rules.value[0], labels.wide.value[0]
    assert (wide[:5] == narrow).all()
    assert set(range(60, 75)) >= set(wide[:12].tolist())
    assert labels.rules.kind[0] == labels.wide.kind[0]


def test_latent_that_fires_in_too_few_rows_or_examples_is_not_labelled(prose, codes_of):
    fires = np.zeros((N_EX * N_POS, 4), bool)
    fires[: N_POS * 4, 0] = True  # four examples
    fires[::251, 1] = True  # twenty-nine rows
    fires[::101, 2] = True
    fires[:, 3] = True  # silent nowhere
    codes = codes_of(fires)
    config = ExplainConfig(min_firings=31)
    assert n_examples(codes, prose).tolist() == [4, 29, 71, N_EX]
    assert fires_enough(codes, prose, config).tolist() == [False, False, True, False]
    labels = make_labels(codes, prose, config)
    assert [labels.text(latent, NAMES) != "" for latent in range(4)] == [False, False, True, False]
    assert (labels.rules.value[[0, 1, 3]] == -1).all()


def test_labels_are_the_same_every_time_and_report_their_passes(prose, codes_of):
    fires = _noisy(np.stack([prose.values["word"] == word for word in range(56, 79)], axis=1))
    seen: list[tuple[int, int]] = []
    config = ExplainConfig(kinds=("word", "source"), permutations=97)
    first = make_labels(codes_of(fires), prose, config, lambda d, t, unit: seen.append((d, t)))
    second = make_labels(codes_of(fires), prose, config)
    assert (first.rules.value == second.rules.value).all()
    assert (first.p_value == second.p_value).all()
    assert seen == [(done, 2 * 98) for done in range(1, 2 * 98 + 1)]


def test_label_text_escapes_what_cannot_be_seen(prose, codes_of):
    fires = _noisy(prose.values["word"] == 77)
    names = NAMES | {"word": ["\n"] * 99}
    assert _labels(prose, codes_of, fires[:, None]).text(0, names) == r'word: "\n"'


def test_only_the_kinds_of_the_config_compete(prose, codes_of):
    fires = _noisy(prose.values["word"] == 77)
    labels = _labels(prose, codes_of, fires[:, None], kinds=("source", "position"))
    assert labels.kinds[labels.rules.kind[0]] in {"source", "position"}


def test_codes_of_the_planted_cache_are_read_through_the_dictionary(
    planted, identity_dictionary, hook_point
):
    ids = planted.cache.rows(("score",))[:211]
    codes = encode_rows(
        identity_dictionary(planted.cache.acts.shape[2]), planted.cache[hook_point], ids
    )
    place = (ids - 3) // 2
    dense = planted.cache.acts.flatten(0, 1)[place].numpy()
    assert (codes.n_fired == (dense > 0).sum(axis=0)).all()


def test_a_latent_of_two_words_in_a_row_gets_their_pair_and_its_rule(
    fake_cache, identity_dictionary
):
    """It fires on the second of two words, each of which comes alone as often."""
    made = np.random.default_rng(0)
    strings = [f" w{chr(97 + i)}" for i in range(11)]
    tokens = torch.from_numpy(made.integers(0, 11, (211, 37)))
    acts = torch.zeros(211, 37, 1)
    acts[:, 1:, 0] = ((tokens[:, :-1] == 3) & (tokens[:, 1:] == 5)).float()
    cache = fake_cache(tokens, acts, torch.arange(211) % 2, torch.zeros(211, dtype=torch.int64))
    config = ExplainConfig(kinds=("word", "previous word", "word pair"), n_baseline=0)
    texts = TextUnits(cache, "model.layers.3:out", config, strings)
    result = explain(identity_dictionary(1), texts, None)
    assert result.labels.text(0, result.names) == 'words: "wd wf"'
    assert result.scores.auc[0] > 0.99
    rule = rule_of(result.labels, 0, result.names)
    assert rule([" wd", " wf", " wf", " wd", " wa", " wf"]) == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
