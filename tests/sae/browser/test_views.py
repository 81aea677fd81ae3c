"""The views in a real browser: they load, they are read with mouse and keyboard, they fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.sae.browser.views import VIEWS

ALL = VIEWS | {"#nothing": "Nothing is here"}
NUMBERS = "[...document.querySelectorAll('tbody .id')].map(a => Number(a.textContent.slice(1)))"
H1 = "document.querySelector('h1').textContent"


# ---- loading


@pytest.mark.parametrize(("address", "title"), ALL.items())
def test_every_view_loads_from_its_folder_alone(
    address: str, title: str, reader: Any, example: Path
) -> None:
    reader.load(example, address)
    assert reader.run(H1) == title
    assert reader.run("document.title").endswith("An example")
    assert reader.complaints() == []
    sent = [e["params"] for e in reader.events if e.get("method") == "Network.requestWillBeSent"]
    folder = example.parent.as_uri() + "/"
    assert {
        s["request"]["url"] for s in sent if not s["request"]["url"].startswith(folder)
    } == set()


@pytest.mark.parametrize(
    "address", ["#d0/latent/251", "#d0/latent/x", "#d9/table", "#%E0%A4%A", "#c7"]
)
def test_an_address_of_nothing_says_so(address: str, reader: Any, example: Path) -> None:
    reader.load(example, address)
    assert reader.run(H1) == "Nothing is here"
    assert reader.complaints() == []


def test_a_missing_file_is_named(reader: Any, example: Path, tmp_path: Path) -> None:
    page = shutil.copytree(example.parent, tmp_path / "site") / "index.html"
    (page.parent / "data/d0/latents/0.js").unlink()
    reader.load(page, "#d0/latent/12")
    assert reader.run(H1) == "This cannot be shown"
    assert "data/d0/latents/0.js could not be read" in reader.run("document.body.textContent")


# ---- going about


def test_back_returns_to_the_place_and_the_filters(reader: Any, example: Path) -> None:
    reader.size(1024, 500)
    reader.load(example, "#d0/table?q=e")
    reader.run("scrollTo(0, 900)")
    reader.frames()
    target = reader.run("document.querySelectorAll('tbody .name a')[14].hash")
    reader.run("document.querySelectorAll('tbody .name a')[14].click()")
    reader.settle(target)
    assert reader.run("scrollY") == 0
    reader.run("history.back()")
    reader.settle("#d0/table?q=e")
    assert reader.run("scrollY") == 900
    assert reader.run("document.getElementById('search').value") == "e"
    reader.run("history.forward()")
    reader.settle(target)
    assert reader.complaints() == []


def test_the_arrows_go_through_what_was_found(reader: Any, example: Path) -> None:
    reader.load(example, "#d0/table?q=river")
    reader.run("router.dictionaries.get('d0').searchable()")
    reader.frames()
    numbers = reader.run(NUMBERS)[:3]
    reader.press("/")
    reader.press("Enter")
    reader.settle(f"#d0/latent/{numbers[0]}")
    reader.press("ArrowRight")
    reader.settle(f"#d0/latent/{numbers[1]}")
    assert reader.run("document.querySelector('.place').textContent").startswith("2 of ")
    reader.press("ArrowRight")
    reader.settle(f"#d0/latent/{numbers[2]}")
    reader.press("ArrowLeft")
    reader.settle(f"#d0/latent/{numbers[1]}")
    assert reader.run("document.activeElement.tagName") == "H1"
    reader.press("Escape")
    reader.settle("#d0/table?q=river")


def test_the_arrows_move_through_the_table_and_enter_opens(reader: Any, example: Path) -> None:
    reader.load(example, "#d0/table")
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
    reader.settle(f"#d0/latent/{last}")


def test_help_and_overview_have_keys_and_fields_keep_theirs(reader: Any, example: Path) -> None:
    reader.load(example, "#d0/table")
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
    reader.settle("#overview")
    reader.press("/")
    reader.settle("#d0/table")
    assert reader.run("document.activeElement.id") == "search"


# ---- the overview's map and the latents


def test_the_map_names_a_point_and_opens_it(reader: Any, example: Path) -> None:
    reader.load(example, "#overview")
    reader.run("document.querySelector('canvas.map').scrollIntoView({block: 'center'})")
    reader.run("document.querySelector('canvas.map').focus()")
    reader.press("ArrowRight")
    assert reader.run("tip.hidden") is False
    latent = int(reader.run("tip.textContent").split("#")[1].split("density")[0])
    assert reader.run("tip.textContent").startswith(
        reader.run(f"router.dictionaries.get('d0').label({latent}) || '(no label)'")
    )
    reader.press("Enter")
    reader.settle(f"#d0/latent/{latent}")


def test_the_map_is_coloured_by_what_the_reader_chooses(reader: Any, example: Path) -> None:
    reader.load(example, "#overview")
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


def test_the_map_opens_with_the_first_layout_and_draws_the_chosen_one(
    reader: Any, example: Path
) -> None:
    reader.load(example, "#overview")
    picture = "document.querySelector('canvas.map').toDataURL()"
    select = "document.querySelectorAll('.map-tools select')[0]"
    assert reader.run(f"{select}.selectedOptions[0].textContent") == "t-SNE"
    first = reader.run(picture)
    reader.run(f"{select}.value = '1'; {select}.dispatchEvent(new Event('change'))")
    reader.frames()
    assert reader.run(f"{select}.selectedOptions[0].textContent") == "PCA"
    assert reader.run(picture) != first


WRITTEN = """(async () => {
  const map = new LatentMap(await readMap(router.dictionaries.get('d0')));
  document.querySelector('.map-frame').replaceChildren(map.node);
  const paint = CanvasRenderingContext2D.prototype, fill = paint.fillText, written = [];
  paint.fillText = (text, x, y) => written.push([text, x, y]);
  try { map.draw(); } finally { paint.fillText = fill; }
  const [[left, right], [low, high]] = map.extent, [across, down] = map.span();
  return { written, ratio: across / (right - left) / (down / (high - low)) };
})()"""


def test_labels_stand_apart_and_both_axes_have_one_scale(reader: Any, example: Path) -> None:
    reader.load(example, "#overview")
    map_ = reader.run(WRITTEN)
    assert map_["ratio"] == pytest.approx(1)
    places = [(x, y) for _, x, y in map_["written"]]
    assert 5 <= len(places) <= 40
    assert all(
        abs(y - v) >= 16 or abs(x - u) > 5 for i, (x, y) in enumerate(places) for u, v in places[:i]
    )


def test_a_tokens_value_is_told_by_focus_hover_and_figures(reader: Any, example: Path) -> None:
    reader.load(example, "#d0/latent/12")
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
    reader.load(example, "#d0/latent/12")
    reader.run("document.querySelector('.copy').click()")
    reader.run("new Promise(done => setTimeout(done, 100))")
    said = reader.run("document.getElementById('said').textContent")
    assert said.startswith("The command is ")
    assert reader.run("document.querySelector('.command code').textContent").startswith("sae steer")


def test_a_pictures_patches_are_read_by_keyboard(reader: Any, example: Path) -> None:
    reader.load(example, "#d2/latent/12")
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
    reader.load(example, "#c0")
    both = reader.run(H1)
    reader.run("document.querySelector('.compare-view .meta a').click()")
    reader.settle("#c0?of=b")
    assert reader.run(H1) == "topk (small) beside topk" != both
    choose = (
        "(() => { const s = document.querySelector('.filters select'); s.value = 'splits';"
        " s.dispatchEvent(new Event('change')); })()"
    )
    reader.run(choose)
    reader.frames()
    splits = reader.run(NUMBERS)
    assert splits
    address = f"#c0/pair/{splits[0]}?of=b"
    reader.run(f"goTo({json.dumps(address)})")
    reader.settle(address)
    cards = "document.querySelectorAll('.sides > section:last-child .card').length"
    assert reader.run(cards) >= 2
    assert reader.complaints() == []
