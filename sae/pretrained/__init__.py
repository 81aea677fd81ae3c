"""Dictionaries on disk: one file per format, one canonical form in memory."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae.pretrained.canonical import Source
    from sae.pretrained.foreign import DictionaryFormatError
    from sae.pretrained.loading import Loaded, load, load_with_source
    from sae.pretrained.monosema_format import save

__all__ = ["DictionaryFormatError", "Loaded", "Source", "load", "load_with_source", "save"]

_HOME = {
    "DictionaryFormatError": "sae.pretrained.foreign",
    "Loaded": "sae.pretrained.loading",
    "Source": "sae.pretrained.canonical",
    "load": "sae.pretrained.loading",
    "load_with_source": "sae.pretrained.loading",
    "save": "sae.pretrained.monosema_format",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sae.pretrained' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
