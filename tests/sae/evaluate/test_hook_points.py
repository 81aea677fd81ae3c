"""Dictionaries of other and of several hook points: their rows, and where they are spliced."""

import pytest
import torch

import activations_cache
from activations_cache.config import CacheConfig, ModelConfig, TextConfig, TextSource
from activations_cache.models import load_model
from sae.architecture import ReLU, SAEConfig, Slice
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.config import EvaluateConfig
from sae.evaluate.reconstruction import measure_reconstruction
from sae.evaluate.report import held_out
from sae.evaluate.substitution import measure_substitution
from sae.metrics import fvu

IN, OUT = "model.layers.1.mlp.down_proj:in", "model.layers.1.mlp.down_proj:out"
LATER = "model.layers.3:out"
CONFIG = EvaluateConfig(n_contexts=5, n_contexts_special=2, contexts_per_forward=3)


@pytest.fixture(scope="module")
def model_config(tiny_model_dir):
    return ModelConfig(path=str(tiny_model_dir), dtype="float32")


@pytest.fixture(scope="module")
def model(model_config):
    return load_model(model_config).model


@pytest.fixture(scope="module")
def cache(tmp_path_factory, model_config, tiny_text):
    source = TextSource(path=str(tiny_text), document_pattern="CHAPTER")
    made = CacheConfig(
        model=model_config,
        text=TextConfig(sources=(source,), context=31),
        hook_points=(OUT, IN, LATER),
        n_rows=1009,
        dtype="float32",
    )
    return activations_cache.build(made, tmp_path_factory.mktemp("hook_points") / "cache")


def slices(cache, *points: str) -> tuple[Slice, ...]:
    return tuple(Slice(hook_point=p, width=cache.d_model(p)) for p in points)


def transcoder(cache, model) -> SparseAutoencoder:
    """The module itself, as the skip beside a latent that never fires."""
    read, predicted = slices(cache, IN), slices(cache, OUT)
    form = SAEConfig(
        d_in=read[0].width,
        d_sae=1,
        d_out=predicted[0].width,
        activation=ReLU(),
        b_in="none",
        skip=True,
        inputs=read,
        outputs=predicted,
    )
    made = SparseAutoencoder(form)
    with torch.no_grad():
        made.skip_rows.copy_(model.get_submodule(IN.split(":")[0]).weight)
    return made


def identity(cache, *points: str) -> SparseAutoencoder:
    """A crosscoder that gives back what it reads: a latent for each direction and its opposite."""
    read = slices(cache, *points)
    d_in = sum(part.width for part in read)
    made = SparseAutoencoder(
        SAEConfig(d_in=d_in, d_sae=2 * d_in, activation=ReLU(), b_in="none", inputs=read)
    )
    with torch.no_grad():
        for rows in (made.enc_rows, made.dec_rows):
            rows.copy_(torch.cat([torch.eye(d_in), -torch.eye(d_in)]))
    return made


def test_a_transcoder_is_measured_on_what_it_predicts(cache, model):
    rows = cache.rows(("hold",))
    result = measure_reconstruction({"t": transcoder(cache, model)}, cache, LATER, rows)["t"]
    assert result.reconstruction.fvu == pytest.approx(0, abs=1e-9)
    assert result.reconstruction.fvu_per_hook_point == {}
    assert result.reconstruction.l0 == 0


def test_each_hook_point_has_its_own_fvu(cache):
    rows, half = cache.rows(("hold",)), identity(cache, LATER, OUT)
    width = cache.d_model(LATER)
    with torch.no_grad():
        half.dec_rows[:, :width] *= 0.5
    result = measure_reconstruction({"c": half}, cache, OUT, rows)["c"].reconstruction
    x = cache[LATER][rows]
    assert result.fvu_per_hook_point == pytest.approx({LATER: fvu(x, x / 2), OUT: 0.0}, abs=1e-6)
    both = torch.cat([x, cache[OUT][rows]], dim=1)
    assert result.fvu == pytest.approx(fvu(both, torch.cat([x / 2, cache[OUT][rows]], dim=1)))


def test_a_transcoder_takes_the_place_of_its_output(cache, model):
    exact, blind = transcoder(cache, model), transcoder(cache, model)
    with torch.no_grad():
        blind.skip_rows.zero_()
    context = held_out(cache, LATER, CONFIG)
    result = measure_substitution({"t": exact, "b": blind}, model, LATER, context, CONFIG)
    assert result.keys() == {"intact", "spliced"}
    for of_one in result.values():
        effects = of_one.dictionaries
        assert effects["t"].kl.value == pytest.approx(0, abs=1e-6)
        assert effects["t"].ce_recovered_zero.value == pytest.approx(1, abs=1e-3)
        assert effects["b"] == of_one.zero
        assert of_one.zero.kl.value > 1e-3


def test_a_crosscoder_is_spliced_at_all_its_hook_points_and_others_at_theirs(cache, model):
    exact, blind = identity(cache, OUT, LATER), identity(cache, OUT, LATER)
    with torch.no_grad():
        blind.dec_rows.zero_()
    plain = identity(cache, LATER)
    of = {"c": exact, "b": blind, "p": plain}
    result = measure_substitution(of, model, LATER, held_out(cache, LATER, CONFIG), CONFIG)
    place = f" at {OUT} + {LATER}"
    assert result.keys() == {"intact", "spliced", f"intact{place}", f"spliced{place}"}
    assert result["intact"].dictionaries.keys() == {"p"}
    for name in ("intact", f"intact{place}"):
        for effect in (e for n, e in result[name].dictionaries.items() if n != "b"):
            assert effect.kl.value == pytest.approx(0, abs=1e-6)
    both = result[f"intact{place}"]
    assert both.dictionaries["b"] == both.zero
    # what flows on from the later place does not see the earlier one
    assert both.mean.ce == result["intact"].mean.ce


def test_places_share_the_run_of_the_model_as_it_is(cache, model):
    """Each place gives what it gives alone, and the first block runs once for all of them."""
    places = (LATER, OUT, "model.layers.2:out")
    halves = {}
    for place in places:
        width = cache.d_model(LATER)
        part = Slice(hook_point=place, width=width)
        made = SparseAutoencoder(
            SAEConfig(d_in=width, d_sae=2 * width, activation=ReLU(), b_in="none", inputs=(part,))
        )
        with torch.no_grad():
            made.enc_rows.copy_(torch.cat([torch.eye(width), -torch.eye(width)]))
            made.dec_rows.copy_(0.5 * made.enc_rows)
        halves[place] = made
    config = EvaluateConfig(n_contexts=5, n_contexts_special=0, contexts_per_forward=5)
    context, runs = held_out(cache, LATER, config), []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    together = measure_substitution(halves, model, LATER, context, config)
    n_together = len(runs)
    alone = {p: measure_substitution({p: halves[p]}, model, LATER, context, config) for p in places}
    hook.remove()
    for place in places:
        key = "intact" if place == LATER else f"intact at {place}"
        [of_one] = alone[place].values()
        assert together[key] == of_one
        assert of_one.dictionaries[place].kl.value > 1e-6
    assert n_together < len(runs) - n_together


def test_the_mean_of_each_place_is_its_own(cache, model):
    """A dictionary that gives the mean row of what it predicts is the mean ablation."""
    made = identity(cache, OUT, LATER)
    with torch.no_grad():
        made.dec_rows.zero_()
        made.b_dec.copy_(torch.cat([cache[OUT].mean, cache[LATER].mean]))
    context = held_out(cache, LATER, CONFIG)
    [result, _] = measure_substitution({"m": made}, model, LATER, context, CONFIG).values()
    assert result.dictionaries["m"].ce.value == pytest.approx(result.mean.ce.value, rel=1e-6)


def test_a_hook_point_that_the_cache_has_not_costs_one_line(cache):
    other = identity(cache, LATER)
    part = Slice(hook_point="model.layers.0:out", width=cache.d_model(LATER))
    other.config = SAEConfig(d_in=part.width, d_sae=2 * part.width, inputs=(part,))
    with pytest.raises(ValueError, match=r"dictionary 'a' must have hook points of the cache") as e:
        measure_reconstruction({"a": other}, cache, LATER, cache.rows())
    assert "model.layers.0:out" in str(e.value)
    assert "\n" not in str(e.value)
    wide = Slice(hook_point=LATER, width=part.width + 1)
    other.config = SAEConfig(d_in=wide.width, d_sae=7, activation=ReLU(), inputs=(wide,))
    with pytest.raises(ValueError, match=rf"got {LATER} \({wide.width}\); build a cache with it"):
        measure_reconstruction({"a": other}, cache, LATER, cache.rows())
