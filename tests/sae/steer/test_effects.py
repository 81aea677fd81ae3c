import contextlib

import pytest
import torch

from sae.steer.edits import Edit
from sae.steer.generation import divergence, generate, measure_effect, repeated_share, share_of
from sae.steer.steering import Steering


@pytest.fixture
def steered(model, placed):
    return lambda: Steering(model, [Edit(placed, latent=3, clamp=7.0)])


def log_probs(model, tokens):
    return model(torch.tensor([tokens]), use_cache=False).logits[0].double().log_softmax(-1)


def test_no_steering_has_no_effect(model, tokenizer):
    base = generate(model, tokenizer, "w3 w7", max_new_tokens=11)
    targets = torch.tensor([2, 5])
    neutral = torch.randint(37, (3, 7), generator=torch.Generator().manual_seed(0))
    effect = measure_effect(model, contextlib.nullcontext, base, base, targets, neutral=neutral)
    assert effect.target_gain == 0
    assert effect.kl_neutral == 0
    assert effect.target_share == effect.target_share_base
    assert effect.repeated == effect.repeated_base
    assert effect.nll == effect.nll_base


def test_the_figures_are_those_of_the_definitions(model, tokenizer, steered):
    base = generate(model, tokenizer, "w3 w7", max_new_tokens=11)
    with steered():
        changed = generate(model, tokenizer, "w3 w7", max_new_tokens=11)
        log_q = log_probs(model, base.all_tokens)
    log_p = log_probs(model, base.all_tokens)
    targets = torch.tensor([2, 5, 31])
    effect = measure_effect(model, steered, base, changed, targets)
    gain = (log_q.exp()[1:, targets].sum(1) / log_p.exp()[1:, targets].sum(1)).log().mean()
    assert effect.target_gain == pytest.approx(float(gain), rel=1e-4)
    places, tokens = range(1, 12), torch.tensor(base.tokens)
    assert effect.nll_base == pytest.approx(-float(log_p[places, tokens].mean()), rel=1e-4)
    log_r = log_probs(model, changed.all_tokens)
    tokens = torch.tensor(changed.tokens)
    assert effect.nll == pytest.approx(-float(log_r[places, tokens].mean()), rel=1e-4)
    assert effect.nll > effect.nll_base
    assert effect.kl_neutral is None


def test_divergence_is_the_mean_over_tokens(model, steered):
    neutral = torch.randint(37, (3, 7), generator=torch.Generator().manual_seed(0))
    total = 0.0
    for tokens in neutral.tolist():
        log_p = log_probs(model, tokens)
        with steered():
            log_q = log_probs(model, tokens)
        total += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert divergence(model, steered, neutral) == pytest.approx(total / 3, rel=1e-4)
    assert total > 0.01


@pytest.mark.parametrize(
    ("tokens", "share"),
    [((), 0.0), ((1, 2), 0.0), ((1, 2, 3, 4), 0.0), ((5,) * 13, 10 / 11), ((1, 2, 1, 2, 1), 1 / 3)],
)
def test_repeated_share(tokens, share):
    assert repeated_share(tokens) == pytest.approx(share)


def test_share_of_targets():
    assert share_of((1, 2, 2, 7), torch.tensor([2, 9])) == 0.5
    assert share_of((), torch.tensor([2])) == 0
