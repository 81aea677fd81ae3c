"""The feature browser: a folder of static pages that opens without a server and without a network.

`Site` and its parts are plain data; `write_site(site, path)` writes the folder and
`sae.browser.server` shows it on a local address. Everything here needs the standard library alone,
so the names are imported directly.
"""

from sae.browser.latent import (
    Example,
    Image,
    Latent,
    ShownAttribution,
    ShownExplanation,
    ShownScore,
)
from sae.browser.site import (
    Column,
    Completeness,
    Curve,
    Dictionary,
    Histogram,
    Map,
    PlaneMap,
    ResultTable,
    ShownComparison,
    Site,
    SteeringExample,
)
from sae.browser.write import write_site

__all__ = [
    "Column",
    "Completeness",
    "Curve",
    "Dictionary",
    "Example",
    "Histogram",
    "Image",
    "Latent",
    "Map",
    "PlaneMap",
    "ResultTable",
    "ShownAttribution",
    "ShownComparison",
    "ShownExplanation",
    "ShownScore",
    "Site",
    "SteeringExample",
    "write_site",
]
