import math

import pytest
import torch

from sae.evaluate import resume_forward
from sae.evaluate.resume_forward import LogitTally, compare


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(5, 7, 11, generator=generator) * 3
    other = torch.randn(5, 7, 11, generator=generator) * 3
    tokens = torch.randint(11, (5, 7), generator=generator)
    tokens[2, 4:] = -1
    return base, other, tokens


def test_sums_are_those_of_the_definitions(case):
    base, other, tokens = case
    tally = compare(base, other, tokens, 2)
    log_p, log_q = base.double().log_softmax(-1), other.double().log_softmax(-1)
    for example in range(5):
        places = range(2, 3 if example == 2 else 6)
        ce = sum(-log_q[example, i, tokens[example, i + 1]] for i in places)
        ce_base = sum(-log_p[example, i, tokens[example, i + 1]] for i in places)
        kl = sum((log_p[example, i].exp() * (log_p - log_q)[example, i]).sum() for i in places)
        same = sum(int(log_p[example, i].argmax() == log_q[example, i].argmax()) for i in places)
        assert tally.n_tokens[example] == len(places)
        assert tally.ce[example] == pytest.approx(float(ce), rel=1e-5)
        assert tally.ce_base[example] == pytest.approx(float(ce_base), rel=1e-5)
        assert tally.kl[example] == pytest.approx(float(kl), rel=1e-5)
        assert tally.same[example] == same


def test_chunks_change_nothing(case, monkeypatch):
    base, other, tokens = case
    whole = compare(base, other, tokens, 1)
    monkeypatch.setattr(resume_forward, "LOGITS_AT_ONCE", 11 * 3)
    for a, b in zip(whole, compare(base, other, tokens, 1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_equal_logits_have_no_divergence_at_all(case):
    base, _, tokens = case
    tally = compare(base.bfloat16(), base.bfloat16(), tokens, 0)
    assert tally.kl.tolist() == [0.0] * 5
    assert torch.equal(tally.same, tally.n_tokens)
    assert torch.equal(tally.ce, tally.ce_base)


def test_impossible_tokens_keep_the_divergence_finite(case):
    base, other, tokens = case
    other[..., 3] = -1e4
    assert bool(compare(base.bfloat16(), other.bfloat16(), tokens, 0).kl.isfinite().all())


def test_uniform_predictions_cost_the_logarithm_of_the_vocabulary(case):
    _, _, tokens = case
    tally = compare(torch.zeros(5, 7, 11), torch.zeros(5, 7, 11), tokens, 0)
    assert tally.ce / tally.n_tokens == pytest.approx([math.log(11)] * 5, rel=1e-6)


def test_tallies_are_joined_along_the_contexts(case):
    base, other, tokens = case
    parts = [compare(base[s], other[s], tokens[s], 1) for s in (slice(0, 2), slice(2, 5))]
    whole = compare(base, other, tokens, 1)
    for a, b in zip(LogitTally.joined(parts), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
