"""The views in a real browser: they load, they are read with mouse and keyboard, they fit."""

import json
from pathlib import Path
from typing import Any

import pytest

VIEWS = {
    "#overview": "An example",
    "#d0/table": "Latents of topk",
    "#d0/latent/12": "forest, window",
    "#d2/latent/12": "forest, window",
    "#d2/pictures": "Pictures of pictures",
    "#c0": "topk beside topk (small)",
    "#c0/pair/12": "forest, window",
    "#nothing": "Nothing is here",
}
BAD = ("Log.entryAdded", "Runtime.exceptionThrown", "Page.javascriptDialogOpening")
LABELS = "[...document.querySelectorAll('tbody .name a')].map(a => a.textContent)"
NUMBERS = "[...document.querySelectorAll('tbody .id')].map(a => Number(a.textContent.slice(1)))"
H1 = "document.querySelector('h1').textContent"


def complaints(reader: Any) -> list[Any]:
    return [event for event in reader.events if event.get("method") in BAD]


def settle(reader: Any, address: str) -> None:
    """Waits until the view of an address stands on the page and all that it reads is there."""
    done = (
        f"router.route?.hash === {json.dumps(address)} && "
        "!document.querySelector('.map-frame > .notice')"
    )
    reader.run(
        "new Promise((yes, no) => { const end = Date.now() + 9000; const look = () => "
        f"{done} ? yes() : Date.now() > end ? no(new Error('not shown')) : setTimeout(look, 5);"
        " look(); })"
    )
    reader.frames()


def show(reader: Any, address: str) -> None:
    """Follows an address in the page that is open."""
    reader.run(f"goTo({json.dumps(address)})")
    settle(reader, address)


def load(reader: Any, page: Path, address: str) -> None:
    """Loads the page at an address."""
    reader.open(page.as_uri() + address)
    settle(reader, address)


def type_text(reader: Any, text: str) -> None:
    reader.call("Input.insertText", text=text)
    reader.frames()


# ---- loading


@pytest.mark.parametrize(("address", "title"), VIEWS.items())
def test_every_view_loads_from_its_folder_alone(
    address: str, title: str, reader: Any, example: Path
) -> None:
    load(reader, example, address)
    assert reader.run(H1) == title
    assert reader.run("document.title").endswith("An example")
    assert complaints(reader) == []
    sent = [e["params"] for e in reader.events if e.get("method") == "Network.requestWillBeSent"]
    folder = example.parent.as_uri() + "/"
    assert {
        s["request"]["url"] for s in sent if not s["request"]["url"].startswith(folder)
    } == set()


@pytest.mark.parametrize(
    "address", ["#d0/latent/251", "#d0/latent/x", "#d9/table", "#%E0%A4%A", "#c7"]
)
def test_an_address_of_nothing_says_so(address: str, reader: Any, example: Path) -> None:
    load(reader, example, address)
    assert reader.run(H1) == "Nothing is here"
    assert complaints(reader) == []


def test_a_missing_file_is_named(reader: Any, site: Any) -> None:
    page = site("broken")
    (page.parent / "data/d0/latents/0.js").unlink()
    load(reader, page, "#d0/latent/12")
    assert reader.run(H1) == "This cannot be shown"
    assert "data/d0/latents/0.js could not be read" in reader.run("document.body.textContent")


# ---- the table


def test_search_finds_labels_words_tokens_and_numbers(reader: Any, example: Path) -> None:
    load(reader, example, "#d0/table")
    everything = reader.run(LABELS)
    reader.press("/")
    assert reader.run("document.activeElement.id") == "search"
    type_text(reader, "RIVER")
    reader.run("router.dictionaries.get('d0').searchable()")
    reader.frames()
    found = reader.run(LABELS)
    assert found
    assert len(found) < len(everything)
    texts = reader.run("router.dictionaries.get('d0').lines.text").split("\n")
    expected = {i for i, line in enumerate(texts) if "river" in line}
    assert set(reader.run(NUMBERS)) <= expected
    assert reader.run("document.querySelector('.count').textContent").startswith(
        f"{len(expected)} of "
    )
    for query, first in (("#113", 113), ("7", 7)):
        reader.run("document.getElementById('search').value = ''")
        type_text(reader, query)
        assert reader.run(NUMBERS)[0] == first
    reader.press("Escape")
    assert reader.run(LABELS) == everything
    assert complaints(reader) == []


def test_two_words_must_both_stand_in_a_latents_text(reader: Any, example: Path) -> None:
    load(reader, example, "#d0/table?q=winter%20paris")
    reader.run("router.dictionaries.get('d0').searchable()")
    reader.frames()
    lines = reader.run("router.dictionaries.get('d0').lines.text").split("\n")
    expected = {i for i, line in enumerate(lines) if "winter" in line and "paris" in line}
    assert 0 < len(expected) < 60
    reader.frames()
    assert set(reader.run(NUMBERS)) == expected


@pytest.mark.parametrize("column", ["density", "max activation", "AUC", "latent"])
def test_a_heading_sorts_and_sorts_back(column: str, reader: Any, example: Path) -> None:
    load(reader, example, "#d0/table?q=e")
    click = (
        "[...document.querySelectorAll('thead button')]"
        f".find(b => b.textContent.startsWith({json.dumps(column)})).click()"
    )
    ids = {"density": "density", "max activation": "max_activation", "AUC": "auc"}
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
    load(reader, example, "#d0/table")
    reader.run(
        "document.querySelector('.filters select').value = 'scored';"
        "document.querySelector('.filters select').dispatchEvent(new Event('change'));"
        "document.querySelector('details').open = true;"
        "document.querySelector('.bounds input').focus()"
    )
    type_text(reader, "5")  # density, in percent, at least
    reader.run("new Promise(done => setTimeout(done, 300))")
    address = reader.run("location.hash")
    assert address == "#d0/table?status=scored&in.density=0.05.."
    kept = reader.run(NUMBERS)
    passing = (
        "Array.from(router.dictionaries.get('d0').status.keys()).filter(n => "
        "router.dictionaries.get('d0').status[n] === 3 && "
        "router.dictionaries.get('d0').value('density', n) >= 0.05).length"
    )
    assert reader.run("document.querySelector('.count').textContent").startswith(
        f"{reader.run(passing)} of 251"
    )
    load(reader, example, address)
    assert reader.run(NUMBERS) == kept
    assert reader.run("document.querySelector('.bounds input').value") == "5"


def test_few_rows_are_in_the_page_and_scrolling_brings_the_others(
    reader: Any, example: Path
) -> None:
    reader.size(1024, 500)
    load(reader, example, "#d0/table?sort=latent")
    rows = "document.querySelectorAll('tbody tr[aria-rowindex]').length"
    assert reader.run(rows) < 60
    reader.run("scrollTo(0, document.documentElement.scrollHeight)")
    reader.frames()
    assert reader.run(NUMBERS)[-1] == 250
    assert reader.run(rows) < 60
    assert reader.run("document.querySelector('table').getAttribute('aria-rowcount')") == "252"


# ---- going about


def test_back_returns_to_the_place_and_the_filters(reader: Any, example: Path) -> None:
    reader.size(1024, 500)
    load(reader, example, "#d0/table?q=e")
    reader.run("scrollTo(0, 900)")
    reader.frames()
    target = reader.run("document.querySelectorAll('tbody .name a')[14].hash")
    reader.run("document.querySelectorAll('tbody .name a')[14].click()")
    settle(reader, target)
    assert reader.run("scrollY") == 0
    reader.run("history.back()")
    settle(reader, "#d0/table?q=e")
    assert reader.run("scrollY") == 900
    assert reader.run("document.getElementById('search').value") == "e"
    reader.run("history.forward()")
    settle(reader, target)
    assert complaints(reader) == []


def test_the_arrows_go_through_what_was_found(reader: Any, example: Path) -> None:
    load(reader, example, "#d0/table?q=river")
    reader.run("router.dictionaries.get('d0').searchable()")
    reader.frames()
    numbers = reader.run(NUMBERS)[:3]
    reader.press("/")
    reader.press("Enter")
    settle(reader, f"#d0/latent/{numbers[0]}")
    reader.press("ArrowRight")
    settle(reader, f"#d0/latent/{numbers[1]}")
    assert reader.run("document.querySelector('.place').textContent").startswith("2 of ")
    reader.press("ArrowRight")
    settle(reader, f"#d0/latent/{numbers[2]}")
    reader.press("ArrowLeft")
    settle(reader, f"#d0/latent/{numbers[1]}")
    assert reader.run("document.activeElement.tagName") == "H1"
    reader.press("Escape")
    settle(reader, "#d0/table?q=river")


def test_the_arrows_move_through_the_table_and_enter_opens(reader: Any, example: Path) -> None:
    load(reader, example, "#d0/table")
    numbers = reader.run(NUMBERS)
    reader.press("ArrowDown")
    here = "Number(document.activeElement.closest('tr').querySelector('.id').textContent.slice(1))"
    assert reader.run(here) == numbers[0]
    for key, place in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("Home", 0)):
        reader.press(key)
        assert reader.run(here) == numbers[place]
    reader.press("End")
    last = reader.run("lastFound.get('d0').rows.at(-1)")
    assert reader.run(here) == last
    reader.run("document.activeElement.click()")
    settle(reader, f"#d0/latent/{last}")


def test_help_and_overview_have_keys_and_fields_keep_theirs(reader: Any, example: Path) -> None:
    load(reader, example, "#d0/table")
    reader.press("?")
    assert reader.run("document.querySelector('dialog').open") is True
    reader.run("document.querySelector('dialog button').click()")
    reader.frames()
    assert reader.run("document.querySelector('dialog')") is None
    reader.press("/")
    reader.press("o")
    assert reader.run("location.hash") == "#d0/table"
    reader.run("document.activeElement.blur()")
    reader.press("o")
    settle(reader, "#overview")


# ---- the overview's map and the latents


def test_the_map_names_a_point_and_opens_it(reader: Any, example: Path) -> None:
    load(reader, example, "#overview")
    reader.run("document.querySelector('canvas.map').scrollIntoView({block: 'center'})")
    reader.run("document.querySelector('canvas.map').focus()")
    reader.press("ArrowRight")
    assert reader.run("tip.hidden") is False
    latent = int(reader.run("tip.textContent").split("#")[1].split("density")[0])
    assert reader.run("tip.textContent").startswith(
        reader.run(f"router.dictionaries.get('d0').label({latent}) || '(no label)'")
    )
    reader.press("Enter")
    settle(reader, f"#d0/latent/{latent}")


def test_the_map_is_coloured_by_what_the_reader_chooses(reader: Any, example: Path) -> None:
    load(reader, example, "#overview")
    picture = "document.querySelector('canvas.map').toDataURL()"
    choose = (
        "(() => {{ const s = document.querySelectorAll('.map-tools select')[1]; s.value = {};"
        " s.dispatchEvent(new Event('change')); }})()"
    )
    seen = []
    for colour in ("cluster", "density", "auc"):
        reader.run(choose.format(json.dumps(colour)))
        reader.frames()
        seen.append(reader.run(picture))
    assert len(set(seen)) == 3


def test_a_tokens_value_is_told_by_focus_hover_and_figures(reader: Any, example: Path) -> None:
    load(reader, example, "#d0/latent/12")
    reader.run("document.querySelector('.contexts .lit[tabindex=\"0\"]').focus()")
    reader.press("ArrowRight")
    reader.press("ArrowLeft")
    assert reader.run("document.activeElement.matches('.peak')") is True
    peak = reader.run("document.querySelector('.contexts .peak-value').textContent")
    assert reader.run("tip.textContent").endswith(f"activation {peak}")
    assert reader.run("document.activeElement.ariaDescription") == f"activation {peak}"
    assert reader.run("location.hash") == "#d0/latent/12"
    thick = "el => parseFloat(getComputedStyle(el).borderBottomWidth)"
    widths = reader.run(f"[...document.querySelectorAll('.contexts .lit')].map({thick})")
    assert set(widths) >= {1, 3}
    reader.run("document.querySelector('.seen .check input').click()")
    after = "getComputedStyle(document.querySelector('.contexts .peak'), '::after').content"
    assert peak in reader.run(after)
    reader.run("document.querySelector('.seen .check input').click()")


def test_the_command_is_copied_or_selected(reader: Any, example: Path) -> None:
    load(reader, example, "#d0/latent/12")
    reader.run("document.querySelector('.copy').click()")
    reader.run("new Promise(done => setTimeout(done, 100))")
    said = reader.run("document.getElementById('said').textContent")
    assert said.startswith("The command is ")
    assert reader.run("document.querySelector('.command code').textContent").startswith("sae steer")


def test_a_pictures_patches_are_read_by_keyboard(reader: Any, example: Path) -> None:
    load(reader, example, "#d2/latent/12")
    reader.run("document.querySelector('.picture').focus()")
    place = "['left', 'top'].map(x => document.querySelector('.patch').style[x])"
    before = reader.run(place)
    moved = set()
    for key in ("ArrowLeft", "ArrowUp", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown"):
        reader.press(key)
        moved.add(tuple(reader.run(place)))
    assert len(moved | {tuple(before)}) >= 3
    assert reader.run("tip.textContent").startswith("activation ")
    assert reader.run("location.hash") == "#d2/latent/12"
    loaded = "document.querySelector('.picture img').decode().then(() => true)"
    assert reader.run(loaded) is True


def test_two_dictionaries_are_read_from_both_sides(reader: Any, example: Path) -> None:
    load(reader, example, "#c0")
    both = reader.run(H1)
    reader.run("document.querySelector('.compare-view .meta a').click()")
    settle(reader, "#c0?of=b")
    assert reader.run(H1) == "topk (small) beside topk" != both
    choose = (
        "(() => { const s = document.querySelector('.filters select'); s.value = 'splits';"
        " s.dispatchEvent(new Event('change')); })()"
    )
    reader.run(choose)
    reader.frames()
    splits = reader.run(NUMBERS)
    assert splits
    show(reader, f"#c0/pair/{splits[0]}?of=b")
    cards = "document.querySelectorAll('.sides > section:last-child .card').length"
    assert reader.run(cards) >= 2
    assert complaints(reader) == []
