"""What cannot be trained is refused in one line that says what must hold and what was given."""

import pytest
import torch

from activations_cache.checks import silent
from activations_cache.testing import synthetic_plan, write_synthetic
from monosema.checks import MonosemaError
from sae import pretrained
from sae.architecture import ReLU, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train import cost, fit
from sae.train.config import L1, DictionaryConfig, TrainConfig
from sae.train.cost import free_on_cpu
from sae.train.fit import train
from sae.train.loss_config import FixedPrefixes
from sae.train.ranks import ALONE, Axis, Ranks
from sae.train.throughput import StepGraph

D_IN = 7


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    plan = synthetic_plan({"a.1:out": D_IN}, n_examples=31, dtype="float32")
    return write_synthetic(tmp_path_factory.mktemp("cache") / "cache", plan)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    """A dictionary that reads 13 columns."""
    made = SparseAutoencoder(DictionaryConfig(d_sae=23, activation=TopK(k=3)).architecture(13))
    initialise(made, torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("wide") / "wide"
    pretrained.save(made, path)
    return str(path)


def topk(**fields):
    return DictionaryConfig(**{"d_sae": 23, "activation": TopK(k=3), **fields})


CASES = {
    "k > d_sae": (
        lambda wide: topk(activation=TopK(k=24)),
        "activation.k must be at most d_sae=23, got 24",
    ),
    "prefixes beyond d_sae": (
        lambda wide: topk(matryoshka=FixedPrefixes(ends=(5, 29))),
        "matryoshka.ends must be below d_sae=23, got 29",
    ),
    "L1 with TopK": (
        lambda wide: topk(l1=L1()),
        "l1 must be absent for activation.kind 'topk', got L1(coefficient=5.0, ramp=0.05)",
    ),
    "cache narrower than d_in": (
        lambda wide: topk(init_from=wide),
        "init_from must be a dictionary with d_in=7, got 13 in {wide}; choose",
    ),
    "hook point missing": (
        lambda wide: topk(inputs=("a.2:out",)),
        "saes.a.inputs must name hook points of the cache (a.1:out), got 'a.2:out'",
    ),
    "width that cannot fit": (
        lambda wide: topk(d_sae=free_on_cpu() // (16 * D_IN)),
        "train.saes must fit into the memory of cpu, ",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_before_the_first_step(case, cache, wide, tmp_path):
    make, message = CASES[case]
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the whole message is compared
        train(cache, TrainConfig(saes={"a": make(wide)}, batch=53), tmp_path / "run")
    said = str(refused.value)
    assert said.startswith(message.format(wide=wide)), said
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


def test_three_steps_in_a_row_that_are_not_finite_end_the_run(cache, tmp_path, monkeypatch):
    """Two and a good one between them do not; the last checkpoint is that of a good step."""
    batches = type(cache).batches

    def poisoned(self, *args, **named):
        for n, batch in enumerate(batches(self, *args, **named)):
            x = batch.x.clone()
            x[3, 5] = float("nan") if n in {1, 2, 4, 5, 6} else x[3, 5]
            yield batch._replace(x=x)

    monkeypatch.setattr(type(cache), "batches", poisoned)
    seen = []
    config = TrainConfig(saes={"a": topk()}, batch=53, epochs=2, precision="fp32")
    with pytest.raises(FloatingPointError) as ended:
        train(cache, config, tmp_path / "run", progress=lambda done, *_: seen.append(done // 53))
    assert str(ended.value) == (
        "the loss of a must be finite, got three steps in a row that are not, up to step 7; lower "
        "optimizer.lr or check the cache"
    )
    assert seen == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "run" / "a").exists()


def test_processes_that_would_get_no_rows_are_refused(cache, tmp_path):
    config, many = TrainConfig(saes={"a": topk()}, batch=53), Ranks(rows=Axis(None, 0, 59))
    with pytest.raises(ValueError, match=r"train\.batch must be at least 59, .*, got 53; raise it"):
        fit._train(cache, config, tmp_path / "run", many, None, silent)


def test_a_step_that_runs_out_of_memory_names_the_estimate_and_what_would_fit(
    cache, tmp_path, monkeypatch
):
    def die(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore lines")

    monkeypatch.setattr(StepGraph, "__call__", die)
    monkeypatch.setattr(cost, "_free_on_gpu", lambda device: (1 << 30, 1 << 30))
    config = TrainConfig(saes={"a": topk()}, batch=64, precision="fp32")
    rule = (
        r"^train.saes must fit into the memory of cpu, 1.0 GiB, got a step of a that ran out of "
        r"it, against an estimate of 0.0 GiB; lower d_sae to 17$"
    )
    with pytest.raises(MonosemaError, match=rule):
        train(cache, config, tmp_path)


def test_the_batch_that_would_fit_is_one_that_is_estimated_lower(cache):
    entry = DictionaryConfig(d_sae=1 << 16, activation=ReLU(), l1=L1(), unit_norm=False)
    at = torch.device("cpu")
    needs = cost.Needs({"a": entry}, cache, cache.hook_points, 4096, "fp32", ALONE, at)
    estimated = needs.total(4096)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "_free_on_gpu", lambda device: (0, 1 << 40))
        said = str(cost.out_of_memory(needs))
    fits = int(said.rpartition(" ")[2])
    assert said.endswith(f"; lower train.batch to {fits}")
    assert needs.total(fits) <= 0.75 * estimated < needs.total(2 * fits)
