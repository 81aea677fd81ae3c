import math
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from activations_cache.hooks import capture
from sae.architecture import SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.config import EvaluateConfig
from sae.evaluate.substitution import EvaluationContexts, measure_substitution

CONFIG = EvaluateConfig(
    n_contexts=23, n_contexts_special=23, contexts_per_forward=7, n_resamples=53
)


@pytest.fixture(scope="module")
def held_out(tokens, stream):
    return EvaluationContexts(tokens, 1, stream[:, 1:].flatten(0, 1).mean(0))


@pytest.fixture
def dictionaries(identity, constant, held_out, random_dictionary):
    return {
        "identity": identity,
        "mean dictionary": constant(held_out.mean),
        "zero dictionary": constant(torch.zeros(8)),
        "random": random_dictionary,
    }


@pytest.mark.parametrize("special", ["intact", "spliced"])
def test_known_dictionaries_have_known_effects(model, hook_point, held_out, dictionaries, special):
    result = measure_substitution(dictionaries, model, hook_point, held_out, CONFIG)[special]
    perfect = result.dictionaries["identity"]
    assert perfect.ce_recovered_zero.value == pytest.approx(1, abs=1e-6)
    assert perfect.ce_recovered_mean.value == pytest.approx(1, abs=1e-6)
    assert perfect.kl.value == pytest.approx(0, abs=1e-9)
    assert perfect.ce_increase.value == pytest.approx(0, abs=1e-6)
    assert perfect.top1_agreement.value == 1
    mean, zero = result.dictionaries["mean dictionary"], result.dictionaries["zero dictionary"]
    assert mean.ce_recovered_mean.value == pytest.approx(0, abs=1e-5)
    assert mean.ce.value == pytest.approx(result.mean.ce.value, abs=1e-5)
    assert zero.ce_recovered_zero.value == 0
    assert zero.ce == result.zero.ce
    assert result.zero.ce_recovered_zero.value == result.mean.ce_recovered_mean.value == 0
    random = result.dictionaries["random"]
    assert random.kl.value > 0
    assert random.kl.low < random.kl.value < random.kl.high
    assert result.n_tokens == 23 * 11
    assert result.special == special


def test_without_zero_all_else_is_the_same(model, hook_point, held_out, dictionaries):
    whole = measure_substitution(dictionaries, model, hook_point, held_out, CONFIG)
    less = measure_substitution(dictionaries, model, hook_point, held_out, CONFIG, zero=False)
    for special, effects in less.items():
        assert effects.mean.kl == whole[special].mean.kl
        assert effects.ce_base == whole[special].ce_base
        assert effects.n_tokens == whole[special].n_tokens
        assert math.isnan(effects.zero.ce.value)
        for name, effect in effects.dictionaries.items():
            assert math.isnan(effect.ce_recovered_zero.value)
            nothing = effect.ce_recovered_zero
            assert effect == replace(whole[special].dictionaries[name], ce_recovered_zero=nothing)


def test_the_base_is_the_models_own_cross_entropy(model, hook_point, held_out):
    result = measure_substitution({}, model, hook_point, held_out, CONFIG)["intact"]
    log_p = model(held_out.tokens).logits.log_softmax(-1)[:, 1:-1]
    expected = -log_p.gather(2, held_out.tokens[:, 2:, None]).mean()
    assert result.ce_base.value == pytest.approx(float(expected), rel=1e-6)


def test_recovered_follows_from_the_cross_entropies(model, hook_point, held_out, dictionaries):
    result = measure_substitution(dictionaries, model, hook_point, held_out, CONFIG)["intact"]
    effect = result.dictionaries["random"]
    lost = result.zero.ce.value - result.ce_base.value
    assert effect.ce_recovered_zero.value == pytest.approx(1 - effect.ce_increase.value / lost)


class BlindToStarts(SparseAutoencoder):
    """Perfect but at the first position: a dictionary that never saw an attention sink."""

    starts: torch.Tensor

    def forward(self, x):
        is_start = (x[:, None] == self.starts).all(-1).any(-1, keepdim=True)
        return torch.where(is_start, torch.zeros_like(x), x)


def test_special_positions_count_only_where_they_are_spliced(model, hook_point, held_out, stream):
    blind = BlindToStarts(SAEConfig(d_in=8, d_sae=32)).requires_grad_(False)
    blind.starts = stream[:, 0]
    result = measure_substitution({"blind": blind}, model, hook_point, held_out, CONFIG)
    assert result["intact"].ce_base == result["spliced"].ce_base
    assert result["intact"].zero.ce.value != result["spliced"].zero.ce.value
    assert result["intact"].dictionaries["blind"].kl.value == 0
    assert result["intact"].dictionaries["blind"].ce_recovered_zero.value == 1
    assert result["spliced"].dictionaries["blind"].kl.low > 0.01


@pytest.mark.parametrize("batch", [1, 5, 23])
def test_the_batch_size_does_not_matter(model, hook_point, held_out, dictionaries, batch):
    config = EvaluateConfig(
        n_contexts=23, n_contexts_special=11, contexts_per_forward=batch, n_resamples=53
    )
    result = measure_substitution(dictionaries, model, hook_point, held_out, config)
    whole = measure_substitution(dictionaries, model, hook_point, held_out, CONFIG)
    a, b = (of["intact"].dictionaries["random"] for of in (result, whole))
    assert a.ce.value == pytest.approx(b.ce.value, rel=1e-5)
    assert a.kl.high == pytest.approx(b.kl.high, rel=1e-4)
    assert result["spliced"].n_contexts == 11


def test_padding_is_not_scored_and_changes_nothing_before_it(model, hook_point, held_out):
    short = held_out.tokens[:3].clone()
    short[1, 6:] = -1
    result = measure_substitution({}, model, hook_point, held_out._replace(tokens=short), CONFIG)
    assert result["intact"].n_tokens == 11 + 4 + 11
    log_p = model(held_out.tokens[:3]).logits.log_softmax(-1)
    places = [(i, j) for i in range(3) for j in range(1, 12) if short[i, j + 1] >= 0]
    ce = [-float(log_p[i, j, short[i, j + 1]]) for i, j in places]
    assert result["intact"].ce_base.value == pytest.approx(sum(ce) / len(ce), rel=1e-5)


def test_the_second_treatment_can_be_left_out(model, hook_point, held_out):
    config = EvaluateConfig(n_contexts=5, n_contexts_special=0)
    result = measure_substitution({}, model, hook_point, held_out, config)
    assert list(result) == ["intact"]


def test_progress_ends_at_its_total(model, hook_point, held_out, identity):
    seen = []
    config = EvaluateConfig(n_contexts=23, n_contexts_special=5, contexts_per_forward=7)
    measure_substitution(
        {"identity": identity}, model, hook_point, held_out, config,
        progress=lambda *report: seen.append(report),
    )  # fmt: skip
    assert seen[-1] == (3 * 28, 3 * 28, "spliced contexts")


def test_reserved_names_are_refused(model, hook_point, held_out, identity):
    with pytest.raises(ValueError, match="must not be named 'mean'; rename it"):
        measure_substitution({"mean": identity}, model, hook_point, held_out, CONFIG)


def test_an_ablation_that_changes_nothing_gives_nan(model, hook_point, held_out, stream):
    one = EvaluationContexts(held_out.tokens[:1, :3].clone(), 2, stream[0, 2])
    result = measure_substitution({}, model, hook_point, one, CONFIG)["intact"]
    assert result.n_tokens == 0
    assert math.isnan(result.zero.ce_recovered_zero.value)


MASK, MASKED_POINT = 36, "bert.encoder.layer.1:out"


@pytest.fixture(scope="module")
def masked_model():
    config = BertConfig(
        vocab_size=37, hidden_size=8, intermediate_size=19, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(5)
    return BertForMaskedLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def masked(held_out):
    return held_out._replace(tokens=held_out.tokens.clamp_max(MASK - 1), mask_token=MASK)


def masked_loss(model, held_out, chosen):
    """By hand, each context alone and without its padding."""
    results = []
    for tokens, hidden in zip(held_out.tokens, chosen, strict=True):
        scored, hidden = tokens[tokens >= 0], hidden[tokens >= 0]
        log_p = model(scored.where(~hidden, MASK)[None]).logits.log_softmax(-1)[0]
        results += [-float(log_p[i, scored[i]]) for i in hidden.nonzero()[:, 0]]
    return sum(results) / len(results), len(results)


def chosen_by_seed(held_out, config):
    chance = torch.rand(held_out.tokens.shape, generator=torch.Generator().manual_seed(config.seed))
    return (chance < 0.15) & (held_out.tokens >= 0)


def test_a_masked_model_is_scored_on_the_tokens_that_are_hidden(masked_model, masked, identity):
    config = replace(CONFIG, seed=3)
    given = masked._replace(skip_positions=0)
    result = measure_substitution(
        {"identity": identity}, masked_model, MASKED_POINT, given, config
    )["intact"]  # fmt: skip
    expected, n = masked_loss(masked_model, given, chosen_by_seed(given, config))
    assert (result.loss, result.n_tokens) == ("masked token", n)
    assert 20 < n < 80  # of 299
    assert result.ce_base.value == pytest.approx(expected, rel=1e-5)
    assert result.dictionaries["identity"].ce_recovered_zero.value == pytest.approx(1, abs=1e-5)
    assert result.zero.kl.value > 0


def test_special_positions_and_excluded_tokens_are_not_hidden(masked_model, masked):
    given = masked._replace(skip_positions=2, exclude_tokens=(7, 11))
    result = measure_substitution({}, masked_model, MASKED_POINT, given, CONFIG)["intact"]
    chosen = chosen_by_seed(given, CONFIG) & ~torch.isin(given.tokens, torch.tensor([7, 11]))
    chosen[:, :2] = False
    expected, n = masked_loss(masked_model, given, chosen)
    assert result.n_tokens == n
    assert result.ce_base.value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch", [1, 7])
def test_a_masked_model_does_not_see_padding(masked_model, masked, batch):
    short = masked.tokens[:7].clone()
    short[1, 6:], short[4, 9:] = -1, -1
    given = masked._replace(tokens=short, skip_positions=0)
    config = replace(CONFIG, contexts_per_forward=batch)
    result = measure_substitution({}, masked_model, MASKED_POINT, given, config)["intact"]
    expected, n = masked_loss(masked_model, given, chosen_by_seed(given, config))
    assert result.n_tokens == n
    assert result.ce_base.value == pytest.approx(expected, rel=1e-4)


def test_a_stream_above_a_limit_stays_the_models_own(masked_model, masked):
    def zero(limit: float):
        given = masked._replace(limits={MASKED_POINT: limit})
        return measure_substitution({}, masked_model, MASKED_POINT, given, CONFIG)["intact"].zero

    free = measure_substitution({}, masked_model, MASKED_POINT, masked, CONFIG)["intact"].zero
    assert zero(1e9).ce == free.ce
    assert zero(0.0).ce_increase.value == pytest.approx(0, abs=1e-6)

    with capture(masked_model, [MASKED_POINT]) as run:
        norms = run(masked.tokens.clamp_min(0))[MASKED_POINT].norm(dim=-1)
    assert 0 != zero(float(norms.median())).ce_increase.value != free.ce_increase.value
