"""The map of one dictionary's latents, and how near two dictionaries' directions come.

And the curve of completeness that explaining left, with what a random decoder has beside it.
"""

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch

from activations_cache.checks import Progress
from sae.browser import Completeness, Map, PlaneMap, ShownComparison
from sae.explain.atlas import Method, cluster_names, clusters, plane, share_preserved
from sae.explain.tables import LatentRecord
from sae.neighbours import chance_cosine, nearest
from sae.run.browse_latents import BrowsedDictionary

N_CLUSTERS = 12
N_PAIRS = 6
LEAST_COSINE = 0.5
NO_NEIGHBOURHOODS = 0.1
"""At most this share of latents with a neighbour nearer than chance: random directions have .05."""
LEAST_ON_MAP = 3
LAYOUTS: tuple[tuple[Method, str, str], ...] = (
    (
        "tsne",
        "t-SNE",
        "Near points are near directions; distances between far points mean nothing.",
    ),
    ("pca", "PCA", "The two main axes of many: near points need not be near directions."),
)


def map_of(rows: torch.Tensor, records: list[LatentRecord], report: Progress) -> Map:
    """Layouts of the live latents; clusters only where directions are nearer than by chance.

    Random directions, such as those of a frozen decoder, have no neighbourhoods: k-means would
    divide them all the same, and colours would show groups that are not there.
    """
    live = torch.tensor([record.status != "dead" for record in records])
    directions = rows[live].float().cpu()
    cosine = nearest(directions, directions, 1, excluded=torch.arange(len(directions))).cosine[:, 0]
    chance = chance_cosine(directions)
    share = float((cosine > chance).float().mean())
    nearer = (
        f"{share:.0%} of the latents have a neighbour with a cosine above {chance:.2f}; "
        "of random directions 5%."
    )
    if share <= NO_NEIGHBOURHOODS:
        nearer = f"No neighbourhoods, and groups on the map mean nothing: {nearer}"
    layouts = []
    for done, (method, name, note) in enumerate(LAYOUTS, 1):
        points = plane(directions, method)
        shown_share = (
            f"{share_preserved(directions, points):.0%} of the 10 nearest directions are among the"
        )
        at = torch.full((len(records), 2), math.nan)
        at[live] = points
        x, y = (tuple(axis) for axis in at.T.tolist())
        layouts.append(PlaneMap(name, x, y, f"{note} {shown_share} 10 nearest points. {nearer}"))
        report(done, len(LAYOUTS), "layouts of the map")
    if share <= NO_NEIGHBOURHOODS:
        return Map(tuple(layouts))
    group = clusters(directions, N_CLUSTERS)
    words = [
        record.words if record.kind in {"word", "token", "class", "group", "image word"} else ()
        for record in records
        if record.status != "dead"
    ]
    names = cluster_names(group, words, int(group.max()) + 1)
    of_all = torch.full((len(records),), -1)
    of_all[live] = group
    return Map(tuple(layouts), tuple(names), tuple(of_all.tolist()))


def comparisons_of(
    subjects: list[BrowsedDictionary], report: Progress
) -> tuple[ShownComparison, ...]:
    """Pairs of dictionaries that write to the same place."""
    comparisons = []
    pairs = [
        (a, b)
        for a, b in combinations(subjects, 2)
        if a.dictionary.dec_rows.shape[1] == b.dictionary.dec_rows.shape[1]
        and a.hook_point == b.hook_point
    ]
    for done, (a, b) in enumerate(pairs[:N_PAIRS], 1):
        of_a, of_b = (s.dictionary.dec_rows.detach() for s in (a, b))
        chance = chance_cosine(of_b)
        forth, back = nearest(of_a, of_b, 1), nearest(of_b, of_a, 1)
        in_b, in_a = (
            tuple(zip(n.latent[:, 0].tolist(), n.cosine[:, 0].tolist(), strict=True))
            for n in (forth, back)
        )
        note = "Cosines of decoder rows; that directions agree does not say that firings do."
        comparisons.append(ShownComparison(a.name, b.name, in_b, in_a, LEAST_COSINE, chance, note))
        report(done, len(pairs), "pairs of dictionaries")
    return tuple(comparisons)


def completeness_of(summary: Mapping[str, Any]) -> Completeness | None:
    """The curve of a summary that explaining texts wrote; None where there is none."""
    found = summary.get("completeness", {})
    if "f50" not in found:
        return None
    names = ("f50", "low", "high", "slope", "times_alive", "n")
    points = tuple((frequency, share, int(n)) for frequency, share, n in found["points"])
    note = found.get("note", "")
    if null := found.get("null"):
        share = f"{null['share_present']:.0%} of the concepts have one"
        half = f"; half of those of frequency {null['f50']:.2g}" if "f50" in null else ""
        note = f"{null['of']}: {share}{half}. {note[:1].upper()}{note[1:]}."
    return Completeness(points=points, **{name: found[name] for name in names}, note=note)
