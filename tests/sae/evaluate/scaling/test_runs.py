"""Runs are read from files and from outputs of `sae run`; what is no run is refused by name."""

import json

import pytest

from sae.evaluate.scaling.runs import FinishedRun, read_runs

RECORD = {"d_sae": 53, "rows": 997, "loss": 0.25, "note": "passed over"}


def test_files_of_both_kinds(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([RECORD, {**RECORD, "k": 3, "lr": 0.01}]))
    (tmp_path / "b.jsonl").write_text(json.dumps(RECORD) + "\n\n" + json.dumps(RECORD) + "\n")
    result = read_runs([tmp_path / "a.json", tmp_path / "b.jsonl"])
    plain = FinishedRun(d_sae=53, rows=997, loss=0.25)
    assert result == [plain, FinishedRun(d_sae=53, rows=997, loss=0.25, k=3, lr=0.01), plain, plain]
    assert plain.compute == 53 * 997


def test_an_output_of_a_run_gives_its_dictionaries_without_the_frozen_ones(tmp_path):
    report = {"reconstruction": {name: {"fvu": 0.2} for name in ("topk", "l1", "frozen", "zero")}}
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "report.json").write_text(json.dumps(report))
    for name, activation, frozen, lr in (
        ("topk", {"kind": "topk", "k": 7}, "none", 0.003),
        ("l1", {"kind": "relu"}, "none", "auto"),
        ("frozen", {"kind": "topk", "k": 7}, "decoder", 0.003),
    ):
        (tmp_path / "train" / name).mkdir(parents=True)
        recipe = {
            "d_sae": 53,
            "activation": activation,
            "frozen": frozen,
            "optimizer": {"lr": lr},
        }
        record = {"rows": 997, "recipe": recipe}
        (tmp_path / "train" / name / "provenance.json").write_text(json.dumps(record))
    assert read_runs([tmp_path]) == [
        FinishedRun(d_sae=53, rows=997, loss=0.2, k=7, lr=0.003),
        FinishedRun(d_sae=53, rows=997, loss=0.2),
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"d_sae": 53, "loss": 0.2}, "rows must be given, got none"),
        ({**RECORD, "loss": "low"}, "loss must be a number, got 'low'"),
        ({**RECORD, "loss": -1.0}, "loss must be a positive number, got -1.0"),
        (3, "must hold runs"),
    ],
)
def test_what_is_no_run_is_refused_with_the_file(tmp_path, record, message):
    (tmp_path / "a.json").write_text(json.dumps([record]))
    with pytest.raises(ValueError, match=message) as caught:
        read_runs([tmp_path / "a.json"])
    assert "a.json must hold runs" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_runs([tmp_path / "none.jsonl"])
