"""The result page of a run: one HTML file that opens without a server and without a network.

`PageData` and its parts are plain data; `write_page(data, path)` writes the file. Everything here
needs the standard library alone, so the names are imported directly.
"""

from sae.browser.page import write_page
from sae.browser.page_data import (
    Context,
    Curve,
    DictionaryPage,
    Histogram,
    LatentPage,
    PageData,
    ResultTable,
    SteeringExample,
)

__all__ = [
    "Context",
    "Curve",
    "DictionaryPage",
    "Histogram",
    "LatentPage",
    "PageData",
    "ResultTable",
    "SteeringExample",
    "write_page",
]
