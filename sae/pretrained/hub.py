"""Dictionaries on the Hugging Face hub: `org/name[/subfolder][@revision]`."""

import logging
import re
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download

from sae.pretrained.fields import DictionaryFormatError, one_line

_NAME = re.compile(r"[\w\-][\w.\-]*(/[\w\-][\w.\-]*)+(@[\w.\-/]+)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WANTED = (
    "config.json", "sae.safetensors", "provenance.json", "cfg.json", "sae_weights.safetensors",
    "activation_scaler.json", "params.npz", "params.safetensors", "hyperparams.json",
    "checkpoints/final.safetensors",
)  # fmt: skip
_WANTED_PICKLED = ("ae.pt", "weights.pt")
_SETTINGS = ("config.json", "overcomplete.json", "config.yaml", "wandb-config.yaml")
_FILE = re.compile(r"\.(npz|pt|pth|safetensors)$")
_log = logging.getLogger(__name__)


class Address(NamedTuple):
    """The parts of a hub name."""

    repo: str
    subfolder: str
    revision: str | None


def parsed(name: str) -> Address:
    """Take a hub name apart.

    Raises:
        FileNotFoundError: If it is neither a hub name nor, as the caller knows, a path.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise FileNotFoundError(
            f"a dictionary must be at {name}, got nothing there, and it has not the form "
            "org/name[/subfolder][@revision] of the hub"
        )
    path, _, revision = name.partition("@")
    org, repo, *rest = path.split("/")
    return Address(f"{org}/{repo}", "/".join(rest), revision or None)


def located(path: str | Path, *, allow_pt: bool = False) -> Path:
    """Return a local path as it is; fetch a hub name's wanted files and return where they lie.

    Raises:
        FileNotFoundError: If there is nothing at a path.
        DictionaryFormatError: If the hub does not give the files.
    """
    local = Path(path)
    if local.exists():
        return local
    if isinstance(path, Path):
        raise FileNotFoundError(f"a dictionary must be at {path}, got nothing there")
    address = parsed(path)
    if address.revision is None or not _COMMIT.fullmatch(address.revision):
        _log.warning("%s names no commit: what it gives may change; add @COMMIT", path)
    names = _WANTED + (_WANTED_PICKLED if allow_pt else ())
    prefix = f"{address.subfolder}/" if address.subfolder else ""
    patterns = [prefix + name for name in names]
    if _FILE.search(address.subfolder):
        patterns = _of_one_file(address.subfolder)
    try:
        root = snapshot_download(address.repo, revision=address.revision, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        raise DictionaryFormatError(
            f"{path} must be a directory, or a repository of the hub that can be fetched, got "
            f"{one_line(error)}"
        ) from error
    found = Path(root) / address.subfolder
    if not found.exists():
        raise DictionaryFormatError(
            f"{path} must hold the files of a dictionary, got none of {patterns}"
        )
    return found


def _of_one_file(name: str) -> list[str]:
    """One file, and those beside it that tell how it is read."""
    folder, _, file = name.rpartition("/")
    others = [*_SETTINGS, file.replace("W_enc_", "W_dec_")]
    return [name, *(f"{folder}/{other}".lstrip("/") for other in others if other != file)]


def name_of(path: str | Path, where: Path) -> str:
    """Name the source: a path as it is, a hub name with the commit that was fetched."""
    parts = where.parts
    if str(path) == str(where) or "snapshots" not in parts:
        return str(path)
    commit = parts[parts.index("snapshots") + 1]
    return f"{str(path).partition('@')[0]}@{commit}"
