"""What a run, or a dictionary with its labels, gives the browser to show."""

import json
import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import torch

from activations_cache.checks import Progress
from activations_cache.models import LoadedModel
from sae.browser import Column, Comparison, Dictionary, Histogram, Layout, Map
from sae.browser.site import DENSE_ABOVE
from sae.cli.beside import beside
from sae.cli.browse_attribution import attributions_of
from sae.cli.browse_latents import Known, Latents
from sae.cli.browse_subject import Around, Subject
from sae.cli.unembedding import unembedding
from sae.explain.atlas.neighbours import Together, chance_cosine, cofiring, nearest
from sae.explain.atlas.plane import Method, cluster_names, clusters, plane, share_kept
from sae.explain.firings import encode_rows
from sae.explain.logit_lens import promoted_tokens
from sae.explain.results import STEM
from sae.explain.rule_scores import STEM as RULES
from sae.explain.tables import EXAMPLES, LATENTS, LatentRecord, iter_examples, read_latents

N_PROMOTED, N_NEIGHBOURS, N_CLUSTERS = 10, 8, 12
ROWS_FOR_COFIRING = 32_768
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


def dictionary_of(subject: Subject, around: Around, report: Progress) -> Dictionary:
    """Everything about one dictionary; its latents are read from the files as they are written."""
    records = read_latents(subject.explained / LATENTS)
    known = _known(subject, around, report)
    rows = subject.dictionary.dec_rows.detach()
    n_live = sum(record.status != "dead" for record in records)
    scorers = sorted({s["scorer"] for found in known.explained.values() for s in found["scores"]})
    return Dictionary(
        name=subject.name,
        summary=f"{_activation(subject)}, {n_live:,} live latents of {len(records):,}",
        d_sae=len(records),
        kind="image" if around.pictures else "text",
        n_rows=_n_rows(subject.explained),
        n_live=n_live,
        n_dead=len(records) - n_live,
        n_dense=sum(record.density > DENSE_ABOVE for record in records),
        columns=(
            Column("auc", "AUC", "score", 0.5, "how well the label tells where the latent fires"),
            *(Column(f"llm:{scorer}", scorer, "score") for scorer in scorers),
            Column("n_fired", "firings", "count", note="rows on which it fires"),
        ),
        density_histogram=_histogram(records),
        latents=Latents(records, subject.explained / EXAMPLES, known),
        map=map_of(rows, records, report) if n_live >= LEAST_ON_MAP else None,
    )


def _activation(subject: Subject) -> str:
    activation = subject.dictionary.config.activation
    k = getattr(activation, "k", None)
    return type(activation).__name__ + ("" if k is None else f", k = {k}")


def _n_rows(explained: Path) -> int:
    summary = json.loads((explained / "summary.json").read_text())
    return summary["n_rows_explain"] + summary["n_rows_score"]


def _known(subject: Subject, around: Around, report: Progress) -> Known:
    rows = subject.dictionary.dec_rows.detach()
    k = min(N_NEIGHBOURS, len(rows) - 1)
    neighbours = nearest(rows, rows, k, same=True) if k else None
    report(0, 1, "latents' neighbours")
    lens = None
    if around.loaded is not None and _has_lens(subject, around.loaded):
        lens = promoted_tokens(
            subject.dictionary, *unembedding(around.loaded.model), N_PROMOTED, progress=report
        )
    attributed = {}
    if around.loaded is not None and around.cache is not None:
        attributed = attributions_of(subject.dictionary, subject.hook_point, around, report)
    return Known(
        path=subject.path,
        strings=around.strings,
        neighbours=neighbours,
        together=_together(subject, around, report),
        lens=lens,
        explained=read_explained(subject.explained),
        attributed=attributed,
        pictures=around.pictures,
    )


def _has_lens(subject: Subject, loaded: LoadedModel) -> bool:
    head = getattr(loaded.model, "get_output_embeddings", lambda: None)()
    width = subject.dictionary.config.slices_out[-1].width
    return head is not None and head.weight.shape[1] == width


def _together(
    subject: Subject, around: Around, report: Progress
) -> list[tuple[Together, ...]] | None:
    """Co-firing over rows that are spread evenly over the splits that labels come from."""
    if around.cache is None:
        return None
    cache = beside(around.cache, subject.dictionary, subject.hook_point)
    rows = cache.rows(("explain", "score"))
    sample = rows[:: max(1, math.ceil(len(rows) / ROWS_FOR_COFIRING))]
    codes = encode_rows(subject.dictionary, cache[subject.hook_point], sample, report)
    return cofiring(codes, N_NEIGHBOURS, progress=report)


def read_explained(explained: Path) -> dict[int, dict]:
    """What scorers and a language model said of latents, by latent; empty where none was asked.

    Scores of labels that were executed as rules come after the others, by names of their own.
    """
    found: dict[int, dict] = {}
    for stem, prefix in ((STEM, ""), (RULES, "rule: ")):
        for record in _records(explained / f"{stem}.jsonl"):
            nothing = {"explanation": None, "scores": [], "controls": {}}
            known = found.setdefault(record["latent"], nothing)
            known["explanation"] = known["explanation"] or (not prefix and record["explanation"])
            known["scores"] += _named(record["scores"], prefix)
            for control, scores in record["controls"].items():
                known["controls"].setdefault(control, []).extend(_named(scores, prefix))
    return found


def _records(file: Path) -> list[dict]:
    if not file.is_file():
        return []
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _named(scores: list[dict], prefix: str) -> list[dict]:
    return [score | {"scorer": prefix + score["scorer"]} for score in scores]


def _histogram(records: list[LatentRecord]) -> Histogram | None:
    live = torch.tensor([r.density for r in records if r.density > 0]).log10()
    if not len(live):
        return None
    first = min(-1, math.floor(float(live.min())))
    counts = torch.histc(live, bins=4 * -first, min=first, max=0)
    edges = tuple(first + i / 4 for i in range(len(counts) + 1))
    return Histogram(edges, tuple(int(count) for count in counts.tolist()), log10=True)


def map_of(rows: torch.Tensor, records: list[LatentRecord], report: Progress) -> Map:
    """Layouts of the live latents; clusters only where directions are nearer than by chance.

    Random directions, such as those of a frozen decoder, have no neighbourhoods: k-means would
    divide them all the same, and colours would show groups that are not there.
    """
    live = torch.tensor([record.status != "dead" for record in records])
    directions = rows[live].float().cpu()
    cosine = nearest(directions, directions, 1, same=True).cosine[:, 0]
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
        kept = f"{share_kept(directions, points):.0%} of the 10 nearest directions are among the"
        at = torch.full((len(records), 2), math.nan)
        at[live] = points
        x, y = (tuple(axis) for axis in at.T.tolist())
        layouts.append(Layout(name, x, y, f"{note} {kept} 10 nearest points. {nearer}"))
        report(done, len(LAYOUTS), "layouts of the map")
    if share <= NO_NEIGHBOURHOODS:
        return Map(tuple(layouts))
    group = clusters(directions, N_CLUSTERS)
    words = [
        record.words if record.kind in {"word", "token", "class", "group"} else ()
        for record in records
        if record.status != "dead"
    ]
    names = cluster_names(group, words, int(group.max()) + 1)
    of_all = torch.full((len(records),), -1)
    of_all[live] = group
    return Map(tuple(layouts), tuple(names), tuple(of_all.tolist()))


def comparisons_of(subjects: list[Subject], report: Progress) -> tuple[Comparison, ...]:
    """Pairs of dictionaries that write to the same place."""
    found = []
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
        found.append(Comparison(a.name, b.name, in_b, in_a, LEAST_COSINE, chance, note))
        report(done, len(pairs), "pairs of dictionaries")
    return tuple(found)


def shown_pictures(around: Around, explained: list[Path]) -> Iterator[tuple[int, bytes]]:
    """Thumbnails of the pictures that examples name; none of texts."""
    if around.pictures is None:
        return
    found = {
        context.example
        for path in explained
        for _, contexts in iter_examples(path / EXAMPLES)
        for context in contexts
    }
    yield from around.pictures.jpegs(sorted(found))
