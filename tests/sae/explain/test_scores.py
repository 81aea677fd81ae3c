"""The AUC is the pairwise probability, and its interval holds for rows that come in clusters."""

import numpy as np
import pytest
from scipy import stats

from sae.explain.config import ExplainConfig
from sae.explain.labels import Rules, make_labels
from sae.explain.scores import bootstrap_mean, derangement, levels, score_rules

KINDS = ("word", "source")


def _rules(*rules: tuple[int, dict[int, float]]) -> Rules:
    width = max(len(listed) for _, listed in rules)
    value = np.full((len(rules), width), -1, np.int32)
    weight = np.zeros((len(rules), width))
    for index, (_, listed) in enumerate(rules):
        value[index, : len(listed)] = list(listed)
        weight[index, : len(listed)] = list(listed.values())
    return Rules(np.array([kind for kind, _ in rules]), value, weight)


def _pairwise(score: np.ndarray, fires: np.ndarray) -> float:
    above = score[fires][:, None] - score[~fires][None]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def _obuchowski(score: np.ndarray, fires: np.ndarray, cluster: np.ndarray) -> float:
    """Variance of the AUC of clustered data, written out from the paper's equations."""
    auc = _pairwise(score, fires)
    ids = np.unique(cluster)
    m, n = fires.sum(), (~fires).sum()
    v10 = np.array([_pairwise(np.append(s, score[~fires]), np.arange(n + 1) < 1) for s in score])
    v01 = np.array([_pairwise(np.append(score[fires], s), np.arange(m + 1) < m) for s in score])
    x = np.array([(v10 - auc)[(cluster == i) & fires].sum() for i in ids])
    y = np.array([(v01 - auc)[(cluster == i) & ~fires].sum() for i in ids])
    i10 = sum(bool(fires[cluster == i].any()) for i in ids)
    i01 = sum(bool((~fires[cluster == i]).any()) for i in ids)
    s10 = i10 / ((i10 - 1) * m) * (x**2).sum()
    s01 = i01 / ((i01 - 1) * n) * (y**2).sum()
    s11 = len(ids) / (len(ids) - 1) * (x * y).sum()
    return s10 / m + s01 / n + 2 * s11 / (m * n)


@pytest.fixture
def small(text_of, codes_of):
    made = np.random.default_rng(0)
    word = made.integers(-1, 7, 13 * 17)
    source = made.integers(0, 2, 13 * 17)
    fires = made.random((13 * 17, 5)) < np.array([0.1, 0.3, 0.5, 0.2, 0.2])
    fires[:, 1] |= word == 2
    return text_of(13, 17, word=word, source=source), codes_of(fires), fires


def test_auc_and_its_error_equal_brute_force(small):
    text, codes, fires = small
    rules = _rules(
        (0, {2: 0.5, 4: 0.7}),
        (0, {2: 0.9, 3: 0.4, 5: 0.4, 6: 0.1}),  # two words share a score
        (1, {1: 0.3}),
        (1, {0: 0.2, 1: 0.4}),
        (0, {5: 0.3}),
    )
    result = score_rules(rules, KINDS, codes, text, np.array([True] * 4 + [False]))
    for latent in range(4):
        values = text.values[KINDS[rules.kind[latent]]]
        score = np.zeros(text.n_rows)
        for value, weight in zip(rules.value[latent], rules.weight[latent], strict=True):
            if value >= 0:
                score[values == value] = weight
        fired = fires[:, latent]
        assert result.auc[latent] == pytest.approx(_pairwise(score, fired), abs=1e-12)
        variance = _obuchowski(score, fired, text.example)
        assert result.error[latent] ** 2 == pytest.approx(variance, rel=1e-9)
        assert result.low[latent] < result.auc[latent] < result.high[latent]
    assert np.isnan([array[4] for array in vars(result).values()]).all()


def test_levels_rank_the_scores_and_share_ties():
    rules = _rules((0, {3: 0.5, 1: 0.2, 2: 0.5}), (0, {9: 0.1}))
    assert levels(rules).tolist() == [[2, 1, 2], [1, 0, 0]]


def test_rule_that_is_always_right_scores_one_with_an_honest_lower_end(small, codes_of):
    text, _, _ = small
    fires = (text.values["word"] == 2)[:, None]
    result = score_rules(_rules((0, {2: 0.5})), KINDS, codes_of(fires), text, np.array([True]))
    n_clusters = len(np.unique(text.example[fires[:, 0]]))
    assert (result.auc[0], result.high[0], result.error[0]) == (1.0, 1.0, 0.0)
    # Wilson's lower end for as many successes in as many examples, on the scale from 0.5 to 1.
    z2 = float(stats.t.ppf(0.975, n_clusters - 1)) ** 2
    assert result.low[0] == pytest.approx(0.5 + 0.5 * n_clusters / (n_clusters + z2), abs=0.02)


def test_interval_ends_where_the_rule_can_score_no_more(small, codes_of):
    """Half of the rows are listed, so that even a latent that fires in no other stays below 1."""
    text, _, _ = small
    listed = text.values["source"] == 1
    fires = np.repeat((listed & (np.arange(listed.size) % 3 == 0))[:, None], 2, axis=1)
    rules = _rules((1, {1: 0.5}), (0, {2: 0.5, 3: 0.4, 4: 0.3}))  # the other has more words
    result = score_rules(rules, KINDS, codes_of(fires), text, np.array([True, False]))
    assert 0.5 < result.low[0] < result.auc[0] < 0.9
    assert result.high[0] == pytest.approx(result.auc[0])


def test_rule_whose_words_never_come_up_is_undecided(small, codes_of):
    text, codes, _ = small
    result = score_rules(
        _rules(*[(0, {50 + i: 0.5}) for i in range(5)]), KINDS, codes, text, np.ones(5, bool)
    )
    np.testing.assert_allclose(result.auc, 0.5)
    assert (result.low <= 0.5).all()
    assert (result.high > 0.55).all()


def test_rule_that_points_the_wrong_way_scores_below_half(small, codes_of):
    text, _, _ = small
    fires = (text.values["word"] != 2)[:, None]
    result = score_rules(_rules((0, {2: 0.5})), KINDS, codes_of(fires), text, np.array([True]))
    assert result.high[0] < 0.5


@pytest.mark.parametrize("spread", [0.02, 1.5])
def test_interval_covers_half_for_latents_that_know_nothing(text_of, codes_of, bursty, spread):
    """Both the firings and the words come in bursts, independently of each other."""
    n_latents, shape = 499, (61, 53)
    word = np.stack([bursty(shape, 0.06, spread, 1000 + w) for w in range(23)])
    values = np.where(word.any(axis=0), word.argmax(axis=0), 23).ravel()
    fires = np.stack([bursty(shape, 0.03, spread, s).ravel() for s in range(n_latents)], axis=1)
    made = np.random.default_rng(3)
    rules = _rules(*[
        (0, dict(zip(made.permutation(23)[:3].tolist(), (0.3, 0.2, 0.1), strict=True)))
        for _ in range(n_latents)
    ])
    codes = codes_of(fires)
    result = score_rules(rules, KINDS, codes, text_of(*shape, word=values), codes.n_fired >= 20)
    scored = np.isfinite(result.auc)
    covered = ((result.low <= 0.5) & (result.high >= 0.5))[scored]
    naive = (
        np.abs(result.auc - 0.5)[scored] <= 1.96 * _error_of_independent_rows(result, codes)[scored]
    )
    assert scored.sum() > 400
    assert 0.93 <= covered.mean() <= 0.995
    if spread > 1:
        assert naive.mean() < covered.mean() - 0.05
    width = (result.high - result.low)[scored]
    assert np.median(width) < 6 * np.median(result.error[scored])


def _error_of_independent_rows(result, codes) -> np.ndarray:
    """Hanley and McNeil's, which takes all rows as independent."""
    auc, m = result.auc, codes.n_fired
    n = codes.n_rows - m
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (m - 1) * (q1 - auc**2) + (n - 1) * (q2 - auc**2)
    return np.sqrt(variance / (m * n)) * 0.35  # ties: most rows share the lowest score


def test_interval_covers_the_truth_for_latents_that_know_something(text_of, codes_of, bursty):
    """600 latents of one law, so their mean is the truth."""
    n_latents, shape = 599, (61, 53)
    made = np.random.default_rng(0)
    covered, aucs, ends = [], [], []
    for seed in range(12):
        has = bursty(shape, 0.05, 0.8, 5000 + seed).ravel()
        text = text_of(*shape, word=np.where(has, 1, 0))
        fires = np.where(
            has[:, None],
            made.random((has.size, n_latents // 12)) < 0.3,
            made.random((has.size, n_latents // 12)) < 0.02,
        )
        rules = _rules(*[(0, {1: 0.3})] * fires.shape[1])
        result = score_rules(rules, KINDS, codes_of(fires), text, np.ones(fires.shape[1], bool))
        aucs.append(result.auc)
        ends.append((result.low, result.high))
    truth = np.concatenate(aucs).mean()
    assert 0.6 < truth < 0.8
    covered = [((low <= truth) & (truth <= high)) for low, high in ends]
    assert 0.92 <= np.concatenate(covered).mean() <= 0.99


def test_scoring_where_the_label_was_made_flatters_a_latent_that_knows_nothing(text_of, codes_of):
    """Why the score split exists: overfitted words look good where they were found."""
    made = np.random.default_rng(0)
    shape, n_latents = (97, 31), 53
    words = [made.integers(0, 499, shape[0] * shape[1]) for _ in range(2)]
    explain, score = (text_of(*shape, word=word) for word in words)
    fires = [made.random((shape[0] * shape[1], n_latents)) < 0.03 for _ in range(2)]
    labels = make_labels(codes_of(fires[0]), explain, ExplainConfig(kinds=("word",)))
    leaking = score_rules(labels.wide, labels.kinds, codes_of(fires[0]), explain, labels.eligible)
    honest = score_rules(labels.wide, labels.kinds, codes_of(fires[1]), score, labels.eligible)
    assert np.nanmean(leaking.auc) > 0.55
    assert (leaking.low[labels.eligible] > 0.5).mean() > 0.9
    assert np.nanmean(honest.auc) == pytest.approx(0.5, abs=0.01)
    assert (honest.low[labels.eligible] > 0.5).mean() < 0.1


def test_derangement_gives_everyone_another():
    latents = np.array([3, 5, 11, 23, 42])
    for seed in range(50):
        partner = derangement(latents, np.random.default_rng(seed))
        assert sorted(partner.tolist()) == latents.tolist()
        assert (partner != latents).all()
    again = derangement(latents, np.random.default_rng(49))
    assert (partner == again).all()


def test_derangement_of_one_is_refused():
    with pytest.raises(ValueError, match="latents must be at least two to be exchanged, got 1"):
        derangement(np.array([3]), np.random.default_rng(0))


def test_bootstrap_interval_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(0.7, 0.1, 997)
    result = bootstrap_mean(values, np.random.default_rng(1))
    error = 1.96 * 0.1 / np.sqrt(997)
    assert result.mean == pytest.approx(values.mean())
    assert result.mean - result.low == pytest.approx(error, rel=0.15)
    assert result.high - result.mean == pytest.approx(error, rel=0.15)


def test_bootstrap_of_one_or_none_has_no_interval():
    one = bootstrap_mean(np.array([0.75]), np.random.default_rng(0))
    none = bootstrap_mean(np.array([]), np.random.default_rng(0))
    assert one.mean == 0.75
    assert np.isnan([one.low, one.high, none.mean, none.low]).all()
