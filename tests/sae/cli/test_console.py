"""What the command shows while a step runs."""

import io
import logging
import os
import re
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import typer
from rich.console import Console

from sae.cli import console, main, troubles
from sae.cli.console import Eta


def eta_after(reports: list[tuple[float, int]]) -> Eta:
    eta = Eta()
    for now, done in reports:
        eta.update(done, now)
    return eta


def test_an_even_pace_gives_the_time_that_is_left():
    eta = eta_after([(float(2 * done), done) for done in range(11)])
    assert eta.seconds(40) == pytest.approx(60)
    assert eta.seconds(10) == 0


def test_a_slow_start_does_not_make_a_minute_an_hour():
    slow = [(0.0, 0), (20.0, 1)]
    eta = eta_after([*slow, *[(20 + 0.5 * done, done) for done in range(2, 30)]])
    assert eta.seconds(130) == pytest.approx(50, rel=0.05)


def test_nothing_is_said_from_a_report_or_two_nor_in_the_first_seconds():
    assert eta_after([]).seconds(9) is None
    assert eta_after([(0.0, 1), (60.0, 2), (61.0, 3)]).seconds(1000) is None
    assert eta_after([(0.1 * done, done) for done in range(20)]).seconds(1000) is None
    assert eta_after([(float(now), 3) for now in range(9)]).seconds(1000) is None


def console_into(
    monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool = False
) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    out = Console(file=file, force_terminal=is_terminal, width=100, height=20, no_color=True)
    monkeypatch.setattr(console, "OUT", out)
    return out, file


@pytest.mark.parametrize("terminal", [True, False])
def test_a_step_says_which_of_how_many_it_is(monkeypatch, terminal):
    out, file = console_into(monkeypatch, is_terminal=terminal)
    monkeypatch.setattr(console, "SECONDS_PER_LINE", 0.0)
    with console.step("train", (2, 6)) as report:
        report(1, 4, "rows")
        if terminal:
            out.print(report.progress.get_renderable())  # pyright: ignore[reportFunctionMemberAccess]
        assert "2/6 train" in file.getvalue()
        assert "left" not in file.getvalue()
    console.skipped("cache", "runs/demo/cache", (1, 6))
    assert "1/6 cache" in re.sub(r"\x1b\[[\d;]*m", "", file.getvalue())


def test_a_log_line_has_the_eta_of_its_own_unit(monkeypatch):
    _, file = console_into(monkeypatch)
    clock = iter([0.0, 0.0, *map(float, range(0, 60, 3)), 100.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.step("explain") as report:
        for done in range(5):
            report(done, 100, "rows")
        for done in range(15):
            report(done, 20, "latents")
    lines = file.getvalue().splitlines()
    assert "  explain: 4 of 100 rows, 288 s left" in lines
    assert lines[-2] == "  explain: 11 of 20 latents, 27 s left"


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(given, expected):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    program = (
        "import os, sys, sae.cli; assert 'torch' not in sys.modules; "
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == expected


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


def test_what_the_cache_says_of_its_rows_is_one_line_of_stderr(capsys):
    log = logging.getLogger("activations_cache.summary")
    with console.showing_logs():
        log.info("the largest 0.1 %% of the rows hold %.1f %% [/x]", 1.5)
    log.info("not shown after the command")
    assert capsys.readouterr() == ("", "the largest 0.1 % of the rows hold 1.5 % [/x]\n")


def commands() -> list[tuple[str, ...]]:
    """Every command by its words."""
    results = []

    def walk(command: Any, words: tuple[str, ...]) -> None:
        results.append(words)
        for name, part in getattr(command, "commands", {}).items():
            walk(part, (*words, name))

    walk(typer.main.get_command(main.app), ())
    return results


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_shows_its_help(words, monkeypatch, capsys):
    """A text of a help is no markup: a bracket in it once ended the command."""
    monkeypatch.setattr(sys, "argv", ["sae", *words, "--help"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert " ".join((*words, "[OPTIONS]")) in shown
    lines = [line.rstrip() for line in shown.partition("╭")[0].splitlines()]
    for one, following in pairwise(lines[lines.index("", 1) :]):  # what follows the usage
        if one and following:  # the next word does not fit into the line
            assert len(one) + 1 + len(following.split()[0]) > 79, one
    assert "--help" in shown
    # Prose speaks of prompts, not of the class that shows them: a renaming once went through it.
    assert not re.search(r"\b(PromptView|[A-Z]\w+(Request|Config|Result|Table|Record))\b", shown)


def test_who_has_read_enough_of_a_help_hears_of_no_error():
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-c", "from sae.cli.main import main; main()", "find", "--help"],
        stdout=writes,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (troubles.FAILED, b"")


def test_every_command_takes_json_but_the_benchmarks_which_write_their_own():
    def commands(group, path=()):
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from commands(command, (*path, name))
            else:
                yield " ".join((*path, name)), command

    without = {
        name
        for name, command in commands(typer.main.get_command(main.app))
        if not any(p.opts == ["--json"] and p.is_flag for p in command.params)
    }
    assert without == {"bench"}
