"""Dictionaries on disk: one file per format, one canonical form in memory."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae.pretrained.canonical import Source
    from sae.pretrained.errors import DictionaryFormatError
    from sae.pretrained.own import save
    from sae.pretrained.recognise import Loaded, load, load_with_source

__all__ = ["DictionaryFormatError", "Loaded", "Source", "load", "load_with_source", "save"]

_HOME = {
    "DictionaryFormatError": "sae.pretrained.errors",
    "Loaded": "sae.pretrained.recognise",
    "Source": "sae.pretrained.canonical",
    "load": "sae.pretrained.recognise",
    "load_with_source": "sae.pretrained.recognise",
    "save": "sae.pretrained.own",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sae.pretrained' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
