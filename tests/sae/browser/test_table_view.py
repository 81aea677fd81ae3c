"""The table of latents in a real browser: search, order, filters, rows on demand."""

import json
from pathlib import Path
from typing import Any

import pytest

NUMBERS = "[...document.querySelectorAll('tbody .id')].map(a => Number(a.textContent.slice(1)))"
LABELS = "[...document.querySelectorAll('tbody .name a')].map(a => a.textContent)"


def test_search_finds_labels_words_tokens_and_numbers(reader: Any, example: Path) -> None:
    reader.load(example, "#d0/table")
    everything = reader.run(LABELS)
    reader.press("/")
    assert reader.run("document.activeElement.id") == "search"
    reader.write("RIVER")
    reader.run("router.dictionaries.get('d0').searchable()")
    reader.frames()
    result = reader.run(LABELS)
    assert result
    assert len(result) < len(everything)
    texts = reader.run("router.dictionaries.get('d0').lines.text").split("\n")
    expected = {i for i, line in enumerate(texts) if "river" in line}
    assert set(reader.run(NUMBERS)) <= expected
    assert reader.run("document.querySelector('.count').textContent").startswith(
        f"{len(expected)} of "
    )
    for query, first in (("#113", 113), ("7", 7)):
        reader.run("document.getElementById('search').value = ''")
        reader.write(query)
        assert reader.run(NUMBERS)[0] == first
    reader.press("Escape")
    assert reader.run(LABELS) == everything
    assert reader.complaints() == []


def test_two_words_must_both_stand_in_a_latents_text(reader: Any, example: Path) -> None:
    reader.load(example, "#d0/table?q=winter%20paris")
    reader.run("router.dictionaries.get('d0').searchable()")
    reader.frames()
    lines = reader.run("router.dictionaries.get('d0').lines.text").split("\n")
    expected = {i for i, line in enumerate(lines) if "winter" in line and "paris" in line}
    assert 0 < len(expected) < 60
    reader.frames()
    assert set(reader.run(NUMBERS)) == expected


@pytest.mark.parametrize("column", ["density", "largest", "AUC", "latent"])
def test_a_heading_sorts_and_sorts_back(column: str, reader: Any, example: Path) -> None:
    reader.load(example, "#d0/table?q=e")
    click = (
        "[...document.querySelectorAll('thead button')]"
        f".find(b => b.textContent.startsWith({json.dumps(column)})).click()"
    )
    ids = {"density": "density", "largest": "max_activation", "AUC": "auc"}
    read = f"""(() => {{
      const d = router.dictionaries.get('d0');
      const id = {json.dumps(ids.get(column))};
      return {NUMBERS}.map(n => id ? d.value(id, n) : n).filter(v => !Number.isNaN(v));
    }})()"""
    orders = []
    for _ in range(2):
        reader.run(click)
        reader.frames()
        values = reader.run(read)
        state = reader.run("document.querySelector('th[aria-sort]').ariaSort")
        assert values == sorted(values, reverse=state == "descending")
        orders.append(state)
    assert set(orders) == {"ascending", "descending"}


def test_filters_stand_in_the_address_and_hold(reader: Any, example: Path) -> None:
    reader.load(example, "#d0/table")
    reader.run(
        "document.querySelector('.filters select').value = 'scored';"
        "document.querySelector('.filters select').dispatchEvent(new Event('change'));"
        "document.querySelector('details').open = true;"
        "document.querySelector('.bounds input').focus()"
    )
    reader.write("5")  # density, in percent, at least
    reader.run("new Promise(done => setTimeout(done, 300))")
    address = reader.run("location.hash")
    assert address == "#d0/table?status=scored&in.density=0.05.."
    numbers = reader.run(NUMBERS)
    passing = (
        "Array.from(router.dictionaries.get('d0').status.keys()).filter(n => "
        "router.dictionaries.get('d0').status[n] === 3 && "
        "router.dictionaries.get('d0').value('density', n) >= 0.05).length"
    )
    assert reader.run("document.querySelector('.count').textContent").startswith(
        f"{reader.run(passing)} of 251"
    )
    reader.load(example, address)
    assert reader.run(NUMBERS) == numbers
    assert reader.run("document.querySelector('.bounds input').value") == "5"


def test_few_rows_are_in_the_page_and_scrolling_brings_the_others(
    reader: Any, example: Path
) -> None:
    reader.size(1024, 500)
    reader.load(example, "#d0/table?sort=latent")
    rows = "document.querySelectorAll('tbody tr[aria-rowindex]').length"
    assert reader.run(rows) < 60
    reader.run("scrollTo(0, document.documentElement.scrollHeight)")
    reader.frames()
    assert reader.run(NUMBERS)[-1] == 250
    assert reader.run(rows) < 60
    assert reader.run("document.querySelector('table').getAttribute('aria-rowcount')") == "252"
