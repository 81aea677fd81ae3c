"""Dictionaries on disk: one file per format, one canonical form in memory."""

from typing import TYPE_CHECKING

from monosema.facade import on_first_use

if TYPE_CHECKING:
    from sae.pretrained.canonical import Source
    from sae.pretrained.foreign import DictionaryFormatError
    from sae.pretrained.loading import Loaded, load, load_with_source
    from sae.pretrained.monosema_format import save

__all__ = ["DictionaryFormatError", "Loaded", "Source", "load", "load_with_source", "save"]

__getattr__, __dir__ = on_first_use(__name__, __file__)
