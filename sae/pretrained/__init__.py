"""Dictionaries on disk: one file per format, one canonical form in memory."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae.pretrained.own import DictionaryFormatError, save
    from sae.pretrained.recognise import load

__all__ = ["DictionaryFormatError", "load", "save"]

_HOME = {
    "DictionaryFormatError": "sae.pretrained.own",
    "load": "sae.pretrained.recognise",
    "save": "sae.pretrained.own",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sae.pretrained' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
