"""What training gives is what is loaded again, bit for bit; as many rows are trained as asked."""

import dataclasses
import json

import pytest
import torch

from activations_cache.config import TRAINING_SPLITS
from activations_cache.testing import synthetic_plan, write_synthetic
from sae import pretrained
from sae.architecture import BatchTopK, GroupMax, TopK
from sae.train import checkpoint
from sae.train.config import DictionaryConfig, TrainConfig
from sae.train.fit import train

FORMS = {
    "own": {"b_in": "own"},
    "none": {"b_in": "none"},
    "rms": {"input_norm": "rms"},
    "layer_norm": {"input_norm": "layer_norm"},
    "gates": {"gate_by_decoder_norm": True, "unit_norm": False, "decoder_norm": 0.7},
    "ema": {"ema": 0.9},
}


KINDS = ("topk", "batchtopk", "relu", "jumprelu", "gated")
CASES = [(kind, form) for kind in KINDS for form in FORMS if (kind, form) != ("gated", "gates")]
"""All but gates by decoder norm for Gated, which its config refuses."""


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_a_saved_dictionary_gives_the_same_bits(kind, form, step_of, entry, planted, tmp_path):
    step = step_of(entry(kind, **FORMS[form]))
    batches = planted(5)
    for x in batches:
        step(x)
    made, x = step.whole(), batches[0] * 3 - 1
    pretrained.save(made, tmp_path / "saved")
    loaded = pretrained.load(tmp_path / "saved")
    assert loaded.config == made.config
    with torch.no_grad():
        assert torch.equal(loaded(x), made(x))
        assert torch.equal(loaded.encode_dense(x), made.encode_dense(x))
        latents, theirs = loaded.encode(x), made.encode(x)
        assert all(torch.equal(a, b) for a, b in zip(latents, theirs, strict=True))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    plan = synthetic_plan({"a.1:out": 7}, n_examples=37, dtype="float32")
    return write_synthetic(tmp_path_factory.mktemp("cache") / "cache", plan)


ENTRY = DictionaryConfig(d_sae=22, activation=TopK(k=2))


def test_every_checkpoint_alone_gives_the_dictionary_of_its_step(cache, tmp_path):
    """A checkpoint holds all that an autoencoder needs; nothing is estimated again."""
    saes = {
        "batchtopk": dataclasses.replace(ENTRY, activation=BatchTopK(k=2)),
        "groupmax": dataclasses.replace(ENTRY, activation=GroupMax(k=2)),
    }
    config = TrainConfig(saes=saes, batch=101, precision="fp32")
    paths = train(cache, config, tmp_path / "run")
    manifest = max((tmp_path / "run" / "checkpoints").glob("*/manifest.json"))
    found = checkpoint.load_newest(
        tmp_path / "run" / "checkpoints", json.loads(manifest.read_text())["identity"]
    )
    assert found is not None
    for name, path in paths.items():
        for key, tensor in pretrained.load(path).state_dict().items():
            saved = [found[1].get(f"{name}/{kind}.{key}") for kind in ("param", "buffer")]
            assert any(t is not None and torch.equal(t, tensor) for t in saved), key


@pytest.mark.parametrize("beside", [-1, 0, 1])
@pytest.mark.parametrize("epochs", [1, 3])
def test_as_many_rows_are_trained_on_as_the_batches_hold(cache, tmp_path, beside, epochs):
    """At a row less, exactly, and a row more than what the cache has to give in two steps."""
    n_rows = len(cache.rows(TRAINING_SPLITS)) * epochs
    batch = n_rows // 2 + beside
    seen = []
    config = TrainConfig(saes={"a": ENTRY}, batch=batch, epochs=epochs, precision="fp32")
    paths = train(cache, config, tmp_path / "run", progress=lambda done, *_: seen.append(done))
    n_steps = n_rows // batch
    assert n_steps == (1 if beside == 1 else 2)
    assert seen == [batch * n for n in range(1, n_steps + 1)]
    provenance = json.loads((paths["a"] / "provenance.json").read_text())
    assert provenance["rows"] == n_steps * batch


def test_a_batch_that_the_rows_do_not_fill_is_refused(cache, tmp_path):
    n_rows = len(cache.rows(TRAINING_SPLITS))
    config = TrainConfig(saes={"a": ENTRY}, batch=n_rows + 1, precision="fp32")
    with pytest.raises(ValueError, match=rf"batch must be at most (the )?{n_rows}") as e:
        train(cache, config, tmp_path / "run")
    assert "\n" not in str(e.value)


def test_a_cache_that_gives_fewer_batches_than_it_says_is_told(cache, tmp_path, monkeypatch):
    batches = type(cache).batches

    def fewer(self, *args, **named):
        for n, batch in enumerate(batches(self, *args, **named)):
            if n == 2:
                return
            yield batch

    monkeypatch.setattr(type(cache), "batches", fewer)
    config = TrainConfig(saes={"a": ENTRY}, batch=53, precision="fp32")
    with pytest.raises(OSError, match=r"must give \d+ batches of 53 rows, got 2; run `sae verify`"):
        train(cache, config, tmp_path / "run")
    assert not (tmp_path / "run" / "a").exists()
