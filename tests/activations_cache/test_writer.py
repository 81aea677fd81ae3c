"""What stands in a cache is what the model gave; a shard is claimed once and committed whole."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from activations_cache import io
from activations_cache.checks import NonFiniteError
from activations_cache.config import SPLITS
from activations_cache.journal import journals_at, newest
from activations_cache.manifest import Plan
from activations_cache.reader import open_cache
from activations_cache.shard import ShardBuffer
from activations_cache.testing import LinearModel, synthetic_plan, write_synthetic
from activations_cache.writer import CacheWriter

HOOKS = {"a.1:out": 7, "a.2:in": 5}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synced when is tested elsewhere."""
    monkeypatch.setattr(io, "fsync", lambda descriptor: None)


@pytest.fixture
def plan() -> Plan:
    """23 examples of 17 tokens; 3 examples to a shard of 61 rows, the last shard with 2."""
    return synthetic_plan(HOOKS, n_examples=23)


def write(
    path: Path, plan: Plan, change=lambda name, x: x, *, tokens: torch.Tensor | None = None
) -> None:
    """Write a cache whose activations went through `change(hook point, x)`."""
    model = LinearModel(plan)
    if tokens is not None:
        model.examples = replace(model.examples, tokens=tokens)
    with CacheWriter(path, plan) as writer:
        for shard in writer.claims():
            buffer = ShardBuffer(plan, shard, model.examples)
            examples = plan.examples_of(shard)
            given = {name: change(name, x) for name, x in model(examples).items()}
            buffer.add(examples, given)
            writer.commit(buffer)
        writer.finish({})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_row_is_what_the_model_gave_rounded_to_the_dtype(tmp_path: Path, dtype: str):
    plan = synthetic_plan(HOOKS, n_examples=23, dtype=dtype)
    cache, model = write_synthetic(tmp_path, plan), LinearModel(plan)
    rows = cache.rows()
    refs = cache.refs(rows)
    assert len(rows) == cache.n_rows == 23 * 16
    where = list(zip(refs.example.tolist(), refs.position.tolist(), strict=True))
    assert where == [(e, p) for e in range(23) for p in range(1, 17)]
    for name in HOOKS:
        given = model(range(23))[name][refs.example, refs.position]
        assert torch.equal(cache[name][rows], given.to(getattr(torch, dtype)).float())
    assert torch.equal(refs.token, model.examples.tokens[refs.example, refs.position])


def test_statistics_are_those_of_the_rows_of_explain_and_score(tmp_path: Path, plan: Plan):
    cache = write_synthetic(tmp_path, plan)
    for name in HOOKS:
        x = cache[name][cache.rows(("explain", "score"))].double()
        norms = x.square().sum(dim=1).sqrt()
        result = cache[name].statistics
        assert result.n_rows == len(x)
        assert result.n_nonfinite == 0
        assert torch.allclose(cache[name].mean.double(), x.mean(dim=0), rtol=1e-6, atol=1e-7)
        assert cache[name].mean_square_norm == pytest.approx(float(norms.square().mean()), rel=1e-9)
        expected = torch.quantile(
            norms, torch.tensor([float(q) for q in result.norm_quantiles]).double()
        )
        assert list(result.norm_quantiles) == ["0", "0.01", "0.05", "0.5", "0.95", "0.99", "1"]
        assert list(result.norm_quantiles.values()) == pytest.approx(expected.tolist(), rel=1e-6)
        assert torch.allclose(
            cache[name].norms(cache.rows()).double(),
            cache[name][cache.rows()].double().norm(dim=1),
            rtol=1e-6,
        )


def test_padding_gives_no_row(tmp_path: Path, plan: Plan):
    tokens = LinearModel(plan).examples.tokens.clone()
    tokens[4, 9:] = -1
    tokens[5, :] = -1
    write(tmp_path, plan, tokens=tokens)
    cache = open_cache(tmp_path)
    refs = cache.refs(cache.rows())
    assert len(refs.example) == 23 * 16 - 8 - 16
    assert (refs.token >= 0).all()
    assert refs.position[refs.example == 4].tolist() == list(range(1, 9))
    assert 5 not in refs.example
    assert cache.verify() == []


@pytest.mark.parametrize(("value", "reason"), [(math.nan, "not finite"), (math.inf, "not finite")])
def test_rows_that_are_not_finite_are_kept_out_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, reason: str
):
    monkeypatch.setattr("activations_cache.writer.MAX_QUARANTINED", 0.01)
    plan = synthetic_plan(HOOKS, n_examples=23)

    def poison(name: str, x: torch.Tensor) -> torch.Tensor:
        if name == "a.2:in" and len(x) == 3 and float(x[0, 0, 0]) == first:
            x[1, 6, 2] = value
        return x

    first = float(LinearModel(plan)(range(3, 4))["a.2:in"][0, 0, 0])
    write(tmp_path, plan, poison)
    cache, model = open_cache(tmp_path), LinearModel(plan)
    assert cache.manifest.n_quarantined == 1
    assert cache.n_rows == len(cache.rows()) == 23 * 16 - 1
    assert {name: cache[name].statistics.n_nonfinite for name in HOOKS} == {
        "a.1:out": 0,
        "a.2:in": 1,
    }
    listed = [
        json.loads(line) for line in (tmp_path / "quarantine/shard1.jsonl").read_text().splitlines()
    ]
    token = int(model.examples.tokens[4, 6])
    assert listed == [{
        "example": 4, "position": 6, "token": token, "hook_points": ["a.2:in"], "reason": reason
    }]  # fmt: skip
    refs = cache.refs(cache.rows())
    assert (4, 6) not in set(zip(refs.example.tolist(), refs.position.tolist(), strict=True))
    for name in HOOKS:
        expected = model(range(23))[name][refs.example, refs.position].bfloat16().float()
        assert torch.equal(cache[name][cache.rows()], expected)
    assert cache.verify() == []


def test_what_float16_cannot_hold_is_an_overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("activations_cache.writer.MAX_QUARANTINED", 1.0)
    plan = synthetic_plan(HOOKS, n_examples=3, dtype="float16")

    def poison(name: str, x: torch.Tensor) -> torch.Tensor:
        if name == "a.1:out":
            x[2, 16, 6] = 70000.0
            x[2, 15, 6] = 65000.0
        return x

    write(tmp_path, plan, poison)
    listed = [
        json.loads(line) for line in (tmp_path / "quarantine/shard0.jsonl").read_text().splitlines()
    ]
    assert [(row["example"], row["position"], row["reason"]) for row in listed] == [
        (2, 16, "overflow")
    ]
    assert float(open_cache(tmp_path)["a.1:out"][torch.tensor([46])].max()) == 64992.0


def test_more_than_one_bad_row_in_ten_thousand_fails_and_names_the_list(tmp_path: Path, plan: Plan):
    def poison(name: str, x: torch.Tensor) -> torch.Tensor:
        x[0, 3, 0] = math.nan
        return x

    with pytest.raises(NonFiniteError) as caught:
        write(tmp_path, plan, poison)
    message = str(caught.value)
    assert "rows must be finite in bfloat16, up to 0.01% of the 368 rows, got 1" in message
    assert str(tmp_path / "quarantine/shard0.jsonl") in message
    assert (tmp_path / "quarantine/shard0.jsonl").exists()
    assert newest(journals_at(tmp_path)) == {}


def test_a_skipped_position_may_be_anything(tmp_path: Path, plan: Plan):
    def poison(name: str, x: torch.Tensor) -> torch.Tensor:
        x[:, 0] = math.nan
        return x

    write(tmp_path, plan, poison)
    assert open_cache(tmp_path).manifest.n_quarantined == 0


def test_hold_rows_count_in_no_statistics(tmp_path: Path, plan: Plan):
    hold = LinearModel(plan).examples.split == SPLITS.index("hold")
    assert hold.any()

    write_synthetic(tmp_path / "plain", plan)
    model = LinearModel(plan)
    with CacheWriter(tmp_path / "loud", plan) as writer:
        for shard in writer.claims():
            buffer = ShardBuffer(plan, shard, model.examples)
            examples = plan.examples_of(shard)
            loud = hold[examples.start : examples.stop, None, None]
            buffer.add(examples, {n: x * (1 + 99 * loud) for n, x in model(examples).items()})
            writer.commit(buffer)
        writer.finish({})
    plain, loud = open_cache(tmp_path / "plain"), open_cache(tmp_path / "loud")
    assert plain.manifest.statistics == loud.manifest.statistics
    assert np.array_equal(plain["a.1:out"].mean, loud["a.1:out"].mean)
    rows = plain.rows(("hold",))
    assert not torch.equal(plain["a.1:out"][rows], loud["a.1:out"][rows])


@pytest.mark.gpu
def test_a_model_on_a_gpu_gives_the_rows_of_one_on_the_cpu(tmp_path: Path, plan: Plan):
    write(tmp_path / "cpu", plan)
    write(tmp_path / "gpu", plan, lambda name, x: x.cuda())
    cpu, gpu = open_cache(tmp_path / "cpu"), open_cache(tmp_path / "gpu")
    for name in HOOKS:
        assert torch.equal(cpu[name][cpu.rows()], gpu[name][gpu.rows()])
        assert torch.allclose(cpu[name].norms(cpu.rows()), gpu[name].norms(gpu.rows()))
        assert torch.allclose(cpu[name].mean, gpu[name].mean)
