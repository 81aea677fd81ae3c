"""The feature browser: a folder of static pages that opens without a server and without a network.

`Site` and its parts are plain data; `write_site(site, path)` writes the folder and
`sae.browser.server` shows it on a local address. Everything here needs the standard library alone,
so the names are imported directly.
"""

from sae.browser.latent import Attribution, Example, Explanation, Image, Latent, Score
from sae.browser.site import (
    Column,
    Comparison,
    Completeness,
    Curve,
    Dictionary,
    Histogram,
    Layout,
    Map,
    ResultTable,
    Site,
    SteeringExample,
)
from sae.browser.write import write_site

__all__ = [
    "Attribution",
    "Column",
    "Comparison",
    "Completeness",
    "Curve",
    "Dictionary",
    "Example",
    "Explanation",
    "Histogram",
    "Image",
    "Latent",
    "Layout",
    "Map",
    "ResultTable",
    "Score",
    "Site",
    "SteeringExample",
    "write_site",
]
