"""Contexts show where a latent fires most, in the right places."""

import numpy as np
import pytest
import torch

from activations_cache.tokens import table_of
from sae.explain.config import ExplainConfig
from sae.explain.examples import ContextFinder, SplitFirings, activity
from sae.explain.text_at_rows import TextReader

N_POS = 11
STRINGS = tuple(f" t{i}" for i in range(71))


@pytest.fixture
def parts(fake_cache, codes_of):
    """Seven examples of two splits; the last one is four tokens long."""
    acts = torch.zeros(7, N_POS, 3)
    acts[0, 4, 0], acts[0, 5, 0], acts[0, 10, 0] = 2.0, 5.0, 1.0
    acts[2, 1, 0] = 4.0
    acts[3, 10, 0] = 9.0
    acts[5, 6, 0] = 3.0
    acts[6, 2, 0] = 0.5
    acts[1, 1:, 1] = 1.0
    tokens = torch.arange(7 * N_POS).reshape(7, N_POS) % 71
    tokens[6, 4:] = -1
    cache = fake_cache(
        tokens=tokens,
        acts=acts,
        split=torch.tensor([0, 0, 0, 1, 1, 1, 1]),
        source=torch.tensor([0, 1, 0, 1, 0, 1, 0]),
    )
    reader = TextReader(cache, STRINGS)
    results = []
    for name in ("explain", "score"):
        text = reader.read(name).text
        results.append(
            SplitFirings(name, codes_of(acts.numpy()[text.example, text.position]), text)
        )
    return cache, results


def _finder(parts, **settings: int) -> ContextFinder:
    cache, result = parts
    pieces = table_of(cache.examples.tokens.numpy(), STRINGS)
    return ContextFinder(result, cache.examples, pieces, ExplainConfig(**settings))


def test_contexts_come_from_different_examples_by_peak(parts):
    contexts = list(_finder(parts, top_contexts=4, contexts_per_fifth=0, context_tokens=5).find(0))
    assert [context.rank for context in contexts] == [0, 1, 2, 3]
    assert [context.example for context in contexts] == [3, 0, 2, 5]
    assert [context.activation for context in contexts] == [9.0, 5.0, 4.0, 3.0]
    assert [context.split for context in contexts] == ["score", "explain", "explain", "score"]
    assert contexts[0].source == "glosses.jsonl"
    for context in contexts:
        assert context.activations[context.peak] == context.activation


def test_further_contexts_come_from_each_fifth(parts):
    contexts = list(_finder(parts, top_contexts=1, contexts_per_fifth=1).find(0))
    # Peaks 9 | 5, 4, 3, 0.5: of 9 the fifths 3, 3, 2, 1; of two in the same fifth the larger.
    assert [context.activation for context in contexts] == [9.0, 5.0, 3.0, 0.5]
    assert [context.rank for context in contexts] == [0, 1, 2, 3]
    more = list(_finder(parts, top_contexts=1, contexts_per_fifth=3).find(0))
    assert [context.activation for context in more] == [9.0, 5.0, 4.0, 3.0, 0.5]
    none = list(_finder(parts, top_contexts=2, contexts_per_fifth=0).find(0))
    assert [context.activation for context in none] == [9.0, 5.0]


def test_window_lies_around_the_peak_and_inside_the_example(parts):
    last, inside, first = list(_finder(parts, context_tokens=5).find(0))[:3]
    assert (last.start, last.peak, last.activations) == (6, 4, (0, 0, 0, 0, 9))
    assert (inside.start, inside.peak, inside.activations) == (3, 2, (0, 2, 5, 0, 0))
    assert inside.tokens == (" t3", " t4", " t5", " t6", " t7")
    assert (first.start, first.peak, first.activations) == (0, 1, (0, 4, 0, 0, 0))


def test_window_longer_than_the_text_is_the_text_without_padding(parts):
    contexts = list(_finder(parts, context_tokens=997).find(0))
    assert [len(context.tokens) for context in contexts] == [11, 11, 11, 11, 4]
    assert contexts[-1].activations == (0, 0, 0.5, 0)


def test_silent_latent_has_no_context(parts):
    assert list(_finder(parts).find(2)) == []


def test_activity_counts_both_splits(parts):
    _, result = parts
    counted = activity(result, 9)
    n_rows = 6 * (N_POS - 1) + 3
    assert counted.n_fired.tolist() == [7, 10, 0]
    np.testing.assert_allclose(counted.density, np.array([7, 10, 0]) / n_rows, rtol=1e-6)
    assert counted.max_activation.tolist() == [9.0, 1.0, 0.0]
    # 0.5 1 2 3 4 5 9 of 9, in steps of 1; the largest stands in the last step.
    assert counted.histogram[0].tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 1]
    assert counted.histogram[1].tolist() == [0] * 8 + [10]
    assert counted.histogram.sum(axis=1).tolist() == counted.n_fired.tolist()
