"""TCAV, concept bottlenecks and embeddings by command, on the stream and on latents."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_matrix
from torch import Tensor

from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.config import TextSource
from activations_cache.documents import documents
from activations_cache.models import LoadedModel
from activations_cache.probe import require_next_token
from sae.autoencoder import SparseAutoencoder
from sae.browser import ResultTable
from sae.config import load_overrides
from sae.evaluate.concepts import (
    TCAV,
    ConceptBottleneck,
    ConceptEmbedding,
    Corrected,
    corrected,
    sets_needed,
    tcav,
)
from sae.evaluate.probe_tasks import check_two_classes, read_answered
from sae.evaluate.report import write_record
from sae.run.config import BottleneckRequest, ConceptsRequest
from sae.run.context import Section, Steps, silent_steps, steps_to, with_differences
from sae.run.finding import token_of
from sae.run.steering import GLOSSES, placed_in_model
from sae.steer.attribution import gradient_at, logit_difference, see
from sae.steer.edits import directions_of
from sae.steer.search import mean_rows

FILE, BOTTLENECK = "concepts.json", "bottleneck.json"
FEWEST = 2
"""Texts of a concept, and prompts, below which nothing can be said."""


class ConceptTest(NamedTuple):
    """Every concept, tested on the stream and on the latents."""

    stream: dict[str, TCAV]
    latents: dict[str, TCAV]
    n_texts: int
    """Texts of every set."""
    n_sets: int
    n_prompts: int
    n_needed: int
    """Random sets from which on a concept can be significant."""
    level: float
    differs: tuple[str, ...]
    """In what the model or the place is not the dictionary's; only where forced."""

    @property
    def section(self) -> Section:
        """A row for each concept and place."""
        rows = [
            (
                name,
                place,
                f"{one.score:.2f}",
                f"{one.random:.2f}",
                f"{one.p:.3f}",
                "yes" if one.significant else "",
            )
            for name in self.stream
            for place, one in (("stream", self.stream[name]), ("latents", self.latents[name]))
        ]
        note = (
            f"score: share of {self.n_prompts} prompts whose answer grows along the concept; "
            f"chance: the same of {self.n_sets} random sets; {self.n_texts} texts a set; p: rank "
            f"among these; significant: p x {len(self.stream)} concepts <= {self.level:g}"
        )
        if self.n_sets < self.n_needed:
            note += (
                f"; with {self.n_sets} random sets no concept can be significant, it takes "
                f"sets={self.n_needed}"
            )
        note = with_differences(note, {"the dictionary": self.differs} if self.differs else {})
        columns = ("concept", "on", "score", "chance", "p", "significant")
        return Section("concepts", ResultTable(columns, tuple(rows), note))

    @property
    def record(self) -> dict[str, Any]:
        """What is written as JSON."""
        on = {"stream": self.stream, "latents": self.latents}
        tests = {place: {name: asdict(one) for name, one in of.items()} for place, of in on.items()}
        return {**self._asdict(), **tests}

    def write(self, out: Path) -> Path:
        """Write all figures."""
        out.mkdir(parents=True, exist_ok=True)
        write_record(out / FILE, self.record)
        return out / FILE


def concepts(dictionary: str | Path, progress: Progress = silent, **request: object) -> ConceptTest:
    """Test whether a next token's logit moves along concepts, on the stream and on latents.

    Args:
        dictionary: Its path, or its name on the hub.
        progress: Called while it runs.
        request: Fields of `sae.run.config.ConceptsRequest`: concepts, prompts, target, ...

    Raises:
        ConfigError: If a field is unknown or out of range.
        ValueError: If a concept has too few texts, or there are too few texts for random sets.
    """
    checked = load_overrides(ConceptsRequest, [], request)
    return concepts_of(dictionary, checked, steps_to(progress))


def concepts_of(
    path: str | Path, request: ConceptsRequest, steps: Steps = silent_steps
) -> ConceptTest:
    """Read the sets, then the model on them, then test each concept."""
    sets = concept_sets(request.concepts, request.field, request.label)
    n_texts = min(request.texts, *map(len, sets.values()))
    random = _random_texts(request, n_texts, sets)
    prompts = _prompts(request)
    placed, loaded, differs = placed_in_model(
        path, request.model, request.dtype, request.hook_point,
        force=request.force, read_out=request.read_out,
    )  # fmt: skip
    require_next_token(loaded.model, "to say what a prediction moves along")
    with steps("gradients") as progress:
        gradients = _gradients(placed, loaded, prompts, request, progress)
    with steps("texts") as progress:
        texts = [text for of_one in sets.values() for text in of_one[:n_texts]] + random
        means = mean_rows(
            loaded.model, loaded.tokenizer, placed, texts, request.first_position, progress
        )
    tests = []
    for name, rows, gradient in zip(("stream", "latents"), means, gradients, strict=True):
        used = rows.abs().amax(dim=0) > 0  # of a latent that never fires nothing can be said
        if not bool(used.any()):
            raise MonosemaError(f"some latent must fire on the texts of {path}, got none")
        parts = list(rows[:, used].split(n_texts))
        chosen, others = dict(zip(sets, parts, strict=False)), parts[len(sets) :]
        how = {"level": request.level, "sides": request.sides}
        with steps(f"test, {name}") as progress:
            tests.append(tcav(chosen, others, gradient[:, used], **how, progress=progress))
    needed = sets_needed(len(sets), request.level, request.sides)
    stream, latents = tests
    return ConceptTest(
        stream, latents, n_texts, request.sets, len(prompts), needed, request.level, differs
    )


def concept_sets(path: str | Path, field: str = "text", label: str = "concept") -> dict[str, list]:
    """Texts by concept, from a folder or from records.

    A folder has NAME.txt with a text per line, or NAME/ with a text per file. A file of records
    (.jsonl, .parquet, .arrow) has the concept of each in a field.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If there is no concept, or one has fewer than two texts.
    """
    place, sets = Path(path), {}
    if place.is_dir():
        for entry in sorted(place.iterdir()):
            if entry.is_dir():
                parts = (file.read_text(encoding="utf-8") for file in sorted(entry.glob("*.txt")))
                sets[entry.name] = _filled(parts)
            elif entry.suffix == ".txt":
                lines = entry.read_text(encoding="utf-8").splitlines()
                sets[entry.stem] = _filled(lines)
    else:
        for document in documents(TextSource(path=str(path), field=field, label=label)):
            if document.label is not None:
                sets.setdefault(str(document.label), []).append(document.text)
    if not sets:
        raise MonosemaError(
            f"concepts must hold NAME.txt, NAME/ or records with {label!r}, got none in {path}"
        )
    for name, texts in sets.items():
        if len(texts) < FEWEST:
            raise MonosemaError(
                f"concept {name!r} must have at least {FEWEST} texts, got {len(texts)}; add some "
                "or leave it out"
            )
    return sets


def _filled(texts: Iterable[str]) -> list[str]:
    return [text.strip() for text in texts if text.strip()]


def _random_texts(
    request: ConceptsRequest, n_texts: int, sets: Mapping[str, Sequence[str]]
) -> list[str]:
    """Different texts for all random sets, none of them of a concept."""
    source = GLOSSES
    if request.random is not None:
        is_plain = request.random.endswith(".txt")
        field = TextSource.field if is_plain else request.random_field
        source = TextSource(path=request.random, field=field)
    known = {text for texts in sets.values() for text in texts}
    candidates = [text for text in dict.fromkeys(_texts_of(source)) if text not in known]
    wanted = request.sets * n_texts
    if len(candidates) < wanted:
        raise MonosemaError(
            f"random must hold {wanted:,} texts for {request.sets} sets of {n_texts}, got "
            f"{len(candidates):,}; add some or lower sets"
        )
    generator = torch.Generator().manual_seed(request.seed)
    order = torch.randperm(len(candidates), generator=generator)[:wanted].tolist()
    return [candidates[i] for i in order]


def _texts_of(source: TextSource, at_most: int = 50_000) -> list[str]:
    if source.path.endswith(".txt"):
        return _filled(Path(source.path).read_text(encoding="utf-8").splitlines())
    return [document.text for document in islice(documents(source), at_most)]


def _prompts(request: ConceptsRequest) -> list[str]:
    prompts = list(request.prompts)
    if request.prompt_file is not None:
        prompts += _texts_of(TextSource(path=request.prompt_file))
    if len(prompts) < FEWEST:
        raise MonosemaError(f"prompts must hold at least {FEWEST} texts, got {len(prompts)}")
    return prompts


def _gradients(
    placed: SparseAutoencoder,
    loaded: LoadedModel,
    prompts: Sequence[str],
    request: ConceptsRequest,
    report: Progress,
) -> tuple[Float[Tensor, "class d_out"], Float[Tensor, "class d_sae"]]:
    """How the answer moves with the stream, and with latents, at all positions that count."""
    against = None if request.against is None else token_of(loaded, request.against)
    metric = logit_difference(token_of(loaded, request.target), against)
    directions = directions_of(placed, torch.arange(placed.config.d_sae))
    of_stream, of_latents = [], []
    for done, text in enumerate(prompts, start=1):
        ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
        if ids.shape[1] <= request.first_position:
            raise MonosemaError(
                f"prompts must have more than {request.first_position} tokens, got {text!r}"
            )
        seen = see(loaded.model, placed, ids, 0)
        gradient, _ = gradient_at(loaded.model, placed, seen.ids, metric, torch.zeros(1))
        counted = gradient[0, request.first_position :].to(directions)
        of_stream.append(counted.sum(dim=0))
        scaled = counted * seen.size[request.first_position :].to(directions)
        of_latents.append(directions @ scaled.sum(dim=0))
        report(done, len(prompts), "prompts")
    return torch.stack(of_stream).cpu(), torch.stack(of_latents).cpu()


class BottleneckArm(NamedTuple):
    """One head on one place."""

    head: str
    place: str
    figures: Corrected


class BottleneckTest(NamedTuple):
    """Both heads on the stream and on the latents."""

    names: tuple[str, ...]
    """Concepts, in the order in which they are corrected."""
    arms: tuple[BottleneckArm, ...]
    floor: float
    """Share of the most frequent answer among the unseen texts."""
    n_fitted: int
    n_held_out: int
    n_repeated: int
    """Texts that came again and were left out."""
    differs: tuple[str, ...]
    """In what the model or the place is not the dictionary's; only where forced."""

    @property
    def section(self) -> Section:
        """A row for each head and place."""
        rows = [
            (arm.head, arm.place, *(f"{figure:.2f}" for figure in arm.figures.ends))
            for arm in self.arms
        ]
        note = (
            f"{self.n_fitted} texts fitted on, {self.n_held_out} unseen; answers right with "
            f"concepts as predicted, as they are ({', '.join(self.names)}), and as other texts' "
            f"are; the most frequent answer has {self.floor:.2f}"
        )
        note = with_differences(note, {"the dictionary": self.differs} if self.differs else {})
        columns = ("head", "on", "concepts right", "predicted", "corrected", "of others")
        return Section("concept bottleneck", ResultTable(columns, tuple(rows), note))

    def write(self, out: Path) -> Path:
        """Write all figures."""
        out.mkdir(parents=True, exist_ok=True)
        record = {
            **self._asdict(),
            "arms": [{**arm._asdict(), "figures": asdict(arm.figures)} for arm in self.arms],
        }
        write_record(out / BOTTLENECK, record)
        return out / BOTTLENECK


def bottleneck(
    dictionary: str | Path, progress: Progress = silent, **request: object
) -> BottleneckTest:
    """Fit answers by way of concepts to the mean stream and latents of texts, then correct them.

    Args:
        dictionary: Its path, or its name on the hub.
        progress: Called while it runs.
        request: Fields of `sae.run.config.BottleneckRequest`: records, k, head, ...

    Raises:
        ConfigError: If a field is unknown or out of range.
        ValueError: If a record has another form, or a concept is in no text or in all of a side.
    """
    return bottleneck_of(
        dictionary, load_overrides(BottleneckRequest, [], request), steps_to(progress)
    )


def bottleneck_of(
    path: str | Path, request: BottleneckRequest, steps: Steps = silent_steps
) -> BottleneckTest:
    """Read the records, then the model on their texts, then fit each head on each place."""
    fields = (request.field, request.answer, request.concepts)
    texts, answers, has, names, n_repeated = read_answered(request.records, fields)
    placed, loaded, differs = placed_in_model(
        path, request.model, request.dtype, request.hook_point,
        force=request.force, read_out=request.read_out,
    )  # fmt: skip
    with steps("texts") as progress:
        means = mean_rows(
            loaded.model, loaded.tokenizer, placed, texts, request.first_position, progress
        )
    made = np.random.default_rng(request.seed)
    unseen, seen = np.split(made.permutation(len(texts)), [round(request.held_out * len(texts))])
    for side, what in ((seen, "texts to fit on"), (unseen, "unseen texts")):
        for number, name in enumerate(names):
            check_two_classes(has[side, number], f"concept {name!r} in the {what}")
    y = np.unique(answers, return_inverse=True)[1]
    arms = []
    places = {"stream": means.stream.numpy(), "latents": csr_matrix(means.latents.numpy())}
    for place, units in places.items():
        for head, model in (
            ("bottleneck", ConceptBottleneck(request.k, request.head)),
            ("embedding", ConceptEmbedding(seed=request.seed)),
        ):
            with steps(f"{head}, {place}"):
                model.fit(units[seen], has[seen], y[seen])
                figures = corrected(model, units[unseen], has[unseen], y[unseen], request.seed)
                arms.append(BottleneckArm(head, place, figures))
    floor, n = float(np.bincount(y[unseen]).max() / len(unseen)), (len(seen), len(unseen))
    return BottleneckTest(tuple(names), tuple(arms), floor, *n, n_repeated, differs)
