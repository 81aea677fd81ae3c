"""The names of public dictionaries, offline: `gemma-scope-2b-pt-res-canonical` with an id.

`releases.json.gz` is made by benchmarks/catalogue.py from the lists that other projects carry; its
first line says which. Each further line is one release, so that a look-up parses one of them.
"""

import difflib
import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from monosema.checks import DictionaryFormatError
from sae.pretrained.hook_names import module_path

DATA = Path(__file__).with_name("releases.json.gz")
SHOWN = 4
"""So many names stand in an error."""
NEURONPEDIA = "https://www.neuronpedia.org/"
_LAYER = re.compile(r"layers?[_=]?(\d+)|l(\d+)")
_WIDTH = re.compile(r"(?:width[_=]?)?(\d+)([km])|width[_=]?(\d+)")
_IN_HOOK = re.compile(r"blocks\.(\d+)\.")


class Entry(NamedTuple):
    """One dictionary of a release."""

    release: str
    """The name of its release."""
    id: str
    """Its name in the release."""
    repo: str
    """Where it is on the hub, `org/name`."""
    path: str
    """Its folder or its file there; empty for the whole repository."""
    format: str
    """The reader; empty where there is none here."""
    model: str
    """The hub's name of the model, or what the list says of it."""
    hook_name: str
    """What it reads, in TransformerLens' words; empty where the list does not say it."""
    hook_name_out: str
    """What it predicts, if that is another place."""
    hook_point: str
    """What it reads, as a module path; empty where no module has it."""
    hook_point_out: str
    """What it predicts, as a module path, if that is another place."""
    width: int
    """Number of latents; 0 where the list does not say it."""
    l0: float
    """Published; 0 where the list does not say it."""
    fvu: float
    """Published; 0 where the list does not say it."""
    neuronpedia: str
    """Address of its page; empty where the list has none."""
    input_scale: float
    """A factor of its rows that its files lack; 0 where the list has none."""
    normalize_activations: str
    """SAELens' word for a norm that its files have wrong; empty where they are right."""
    is_centred: bool
    """Whether its stream has no mean over dimensions, as TransformerLens can load a model."""

    @property
    def name(self) -> str:
        """What `sae.load` takes."""
        return f"{self.release}:{self.id}"

    @property
    def words(self) -> tuple[str, ...]:
        """What a search looks into."""
        return self.name, self.model, self.repo, self.hook_name, self.hook_point, self.format

    @property
    def layer(self) -> int | None:
        """The number of its block; None where the list does not say it."""
        match = _IN_HOOK.match(self.hook_name)
        return int(match[1]) if match else None

    @property
    def site(self) -> dict[str, str]:
        """What the list says of it, for the provenance."""
        texts = {
            "release": self.release,
            "id": self.id,
            "model_name": self.model,
            "hook_name": self.hook_name,
            "hook_name_out": self.hook_name_out,
            "l0": f"{self.l0:g}" if self.l0 else "",
            "fvu": f"{self.fvu:g}" if self.fvu else "",
            "neuronpedia": self.neuronpedia,
        }
        return {key: text for key, text in texts.items() if text}


@cache
def _lines() -> list[bytes]:
    return gzip.decompress(DATA.read_bytes()).splitlines()


@cache
def _head() -> dict[str, Any]:
    return json.loads(_lines()[0])


def sources() -> dict[str, dict[str, str]]:
    """Which lists the catalogue was made from: name -> version, file, licence."""
    return _head()["sources"]


def releases() -> dict[str, int]:
    """The releases, and how many dictionaries each has."""
    return _head()["releases"]


@cache
def release(name: str) -> dict[str, Entry]:
    """The dictionaries of a release by their ids.

    Raises:
        KeyError: If there is no such release.
    """
    line = list(releases()).index(name) if name in releases() else None
    if line is None:
        raise KeyError(name)
    record = json.loads(_lines()[line + 1])
    return {entry.id: entry for entry in (_entry(record, row) for row in record["rows"])}


def _entry(record: Mapping[str, Any], row: list[Any]) -> Entry:
    values = dict(enumerate(row))
    name, path, word = values[0], values.get(1) or values[0], values.get(2) or ""
    repo, family, out = record["repo"], record["family"], record.get("hook_out", "")
    if not repo:  # a repository for each dictionary
        repo, path = path, ""
    block = _IN_HOOK.match(word)
    word_out = f"{block[0]}{out}" if out and block else ""
    # the embeddings that Gemma Scope was trained on lack the factor that the module's output has
    point = "" if word == "hook_embed" else module_path(word, family) or ""
    if block and (place_read := record.get("reads")):
        # the release names a module that is none of TransformerLens' words
        behind = module_path(f"{block[0]}hook_resid_post", family) or ""
        point = behind.replace(":out", f".{place_read}")
    page = values.get(5)
    return Entry(
        release=record["name"],
        id=name,
        repo=repo,
        path=path,
        format=record["format"],
        model=record["model"],
        hook_name=word,
        hook_name_out=word_out,
        hook_point=point,
        hook_point_out=module_path(word_out, family) or "",
        width=values.get(3, 0),
        l0=values.get(4) or 0,
        fvu=values.get(6) or 0,
        neuronpedia=f"{NEURONPEDIA}{page}" if page else "",
        input_scale=values.get(7) or 0,
        normalize_activations=record.get("normalize_activations", ""),
        is_centred=record.get("centred", False),
    )


def every() -> Iterator[Entry]:
    """All dictionaries, release by release."""
    for name in releases():
        yield from release(name).values()


def named(name: str, id: str | None = None) -> Entry | None:
    """Return the dictionary that a release's name and an id stand for.

    Args:
        name: A release, or `RELEASE:ID` as one text.
        id: The id, where the name has none.

    Returns:
        None where there is no such release, so that the name may be something else.

    Raises:
        DictionaryFormatError: If the release has no such id, or needs one.
    """
    whole, _, behind = name.partition(":")
    if whole not in releases():
        return None
    if behind and id is not None:
        raise DictionaryFormatError(f"id must be given once, got {behind!r} in the name and {id!r}")
    entries = release(whole)
    wanted = behind or (None if id is None else str(id))
    if wanted is None and len(entries) == 1:
        return next(iter(entries.values()))
    if wanted in entries:
        return entries[str(wanted)]
    raise DictionaryFormatError(_without(whole, wanted, list(entries)))


def _without(name: str, wanted: str | None, ids: list[str]) -> str:
    near = nearest(wanted or "", ids) or ids[:SHOWN]
    got = f"{wanted!r}" if wanted else "none"
    return (
        f"id must be one of the {len(ids):,} of {name}, got {got}; type for example "
        f"{name}:{near[0]} (near it: {', '.join(near)}), and `sae releases {name}` lists them"
    )


def nearest(text: str, options: Iterable[str]) -> list[str]:
    """The options that are like a text, the likest first."""
    options = list(options)
    inside = [option for option in options if text and text.lower() in option.lower()]
    like = difflib.get_close_matches(text, options, SHOWN, 0.6) if text else []
    return list(dict.fromkeys(like + inside))[:SHOWN]


def suggestions(text: str) -> str:
    """What a text that is no release may have meant, for the end of an error; empty if nothing."""
    name, _, id = text.partition(":")
    if name in releases():
        return ""
    holding = [entry.name for entry in every() if (id or name) == entry.id][: SHOWN + 1]
    if near := nearest(name, releases()):
        return f"; releases of a like name: {', '.join(near)}"
    if not holding:
        return ""
    more = ", ..." if len(holding) > SHOWN else ""
    return f"; releases that have it as an id: {', '.join(holding[:SHOWN])}{more}"


def point_of(word: str, model: str) -> str:
    """Return a hook point that is given as one, or in TransformerLens' words; empty if unknown.

    Args:
        word: `model.layers.3:out`, `model.layers.3.output`, or `blocks.3.hook_resid_post`.
        model: TransformerLens' or the hub's name of the model.
    """
    if word.endswith((":in", ":out")):
        return word
    if word.endswith((".input", ".output")):
        return f"{word.rpartition('.')[0]}:{word.rpartition('.')[2].removesuffix('put')}"
    return module_path(word, family_of_model(model)) or ""


def family_of_model(model: str) -> str:
    """The family of a model by TransformerLens' or the hub's name; empty if it is not known."""
    return _head()["families"].get(model, "")


def search(words: Iterable[str]) -> list[Entry]:
    """The dictionaries that every word fits: a part of a name, `layer_20`, `16k`, `width_65k`."""
    tests = [_test(word.lower()) for word in words]
    return [entry for entry in every() if all(test(entry) for test in tests)]


def _test(word: str) -> Any:
    if match := _LAYER.fullmatch(word):
        layer = int(match[1] or match[2])
        return lambda entry: entry.layer == layer
    if match := _WIDTH.fullmatch(word):
        wanted = int(match[3]) if match[3] else _width(int(match[1]), match[2])
        return lambda entry: entry.width == wanted
    return lambda entry: word in " ".join(entry.words).lower()


def _width(number: int, unit: str) -> int:
    """16k is 16,384, and so is 131k 131,072: where it is near a power of two, that is meant."""
    thousands = number * (1_000_000 if unit == "m" else 1000)
    power = 1 << max(round(thousands).bit_length() - 1, 0)
    near = min((power, 2 * power), key=lambda width: abs(width - thousands))
    return near if abs(near - thousands) < 0.05 * thousands else number * (1 << 10)


LISTED = 60
"""Where more dictionaries fit, their releases are listed instead."""


def table(words: list[str]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], str]:
    """Return the columns, the rows and a note for what `sae releases WORDS` shows.

    Raises:
        DictionaryFormatError: If nothing fits.
    """
    entries = search(words)
    if not entries:
        near = [name for word in words for name in nearest(word, releases())][:SHOWN]
        more = f"; releases of a like name: {', '.join(near)}" if near else ""
        raise DictionaryFormatError(
            f"WORDS must fit a dictionary of the catalogue, got {' '.join(words)}{more}"
        )
    made = ", ".join(f"{name} {source['version']}" for name, source in sources().items())
    note = f"{len(entries):,} dictionaries; from the lists of {made}"
    if len(entries) <= LISTED:
        columns = ("name", "model", "hook point", "latents", "L0")
        return columns, tuple(map(_row, entries)), f"{note}; sae inspect NAME fetches one"
    by_release: dict[str, list[Entry]] = {}
    for entry in entries:
        by_release.setdefault(entry.release, []).append(entry)
    rows = tuple(
        (name, some[0].model, str(len(some)), some[0].id) for name, some in by_release.items()
    )
    columns = ("release", "model", "dictionaries", "first id")
    return columns, rows, f"{note}; sae releases WORDS... narrows them down"


def _row(entry: Entry) -> tuple[str, ...]:
    point = entry.hook_point or entry.hook_name or "in its files"
    width = f"{entry.width:,}" if entry.width else "in its files"
    return entry.name, entry.model, point, width, f"{entry.l0:g}" if entry.l0 else ""
