"""Every family against its own outputs: a few of them at once, all in the long form."""

import pytest

from tests.families import FAMILIES, SHORT, row_of
from tests.variants import SHORT_TOWERS, SHORT_VARIANTS, TOWERS, VARIANTS, Outer, tower_row_of


def line_of(family, repository):
    page = (repository / "docs" / "models.md").read_text()
    return next(line for line in page.splitlines() if line.startswith(f"| {family} |"))


def assert_row(row, repository):
    assert line_of(row.family, repository) == f"| {' | '.join(row)} |"


@pytest.mark.parametrize("family", SHORT)
def test_what_is_said_of_a_family_holds(family, repository):
    assert_row(row_of(family), repository)


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(SHORT)))
def test_what_is_said_of_every_family_holds(family, repository):
    assert_row(row_of(family), repository)


@pytest.mark.parametrize("name", SHORT_VARIANTS)
def test_what_is_said_of_a_model_in_another_form_holds(name, repository):
    assert_row(row_of(name, VARIANTS[name]()), repository)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(VARIANTS) - set(SHORT_VARIANTS)))
def test_what_is_said_of_every_form_holds(name, repository):
    assert_row(row_of(name, VARIANTS[name]()), repository)


@pytest.mark.long
def test_what_has_the_shape_of_peft_does_as_peft(repository):
    """PEFT need not be installed: then the row above is that of this class too."""
    model = Outer(VARIANTS["Llama in 8 bits"]()).eval()
    assert_row(row_of("Llama in PEFT", model), repository)


@pytest.mark.parametrize("family", SHORT_TOWERS)
def test_what_is_said_of_a_tower_holds(family, repository):
    assert_row(tower_row_of(family), repository)


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(set(TOWERS) - set(SHORT_TOWERS)))
def test_what_is_said_of_every_tower_holds(family, repository):
    assert_row(tower_row_of(family), repository)


def test_the_tables_have_all_families(repository):
    assert len(FAMILIES) >= 35
    assert all(line_of(family, repository) for family in (*FAMILIES, *VARIANTS, *TOWERS))
