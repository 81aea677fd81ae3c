"""Put a dictionary on the Hugging Face hub, with a card that says what it is and who made it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi

from activations_cache import seals
from sae.pretrained import hub, monosema_format
from sae.pretrained.canonical import Source
from sae.pretrained.foreign import DictionaryFormatError, one_line, printable
from sae.pretrained.loading import Loaded, load_with_source

CARD = "README.md"
STATISTICS = "stats.safetensors"
LICENCE = re.compile(r"[a-z0-9][a-z0-9.\-]{1,40}")
MODEL = re.compile(r"[\w.\-]+(/[\w.\-]+)?", re.ASCII)


class Card(NamedTuple):
    """What a card says beside what the files tell."""

    licence: str
    """As the hub names it, such as "apache-2.0"."""
    model: str
    """The model whose rows it reads, a name of the hub."""
    hook_point: str
    """The place in the model."""
    metrics: Mapping[str, object]
    """Figure -> value."""


class Pushed(NamedTuple):
    """Where it is now."""

    name: str
    """What `sae.load` takes, with the commit."""
    files: tuple[str, ...]
    """What was sent."""


def push(
    path: str | Path, repo: str, card: Card, *, private: bool = True, api: HfApi | None = None
) -> Pushed:
    """Send a dictionary directory of our own format and its card as one commit.

    Args:
        path: The directory, as `sae.save` wrote it; convert others first.
        repo: "org/name[/subfolder]"; made if it is not there.
        card: What the card says.
        private: Whether a repository that is made is private.
        api: The hub's client; that of huggingface_hub, with its own token, when absent.

    Raises:
        DictionaryFormatError: If it is no dictionary of our own format, if the card lacks
            something, or if the hub refuses.
    """
    path = Path(path)
    address = hub.parsed(repo)
    if address.revision is not None:
        raise DictionaryFormatError(f"the repository must be named without @, got {repo}")
    _check(card)
    loaded = load_with_source(path, format=monosema_format.FORMAT)
    prefix = f"{address.subfolder}/" if address.subfolder else ""
    names = [
        monosema_format.WEIGHTS,
        monosema_format.CONFIG,
        monosema_format.PROVENANCE,
        STATISTICS,
        monosema_format.READ_OUT,
    ]
    files: dict[str, Path | bytes] = {n: path / n for n in names if (path / n).is_file()}
    files[CARD] = card_text(loaded, card, provenance(path), repo).encode()
    operations = [
        CommitOperationAdd(path_in_repo=prefix + name, path_or_fileobj=data)
        for name, data in files.items()
    ]
    client = api or HfApi()
    try:
        client.create_repo(address.repo, private=private, exist_ok=True)
        done = client.create_commit(
            address.repo, operations, commit_message=f"Add {address.subfolder or 'a dictionary'}"
        )
    except (OSError, ValueError) as error:
        raise DictionaryFormatError(
            f"{repo} must be a repository that you may write, got {one_line(error)}"
        ) from error
    return Pushed(f"{repo}@{done.oid}", tuple(prefix + name for name in files))


def provenance(path: Path) -> dict[str, object]:
    """What made a dictionary, as it was recorded; nothing where nothing was."""
    file = path / monosema_format.PROVENANCE
    return json.loads(seals.read(file)) if file.is_file() else {}


def card_text(loaded: Loaded, card: Card, made_by: Mapping[str, object], repo: str) -> str:
    """The card: front matter for the hub, then what it is, how it is loaded and measured."""
    config, source = loaded.dictionary.config, loaded.source
    facts = {
        "hook point": card.hook_point,
        "latents": f"{config.d_sae:,}",
        "width": f"{config.d_in:,} -> {config.width_out:,}",
        "activation": str(config.activation),
        **{f"sha256 of {name}": digest for name, digest in source.source_sha256.items()},
    }
    front = {"library_name": "monosema", "license": card.licence, "base_model": card.model}
    front |= {"tags": "[sparse-autoencoder, interpretability]"}
    parts = [
        "\n".join(["---", *(f"{key}: {value}" for key, value in front.items()), "---"]),
        f"# {repo}",
        f"A dictionary of the rows of `{_code(card.hook_point)}` of `{_code(card.model)}`.",
        f'```python\nimport sae\n\ndictionary = sae.load("{repo}")\n```',
        _table("What it is", facts),
        _table("Measured", card.metrics) if card.metrics else "No figures were recorded.",
        _table("Made by", made_by) if made_by else "Nothing was recorded of how it was made.",
        _table("Read from", _foreign(source)) if source.folds_applied else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _foreign(source: Source) -> dict[str, object]:
    return {"format": source.source_format, "folded": "; ".join(source.folds_applied)}


def _table(title: str, rows: Mapping[str, object]) -> str:
    lines = [f"| {_cell(key)} | `{_code(_value(value))}` |" for key, value in rows.items()]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines])


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _code(text: str) -> str:
    """A text that stays inside backticks and inside a cell."""
    return printable(text, 400).replace("`", "'").replace("|", "\\|")


def _cell(text: str) -> str:
    return re.sub(r"[^\w .\-]", " ", printable(text, 80))


def _check(card: Card) -> None:
    if not LICENCE.fullmatch(card.licence):
        raise DictionaryFormatError(
            f"the licence must be named as the hub does, such as apache-2.0, got {card.licence!r}"
        )
    if not MODEL.fullmatch(card.model):
        raise DictionaryFormatError(f"the model must be a name of the hub, got {card.model!r}")
    if not card.hook_point.strip():
        raise DictionaryFormatError("the hook point must be named, got none")
