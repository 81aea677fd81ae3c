"""Figures that tests measure: shown at the end of a run, and written into a page of the docs.

A test takes the fixture `figure` and says `figure("R1", "200 kills: 0 rows lost")`. With
`--record PAGE` the table of that page which begins with `<!-- figures -->` is made from them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

END = "<!-- end -->"


def put_table(page: Path, name: str, lines: Sequence[str]) -> None:
    """Replace what stands in a page between `<!-- name -->` and the next `<!-- end -->`.

    Raises:
        ValueError: If the page has no such place.
    """
    text, mark = page.read_text(), f"<!-- {name} -->"
    before, result, rest = text.partition(mark)
    _, has_end, after = rest.partition(END)
    if not (result and has_end):
        raise ValueError(f"{page} must have {mark} and then {END}, got none")
    page.write_text("\n".join([f"{before}{mark}", *lines, f"{END}{after}"]))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that records."""
    parser.addoption("--record", type=Path, help="write the figures of the tests into this page")


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str, str], None]:
    """Say what was measured, under an ID of docs/reliability.md."""

    def measured(name: str, text: str) -> None:
        record_property("figure", (name, text))

    return measured


def figures_of(reports: Sequence[pytest.TestReport]) -> list[tuple[str, str, str, float]]:
    """ID, figure, test and seconds, in the order of the IDs."""
    results = []
    for report in reports:
        for name, value in report.user_properties:
            if name == "figure" and report.when == "call":
                assert isinstance(value, tuple | list)
                results.append((*value, report.nodeid.partition("[")[0], report.duration))
    return sorted(results, key=lambda f: (f[0][0], int("".join(filter(str.isdigit, f[0])) or 0), f))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Show the figures of the tests that passed, and record them where that is asked for."""
    result = figures_of(terminalreporter.stats.get("passed", []))
    if not result:
        return
    terminalreporter.section("figures")
    for name, text, test, seconds in result:
        terminalreporter.line(f"{name:4} {text}  ({test}, {seconds:.0f} s)")
    if config.option.record:
        lines = ["| ID | measured | test | s |", "|---|---|---|---|"]
        for name, text, test, seconds in result:
            shown = test.removeprefix("tests/").replace("::", "` `")
            lines.append(f"| {name} | {text} | `{shown}` | {seconds:.0f} |")
        put_table(config.option.record, "figures", lines)
