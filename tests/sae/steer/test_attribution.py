import copy

import pytest
import torch

from activations_cache.hooks import capture
from activations_cache.probe import record_of
from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.steer.attribution import (
    ablation_effects,
    agreement,
    attribute,
    direct_logits,
    logit_difference,
    see,
)
from sae.steer.paths import MetricOfLatents, agreements, integrated_gradients
from tests.families import make

IDS = torch.randint(1, 37, (1, 7), generator=torch.Generator().manual_seed(2))
METRIC = logit_difference(5, 11)


@pytest.fixture
def before_the_head(dictionary):
    """Where nothing but a matrix follows."""
    return copy.deepcopy(dictionary).at("lm_head:in")


def test_on_a_linear_model_attribution_is_the_ablation_effect(model, before_the_head):
    result = attribute(model, before_the_head, IDS, METRIC)
    fires = (result.latents.values[-1] != 0).nonzero().flatten()
    entries = [(6, int(result.latents.indices[6, j])) for j in fires]
    effects = ablation_effects(model, before_the_head, IDS, METRIC, entries, at_once=2)
    torch.testing.assert_close(result.scores[6, fires], effects, rtol=1e-4, atol=1e-5)
    assert effects.abs().max() > 0.05
    assert not result.scores[:6].any()  # the metric reads the last position alone
    assert result.metric == pytest.approx(float(METRIC(model(IDS).logits)))
    position, latent, score = result.top(1)[0]
    best = int(effects.abs().argmax())
    assert (position, latent) == entries[best]
    assert score == pytest.approx(float(effects[best]), rel=1e-4)
    assert agreement(model, before_the_head, IDS[:, -2:], METRIC).attribution > 0.999


def test_integrated_gradients_of_a_linear_model_are_complete(model, before_the_head, placed):
    linear = integrated_gradients(model, before_the_head, IDS, METRIC, n_steps=1)
    assert linear.gap < 1e-4
    coarse, fine = (integrated_gradients(model, placed, IDS, METRIC, n_steps=n) for n in (1, 512))
    assert fine.gap < 0.02 < coarse.gap


@pytest.mark.parametrize("baseline", ["off", "zero", "mean", "sampled"])
def test_every_baseline_is_complete_and_lists_what_latents_add_beyond_it(model, placed, baseline):
    """From zeros a norm's gradient has no bound, so that the sum is off, which the gap says."""
    rows = torch.randn(13, placed.config.d_in, generator=torch.Generator().manual_seed(3))
    path = integrated_gradients(
        model, placed, IDS, METRIC, baseline=baseline, rows=rows, n_steps=512, n_draws=3
    )
    assert (path.gap < 0.05) == (baseline != "zero")
    assert abs(path.difference) > 1e-3
    listed = float(path.attribution.scores.sum())
    assert (listed == pytest.approx(path.total, rel=1e-3)) == (baseline == "off")
    assert not path.attribution.scores[0].any()


def test_a_latent_that_is_at_the_baseline_what_it_is_gets_nothing(model, before_the_head):
    """The baseline of the prompt's own row: nothing changes on the path."""
    row = see(model, before_the_head, IDS, 1).x[-1:]
    path = integrated_gradients(
        model, before_the_head, IDS, METRIC, baseline="mean", rows=row, n_steps=1
    )
    assert torch.allclose(path.attribution.scores[-1], torch.zeros(1), atol=1e-5)
    with pytest.raises(ValueError, match="rows must be given for the baseline 'sampled', got none"):
        integrated_gradients(model, before_the_head, IDS, METRIC, baseline="sampled")


def test_baselines_agree_with_themselves(model, placed):
    paths = {
        name: integrated_gradients(model, placed, IDS, METRIC, baseline=name)
        for name in ("off", "zero")
    }
    agreed = agreements(paths)
    assert agreed["off"] == pytest.approx(1)
    assert -1 <= agreed["zero"] < 1


def test_what_takes_a_module_gets_the_same_scores_from_latents_as_inputs(model, placed):
    """Gradient times input, one latent taken out, and a path from zeros, all from outside."""
    f = MetricOfLatents(model, placed, IDS, METRIC)
    a = f.activations.clone().requires_grad_()
    assert f(a).item() == pytest.approx(METRIC(model(IDS).logits).item(), rel=1e-5)

    (gradient,) = torch.autograd.grad(f(a).sum(), a)
    ours = attribute(model, placed, IDS, METRIC)
    where = {entry: i for i, entry in enumerate(f.entries)}
    scores = torch.zeros_like(f.activations[0])
    for position, latent, score in ours.top(int((ours.latents.values != 0).sum())):
        scores[where[position, latent]] = score
    torch.testing.assert_close((gradient * a)[0], scores, rtol=1e-4, atol=1e-5)

    without = f.activations * (1 - torch.eye(len(f.entries)))
    effects = ablation_effects(model, placed, IDS, METRIC, f.entries)
    torch.testing.assert_close(f(f.activations) - f(without), effects, rtol=1e-3, atol=1e-4)

    steps = ((torch.arange(200) + 0.5) / 200)[:, None].to(a) * a.detach()
    (along,) = torch.autograd.grad(f(steps.requires_grad_()).sum(), steps)
    path = integrated_gradients(model, placed, IDS, METRIC, n_steps=512)
    assert float((along.mean(dim=0) * a.detach()).sum()) == pytest.approx(path.total, rel=1e-3)


def test_a_batch_of_inputs_does_not_mix(model, placed):
    f = MetricOfLatents(model, placed, IDS, METRIC)
    inputs = torch.cat([f.activations, 0 * f.activations, 2 * f.activations])
    torch.testing.assert_close(f(inputs), torch.cat([f(x[None]) for x in inputs]))
    assert not list(f.parameters())


def test_ablation_takes_the_direction_out_at_one_position(model, placed, hook_point):
    result = attribute(model, placed, IDS, METRIC)
    latent = int(result.latents.indices[4, -1])
    (effect,) = ablation_effects(model, placed, IDS, METRIC, [(4, latent)])
    f, direction = result.latents.values[4, -1], placed.direction(latent)

    def without(module, args, output):
        output = output.clone()
        output[0, 4] -= f * direction
        return output

    handle = model.get_submodule("model.layers.1").register_forward_hook(without)
    expected = METRIC(model(IDS).logits)
    handle.remove()
    torch.testing.assert_close(METRIC(model(IDS).logits)[0] - expected[0], effect)
    assert effect.abs() > 1e-4


def test_direct_logits_pass_the_frozen_norm_and_the_head_alone(model, dictionary):
    placed = dictionary.at("model.layers.3:out")
    result = direct_logits(model, placed, IDS, 5, 11)
    with capture(model, ["model.layers.3:out"]) as run:
        h = run(IDS)["model.layers.3:out"][0]
    readout = model.lm_head.weight[5] - model.lm_head.weight[11]
    rms = h.square().mean(1).sqrt()
    for position, place in ((6, 0), (3, 2)):
        latent = int(result.latents.indices[position, place])
        direction = dictionary.direction(latent) * model.model.norm.weight
        expected = result.latents.values[position, place] * direction @ readout / rms[position]
        torch.testing.assert_close(result.scores[position, place], expected, rtol=1e-3, atol=1e-5)
    assert result.metric == pytest.approx(float(METRIC(model(IDS).logits)), rel=1e-4)


def test_direct_logits_need_a_language_model(vit_model, dictionary):
    placed = dictionary.at("layers.0:out")
    with pytest.raises(ValueError, match=r"model must read tokens, got ViTModel"):
        direct_logits(vit_model, placed, IDS, 5)


@pytest.mark.parametrize("family", ["Granite", "Cohere", "OPT", "Llava"])
def test_direct_logits_of_another_family_are_parts_of_its_own_logits(family):
    """All latents of a dictionary that gives a row back add up to the difference of two logits."""
    model = make(family)
    record = record_of(model)
    ids = torch.tensor([[3, 9, 27, 11, 5]])
    with capture(model, [record.last]) as run:
        h = run(ids)[record.last][0]
    dictionary = SparseAutoencoder(SAEConfig(d_in=24, d_sae=48, activation=ReLU()))
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.zero_()
        rows = torch.cat([torch.eye(24), -torch.eye(24)])
        dictionary.enc_rows.copy_(rows)
        dictionary.dec_rows.copy_(rows)  # relu(x) - relu(-x) = x
    result = direct_logits(model, dictionary.requires_grad_(False).at(record.last), ids, 5, 11)
    logits = model(input_ids=ids).logits[0]
    assert result.metric == pytest.approx(float(logits[-1, 5] - logits[-1, 11]), rel=1e-4)
    zero = model.get_submodule(record.logits.norm)(torch.zeros_like(h[:1]))
    bias = model.get_output_embeddings()(zero)[0] * record.logits.scale
    expected = logits[:, 5] - logits[:, 11] - (bias[5] - bias[11])
    assert torch.allclose(result.scores.sum(dim=1), expected, atol=1e-3)


def test_direct_logits_through_a_soft_cap_are_refused(dictionary):
    placed = dictionary.at("model.layers.2:out")
    with pytest.raises(ValueError, match=r"a soft cap of 30 in Gemma2ForCausalLM; use attribute"):
        direct_logits(make("Gemma2"), placed, IDS, 5)


def test_one_prompt_at_a_time(model, placed):
    with pytest.raises(ValueError, match="input_ids must be one prompt, got 2"):
        attribute(model, placed, IDS.expand(2, -1), METRIC)
