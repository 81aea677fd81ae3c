"""What may change between two runs that go on from one checkpoint; no key is without an answer."""

import dataclasses

import pytest

from activations_cache.testing import synthetic_plan, write_synthetic
from sae.architecture import BatchTopK, Gated, JumpReLU, ReLU, TopK
from sae.train import fit
from sae.train.config import Adam, AuxK, DictionaryConfig, TrainConfig
from sae.train.fit import train
from sae.train.loss_config import L0, L1, RandomPrefixes
from sae.train.module import SAEModule
from sae.train.signals import Stopped

MAY_CHANGE = {"latent_shards", "rank_timeout_seconds", "log_every", "wandb"}
"""Keys of `train` that leave the numbers of a run as they are."""
OF_THE_ROWS = {"max_norm"}
"""Those that count where they leave rows out."""
ENTRIES = {
    "topk": DictionaryConfig(d_sae=23, activation=TopK(k=3), auxk=AuxK()),
    "batchtopk": DictionaryConfig(
        d_sae=23, activation=BatchTopK(k=3), matryoshka=RandomPrefixes(n=2)
    ),
    "relu": DictionaryConfig(d_sae=23, activation=ReLU(), l1=L1(), unit_norm=False),
    "jumprelu": DictionaryConfig(d_sae=23, activation=JumpReLU(), l0=L0()),
    "gated": DictionaryConfig(d_sae=23, activation=Gated(), l1=L1(), optimizer=Adam(lr=1e-3)),
}
CONFIG = TrainConfig(saes=ENTRIES, batch=53, precision="fp32")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    plan = synthetic_plan({"a.1:out": 7}, n_examples=61, dtype="float32")
    return write_synthetic(tmp_path_factory.mktemp("cache") / "cache", plan)


def changes(config, path=""):
    """Every key of a config, and the config with another value there, unchecked."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{path}{field.name}"
        inner = {}
        if isinstance(value, dict):
            inner = {k: v for k, v in value.items() if dataclasses.is_dataclass(v)}
        for key, entry in inner.items():
            for deeper, changed in changes(entry, f"{name}.{key}."):
                yield deeper, with_value(config, field.name, {**value, key: changed})
        if dataclasses.is_dataclass(value):
            for deeper, changed in changes(value, f"{name}."):
                yield deeper, with_value(config, field.name, changed)
        elif not inner:
            yield name, with_value(config, field.name, "another value")


def with_value(config, name, value):
    other = object.__new__(type(config))
    vars(other).update(vars(config))
    object.__setattr__(other, name, value)
    return other


def test_every_key_belongs_to_the_run_or_may_change(cache, figure):
    before, seen = fit._identity(cache, CONFIG, "fp32"), {}
    for name, other in changes(CONFIG):
        seen[name] = fit._identity(cache, other, "fp32") == before
    may_change = {name for name, is_same in seen.items() if is_same}
    assert may_change == MAY_CHANGE | OF_THE_ROWS
    fields = {field.name for field in dataclasses.fields(DictionaryConfig)}
    assert {name.split(".")[2] for name in seen if name.startswith("saes.")} == fields
    figure("C3", f"{len(seen)} keys: {len(may_change)} may change, the others begin a run anew")


def test_the_precision_that_was_resolved_belongs_to_the_run(cache):
    identities = {fit._identity(cache, CONFIG, precision) for precision in ("fp32", "bf16")}
    assert len(identities) == 2


def test_the_limit_of_norms_belongs_to_the_run_where_it_leaves_rows_out(cache):
    class Looked:
        fingerprint, n_left_out = "x", 3

    identities = {
        fit._identity(Looked(), dataclasses.replace(CONFIG, max_norm=limit), "fp32")
        for limit in (5.0, 10.0)
    }
    assert len(identities) == 2


@pytest.mark.parametrize(
    ("change", "done_before"),
    [
        ({"log_every": 3, "rank_timeout_seconds": 9.0}, 4),
        ({"precision": "bf16"}, 0),
        ({"seed": 1}, 0),
        ({"batch": 52}, 0),
    ],
)
def test_a_run_goes_on_from_what_is_its_own(cache, tmp_path, monkeypatch, change, done_before):
    n_steps, original, stop_at = [0], SAEModule.step, 4

    def step(self, x):
        original(self, x)
        n_steps[0] += 1
        if n_steps[0] == stop_at:
            self.after_step.save(self.n_steps, self.full_state())
            raise Stopped(15, self.n_steps)

    monkeypatch.setattr(SAEModule, "step", step)
    with pytest.raises(Stopped):
        train(cache, CONFIG, tmp_path)
    stop_at, n_steps[0] = None, 0
    config = dataclasses.replace(CONFIG, **change)
    train(cache, config, tmp_path)
    assert n_steps[0] == cache.n_batches(batch=config.batch) - done_before


def test_weights_of_a_bf16_run_are_none_of_an_fp32_run(cache, tmp_path):
    made = {}
    for name in ("fp32", "bf16"):
        config = dataclasses.replace(CONFIG, precision=name, saes={"topk": ENTRIES["topk"]})
        made[name] = (train(cache, config, tmp_path)["topk"] / "sae.safetensors").read_bytes()
    assert made["fp32"] != made["bf16"]
