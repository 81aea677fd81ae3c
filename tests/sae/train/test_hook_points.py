"""Dictionaries of several hook points of one cache, trained in one pass."""

import pytest
import torch

import activations_cache
import sae
from activations_cache.config import CacheConfig, ModelConfig, TextConfig, TextSource
from activations_cache.testing import synthetic_plan, write_synthetic
from sae.architecture import ReLU, TopK
from sae.metrics import fvu
from sae.train.config import Adam, DictionaryConfig, TrainConfig
from sae.train.fit import train
from sae.train.loss_config import L1, AuxK
from sae.train.module import SAEModule


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_model_dir, tiny_text):
    made = CacheConfig(
        model=ModelConfig(path=str(tiny_model_dir), dtype="float32"),
        text=TextConfig(
            sources=(TextSource(path=str(tiny_text), document_pattern="CHAPTER"),), context=31
        ),
        hook_points=("model.layers.0:out", "model.layers.1.mlp:in", "model.layers.1:out"),
        n_rows=1009,
    )
    return activations_cache.build(made, tmp_path_factory.mktemp("hook_points") / "cache")


def entries(cache) -> dict[str, DictionaryConfig]:
    first, mlp, last = cache.hook_points
    fast = {"d_sae": 53, "optimizer": Adam(lr=1e-2)}
    sparse = {**fast, "activation": TopK(k=3), "auxk": AuxK(), "dead_after_tokens": 300}
    plain = {**fast, "unit_norm": False, "decoder_norm": 0.1, "l1": L1(coefficient=0.3)}
    out = {"b_in": "own", "unit_norm": False, "decoder_norm": 0.1}
    return {
        "first": DictionaryConfig(inputs=(first,), **sparse),
        "cross": DictionaryConfig(inputs=(last, first), activation=ReLU(), **plain),
        "trans": DictionaryConfig(inputs=(mlp,), outputs=(last,), skip=True, **out, **sparse),
        "last": DictionaryConfig(inputs=(last,), **sparse),
    }


@pytest.fixture(scope="module")
def together(cache, tmp_path_factory):
    made = TrainConfig(saes=entries(cache), batch=101, epochs=3, precision="fp32")
    return train(cache, made, tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize("name", ["first", "cross", "trans", "last"])
def test_a_dictionary_is_bit_equal_to_what_it_is_alone(name, cache, together, tmp_path):
    made = TrainConfig(saes={name: entries(cache)[name]}, batch=101, epochs=3, precision="fp32")
    alone = sae.load(train(cache, made, tmp_path)[name])
    other = sae.load(together[name])
    assert alone.config == other.config
    state = alone.state_dict()
    assert state.keys() == other.state_dict().keys()
    assert all(torch.equal(state[key], other.state_dict()[key]) for key in state)


def test_a_saved_dictionary_records_its_hook_points(cache, together):
    first, mlp, last = cache.hook_points
    width = cache.d_model(first)
    found = {name: sae.load(path).config for name, path in together.items()}
    assert [part.hook_point for part in found["first"].inputs] == [first]
    assert found["first"].slices_out == found["first"].inputs
    assert [part.hook_point for part in found["cross"].inputs] == [last, first]
    assert [part.width for part in found["cross"].slices_out] == [width, width]
    assert [p.hook_point for p in (*found["trans"].inputs, *found["trans"].outputs)] == [mlp, last]
    assert found["trans"].skip


def test_rows_are_brought_to_a_mean_square_norm_of_their_width_each(cache, together):
    cross = sae.load(together["cross"])
    first, _, last = cache.hook_points
    rows = cache.rows(("explain", "score"))
    x = torch.cat([cache[last][rows], cache[first][rows]], dim=1)
    u = cross.scaled(x - x.mean(0))
    for part in u.split(cache.d_model(first), dim=1):
        assert float(part.square().sum(1).mean()) == pytest.approx(part.shape[1], rel=1e-3)


def test_what_is_learned_predicts_the_output(cache, together):
    trans = sae.load(together["trans"])
    _, mlp, last = cache.hook_points
    rows = cache.rows(("hold",))
    target = cache[last][rows]
    assert fvu(target, trans(cache[mlp][rows])) < 0.7


def test_rows_that_come_in_16_bits_train_the_same_bits(tmp_path, monkeypatch):
    """A GPU gets them so from the cache; what they are made there, a CPU gets from the start."""
    plan = synthetic_plan({"a:out": 7, "b:out": 5}, n_examples=41, dtype="bfloat16")
    cache = write_synthetic(tmp_path / "cache", plan)
    both = DictionaryConfig(d_sae=22, activation=TopK(k=2), inputs=("a:out", "b:out"))
    saes = {"a": DictionaryConfig(d_sae=30, activation=TopK(k=3), inputs=("a:out",)), "both": both}
    config = TrainConfig(saes=saes, batch=53, precision="fp32")
    seen, build, step = [], SAEModule.build, SAEModule.step

    def built(module, data, *given, **named):
        build(module, data, *given, **named)
        assert not data.rows.as_stored
        data.rows.as_stored = as_stored

    monkeypatch.setattr(SAEModule, "build", built)
    monkeypatch.setattr(SAEModule, "step", lambda m, x: (seen.append(x.dtype), step(m, x))[1])
    files = {}
    for as_stored in (False, True):
        paths = train(cache, config, tmp_path / str(as_stored))
        files[as_stored] = {n: (p / "sae.safetensors").read_bytes() for n, p in paths.items()}
    n = cache.n_batches(batch=53)
    assert seen == [torch.float32] * n + [torch.bfloat16] * n
    assert files[True] == files[False]
