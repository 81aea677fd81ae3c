"""What a step shows while it runs: a line per dictionary below the bar."""

import io

import pytest
from rich.console import Console

from sae.cli import console


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
