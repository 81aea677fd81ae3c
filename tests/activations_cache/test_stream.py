"""The live model gives the rows that its cache has, with the same numbers and values."""

import math

import numpy as np
import pytest
import torch

import activations_cache
from activations_cache import io
from activations_cache.batches import Batch
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


def stream_of(model: CountingModel, **options) -> ActivationStream:
    """Forwards of 2 examples, windows of 5 forwards."""
    return ActivationStream(model, 2, **({"buffer_rows": 2 * 5 * 32} | options))


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
    as_stored = list(stream.batches(batch=101, seed=1, as_stored=True))
    assert as_stored[0].x.dtype == getattr(torch, tiny_cache_config.dtype)
    for low, batch in zip(as_stored, batches, strict=True):
        assert torch.equal(low.rows, batch.rows)
        assert torch.equal(low.x.float(), batch.x)


def test_each_row_comes_once_per_epoch(model: CountingModel):
    stream = stream_of(model)
    wanted = stream.rows(("explain", "score"))
    rows = torch.cat([b.rows for b in stream.batches(batch=27, seed=5, epochs=2)])
    assert len(wanted) == 1296
    for epoch in rows.split(1296):
        assert torch.equal(epoch.sort().values, wanted)
    assert not torch.equal(rows[:1296], rows[1296:])


def test_going_on_at_every_batch_gives_the_same_rest(model: CountingModel):
    stream = stream_of(model)

    def batches(start: int) -> list[Batch]:
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
    model: CountingModel,
):
    stream = stream_of(model)
    batches = stream.batches(batch=16, seed=0)
    for n_used, _ in enumerate(batches, start=1):
        # One window of 5 forwards of 2 examples is mixed while the next one is read; two batches
        # are ahead of the one that is used.
        assert model.n_read * 16 <= (n_used + 2) * 16 + 2 * (5 * 32) + 4 * 16
    assert model.n_read <= 101 + 2 * 5  # the first window of an epoch that nobody asks for
    model.n_read = 0
    next(iter(stream.batches(batch=16, seed=0, start=70)))
    assert model.n_read <= 2 * 2 * 5


def test_rows_are_mixed_within_a_window(model: CountingModel):
    stream = ActivationStream(model, 2)
    rows = torch.cat([b.rows for b in stream.batches(batch=16, seed=3)]).numpy()
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.1


class Poisoned(CountingModel):
    """Gives numbers that are not finite at position 3 of some examples."""

    poisoned = (7,)

    def __call__(self, numbers: range) -> dict[str, torch.Tensor]:
        given = super().__call__(numbers)
        for example in set(self.poisoned) & set(numbers):
            given["a.1:out"][numbers.index(example), 3, 0] = math.inf
        return given


def test_in_the_place_of_a_row_that_is_not_finite_stands_another_one(model: CountingModel):
    clean = stream_of(model)
    known = {b: x for one in clean.batches(batch=1, seed=0) for b, x in [(int(one.rows), one.x)]}
    stream = stream_of(Poisoned(model.plan))
    found = list(stream.batches(batch=16, seed=0))
    expected = list(clean.batches(batch=16, seed=0))
    rows, wanted = (torch.cat([b.rows for b in some]) for some in (found, expected))
    assert int((rows != wanted).sum()) == 1
    assert stream.n_left_out == 1
    for one in found:
        assert torch.equal(one.x, torch.cat([known[int(row)] for row in one.rows]))


def test_too_many_rows_that_are_not_finite_end_the_stream(model: CountingModel):
    poisoned = Poisoned(model.plan)
    poisoned.poisoned = tuple(range(101))
    rule = r"rows must be finite, up to 0\.01% of \d+ rows, got \d+ that are not; try another"
    with pytest.raises(NonFiniteError, match=rule):
        list(stream_of(poisoned).batches(batch=16, seed=0))


def test_rows_above_a_limit_are_left_out_and_counted(model: CountingModel):
    every = list(stream_of(model).batches(["a.1:out"], batch=16, seed=0))
    norms = torch.cat([b.x for b in every]).norm(dim=1)
    limit = float(norms.sort().values[-20]) - 1e-4
    stream = stream_of(model, limits={"a.1:out": limit})
    kept = list(stream.batches(["a.1:out"], batch=16, seed=0))
    assert len(kept) == len(every)
    assert float(torch.cat([b.x for b in kept]).norm(dim=1).max()) <= limit
    same = torch.cat([b.rows for b in kept]) == torch.cat([b.rows for b in every])
    assert torch.equal(same, norms <= limit)
    assert stream.n_left_out == 20
    with pytest.raises(ValueError, match="rows must not be larger than max_norm allows, got none"):
        list(stream_of(model, limits={"a.1:out": 0.0}).batches(batch=16, seed=0))


def test_processes_share_the_examples_and_start_again_at_their_end(model: CountingModel):
    alone = stream_of(model)
    n_rows = 1600
    parts = [
        list(stream_of(model, share=(rank, 3), n_rows=n_rows).batches(batch=20, seed=4, part=part))
        for rank, part in enumerate((slice(0, 6), slice(6, 13), slice(13, 20)))
    ]
    assert [len(part) for part in parts] == [n_rows // 20] * 3
    assert [len(part[0].rows) for part in parts] == [6, 7, 7]
    seen = [set(torch.cat([b.rows for b in part]).tolist()) for part in parts]
    assert not seen[0] & seen[1]
    assert set().union(*seen) <= set(alone.rows().tolist())
    assert seen[1] | seen[2] | seen[0] >= set(alone.rows(("explain", "score")).tolist())
    with pytest.raises(ValueError, match="processes must be at most 70, one for each forward"):
        stream_of(model, share=(70, 99)).batches(batch=20, seed=4)


def test_an_iterator_that_is_dropped_does_not_run_the_model_to_the_end_of_a_window():
    model = CountingModel(synthetic_plan(HOOKS, n_examples=4001))
    batches = ActivationStream(model, 2, buffer_rows=2 * 1000 * 32).batches(batch=16, seed=0)
    next(batches)
    batches.close()
    assert model.n_read < 2 * 2000


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


def test_a_buffer_that_holds_no_two_forwards_is_refused(model: CountingModel):
    with pytest.raises(ValueError, match="buffer_rows must be at least 64, two forwards of 2 exam"):
        ActivationStream(model, 2, buffer_rows=63)
