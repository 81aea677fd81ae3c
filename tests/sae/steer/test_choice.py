import dataclasses
import json

import pytest
import torch

from sae.steer.choice import (
    Candidate,
    Subject,
    Trial,
    _rank,
    choose_latent,
    shortlist,
    target_tokens,
)
from sae.steer.config import SteerConfig
from sae.steer.effects import Effect
from sae.steer.generation import generate
from sae.steer.steering import steering

CONFIG = SteerConfig(prompt="w3 w7", max_new_tokens=11, strength=4.0, n_candidates=3)


def candidate(latent, **fields):
    known = {"label": f"label {latent}", "auc": 0.9, "density": 0.01, "targets": (latent,)}
    return Candidate(latent=latent, **{**known, **fields})


@pytest.fixture
def subject(model, tokenizer, hook_point, dictionary, stats):
    return Subject(model, tokenizer, hook_point, dictionary, stats)


def test_only_fit_candidates_are_tried():
    found = shortlist(
        [
            candidate(1, auc=0.81),
            candidate(2, auc=0.79),
            candidate(3, density=0.5),
            candidate(4, density=1e-6),
            candidate(5, targets=()),
            candidate(6, auc=0.99),
            candidate(7, auc=0.95, label="label 6"),
            candidate(8, auc=0.95),
            candidate(9, auc=0.9),
        ],
        CONFIG,
    )
    assert [c.latent for c in found] == [6, 8, 9]


def test_a_named_latent_is_the_only_one_tried():
    config = dataclasses.replace(CONFIG, latent=2)
    assert [c.latent for c in shortlist([candidate(1), candidate(2, auc=0.1)], config)] == [2]
    with pytest.raises(ValueError, match="latent must be one of the labelled ones, got 2"):
        shortlist([candidate(1)], config)


def test_nothing_fit_is_said():
    with pytest.raises(ValueError, match=r"AUC >= 0\.8 .* got none among 1; name a latent"):
        shortlist([candidate(1, auc=0.5)], CONFIG)


def test_the_largest_effect_is_chosen_and_everything_is_recorded(subject, model, tokenizer):
    reports = []
    with steering(*subject[:1], subject.hook_point, subject.dictionary,
                  [CONFIG.operation(5)], stats=subject.stats):  # fmt: skip
        text = generate(model, tokenizer, CONFIG.prompt, max_new_tokens=11)
    base = generate(model, tokenizer, CONFIG.prompt, max_new_tokens=11)
    brought = tuple(set(text.tokens) - set(base.tokens))
    assert brought
    candidates = [
        candidate(4, targets=(0,)), candidate(5, targets=brought), candidate(6, targets=(0,)),
        candidate(7, auc=0.1),
    ]  # fmt: skip
    choice = choose_latent(
        subject, candidates, CONFIG, progress=lambda *report: reports.append(report)
    )
    assert choice.chosen == choice.trials[0]
    assert {t.candidate.latent for t in choice.trials} == {4, 5, 6}
    assert choice.n_candidates == 4
    assert choice.base == base
    assert reports == [(i, 3, "latents steered") for i in (1, 2, 3)]
    by_latent = {t.candidate.latent: t for t in choice.trials}
    assert by_latent[5].text == text.text
    assert by_latent[5].effect.repeated <= 0.25
    assert choice.chosen.candidate.latent == 5
    assert "most target tokens" in choice.rule
    json.dumps(dataclasses.asdict(choice))


def test_loops_come_last_and_the_gain_breaks_ties():
    def trial(**fields):
        effect = Effect(
            target_share_base=0.1, target_share=0.1, target_gain=0.0, repeated_base=0.0,
            repeated=0.0, nll_base=2.0, nll=3.0, kl_neutral=None,
        )  # fmt: skip
        effect = dataclasses.replace(effect, **fields)
        return Trial(candidate=candidate(1), text="", effect=effect)

    best = trial(target_share=0.3)
    gain = trial(target_share=0.2, target_gain=1.0)
    none = trial(target_share=0.2)
    loop = trial(target_share=1.0, repeated=0.9)
    assert sorted([loop, none, best, gain], key=_rank, reverse=True) == [best, gain, none, loop]


def test_steering_starts_at_the_first_position(subject):
    config = dataclasses.replace(CONFIG, latent=5)
    late = choose_latent(subject._replace(first_position=99), [candidate(5)], config)
    assert late.chosen.text == late.base.text
    assert late.rule == "the latent was named in the config"


def test_target_tokens_are_whole_words(tokenizer):
    assert target_tokens(tokenizer, ["w3", "w3", "w11"]) == (4, 12)
    assert target_tokens(tokenizer, []) == ()
    assert torch.tensor(target_tokens(tokenizer, ["w3 w4"])).tolist() == []
