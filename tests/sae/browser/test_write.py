"""The browser's folder: every file's fields, values that come back exactly, and what is refused."""

import base64
import json
import math
import re
import subprocess
import sys
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.browser_example import DEAD, example_site
from sae.browser import (
    Dictionary,
    Example,
    Image,
    Latent,
    Map,
    PlaneMap,
    ShownScore,
    Site,
    write_site,
)

NASTY = "</script>'\"\\\u2028\x00\ud800\u202e<!--`${x}"
STATEMENT = re.compile(r"MONOSEMA\.put\((\"[^\"]*\"),'([^']*)'\)\n")


def read(folder: Path, key: str) -> Any:
    """A data file as a browser reads it: a string of JavaScript, then JSON."""
    text = (folder / "data" / f"{key}.js").read_text(encoding="utf-8")
    result = STATEMENT.fullmatch(text)
    assert result is not None, key
    assert json.loads(result[1]) == key
    # Within single quotes only backslashes are escaped, each by another one.
    assert "\\" not in re.sub(r"\\\\", "", result[2])
    return json.loads(result[2].replace("\\\\", "\\"))


def numbers(kind: str, text: str) -> list[Any]:
    return array(kind, base64.b64decode(text)).tolist()


def one(latents: tuple[Latent, ...] = (), d_sae: int = 71, **more: Any) -> Site:
    dictionary = Dictionary("topk", "", d_sae, 1009, d_sae, 0, latents, **more)
    return Site("A title", "", (), (dictionary,))


def test_the_folder_has_the_files_that_the_overview_names(site: Callable[..., Path]) -> None:
    folder = site(n_latents=131).parent
    index = read(folder, "index")
    assert index["format"] == 3
    assert [(d["id"], d["d_sae"], d["parts"]) for d in index["dictionaries"]] == [
        ("d0", 131, [0, 1, 2]),
        ("d1", 32, [0]),
        ("d2", 29, [0]),
    ]
    for dictionary in index["dictionaries"]:
        assert (dictionary["size"], dictionary["n_tables"]) == (64, 1)
        for part in dictionary["parts"]:
            assert read(folder, f"{dictionary['id']}/latents/{part}")["first"] == 64 * part
        points = read(folder, f"{dictionary['id']}/map")
        named = [layout["name"] for layout in dictionary["map"]["layouts"]]
        assert named == ["t-SNE", "PCA"]
        for layout in points["layouts"]:
            assert len(numbers("f", layout["x"])) == dictionary["d_sae"]
            assert len(numbers("f", layout["y"])) == dictionary["d_sae"]
        assert len(numbers("i", points["cluster"])) == dictionary["d_sae"]
    assert read(folder, "server") is None
    pictures = sorted(path.name for path in (folder / "data" / "images").iterdir())
    assert len(pictures) == 13
    assert (folder / "data" / "images" / "7.jpg").read_bytes()[:2] == b"\xff\xd8"


def test_the_table_says_what_the_latents_say(site: Callable[..., Path]) -> None:
    folder = site(n_latents=131).parent
    table, search = read(folder, "d0/table/0"), read(folder, "d0/search/0")
    ids = [column["id"] for column in read(folder, "index")["dictionaries"][0]["columns"]]
    assert ids == ["density", "max_activation", "auc", "detection", "n_fired"]
    columns = dict(zip(ids, (numbers("f", c) for c in table["columns"]), strict=True))
    status = numbers("B", table["status"])
    lines = search["text"].split("\n")
    assert lines.pop() == ""
    assert len(lines) == len(status) == table["n"] == 131
    for latent in read(folder, "d0/latents/1")["latents"]:
        at = latent["latent"]
        assert 64 <= at < 128
        assert columns["density"][at] == pytest.approx(latent["density"], rel=1e-4)
        assert columns["max_activation"][at] == pytest.approx(latent["max_activation"], rel=1e-4)
        assert table["labels"][at] == latent["label"]
        assert latent["label"].lower() in lines[at]
        expected = ["dead", "insufficient", "scored", "live"].index(latent["status"]) + 1
        assert status[at] == expected
        assert math.isnan(columns["auc"][at]) == (latent["status"] != "scored")


def test_values_come_back_exactly(tmp_path: Path) -> None:
    picture = Image(3, NASTY, (2, 3), 40, 30)
    examples = (
        Example((NASTY, " b", NASTY), (0.0, 8.0, 0.015625), 1, "here"),
        Example((), (0.0, 0.0, 3.0, 0.0, 0.0, 0.5), 2, "", picture),
    )
    latent = Latent(
        66, "scored", 0.25, 8.0, 257, NASTY, "word",
        scores=(ShownScore("AUC", 0.75, 0.5, 1.0, 0.5, 40), ShownScore("AUC", None, note=NASTY)),
        promoted=((NASTY, 1.5),), suppressed=((" b", None),), examples=examples,
        nearest=((3, 0.5),), cofiring=((5, 0.125, 7),), command="sae steer x",
    )  # fmt: skip
    folder = write_site(one((latent,)), tmp_path / "out").parent
    assert read(folder, "index")["dictionaries"][0]["parts"] == [1]
    assert not (folder / "data" / "d0" / "latents" / "0.js").exists()
    result = read(folder, "d0/latents/1")
    strings, known = result["strings"], result["latents"]
    assert [entry is None for entry in known] == [True, True, False] + [True] * 61
    shown = known[2]
    assert shown["label"] == NASTY
    text, image = shown["examples"]
    assert [strings[i] for i in text["tokens"]] == [NASTY, " b", NASTY]
    assert text["fires"] == [1, 8.0, 2, 0.015625]
    assert (text["peak"], text["fifth"], text["image"]) == (1, 4, None)
    assert image["fires"] == [2, 3.0, 5, 0.5]
    assert image["fifth"] == 1  # 3 of 8 lies in the second fifth
    assert image["image"] | {"name": strings[image["image"]["name"]]} == {
        "id": 3, "name": NASTY, "grid": [2, 3], "width": 40, "height": 30,
    }  # fmt: skip
    assert [(strings[i], logit) for i, logit in shown["promoted"]] == [(NASTY, 1.5)]
    assert shown["scores"][0] == {
        "name": "AUC", "value": 0.75, "low": 0.5, "high": 1.0, "floor": 0.5, "n": 40,
        "control": "", "note": "",
    }  # fmt: skip
    assert (shown["nearest"], shown["cofiring"]) == ([[3, 0.5]], [[5, 0.125, 7]])
    status = numbers("B", read(folder, "d0/table/0")["status"])
    assert [i for i, code in enumerate(status) if code] == [66]


def test_parts_that_a_run_does_not_have_are_absent(tmp_path: Path) -> None:
    folder = write_site(one((Latent(2, "live", 0.5, 1.0),)), tmp_path / "out").parent
    index = read(folder, "index")
    assert index["results"] is None
    assert index["curves"] == index["steering"] == index["comparisons"] == []
    [dictionary] = index["dictionaries"]
    absent = ("map", "completeness", "density_histogram", "n_dense")
    assert [dictionary[field] for field in absent] == [None] * 4
    assert not (folder / "data" / "d0" / "map.js").exists()
    assert not (folder / "data" / "images").exists()


def test_tables_end_where_the_next_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.browser.write.LATENTS_PER_TABLE", 64)
    latents = tuple(Latent(i, "live", 0.5, 1.0, label=f"L{i}") for i in (0, 63, 64, 200))
    folder = write_site(one(latents, d_sae=211), tmp_path / "out").parent
    tables = [read(folder, f"d0/table/{i}") for i in range(4)]
    assert [(t["first"], t["n"]) for t in tables] == [(0, 64), (64, 64), (128, 64), (192, 19)]
    labels = [label for t in tables for label in t["labels"]]
    assert {i: label for i, label in enumerate(labels) if label} == {
        i: f"L{i}" for i in (0, 63, 64, 200)
    }
    assert read(folder, "index")["dictionaries"][0]["n_tables"] == 4


def test_a_data_file_is_one_statement_to_a_browser_too(tmp_path: Path) -> None:
    folder = write_site(example_site(71, NASTY), tmp_path / "out").parent
    for path in (folder / "data").rglob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") == 1
        assert not re.search("[<>&\u2028\u2029\u202e\x00]", text)


def test_a_folder_of_an_earlier_browser_is_replaced(site: Callable[..., Path]) -> None:
    index = site(n_latents=131)
    (index.parent / "done.json").write_text("{}")
    assert site(n_latents=61) == index
    assert not (index.parent / "data" / "d0" / "latents" / "1.js").exists()
    assert [path.name for path in index.parent.parent.iterdir()] == ["site"]


def test_other_peoples_files_stay(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match=r"new or one of an earlier browser, got thesis\.tex"):
        write_site(one(), tmp_path)
    with pytest.raises(ValueError, match=r"got thesis\.tex"):
        write_site(one(), tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "all of it"


def test_a_failed_write_leaves_what_was_there(site: Callable[..., Path]) -> None:
    index = site(n_latents=131)
    before = (index.parent / "data" / "index.js").read_bytes()
    bad = one((Latent(5, "live", 0.5, 1.0), Latent(5, "live", 0.5, 1.0)))
    with pytest.raises(ValueError, match=r"numbers must ascend and be below d_sae=71, got 5"):
        write_site(bad, index.parent)
    assert (index.parent / "data" / "index.js").read_bytes() == before
    assert [path.name for path in index.parent.parent.iterdir()] == ["site"]


def test_the_example_has_dead_latents(site: Callable[..., Path]) -> None:
    status = numbers("B", read(site(n_latents=131).parent, "d0/table/0")["status"])
    assert [i for i, code in enumerate(status) if code == 1] == list(range(5, 131, DEAD))


def _example(**changes: Any) -> Example:
    return replace(Example(("a", "b"), (1.0, 0.0), 0, ""), **changes)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: _example(activations=(1.0,)), "activations must have one value per token"),
        (lambda: _example(activations=(1.0, math.nan)), "activations must be finite"),
        (lambda: _example(activations=(1.0, -1.0)), "at least 0, got -1.0"),
        (lambda: _example(peak=2), "peak must be the index of one of the 2 tokens, got 2"),
        (lambda: Image(0, "", (0, 2), 3, 3), "must be above 0"),
        (lambda: _example(image=Image(0, "", (1, 2), 3, 3)), "tokens must be empty"),
        (lambda: Latent(-1, "live", 0.5, 1.0), "number must be at least 0"),
        (lambda: Latent(0, "live", 1.5, 1.0), "density must lie between 0 and 1"),
        (lambda: ShownScore("AUC", math.nan), "be finite, got nan"),
        (lambda: ShownScore("AUC", 0.5, 0.75, 0.25), "low must be at most high=0.25"),
        (
            lambda: one(map=Map((PlaneMap("PCA", (0.0,), (0.0,)),))),
            "map must have one value per latent",
        ),
        (lambda: Dictionary("a", "", 5, 7, 2, 2, ()), "add up to d_sae=5"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_a_picture_must_be_a_jpeg(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="picture 3 must be a JPEG"):
        write_site(replace(one(), pictures=((3, b"\x89PNG"),)), tmp_path / "out")


def test_no_script_of_the_browser_makes_markup_of_texts() -> None:
    folder = Path(__file__).parents[3] / "sae" / "browser"
    for path in folder.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        for bad in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert bad not in text, (path.name, bad)


def test_the_example_is_written_by_its_module(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "benchmarks.browser_example", str(tmp_path / "out")]
    subprocess.run([*command, "--latents", "61"], cwd=root, check=True, timeout=60)
    assert read(tmp_path / "out", "index")["title"] == "An example"
