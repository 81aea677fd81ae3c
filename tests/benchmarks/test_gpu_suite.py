"""The GPU suite's logic at tiny sizes: the kernels are interpreted, and nothing is timed."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu_suite import ops, report, run, steps, timing
from benchmarks.gpu_suite.bare import stand_in
from benchmarks.gpu_suite.case import Shape, Variant, gate, relative

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


def test_a_run_writes_a_row_for_every_candidate(suite):
    suite.run([SHAPE])
    rows = [json.loads(line) for line in suite.writer.path.read_text().splitlines()]
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["op"] for row in rows} == {
        "step",
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
    assert all(keys.count(key) >= 2 for key in keys)
    for row in rows:
        assert row["commit"] == "abc"
        assert row["shape"] == {"d_model": 23, "d_sae": 31, "k": 2, "batch": 3}
        assert row["error"] <= row["tolerance"]
        assert (row["median_ms"], row["p20_ms"], row["p80_ms"], row["n_times"]) == (2, 1, 3, 7)
        assert row["share_of_bound"] == pytest.approx(row["bound_ms"] / 2)
    text = report.table(suite.writer.rows)
    assert len(text.splitlines()) == len(rows) + 1


def test_the_first_candidate_is_ours_and_within_its_tolerance(every_case):
    for case in every_case:
        name, ours = next(iter(case.candidates.items()))
        assert name == "triton"
        assert gate(case, ours) < (1e-5 if case.op != "encode" else 1e-4), case.op


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
    suite._candidate(case, "zeros", Variant(lambda v, i, w: torch.zeros(3, 23), 1e-2))
    suite._candidate(case, "dies", Variant(die, 1e-2))
    suite._candidate(case, "nan", Variant(lambda v, i, w: torch.full((3, 23), torch.nan), 1e-2))
    wrong, died, nan = suite.writer.rows
    assert wrong["status"] == "wrong: error 1.0e+00 above 1.0e-02"
    assert died["status"] == "failed: RuntimeError: out of memory"
    assert nan["status"] == "wrong: error inf above 1.0e-02"
    assert not any("median_ms" in row for row in suite.writer.rows)
    assert "failed: RuntimeError" in report.table(suite.writer.rows)


def test_a_step_that_does_not_train_is_wrong(suite, monkeypatch):
    true = steps.PlainStep
    monkeypatch.setattr(steps, "LR", 0.0)
    monkeypatch.setitem(steps.STEPS, "idle", true)
    suite._step(SHAPE, "idle")
    assert suite.writer.rows[0]["status"].startswith("wrong: error inf")


def test_both_steps_take_the_same_steps():
    ours, dense = (make(SHAPE, torch.float32, "cpu") for make in steps.STEPS.values())
    for seed in (3, 4, 5):
        x = ops.Draw(seed, "cpu").normal(3, 23)
        assert relative(ours(x), dense(x).double()) < 1e-4
    start = steps.SuiteWeights.draw(SHAPE, "cpu")
    for name, other, before in zip(start._fields, dense.weights, start, strict=True):
        one = ours.step.autoencoder.get_parameter(name).detach()
        moved = other.detach().double() - before
        assert moved.norm() > 0
        assert relative(one - before, moved) < 1e-2


def test_nothing_starts_after_the_deadline_or_outside_only(suite):
    suite.only = "step"
    suite.deadline = 0.0
    suite.run([SHAPE])
    assert [row["status"] for row in suite.writer.rows] == ["skipped: the time was over"] * 2
    assert {row["op"] for row in suite.writer.rows} == {"step"}


def test_quantiles():
    assert timing.quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (3.0, 2.0, 5.0, 6)
    assert timing.quantiles([7.0]) == (7.0, 7.0, 7.0, 1)


def test_the_bound_is_the_slower_of_traffic_and_arithmetic():
    assert report.bound_ms(1e12, 1e13, TOP) == 1000
    assert report.bound_ms(1e11, 1e14, TOP) == 1000
    row = report.timed({}, timing.Quantiles(4.0, 1.0, 9.0, 3), 2e9, 0, TOP)
    assert row["share_of_bound"] == 0.5


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
        "benchmarks.gpu_suite needs a CUDA device and found none; nothing was measured\n"
    )
    assert not (tmp_path / "out").exists()


def test_it_needs_torch_and_triton_alone(repository):
    allowed = "{'torch', 'triton', 'numpy', 'sae_kernels', 'benchmarks', 'jaxtyping'}"
    code = (
        "import sys, importlib.util\n"
        "true = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'jaxtyping' else true(n, *a)\n"
        "from benchmarks.gpu_suite import bare\n"
        "bare.find_spec = importlib.util.find_spec\n"
        "bare.prepare()\n"
        "from benchmarks.gpu_suite import run\n"
        "assert sys.modules['jaxtyping'].__spec__ is None\n"
        "others = {'lightning', 'transformers', 'zarr', 'beartype', 'typeguard', 'pydantic'}\n"
        f"print(sorted(others & {{name.partition('.')[0] for name in sys.modules}} - {allowed}))"
    )
    done = run_python(repository, "-c", code)
    assert done.stdout == "[]\n", done.stderr


class FakeDevice:
    """A clock of milliseconds in the place of a CUDA device."""

    def __init__(self):
        self.now = 0.0
        self.called = []

    def Event(self, enable_timing):
        device = self

        class Event:
            def record(self):
                self.at = device.now

            def elapsed_time(self, other):
                return other.at - self.at

        return Event()

    def call(self, name, milliseconds):
        def work():
            self.called.append(name)
            self.now += milliseconds

        return work


def test_calls_take_turns_and_are_timed_one_by_one(monkeypatch):
    device = FakeDevice()
    waits = []
    monkeypatch.setattr(torch.cuda, "Event", device.Event)
    monkeypatch.setattr(torch.cuda, "_sleep", waits.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = [device.call("a", 1.0), device.call("b", 2.0), device.call("c", 3.0)]
    times = timing.measure(calls, 0.1)
    assert (times.median, times.p20, times.p80) == (2.0, 1.0, 3.0)
    assert times.n_times == 60  # the first multiple of 10 that has 100 ms
    measured = device.called[2 * timing.GROUP :]
    assert measured == list("abc" * 20)
    assert len(waits) == 8
    timing.measure(calls, 0.1, wait=False)
    assert len(waits) == 8


def test_rows_say_where_they_were_measured(monkeypatch):
    properties = SimpleNamespace(name="GPU", multi_processor_count=7, L2_cache_size=11)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(report, "_output", lambda *command: f"<{command[0]}>")
    common = report.surroundings(None)
    assert common["device"] == "GPU"
    assert common["commit"] == "<git>"
    assert common["torch"] == torch.__version__
    assert common["triton"]
    assert common["date"].endswith("+00:00")
    assert report.surroundings("abc")["commit"] == "abc"


def test_a_command_that_is_not_there_is_unknown():
    assert report._output("no-such-command-anywhere") == "unknown"
    assert report._output(sys.executable, "-c", "raise SystemExit(1)") == "unknown"
    assert report._output(sys.executable, "-c", "print(7)") == "7"
