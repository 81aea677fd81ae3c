"""How the GPU suite times, who makes its rows, and what it says of them."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu_suite import report, timing, tuning
from benchmarks.gpu_suite.__main__ import supervise
from benchmarks.gpu_suite.case import Shape
from sae_kernels import blocks

SHAPE = Shape(d_model=23, d_sae=31, k=2, batch=3)
TOP = timing.DevicePeaks(1e12, 1e14)


WORKER = """
import json, os, sys, time
start = json.loads(sys.argv[-1])["start"]
print(json.dumps({"common": {"device": "x"}, "top": [1.0, 2.0]}), flush=True)
for number in range(start, 5):
    row = {"op": str(number)}
    print("GPU available: True")
    print(json.dumps(row), flush=True)
    if number == 1:
        os.abort()
    if number == 2:
        time.sleep(100)
    print(json.dumps(row | {"status": "ok"}), flush=True)
    if number == 3:
        sys.exit(3)
"""


def test_a_process_that_dies_or_hangs_loses_one_row(tmp_path):
    writer = report.RowWriter(tmp_path / "rows.jsonl", {})
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    supervise([sys.executable, str(script)], writer, time.monotonic() + 1e6, 2.0)
    assert [(row["op"], row["status"]) for row in writer.rows] == [
        ("0", "ok"),
        ("1", "failed: the process ended with -6"),
        ("2", "failed: the process took longer than 2 s"),
        ("3", "ok"),
        ("4", "ok"),
    ]
    assert writer.common == {"device": "x"}


def test_a_process_that_gets_to_no_row_ends_all(tmp_path):
    writer = report.RowWriter(tmp_path / "rows.jsonl", {})
    with pytest.raises(SystemExit, match="must get to one, ended with 7"):
        supervise([sys.executable, "-c", "raise SystemExit(7)"], writer, 1e18, 9.0)


def test_what_is_faster_by_more_than_it_differs_is_proposed():
    def row(op, candidate, *ms):
        times = dict(zip(("p20_ms", "median_ms", "p80_ms"), ms, strict=True))
        return report.named(op, SHAPE, torch.float32, candidate) | {"status": "ok"} | times

    rows = [
        row("decode", "triton", 9.0, 10.0, 11.0),
        row("decode", "embedding_bag", 1.0, 1.0, 1.0),
        row("tuning: decode", "weighted_rows: 2 x warps", 7.0, 8.0, 8.5),
        row("tuning: decode", "weighted_rows: 2 x width", 7.0, 8.0, 9.5),
        row("tuning: decode", "weighted_rows: 0.5 x warps", 9.8, 9.8, 9.9),
        row("encode", "triton", 9.0, 10.0, 11.0),
        row("encode", "triton, gated product", 7.9, 8.0, 8.1),
        row("tuning: encode", "product: 0.5 x warps", 7.0, 7.2, 7.8),
        row("tuning: encode", "product: 0.5 x latents", 8.2, 8.4, 8.6),
    ]
    assert tuning.proposals(rows) == [
        f"decode, {SHAPE}: weighted_rows: 2 x warps saves 20%",
        f"encode, {SHAPE}: triton, gated product saves 20%",
        f"encode, {SHAPE}: product: 0.5 x warps saves 10%",
    ]


def test_a_change_reaches_the_kernel_and_goes_again():
    change = tuning.Change("weighted_rows", "warps", 2)
    before = blocks.weighted_rows(768)
    with change.made():
        assert blocks.weighted_rows(768) == before._replace(warps=2 * before.warps)
    assert blocks.weighted_rows(768) == before
    for rule, _ in tuning.RULES.values():
        fields = getattr(blocks, rule).__annotations__["return"]._fields
        assert {"warps"} <= set(fields)


def test_quantiles():
    assert timing.quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (3.0, 2.0, 5.0, 6)
    assert timing.quantiles([7.0]) == (7.0, 7.0, 7.0, 1)


def test_the_bound_is_the_slower_of_traffic_and_arithmetic():
    assert report.bound_ms(1e12, 1e13, TOP) == 1000
    assert report.bound_ms(1e11, 1e14, TOP) == 1000
    row = report.timed({}, timing.Quantiles(4.0, 1.0, 9.0, 3), 2e9, 0, TOP)
    assert row["share_of_bound"] == 0.5


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
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
