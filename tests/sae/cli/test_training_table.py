"""What `sae train` shows: a line per dictionary while it runs, one table at the end."""

import io

import pytest
from rich.console import Console

from sae.cli import console
from sae.cli.training import show_training, training_row


def test_a_row_has_means_of_the_last_batches_and_the_time_of_its_own_steps():
    curve = {
        "rows": (100.0, 200.0, 300.0),
        "fvu": (0.9, 0.4, 0.2),
        "l0": (9.0, 4.0, 3.0),
        "dead": (0.0, 0.1, 0.2),
        "rows_per_second": (100.0, 50.0, 100.0),
    }
    assert training_row("a", curve, 2) == ("a", "0.300", "3.5", "15.0%", "75", "4.0 s")
    assert training_row("a", {"rows": (100.0,), "fvu": (0.5,)}, 1)[-2:] == ("-", "-")


def test_the_table_names_every_dictionary_and_the_picture(tmp_path, capsys):
    logs = tmp_path / "logs" / "csv" / "from-step-00000000"
    logs.mkdir(parents=True)
    text = "a/fvu,a/l0,a/dead,b/fvu,b/l0,b/dead,rows,step\n0.5,3,0,0.25,4,0.5,20,2\n"
    (logs / "metrics.csv").write_text(text)
    (tmp_path / "curves.png").write_bytes(b"")
    show_training(tmp_path, "Title")
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line[:2] in {" a", " b"}]
    assert rows == [
        ["a", "0.500", "3.0", "0.0%", "-", "-"],
        ["b", "0.250", "4.0", "50.0%", "-", "-"],
    ]
    assert f"curves: {tmp_path / 'curves.png'}" in said


@pytest.mark.parametrize("terminal", [True, False])
def test_each_dictionary_has_its_line_below_the_bar(monkeypatch, terminal):
    out = Console(file=io.StringIO(), force_terminal=terminal, width=100, height=20)
    monkeypatch.setattr(console, "OUT", out)
    monkeypatch.setattr(console, "SECONDS_PER_LINE", 0.0)
    with console.step("train") as report:
        report(1, 4, "rows")
        report(2, 4, "rows\na: FVU 0.500\nb: FVU 0.250")
        if terminal:
            shown = Console(width=100, height=20, file=io.StringIO())
            shown.print(report.progress.get_renderable())
            text = shown.file.getvalue()
        else:
            text = out.file.getvalue()
    lines = [line.strip() for line in text.splitlines()]
    assert lines[-2:] == ["a: FVU 0.500", "b: FVU 0.250"]
    assert "2/4 rows" in lines[-3] if terminal else "2 of 4 rows" in lines[-3]
