"""Every family against its own outputs: a few of them at once, all in the long form."""

import pytest

from tests.families import FAMILIES, SHORT, row_of


def line_of(family, repository):
    page = (repository / "docs" / "models.md").read_text()
    return next(line for line in page.splitlines() if line.startswith(f"| {family} |"))


@pytest.mark.parametrize("family", SHORT)
def test_what_is_said_of_a_family_holds(family, repository):
    assert line_of(family, repository) == f"| {' | '.join(row_of(family))} |"


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(SHORT)))
def test_what_is_said_of_every_family_holds(family, repository):
    assert line_of(family, repository) == f"| {' | '.join(row_of(family))} |"


def test_the_table_has_all_families(repository):
    assert len(FAMILIES) >= 35
    assert all(line_of(family, repository) for family in FAMILIES)
