"""Every wrong key, type, range or contradiction of a real config: exit 2, one line, no torch."""
# ruff: noqa: E501 - a message stands on one line

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sae.cli import main

DEMO = Path(__file__).parents[3] / "configs" / "demo.yaml"

CASES = {
    "trian.batch=3": "trian is not a top-level key; did you mean 'train'?",
    "train.bacth=3": "train.bacth is not a key of train; did you mean 'batch'?",
    "train.saes.topk.activation.kk=3": "train.saes.topk.activation.kk is not a key of topk; did you mean 'k'?",
    "train.saes.topk.activation.kind=tpok": "train.saes.topk.activation.kind must be one of",
    "train.saes.topk.activation.k=5000": "train.saes.topk.activation.k must be at most d_sae=4608, got 5000",
    "train.saes.topk.activation.k=0": "train.saes.topk.activation.k must be at least 1, got 0",
    "train.saes.topk.activation.k=3.5": "train.saes.topk.activation.k must be an integer, got 3.5",
    "train.saes.topk.d_sae=many": "train.saes.topk.d_sae must be an integer, got 'many'",
    "train.saes.topk.d_sae=true": "train.saes.topk.d_sae must be an integer, got true",
    "train.saes.topk.d_sea=64": "train.saes.topk.d_sea is not a key of train.saes.topk; did you mean 'd_sae'?",
    "train.saes.topk.frozen=both": "train.saes.topk.frozen must be one of",
    "train.saes.topk.l1.coefficient=5": "train.saes.topk.l1 must be absent for activation.kind 'topk'",
    "train.saes.l1.unit_norm=true": "train.saes.l1.unit_norm must be false beside l1",
    "train.saes.l1.l1.coefficient=-1": "train.saes.l1.l1.coefficient must be at least 0, got -1.0",
    "train.saes.l1.auxk.k=0": "train.saes.l1.auxk.k must be at least 1, got 0",
    "train.saes.topk.optimizer.lr=0": "train.saes.topk.optimizer.lr must be a positive number",
    "train.saes.topk.optimizer.lr=.nan": "train.saes.topk.optimizer.lr must be",
    "train.saes.topk.optimizer.beta2=1": "train.saes.topk.optimizer.beta2 must be at least 0 and below 1",
    "train.saes.topk.optimizer.decay=0.99": "train.saes.topk.optimizer.decay must be at most 1 - warmup",
    "train.batch=0": "train.batch must be at least 1, got 0",
    "train.batch=500000": "train.batch must be at most cache.n_rows=400000, got 500000",
    "train.precision=fp16": "train.precision must be one of",
    "train.seed=-1": "train.seed must be at least 0, got -1",
    "train.epochs=null": "train.epochs must be an integer",
    "cache.n_rows=0": "cache.n_rows must be at least 1, got 0",
    "cache.skip_positions=256": "cache.skip_positions must be less than text.context=256, got 256",
    "cache.hook_points=[model.layers.15]": "cache.hook_points must have the form",
    "cache.hook_points=[model.layers.1:out, model.layers.2:out]": (
        "train.saes.topk.inputs must name hook points of the cache"
    ),
    "cache.dtype=int4": "cache.dtype must be one of",
    "cache.model.sha256=abc": "cache.model.sha256 must be 64 lower-case hexadecimal digits, got 'abc'",
    "cache.model.path=[1]": "cache.model.path must be text",
    "cache.text.context=1": "cache.text.context must be at least 2, got 1",
    "cache.text.hold=0.5": "cache.text.explain must sum to 1 together with score and hold",
    "cache.text.sources=[]": "cache.text.sources must name at least one source",
    "cache.text.sources.0.share=-1": "cache.text.sources.0.share must be a positive number",
    "cache.text.sources.0.label=x": "cache.text.sources.0.label must be absent for plain text",
    "evaluate.n_contexts=0": "evaluate.n_contexts must be at least 1, got 0",
    "explain.words_per_label=0": "explain.words_per_label must be at least 1, got 0",
    "steer.dictionary=nope": "steer.dictionary must be one of",
    "output=": "output must",
    "train.batch": "must have the form dotted.key=value",
}  # fmt: skip


def run_main(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["sae", *arguments])
    with pytest.raises(SystemExit) as stop:
        main.main()
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("override", CASES)
def test_a_wrong_config_costs_one_line(monkeypatch, capsys, override):
    code, err = run_main(monkeypatch, capsys, "run", str(DEMO), override)
    assert code == 2
    assert CASES[override] in err
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_a_wrong_config_is_refused_before_torch_within_two_seconds():
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "from sae.cli.main import main; main()",
         "run", str(DEMO), "train.batch=0"],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == 2
    assert not any(line.endswith("| torch") for line in done.stderr.splitlines())
    # The figure is 2 s of this process; a shared machine may stall it, so CPU-bound imports decide.
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("run", "no/such.yaml"), "no/such.yaml"),
        (("run",), "CONFIG"),
        (("fly",), "fly"),
        (("run", str(DEMO), "--fast"), "--fast"),
    ],
)
def test_a_wrong_command_line_costs_one_line(monkeypatch, capsys, arguments, part):
    code, err = run_main(monkeypatch, capsys, *arguments)
    assert code == 2
    assert part in err
    assert err.count("\n") == 1


def test_help_names_every_step(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sae", "--help"])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command in (
        "run",
        "cache",
        "train",
        "evaluate",
        "explain",
        "steer",
        "browse",
        "verify",
        "inspect",
    ):
        assert command in text
