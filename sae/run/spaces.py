"""How alike sets of rows are: caches, hook points, dictionaries' latents, captions of images."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations, groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from activations_cache import ActivationCache, io
from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.config import SPLITS, TRAINING_SPLITS
from activations_cache.models import LoadedModel
from activations_cache.probe import record_of
from sae import notebook
from sae.config import ConfigError
from sae.evaluate.config import EvaluateConfig
from sae.evaluate.geometry import RowsShape, shape_of
from sae.evaluate.probe_tasks import Signature, signature_of
from sae.evaluate.report import held_out, plain, write_record
from sae.evaluate.spaces import (
    DIRECTED,
    MEASURES,
    Draws,
    MeasureCheck,
    MeasureName,
    Similarity,
    check_measure,
    compare,
)
from sae.evaluate.substitution import Substitution, measure_substitution
from sae.evaluate.translation import Stitch, fit_stitch
from sae.run.context import (
    Section,
    Steps,
    load_model_of,
    recorded_model,
    silent_steps,
    steps_to,
)
from sae.run.page import plot_matrices, write_page
from sae.run.paired_rows import (
    Pool,
    RowSet,
    SimilarRequest,
    Target,
    read_sets,
    require_models,
    row_sets,
)
from sae.run.tables import (
    check_table,
    pairs_table,
    shapes_table,
    signatures_table,
    stitched_table,
)

FILE, PICTURE, PAGE = "similar.json", "similar.png", "index.html"

Figures = TypeVar("Figures")


class StitchedPlace(NamedTuple):
    """What the rest of a model loses when it goes on from another place's mapped stream."""

    a: str
    """Whose stream is mapped."""
    b: str
    """Whose place it takes."""
    effects: Substitution
    """Of a map fitted on other rows, "stitched"; on exchanged ones; of the stream as it is."""


class SpaceSimilarity(NamedTuple):
    """Every pair of sets by every measure."""

    spaces: dict[str, RowsShape]
    """The shape of each set."""
    constant: dict[str, int]
    """Columns of a dictionary that are the same in all rows, and left out."""
    pairs: dict[tuple[str, str], dict[str, Similarity]]
    """By the names of both sets, then by measure; a measure that the rows do not allow is absent.
    """
    notes: tuple[str, ...]
    """What was left out and why, a line each."""
    n_rows: int
    checks: dict[str, MeasureCheck]
    """By measure; empty if none was asked for."""
    stitched: tuple[StitchedPlace, ...]
    """Each set in the place of the next; empty if no model was asked for."""
    signatures: dict[str, Signature]
    """How concepts lie in each set; empty if no labels were given."""

    def matrix(self, measure: str) -> Float64[Tensor, "space space"]:
        """The values of a measure from row to column, 1 on the diagonal, nan without one."""
        names = list(self.spaces)
        result = torch.full((len(names), len(names)), math.nan, dtype=torch.float64)
        result.fill_diagonal_(1)
        for (a, b), by_measure in self.pairs.items():
            if measure in by_measure:
                i, j = names.index(a), names.index(b)
                result[i, j] = by_measure[measure].value
                if measure not in DIRECTED:
                    result[j, i] = result[i, j]
        return result

    @property
    def sections(self) -> list[Section]:
        """The pairs, then the sets, and what else was asked for."""
        tables = {
            "similarity": pairs_table(self.pairs, self.n_rows, self.notes),
            "shape": shapes_table(self.spaces, self.constant),
            "concepts": signatures_table(self.signatures) if self.signatures else None,
            "check": check_table(self.checks) if self.checks else None,
            "stitching, in nats": stitched_table(self.stitched) if self.stitched else None,
        }
        return [Section(title, table) for title, table in tables.items() if table is not None]

    @property
    def picture(self) -> bytes:
        """A heat map of each measure, as a PNG."""
        measures = dict.fromkeys(m for figures in self.pairs.values() for m in figures)
        maps = {measure: self.matrix(measure).tolist() for measure in measures}
        return plot_matrices(maps, list(self.spaces))

    def _repr_html_(self) -> str:
        shown = [section._repr_html_() for section in self.sections]
        return "".join([shown[0], notebook.picture(self.picture, "heat maps"), *shown[1:]])

    @property
    def record(self) -> dict[str, Any]:
        """What is written as JSON."""
        return {
            "rows": self.n_rows,
            "spaces": {
                name: {**one._asdict(), "constant": self.constant[name]}
                for name, one in self.spaces.items()
            },
            "pairs": [
                {"a": a, "b": b, "measure": measure, **asdict(figure)}
                for (a, b), by_measure in self.pairs.items()
                for measure, figure in by_measure.items()
            ],
            "checks": {name: one._asdict() for name, one in self.checks.items()},
            "signatures": {name: plain(one._asdict()) for name, one in self.signatures.items()},
            "stitched": [plain(one._asdict()) for one in self.stitched],
            "notes": self.notes,
        }

    def write(self, out: Path) -> dict[str, Path]:
        """Write all figures, a heat map of each measure, and a page; the files by their kind."""
        out.mkdir(parents=True, exist_ok=True)
        files = {"figures": out / FILE, "picture": out / PICTURE, "page": out / PAGE}
        write_record(files["figures"], self.record)
        io.write_files({files["picture"]: self.picture})
        write_page(files["page"], "Similarity", self.sections, files["picture"])
        return files


def similar(  # noqa: PLR0913
    *targets: Target,
    cache: ActivationCache | str | Path | None = None,
    rows: int = 2000,
    measures: Sequence[MeasureName] = MEASURES,
    permutations: int = 200,
    draws: int = 200,
    neighbours: int = 10,
    pool: Pool = "row",
    seed: int = 0,
    check: bool = False,
    model: bool = False,
    contexts: int = 24,
    labels: str | Path | None = None,
    progress: Progress = silent,
) -> SpaceSimilarity:
    """Hold sets of rows of the same examples against each other, pair by pair.

    Args:
        *targets: Caches (all their hook points), "CACHE::HOOK_POINT", dictionaries, whose latents
            are compared, or "CAPTIONS::TOWER": records with `image` and `text` of the images of a
            cache, embedded by the tower for texts of CLIP or SigLIP.
        cache: What dictionaries are read on.
        rows: So many rows at most, from as many examples as there are.
        measures: Which of `sae.evaluate.spaces.MEASURES`.
        permutations: Exchanges of the rows for the null; of pwcca and matching 19 at most, and of
            svcca and procrustes where bounds do not tell that none reaches the value.
        draws: Resamples of the examples for the intervals.
        neighbours: Of cknna; and among how many candidates a search must have the partner.
        pool: "example" compares the mean rows of examples, such as images that two models cut
            into other patches.
        seed: Decides rows, permutations, resamples and which half is fitted on.
        check: Also check each measure: sensitivity to removed components, specificity to layers.
        model: Also stitch each set into the place of the next, in the caches' model, in nats.
        contexts: Held-out contexts that stitched streams are read in.
        labels: Also how these concepts lie in each set: JSON lines of example and label, or
            "cache" for the cache's own.
        progress: Called in every step.

    Raises:
        TypeError: If an argument is of another class.
        ValueError: If the caches hold other rows, or in another order, or a column is constant.
    """
    request = SimilarRequest(
        targets, cache, rows, tuple(measures), permutations, draws, neighbours, pool, seed, check,
        model, contexts, labels,
    )  # fmt: skip
    return similar_spaces(request, steps_to(progress))


def similar_spaces(request: SimilarRequest, steps: Steps = silent_steps) -> SpaceSimilarity:
    """Read what a request names, and compare."""
    if unknown := [name for name in request.measures if name not in MEASURES]:
        raise ConfigError(f"measures must be among {', '.join(MEASURES)}, got {unknown[0]!r}")
    sides = row_sets(request)
    if request.model:
        require_models(sides, request)
    with steps("read") as progress:
        read, constant, example, concept = read_sets(sides, request, progress)
    draws = Draws.of(example, request.permutations, request.draws, request.seed)
    spaces = _of_each(read, shape_of, steps, "shape")
    signatures: dict[str, Signature] = {}
    if concept is not None:
        signatures = _of_each(
            read, lambda x: signature_of(x, concept, draws.fitted), steps, "concepts"
        )
    pairs, notes = _of_pairs(read, draws, request, steps)
    stitched: tuple[StitchedPlace, ...] = ()
    if request.model:
        with steps("stitch") as progress:
            stitched = _stitched(sides, read, example, request, progress)
    known = (spaces, constant, pairs, notes, len(example))
    result = SpaceSimilarity(*known, {}, stitched, signatures)
    return _checked(result, read, sides, draws, request, steps) if request.check else result


def _of_each(
    read: Mapping[str, Tensor], figures: Callable[[Tensor], Figures], steps: Steps, step: str
) -> dict[str, Figures]:
    """The figures of each set of rows."""
    results: dict[str, Figures] = {}
    with steps(step) as progress:
        for name, x in read.items():
            results[name] = figures(x)
            progress(len(results), len(read), "sets of rows")
    return results


def _of_pairs(
    read: Mapping[str, Tensor], draws: Draws, request: SimilarRequest, steps: Steps
) -> tuple[dict[tuple[str, str], dict[str, Similarity]], tuple[str, ...]]:
    """Each measure of each pair, and what was left out."""
    names, notes = list(read), []
    pairs: dict[tuple[str, str], dict[str, Similarity]] = {}
    for measure in request.measures:
        numbers = list(combinations(range(len(names)), 2))
        if measure in DIRECTED:
            numbers += [(b, a) for a, b in numbers]
        with steps(measure) as progress:
            figures, problems = compare(
                read, numbers, measure, draws, k=request.neighbours, progress=progress
            )
        if problems:
            notes.append(f"{measure} is left out for {len(problems)} pairs: {problems[0]}")
        for a, b in numbers:
            of_pair = pairs.setdefault((names[a], names[b]), {})
            of_pair |= {measure: figures[a, b]} if (a, b) in figures else {}
    return pairs, tuple(notes)


def _checked(
    result: SpaceSimilarity,
    read: dict[str, Tensor],
    sides: Sequence[RowSet],
    draws: Draws,
    request: SimilarRequest,
    steps: Steps,
) -> SpaceSimilarity:
    """With a check of each measure; the depth of a set is its place among those of its cache."""
    caches = [side.cache.fingerprint for side in sides]
    places = [(caches.index(cache), caches[:i].count(cache)) for i, cache in enumerate(caches)]
    checks: dict[str, MeasureCheck] = {}
    with steps("check") as progress:
        for measure in request.measures:
            values = result.matrix(measure)
            checks[measure] = check_measure(
                read, values, places, measure, draws, k=request.neighbours
            )
            progress(len(checks), len(request.measures), "measures")
    return result._replace(checks=checks)


def _stitched(
    sides: Sequence[RowSet],
    read: dict[str, Tensor],
    example: Int[Tensor, " row"],
    request: SimilarRequest,
    report: Progress,
) -> tuple[StitchedPlace, ...]:
    """Each set mapped into the place of the next; maps are fitted on rows of the training splits.

    The model as it is runs once for all places of a cache.

    Raises:
        ValueError: If there are no more such rows than columns, or a model has no loss.
    """
    is_training = torch.tensor([SPLITS.index(name) for name in TRAINING_SPLITS])
    fitted = torch.isin(sides[0].cache.examples.split[example], is_training)
    order = torch.randperm(int(fitted.sum()), generator=torch.Generator().manual_seed(request.seed))
    models: dict[str, LoadedModel] = {}
    config = EvaluateConfig(n_contexts=request.contexts, n_contexts_special=0, seed=request.seed)
    results = []
    for pairs in _places_at_once(sides, read):
        first, second = pairs[0]
        maps = {
            f"{name} {i}": one.dictionary(*a.hook_points, *b.hook_points)
            for i, (a, b) in enumerate(pairs)
            for name, one in _maps(a.name, read[a.name][fitted], read[b.name][fitted], order)
        }
        source, reader = (_model_of(side.cache, models, report) for side in (first, second))
        [main] = second.hook_points
        contexts = held_out(second.cache, main, config)
        if record_of(reader.model).loss == "masked token":
            contexts = contexts._replace(mask_token=reader.mask_token)
        effects = measure_substitution(
            maps, reader.model, main, contexts, config, source=source.model, zero=False,
            progress=report,
        )  # fmt: skip
        for i, (a, b) in enumerate(pairs):
            [place] = b.hook_points
            here = effects["intact" if place == main else f"intact at {place}"]
            own = {n.rpartition(" ")[0]: e for n, e in here.dictionaries.items()
                   if n.endswith(f" {i}")}  # fmt: skip
            results.append(StitchedPlace(a.name, b.name, replace(here, dictionaries=own)))
    return tuple(results)


NUMBERS_AT_ONCE = 1 << 28
"""Of the maps that are held at a time: 1 GiB."""


def _places_at_once(
    sides: Sequence[RowSet], read: Mapping[str, Tensor]
) -> Iterator[list[tuple[RowSet, RowSet]]]:
    """Neighbours from one cache into one cache, as many as are spliced over the same contexts."""
    caches = [side.cache.fingerprint for side in sides]
    for _, run in groupby(range(len(sides) - 1), key=lambda i: (caches[i], caches[i + 1])):
        pairs = [(sides[i], sides[i + 1]) for i in run]
        largest = max(read[a.name].shape[1] * read[b.name].shape[1] for a, b in pairs)
        n = max(1, NUMBERS_AT_ONCE // (3 * largest))
        yield from (pairs[start : start + n] for start in range(0, len(pairs), n))


def _maps(
    name: str,
    x: Float[Tensor, "row d_in"],
    y: Float[Tensor, "row d_out"],
    order: Int[Tensor, " row"],
) -> Iterator[tuple[str, Stitch]]:
    """The stitch, its null, and no map at all where both are as wide."""
    if len(x) <= x.shape[1]:
        raise MonosemaError(
            f"--rows must give more training rows than {name} has columns ({x.shape[1]}) to fit a "
            f"stitch, got {len(x)}; take more rows"
        )
    yield "stitched", fit_stitch(x, y)
    yield "exchanged rows", fit_stitch(x, y[order])
    if x.shape[1] == y.shape[1]:
        eye = torch.eye(x.shape[1], dtype=torch.float64)
        yield "identity", Stitch(eye, torch.zeros_like(eye[0]))


def _model_of(
    cache: ActivationCache, models: dict[str, LoadedModel], report: Progress
) -> LoadedModel:
    """The model that a cache records, loaded once, if it predicts tokens."""
    recorded = recorded_model(cache)
    key = str(recorded)
    if key not in models:
        loaded = load_model_of(cache, report)
        assert isinstance(loaded, LoadedModel), recorded  # a cache of texts
        loss = record_of(loaded.model).loss
        if loss is None or (loss == "masked token" and loaded.mask_token is None):
            raise MonosemaError(
                f"--model must be one that predicts tokens, got {type(loaded.model).__name__}"
            )
        models[key] = loaded
    return models[key]
