"""The GPU suite's logic at tiny sizes: the kernels are interpreted, and nothing is timed."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.gpu_suite import checks, loop, ops, peers, report, run, steps, timing, tuning
from benchmarks.gpu_suite.bare import stand_in
from benchmarks.gpu_suite.case import Shape, Variant, gate, relative
from sae.train.config import Adam
from sae.train.step import TrainStep

SHAPE = Shape(d_model=23, d_sae=31, k=2, batch=3)
TOP = timing.DevicePeaks(1e12, 1e14)
COMMON = {"device": "none", "commit": "abc", "date": "today", "torch": "2", "triton": "3"}


def call_once(calls, seconds, wait):
    for call in calls:
        call()
    return timing.Quantiles(2.0, 1.0, 3.0, 7)


@pytest.fixture
def suite(tmp_path):
    """A suite on the CPU that calls everything once."""
    writer = report.RowWriter(tmp_path / "rows.jsonl", COMMON)
    far = time.monotonic() + 1e6
    return run.Suite(writer, TOP, far, "", "cpu", torch.float32, call_once)


@pytest.fixture
def every_case():
    """All ops and both forms of the optimiser."""
    cases = list(ops.all_ops(SHAPE, torch.float32, "cpu"))
    return [*cases, *(steps.adam(SHAPE, "cpu", unit=unit) for unit in (True, False))]


def test_a_run_writes_a_row_for_every_candidate(suite, monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", {})  # which the short form goes through
    monkeypatch.setattr(loop, "PACKAGES", ("zarr_of_another_machine",))
    suite.run([SHAPE])
    rows = [json.loads(line) for line in suite.writer.path.read_text().splitlines()]
    statuses = {row["op"]: row["status"] for row in rows}
    assert statuses.pop("loop from a cache") == "not run: zarr_of_another_machine is missing"
    assert set(statuses.values()) == {"ok"}
    rows = [row for row in rows if row["op"] in statuses]
    tuned = [row for row in rows if row["op"].startswith("tuning: ")]
    # the encoder's product is the library's where there are too few latents to gate anything
    assert {row["op"] for row in tuned} == {f"tuning: {op}" for op in {*tuning.RULES} - {"encode"}}
    rows = [row for row in rows if row not in tuned]
    assert {row["op"] for row in rows} == {
        "step",
        "step, jumprelu",
        "step, default",
        "select",
        "encode",
        "decode",
        "values_grad",
        "decode_mse",
        "weight_grads",
        "adam",
        "adam, projected, unit norm",
    }
    keys = [json.dumps([row[name] for name in ("op", "dtype", "pattern")]) for row in rows]
    assert all(keys.count(key) >= 2 for key in keys if "default" not in key)
    for row in rows:
        if row["op"].startswith("step"):
            assert row["rows_per_s"] == 1500
            assert row["times_goal"] is None, "no goal for this shape"
        assert row["commit"] == "abc"
        assert row["shape"] == {"d_model": 23, "d_sae": 31, "k": 2, "batch": 3}
        assert row["error"] <= row["tolerance"]
        assert (row["median_ms"], row["p20_ms"], row["p80_ms"], row["n_times"]) == (2, 1, 3, 7)
        assert row["share_of_bound"] == pytest.approx(row["bound_ms"] / 2)
    text = report.table(suite.writer.rows)
    assert len(text.splitlines()) == len(rows) + len(tuned) + 2


def test_the_first_candidate_is_ours_and_within_its_tolerance(every_case):
    for case in every_case:
        name, ours = next(iter(case.candidates.items()))
        assert name == "triton"
        assert gate(case, ours) < (1e-5 if case.op != "encode" else 1e-4), case.op


def test_the_gated_product_is_a_candidate_where_it_can_be(suite):
    shape = Shape(d_model=5, d_sae=2311, k=3, batch=3)
    case = ops.encode(shape, torch.float32, "cpu")
    assert list(case.candidates)[:2] == ["triton", tuning.GATED]
    assert gate(case, case.candidates[tuning.GATED]) < 1e-4
    (*_, change) = tuning.changes(case)
    assert change.rule == "product"
    row = suite._tune(case, change, {})
    assert row["error"] < 1e-4
    assert row["median_ms"] == 2.0


def _change(result):
    """Spoil the last element of the first tensor of a result."""
    first = result if isinstance(result, torch.Tensor) else result[0]
    spoiled = first.clone()
    spoiled.view(-1)[-1] += 1.0
    return spoiled if isinstance(result, torch.Tensor) else (spoiled, *result[1:])


def _lose(result):
    """Leave all floats of a result unwritten."""
    if isinstance(result, torch.Tensor):
        return torch.full_like(result, torch.nan)
    return tuple(_lose(t) if t.is_floating_point() else t for t in result)


def test_the_gate_sees_a_wrong_element_and_unwritten_memory(every_case):
    for case in every_case:
        right = next(iter(case.candidates.values()))
        if case.op != "weight_grads":  # whose last latent may not be among those it looks at
            wrong = Variant(lambda *a, right=right: _change(right.run(*a)), 0.0)
            assert gate(case, wrong) > 1e-3, case.op
        lost = Variant(lambda *a, right=right: _lose(right.run(*a)), 0.0)
        assert gate(case, lost) == float("inf"), case.op


def test_a_selection_with_an_index_twice_or_a_second_best_is_wrong():
    pre = torch.tensor([[3.0, 1.0, 2.0, 0.0]], dtype=torch.float64)
    error = ops.selection_error
    assert error(pre, torch.tensor([[3.0, 2.0]]), torch.tensor([[0, 2]])) == 0
    assert error(pre, torch.tensor([[2.0, 3.0]]), torch.tensor([[2, 0]])) == 0
    assert error(pre, torch.tensor([[3.0, 3.0]]), torch.tensor([[0, 0]])) == float("inf")
    assert error(pre, torch.tensor([[3.0, 1.0]]), torch.tensor([[0, 1]])) == pytest.approx(1 / 3)
    assert error(pre, torch.tensor([[3.0, 2.5]]), torch.tensor([[0, 2]])) == pytest.approx(1 / 6)


def test_a_wrong_candidate_is_not_timed_and_a_dying_one_ends_nothing(suite, every_case):
    def die(*_):
        raise RuntimeError("out of memory\nmore lines")

    case = every_case[3]
    for name, run_it in {
        "zeros": lambda v, i, w: torch.zeros(3, 23),
        "dies": die,
        "nan": lambda v, i, w: torch.full((3, 23), torch.nan),
    }.items():
        row = report.named(case.op, SHAPE, case.dtype, name)
        candidate = Variant(run_it, 1e-2)
        suite._guarded(run.Work(row, partial(suite._time_candidate, case, candidate)))
    wrong, died, nan = suite.writer.rows
    assert wrong["status"] == "wrong: error 1.0e+00 above 1.0e-02"
    assert died["status"] == "failed: RuntimeError: out of memory"
    assert nan["status"] == "wrong: error inf above 1.0e-02"
    assert not any("median_ms" in row for row in suite.writer.rows)
    assert "failed: RuntimeError" in report.table(suite.writer.rows)


def test_a_step_that_does_not_train_is_wrong(suite, monkeypatch):
    monkeypatch.setattr(peers, "LR", 0.0)
    monkeypatch.setattr(TrainStep, "_update", lambda *_: None)
    for op, named in steps.STEPS.items():
        for name in named:
            row = suite._time_step(op, SHAPE, name, {})
            assert row["status"].startswith("wrong: error inf"), (op, name)


@pytest.mark.parametrize("op", ["step", "step, jumprelu"])
def test_all_steps_of_an_op_take_the_same_steps(op, monkeypatch):
    for module in (peers, steps):
        monkeypatch.setattr(module, "BANDWIDTH", 1.0)  # so few rows must move a threshold
    named = {name: make for name, make in steps.STEPS[op].items() if "ReLU" not in name}
    ours, *others = (make(SHAPE, torch.float32, "cpu") for make in named.values())
    start = peers.SuiteWeights.draw(SHAPE, "cpu")
    for seed in (3, 4, 5):
        x = ops.Draw(seed, "cpu").normal(3, 23)
        loss = ours(x)
        for other in others:
            assert relative(loss, other(x).double()) < 1e-5
    for other in others:
        if isinstance(other, steps.ProductStep):
            continue
        befores, names = list(start), list(start._fields)
        if op == "step, jumprelu":
            befores, names = [*befores, torch.full((31,), peers.THRESHOLD)], [*names, "threshold"]
        for name, after, before in zip(names, other.params, befores, strict=True):
            one = ours.step.autoencoder.get_parameter(name).detach()
            moved = after.detach().double() - before
            assert moved.norm() > 0
            assert relative(one - before, moved) < 1e-4


def test_the_multiple_of_the_goal_is_that_of_the_shape(suite):
    times = timing.Quantiles(1.4, 1.0, 2.0, 7)
    row = suite._of_step({}, run.SHAPES[0], times)
    assert row["times_goal"] == pytest.approx(2.0)
    assert row["rows_per_s"] == pytest.approx(8192 / 1.4e-3)
    product, bytes_of_adam = 2 * 8192 * 768 * (24576 + 128), 60 * 24576 * 768
    assert row["bound_ms"] == pytest.approx(1e3 * (product / 1e14 + bytes_of_adam / 1e12))


def test_a_check_that_is_wrong_says_what(suite):
    def wrong(device):
        raise AssertionError("other latents\nmore")

    assert suite._check(wrong, {})["status"] == "wrong: other latents"
    assert suite._check(lambda device: "not run: a GPU is missing", {})["status"] == (
        "not run: a GPU is missing"
    )


@pytest.mark.parametrize("name", ["ties", "NaN and infinities"])
def test_a_check_sees_a_selection_that_is_off_by_one(name, monkeypatch):
    true, check = checks.topk_select, checks.CHECKS[name]

    def off(pre, k, **more):
        values, indices = true(pre, k, **more)
        return values, (indices + 1) % pre.shape[1]

    check(torch.device("cpu"))
    monkeypatch.setattr(checks, "topk_select", off)
    with pytest.raises(AssertionError, match="other latents"):
        check(torch.device("cpu"))


def test_a_check_sees_a_step_that_takes_another_step(monkeypatch):
    true, check, rates = checks._step, checks.CHECKS["TrainStep: batchtopk"], [3e-2, 1e-3, 1e-3]

    def other(config, device):
        return true(replace(config, optimizer=Adam(lr=rates.pop(0))), device)

    check(torch.device("cpu"))
    monkeypatch.setattr(checks, "_step", other)
    with pytest.raises(AssertionError, match="param"):
        check(torch.device("cpu"))


def test_an_illegal_access_ends_the_process_and_its_row(suite, monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    suite.device = "cuda"
    row = report.named("decode", SHAPE, torch.float32, "triton")
    with pytest.raises(SystemExit) as end:
        suite._guarded(run.Work(row, lambda row: row | {"status": "ok"}))
    assert end.value.code == run.LOST
    assert [row["status"] for row in suite.writer.rows] == [
        "failed: RuntimeError: CUDA error: an illegal memory access was encountered"
    ]


def test_nothing_starts_after_the_deadline_or_outside_only(suite):
    suite.only = "step"
    suite.deadline = 0.0
    suite.run([SHAPE])
    n_steps = sum(map(len, steps.STEPS.values()))
    assert [row["status"] for row in suite.writer.rows] == ["skipped: the time was over"] * n_steps
    assert {row["op"] for row in suite.writer.rows} == set(steps.STEPS)


def test_latents_are_distinct_and_ascend():
    for pattern in ("uniform", "power law"):
        values, indices = ops.Draw(0, "cpu").latents(Shape(2, 31, 29, 11), pattern)
        assert (indices.diff(dim=1) > 0).all()
        assert indices.min() >= 0
        assert indices.max() < 31
        assert (values > 0).all()
    common = ops.Draw(0, "cpu").latents(Shape(2, 1009, 3, 997), "power law")[1]
    assert (common < 101).float().mean() > 0.5


def test_annotations_are_accepted_without_jaxtyping():
    module = stand_in()
    assert module.Float[torch.Tensor, "batch k"] is torch.Tensor
    assert module.Int[torch.Tensor, ""] | None == torch.Tensor | None


def run_python(repository, *command):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_gpu_it_says_so_in_one_line(repository, tmp_path):
    done = run_python(repository, "-m", "benchmarks.gpu_suite", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "benchmarks.gpu_suite needs a CUDA device and found none; nothing was measured, --smoke "
        "goes through all of it on a CPU\n"
    )
    assert not (tmp_path / "out").exists()


BLOCKER = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_less(name, *more):
    return None if name.partition(".")[0] in GONE else find(name, *more)

PathFinder.find_spec = staticmethod(find_less)
"""
GONE = (
    "zarr", "pydantic", "typer", "rich", "yaml", "pytest", "hypothesis", "beartype", "jaxtyping",
    "lightning", "transformers", "datasets", "tensorboard", "google_crc32c", "pyarrow",
)  # fmt: skip


@pytest.mark.timeout(400)
@pytest.mark.parametrize("only", ["step", "loop", pytest.param("", marks=pytest.mark.long)])
def test_it_needs_torch_and_triton_alone(only, repository, tmp_path):
    """The short form, in processes that find nothing else."""
    (tmp_path / "sitecustomize.py").write_text(f"GONE = {GONE!r}\n{BLOCKER}")
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--only", only],
        cwd=repository,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in next(tmp_path.glob("*.jsonl")).read_text().splitlines()]
    others = {f"{row['op']}, {row['candidate']}": row["status"] for row in rows}
    others = {name: status for name, status in others.items() if status != "ok"}
    expected = {
        "check, CUDA graph": "not run: a GPU is missing",
        "check, rows of 16 bits": "not run: bfloat16 is missing in the interpreter",
        "loop from a cache, sae.train.train": "not run: lightning is missing",
    }
    assert others == {name: said for name, said in expected.items() if only in name}
    assert {"step": 8, "loop": 1, "": 50}[only] <= len(rows)
    assert all(row["smoke"] and row["device"] == "CPU, kernels interpreted" for row in rows)


def test_the_loop_is_timed_from_a_cache_where_its_packages_are():
    assert loop.missing() is None
    assert 0 < loop.seconds_per_step(Shape(7, 16, 2, 32), "fp32") < 1
