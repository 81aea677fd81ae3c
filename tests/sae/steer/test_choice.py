import dataclasses
import json

import pytest
import torch

from sae.steer.choice import Candidate, SteerSubject, Trial, _rank, choose_latent
from sae.steer.config import SteerConfig
from sae.steer.edits import Edit
from sae.steer.generation import generate
from sae.steer.steering import Steering

CONFIG = SteerConfig(prompt="w3 w7", max_new_tokens=11, strength=4.0, n_candidates=3)
NEVER = (34, 35, 36)


def candidate(latent, **fields):
    known = {"label": f"label {latent}", "auc": 0.9, "density": 0.01, "targets": NEVER}
    return Candidate(latent=latent, **{**known, **fields})


@pytest.fixture
def subject(model, tokenizer, placed):
    return SteerSubject(model, tokenizer, placed)


@pytest.fixture
def steered_text(subject):
    def text(latent):
        with Steering(subject.model, [Edit(subject.dictionary, latent=latent, clamp="4x max")]):
            return generate(*subject[:2], CONFIG.prompt, max_new_tokens=11)

    return text


def test_the_latent_that_brings_its_words_is_chosen(subject, steered_text):
    base = generate(*subject[:2], CONFIG.prompt, max_new_tokens=11)
    text = steered_text(5)
    brought = tuple(sorted(set(text.tokens) - set(base.tokens)))
    assert brought
    absent = sorted(set(range(1, 37)) - set(text.tokens) - set(base.tokens))[:2]
    reports = []
    candidates = [
        candidate(4, targets=(*absent, 0)),
        candidate(5, targets=(*brought, *absent)),
        candidate(7, auc=0.1),
    ]
    choice = choose_latent(
        subject, candidates, CONFIG,
        neutral=torch.tensor([[1, 2, 3, 4, 5]]), progress=lambda *r: reports.append(r),
    )  # fmt: skip
    assert choice.chosen.candidate.latent == 5
    assert choice.base == base
    assert choice.chosen == choice.trials[0]
    assert choice.chosen.text == text.text
    assert choice.effect.target_share > choice.effect.target_share_base == 0
    assert choice.effect.kl_neutral > 0
    assert [t.candidate.latent for t in choice.trials] == [5, 4]
    assert choice.trials[0].brought == brought
    assert choice.trials[1].brought == ()
    assert choice.n_candidates == 2
    assert reports == [(2, 2, "latents tried")]
    assert "AUC of 0.7 or more" in choice.rule
    json.dumps(dataclasses.asdict(choice))


def test_many_candidates_are_screened_by_the_rise_of_their_words(subject):
    candidates = [candidate(i, targets=(i, i + 1, i + 2)) for i in range(22)]
    prompt = torch.tensor([subject.tokenizer(CONFIG.prompt)["input_ids"]])
    base = subject.model(prompt).logits[0, -1].softmax(0)
    rise = {}
    for c in candidates:
        edit = Edit(subject.dictionary, latent=c.latent, clamp="4x max")
        with Steering(subject.model, [edit]):
            steered = subject.model(prompt).logits[0, -1].softmax(0)
        rise[c.latent] = float((steered - base)[list(c.targets)].sum())
    best = sorted(rise, key=rise.__getitem__, reverse=True)[:3]
    reports = []
    choice = choose_latent(subject, candidates, CONFIG, progress=lambda *r: reports.append(r))
    assert {t.candidate.latent for t in choice.trials} == set(best)
    assert choice.n_candidates == 22
    assert reports == [(22, 22, "latents screened"), (3, 3, "latents tried")]


def test_batches_do_not_matter(subject, monkeypatch):
    candidates = [candidate(i, targets=(i, i + 1, i + 2)) for i in range(22)]
    whole = choose_latent(subject, candidates, CONFIG)
    monkeypatch.setattr("sae.steer.choice.AT_ONCE", 2)
    assert choose_latent(subject, candidates, CONFIG) == whole


def test_each_trial_is_steered_by_its_own_latent(subject, steered_text):
    choice = choose_latent(subject, [candidate(4), candidate(5), candidate(6)], CONFIG)
    assert {t.candidate.latent: t.text for t in choice.trials} == {
        latent: steered_text(latent).text for latent in (4, 5, 6)
    }


def test_a_named_latent_is_the_only_one_tried(subject, steered_text):
    config = dataclasses.replace(CONFIG, latent=5)
    choice = choose_latent(subject, [candidate(4), candidate(5, auc=0.1)], config)
    assert [t.candidate.latent for t in choice.trials] == [5]
    assert choice.chosen.text == steered_text(5).text
    assert choice.rule == "the latent was named in the config"


def test_steering_starts_at_the_first_position(subject):
    config = dataclasses.replace(CONFIG, latent=5)
    late = choose_latent(subject._replace(first_position=99), [candidate(5)], config)
    assert late.chosen.text == late.base.text
    assert late.effect.target_gain == 0


def test_loops_come_last_and_the_label_breaks_ties():
    def trial(brought=(), repeated=0.0, **fields):
        return Trial(candidate=candidate(1, **fields), text="", brought=brought, repeated=repeated)

    best = trial((1, 2))
    sure = trial((1,), auc=0.95)
    less = trial((1,), auc=0.9)
    loop = trial((1, 2, 3), repeated=0.9)
    assert sorted([loop, less, best, sure], key=_rank) == [best, sure, less, loop]
