"""A small model that was trained on a grammar with a known topic: what steering must do to it."""

import pytest
import torch

from sae.steer.attribution import (
    agreement,
    logit_difference,
    mean_difference,
    random_direction,
    stream_of,
)
from sae.steer.choice import alike
from sae.steer.config import SweepConfig
from sae.steer.edits import Calibrate, Edit, Patch, Push
from sae.steer.paths import integrated_gradients
from sae.steer.search import Counting, find_latents, nearest_latents
from sae.steer.steering import Steering
from sae.steer.sweep import Target, sweep


def divergence(planted, p):
    return float((planted * (planted.clamp_min(1e-9).log() - p.clamp_min(1e-9).log())).sum())


def next_noun(grammar, ids):
    """The model's distribution over nouns after a verb, at the last position."""
    p = grammar.model(ids).logits[:, -1].softmax(dim=-1)
    return p[:, grammar.nouns].mean(dim=0)


@pytest.fixture(scope="module")
def topic_latent(grammar):
    """The latent that fires for topic 2 and no other on the verb at the end, by texts alone."""
    texts = [[grammar.text(topic, seed) for seed in range(5)] for topic in range(4)]
    others = [text for topic in (0, 1, 3) for text in texts[topic]]
    return find_latents(
        grammar.model, grammar.tokenizer, grammar.placed, texts[2], others, Counting("last")
    )


def test_the_model_has_learned_the_grammar(grammar):
    for topic in range(4):
        ids = grammar.prompts(topic, seed=9)
        assert divergence(grammar.planted[topic], next_noun(grammar, ids)) < 0.03


def test_search_by_texts_finds_the_topic(grammar, topic_latent):
    assert topic_latent
    result = topic_latent[0].latent
    ids = [grammar.prompts(topic, seed=9) for topic in range(4)]
    f = [grammar.activations(i)[..., result].mean() for i in ids]
    assert f[2] > 10 * max(f[0], f[1], f[3])


def test_clamping_the_topic_brings_its_conditional_and_a_random_direction_does_not(
    grammar, topic_latent
):
    latent = topic_latent[0].latent
    ids = grammar.prompts(grammar.NONE, seed=9)
    planted = grammar.planted[2]
    before = divergence(planted, next_noun(grammar, ids))
    after, doses = {}, []
    random = torch.randn(grammar.d_model, generator=torch.Generator().manual_seed(0))
    for strength in (0.0, 1.0, 2.0, 3.0):
        for arm, along in (("latent", None), ("random", random)):
            edit = Edit(grammar.placed, latent=latent, clamp=f"{strength}x max", along=along)
            with Steering(grammar.model, [edit], first_position=0):
                after[arm] = divergence(planted, next_noun(grammar, ids))
        doses.append(after["latent"])
    assert before > 0.5
    assert doses == sorted(doses, reverse=True)  # the more, the nearer
    assert doses[0] == pytest.approx(before, rel=0.05)
    assert doses[-1] < 0.15 * before
    assert after["random"] > before


def test_calibrating_the_topic_brings_its_conditional_and_latents_that_fire_alike_do_not(
    grammar, topic_latent
):
    latent, ids = topic_latent[0].latent, grammar.prompts(grammar.NONE, seed=9)
    before = divergence(grammar.planted[2], next_noun(grammar, ids))
    made = torch.Generator().manual_seed(0)
    arms = [(latent,), *(alike(grammar.placed.stats, [latent], made) for _ in range(5))]
    after = []
    for latents in arms:
        with Steering(grammar.model, [Calibrate(grammar.placed, latents, "2x")], first_position=0):
            after.append(divergence(grammar.planted[2], next_noun(grammar, ids)))
    assert after[0] < 0.3 * before
    assert sorted(after[1:])[2] > 4 * after[0]  # one of the random ones may be the topic's too
    assert min(after[1:]) > after[0]


def test_patching_and_mean_difference_bring_it_too(grammar):
    """The stream of another topic's text carries the topic; so does the difference of means."""
    point = grammar.placed.hook_point
    ids, other = grammar.prompts(0, seed=9)[:1], grammar.prompts(2, seed=9)[:1]
    with Steering(grammar.model, [Patch(point, stream_of(grammar.model, point, other)[0])]):
        assert divergence(grammar.planted[2], next_noun(grammar, ids)) < 0.1
    vector = mean_difference(
        grammar.model, point, grammar.prompts(2, seed=3), grammar.prompts(0, seed=3)
    )
    for push, is_near in ((vector, True), (random_direction(vector, torch.Generator()), False)):
        with Steering(grammar.model, [Push(point, push)], first_position=0):
            result = divergence(grammar.planted[2], next_noun(grammar, ids))
        assert (result < 0.3) == is_near


def test_attribution_tells_what_ablation_does_better_than_activation(grammar):
    result = agreement(
        grammar.model, grammar.placed, grammar.prompts(2, seed=9)[:1],
        logit_difference(int(grammar.nouns[10]), int(grammar.nouns[0])),
    )  # fmt: skip
    assert result.attribution > 0.7
    assert result.attribution > result.activation + 0.1
    assert result.n > 15


def test_integrated_gradients_are_complete(grammar):
    metric = logit_difference(int(grammar.nouns[10]), int(grammar.nouns[0]))
    path = integrated_gradients(
        grammar.model, grammar.placed, grammar.prompts(2, seed=9)[:1], metric, first_position=0
    )
    assert abs(path.difference) > 1
    assert path.gap < 0.02
    assert path.total == pytest.approx(float(path.attribution.scores.sum()))


def test_a_sweep_chooses_the_largest_strength_within_the_bound(grammar, topic_latent, tmp_path):
    latent = topic_latent[0].latent
    config = SweepConfig(
        strengths=(4.0, 0.0, 1.0, 2.0), prompts=(grammar.text(grammar.NONE, 4),), max_new_tokens=12,
        first_position=0, max_kl=1.0,
    )  # fmt: skip
    target = Target(grammar.model, grammar.tokenizer, grammar.placed, latent, grammar.nouns[10:15])
    neutral = grammar.prompts(grammar.NONE, seed=1)
    neutral[0, -2:] = -1
    reports = []
    result = sweep(target, neutral, config, progress=lambda *r: reports.append(r))
    latent_arm, control = result.of_arm("latent"), result.of_arm("random direction")
    assert [p.strength for p in latent_arm] == [p.strength for p in control] == [0, 1, 2, 4]
    assert latent_arm[2].target_gain > 0.5 > control[2].target_gain
    assert latent_arm[2].kl_neutral > latent_arm[1].kl_neutral > 0
    assert latent_arm[2].read_back > latent_arm[1].read_back
    assert latent_arm[0].n_moved < latent_arm[3].n_moved
    assert all(p.n_tokens == latent_arm[0].n_tokens > 10 for p in result.points)
    within = [p.strength for p in latent_arm if p.kl_neutral <= 1.0]
    assert result.best.strength == max(within)
    assert reports[-1] == (8, 8, "strengths")
    result.write_csv(tmp_path / "sweep.csv")
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 9


def test_latents_are_their_own_nearest_in_a_copy(grammar):
    dictionary, latents = grammar.placed, torch.arange(11)
    result = nearest_latents(dictionary, latents, dictionary, k=3)
    assert torch.equal(result.latent[:, 0], latents)
    within = nearest_latents(dictionary, latents, k=3)
    assert not (within.latent == latents[:, None]).any()
    torch.testing.assert_close(within.cosine[:, :2], result.cosine[:, 1:])
