"""The live model gives the rows that its cache has, with the same numbers and values."""

import math

import numpy as np
import pytest
import torch

import activations_cache
from activations_cache import io, live
from activations_cache.checks import NonFiniteError
from activations_cache.config import CacheConfig
from activations_cache.live import ActivationStream
from activations_cache.reader import ActivationCache
from activations_cache.testing import LinearModel, synthetic_plan

HOOKS = {"a.1:out": 7, "a.2:in": 5}


@pytest.fixture(scope="module")
def cache(tiny_cache_config: CacheConfig, tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "fsync", lambda descriptor: None)
        return activations_cache.build(tiny_cache_config, tmp_path_factory.mktemp("stream") / "c")


class CountingModel(LinearModel):
    """Counts the examples that it reads."""

    n_read = 0

    def __call__(self, numbers: range) -> dict[str, torch.Tensor]:
        self.n_read += len(numbers)
        return super().__call__(numbers)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "WINDOW_ROWS", 5 * 32)


@pytest.fixture
def model() -> CountingModel:
    return CountingModel(synthetic_plan(HOOKS, n_examples=101))


def test_a_stream_gives_the_rows_of_the_cache(
    cache: ActivationCache, tiny_cache_config: CacheConfig
):
    stream = activations_cache.stream(tiny_cache_config)
    assert stream.hook_points == cache.hook_points
    assert torch.equal(stream.rows(), cache.rows())
    assert torch.equal(stream.rows(("score",)), cache.rows(("score",)))
    batches = list(stream.batches(batch=101, seed=1))
    assert len(batches) == stream.n_batches(batch=101) == cache.n_batches(batch=101)
    for batch in batches:
        both = [cache[name][batch.rows] for name in cache.hook_points]
        assert torch.equal(batch.x, torch.cat(both, dim=1))


def test_each_row_comes_once_per_epoch(model: CountingModel, small_windows: None):
    stream = ActivationStream(model, 2)
    wanted = stream.rows(("explain", "score"))
    rows = torch.cat([b.rows for b in stream.batches(batch=27, seed=5, epochs=2)])
    assert len(wanted) == 1296
    for epoch in rows.split(1296):
        assert torch.equal(epoch.sort().values, wanted)
    assert not torch.equal(rows[:1296], rows[1296:])


def test_going_on_at_every_batch_gives_the_same_rest(model: CountingModel, small_windows: None):
    stream = ActivationStream(model, 2)

    def batches(start: int) -> list[activations_cache.live.Batch]:
        return list(stream.batches(["a.2:in"], batch=101, seed=9, start=start, epochs=2))

    whole = batches(0)
    assert len(whole) == 25
    for start in range(0, 26, 4):
        rest = batches(start)
        assert len(rest) == 25 - start
        for one, other in zip(rest, whole[start:], strict=True):
            assert torch.equal(one.rows, other.rows)
            assert torch.equal(one.x, other.x)


def test_the_model_runs_once_per_example_and_epoch_and_only_ahead_of_need(
    model: CountingModel, small_windows: None
):
    stream = ActivationStream(model, 2)
    batches = stream.batches(batch=16, seed=0)
    for n_used, _ in enumerate(batches, start=1):
        # One window of 5 forwards of 2 examples is mixed, one batch is read ahead.
        assert model.n_read * 16 <= n_used * 16 + 16 + 2 * (5 * 32) + 4 * 16
    assert model.n_read <= 101
    model.n_read = 0
    next(iter(stream.batches(batch=16, seed=0, start=70)))
    assert model.n_read <= 2 * 2 * 5


def test_rows_are_mixed_within_a_window(model: CountingModel):
    stream = ActivationStream(model, 2)
    rows = torch.cat([b.rows for b in stream.batches(batch=16, seed=3)]).numpy()
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.1


def test_a_row_that_is_not_finite_ends_the_stream(model: CountingModel):
    class Poisoned(CountingModel):
        def __call__(self, numbers: range) -> dict[str, torch.Tensor]:
            given = super().__call__(numbers)
            if 7 in numbers:
                given["a.1:out"][numbers.index(7), 3, 0] = math.inf
            return given

    stream = ActivationStream(Poisoned(model.plan), 2)
    with pytest.raises(
        NonFiniteError, match="got one that is not at position 3 of example 7; build"
    ):
        list(stream.batches(batch=16, seed=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 1297}, "batch must be at most the 1,296 rows of 1 epochs, got 1297"),
        ({"start": 130}, "start must be at most the 129 batches there are, got 130"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_an_argument_out_of_range_is_refused_at_once(
    model: CountingModel, arguments: dict[str, int], message: str
):
    with pytest.raises(ValueError, match=message):
        ActivationStream(model, 2).batches(**({"batch": 10, "seed": 0} | arguments))
