"""Steering all latents whose labels name some words, beside random ones that fire like them.

Steering a model of pictures: which of some words it then sees in them.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from activations_cache import io
from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.models import LoadedModel
from activations_cache.vision import LoadedVisionModel, load_any_model
from sae.autoencoder import SparseAutoencoder
from sae.browser import ResultTable
from sae.config import load_overrides
from sae.explain.tables import LatentAbout
from sae.run.context import Section, pieces_of, with_differences
from sae.run.finding import PictureReader, zero_shot
from sae.run.steering import (
    changes_of,
    model_of_dictionary,
    named_latents,
    neutral_tokens,
    placed,
    placed_in_model,
)
from sae.steer.choice import alike, target_tokens
from sae.steer.config import SteerRequest, SteerWordsRequest, latent_change
from sae.steer.edits import Edit
from sae.steer.generation import Generation, Patches, divergence, generate, measure_effect
from sae.steer.steering import Count, Steering


class ArmEffect(NamedTuple):
    """What steering several latents at once does; means over the prompts."""

    arm: str
    """What was steered."""
    latents: tuple[int, ...]
    """Their numbers."""
    target_gain: float
    """Rise of log p(target tokens) over the places of the base text, in nats."""
    target_share: float
    """Share of the steered text's tokens that are target tokens."""
    kl_neutral: float
    """KL(model as it is || steered) on neutral text, in nats per token."""
    perplexity: float
    """Of the steered text under the model as it is."""
    repeated: float
    """Share of the steered text's 3-grams that occur earlier in it."""
    n_chosen: int
    """Tokens of the prompts and their continuations on which the change ran."""
    n_changed: int
    """Those among them that it changed."""
    relative_size: float
    """Mean size of the change over the former, in norms of the stream."""
    texts: tuple[str, ...]
    """Continuations of the prompts."""


class SteeredByWords(NamedTuple):
    """What the latents about some words do, beside as many random ones."""

    words: tuple[str, ...]
    change: str
    latents: tuple[LatentAbout, ...]
    targets: tuple[str, ...]
    """Tokens of the words, whose probability is measured."""
    base: tuple[str, ...]
    """Continuations of the prompts by the model as it is."""
    arms: tuple[ArmEffect, ...]
    """The words first, then each set of random latents that fire as often and as strongly."""
    differs: tuple[str, ...] = ()
    """In what the model or the place is not the dictionary's; only where forced."""

    @property
    def sections(self) -> list[Section]:
        """The latents with their labels, and a row for each arm."""
        named = [
            (
                str(one.latent),
                one.label,
                f"{one.worth:.4g}",
                "" if one.auc is None else f"{one.auc:.3f}",
            )
            for one in self.latents
        ]  # fmt: skip
        rows = [
            (
                arm.arm, f"{arm.target_gain:+.2f}", f"{arm.target_share:.2f}",
                f"{arm.kl_neutral:.3f}", f"{arm.perplexity:.1f}", f"{arm.repeated:.2f}",
                f"{arm.n_changed} of {arm.n_chosen}", f"{arm.relative_size:.2f}",
            )
            for arm in self.arms
        ]  # fmt: skip
        note = (
            f"{self.change}; gain in log p of {' '.join(map(repr, self.targets))}; base: "
            f"{self.base[0]!r}; {self.arms[0].arm}: {self.arms[0].texts[0]!r}"
        )
        note = with_differences(note, {"the dictionary": self.differs} if self.differs else {})
        columns = ("arm", "gain", "share", "KL", "perplexity", "repeated", "tokens", "size")
        return [
            Section("latents", ResultTable(("latent", "label", "nats", "AUC"), tuple(named), "")),
            Section("steered", ResultTable(columns, tuple(rows), note)),
        ]

    def write(self, out: Path) -> Path:
        """Write all figures and texts."""
        out.mkdir(parents=True, exist_ok=True)
        record = {**self._asdict(), "arms": [arm._asdict() for arm in self.arms]}
        record["latents"] = [one._asdict() for one in self.latents]
        io.write_files({out / "words.json": json.dumps(record, indent=1).encode()})
        return out / "words.json"


def steer_words(
    dictionary: str | Path, progress: Progress = silent, **request: object
) -> SteeredByWords:
    """Steer all latents whose labels name some words, and as many random ones that fire like them.

    Wu et al. (2025, arXiv 2502.15576): latents are chosen by their explanations, then amplified
    where they fire, or calibrated (`sae.steer.Calibrate`).

    Args:
        dictionary: Its path, or its name on the hub; explained before.
        progress: Called while it runs.
        request: Fields of `sae.steer.config.SteerWordsRequest`: words, amplify or calibrate, ...

    Raises:
        ConfigError: If a field is unknown or out of range.
        FileNotFoundError: If the dictionary was not explained.
        ValueError: If no label names any of the words.
    """
    checked = load_overrides(SteerWordsRequest, [], request)
    return steer_words_of(dictionary, checked, progress)


def steer_words_of(
    path: str | Path, request: SteerWordsRequest, progress: Progress = silent
) -> SteeredByWords:
    """Choose the latents and their random counterparts, then measure what each arm does."""
    about = named_latents(path, request)
    where = (request.model, request.dtype, request.hook_point)
    dictionary, loaded, differs = placed_in_model(
        path, *where, force=request.force, read_out=request.read_out
    )
    arms = _arms(dictionary, [one.latent for one in about], request)
    subject = _Subject(dictionary, loaded, request)
    bases, effects = subject.continued(), []
    for name, latents in arms.items():
        effects.append(subject.effect(name, latents, bases))
        progress(len(effects), len(arms), "arms")
    pieces, change = pieces_of(loaded), "=".join(request.change)
    tokens = tuple(pieces[i] for i in subject.targets.tolist())
    texts = tuple(base.text for base in bases)
    return SteeredByWords(
        request.words, change, tuple(about), tokens, texts, tuple(effects), differs
    )


class _Subject:
    """A model with a dictionary, the prompts, and what effects are measured on."""

    def __init__(
        self, dictionary: SparseAutoencoder, loaded: LoadedModel, request: SteerWordsRequest
    ) -> None:
        self._dictionary, self._loaded, self._request = dictionary, loaded, request
        tokenizer = loaded.tokenizer
        words = [word.strip().lower() for word in request.words]
        begun = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
        targets = target_tokens(tokenizer, words) or [ids[0] for ids in begun if ids]
        if not targets:
            raise MonosemaError(f"words must have tokens, got {', '.join(words)}")
        self.targets = torch.tensor(targets)
        self._neutral = neutral_tokens(tokenizer, request.neutral, request.n_neutral)

    def continued(self) -> list[Generation]:
        asked, loaded = self._request, self._loaded
        options = {"max_new_tokens": asked.max_new_tokens, "chat": asked.chat}
        return [generate(loaded.model, loaded.tokenizer, p, **options) for p in asked.prompts]

    def effect(self, arm: str, latents: Sequence[int], bases: Sequence[Generation]) -> ArmEffect:
        model, asked = self._loaded.model, self._request

        def steered() -> Steering:
            where = {"positions": asked.positions, "first_position": asked.first_position}
            return Steering(model, changes_of(self._dictionary, latents, asked), **where)

        with steered() as steering:
            texts = self.continued()
        (count,) = steering.counts
        effects = [
            measure_effect(model, steered, base, text, self.targets)
            for base, text in zip(bases, texts, strict=True)
        ]
        return ArmEffect(
            arm=arm,
            latents=tuple(latents),
            target_gain=fmean(effect.target_gain for effect in effects),
            target_share=fmean(effect.target_share for effect in effects),
            kl_neutral=divergence(model, steered, self._neutral),
            perplexity=math.exp(fmean(effect.nll for effect in effects)),
            repeated=fmean(effect.repeated for effect in effects),
            n_chosen=count.n_chosen,
            n_changed=count.n_changed,
            relative_size=count.relative_size,
            texts=tuple(text.text for text in texts),
        )


def _arms(
    placed: SparseAutoencoder, latents: Sequence[int], request: SteerWordsRequest
) -> dict[str, tuple[int, ...]]:
    """The latents of the words, and sets of random ones."""
    arms = {"words": tuple(latents)}
    if request.controls and placed.stats is None:
        raise MonosemaError(
            "stats must be given to draw random latents that fire alike, got None; run `sae "
            "evaluate DICT --cache CACHE`, or set controls=0"
        )
    generator = torch.Generator().manual_seed(request.seed)
    for number in range(request.controls):
        assert placed.stats is not None
        arms[f"random latents {number + 1}"] = alike(placed.stats, latents, generator)
    return arms


class SteeredPictures(NamedTuple):
    """How a tower shares its probability between words, as it is and with latents changed."""

    files: tuple[str, ...]
    words: tuple[str, ...]
    base: Float[Tensor, "example word"]
    """Logits: scale x cosine."""
    steered: Float[Tensor, "example word"]
    changed: Count
    """On how many patches the change ran."""
    title: str
    differs: dict[str, tuple[str, ...]]

    @property
    def section(self) -> Section:
        """A row for each picture and word."""
        shares = [logits.softmax(dim=1) for logits in (self.base, self.steered)]
        rows = tuple(
            (Path(file).name, word, *(f"{float(share[i, j]):.3f}" for share in shares),
             f"{float(self.steered[i, j] - self.base[i, j]):+.3f}")
            for i, file in enumerate(self.files)
            for j, word in enumerate(self.words)
        )  # fmt: skip
        note = (
            f"share of each word among those given; ran on {self.changed.n_chosen} patches and "
            f"changed {self.changed.n_changed}, by {self.changed.relative_size:.2f} of the "
            "stream's norm"
        )
        columns = ("picture", "word", "base", "steered", "logit")
        return Section(self.title, ResultTable(columns, rows, with_differences(note, self.differs)))

    def _repr_html_(self) -> str:
        return self.section._repr_html_()


def steer_pictures(dictionary: str | Path, **request: object) -> SteeredPictures:
    """Show a tower of CLIP or SigLIP pictures, as it is and with latents changed on all patches.

    Args:
        dictionary: Its path, or its name on the hub.
        request: Fields of `sae.steer.config.SteerRequest`: latents=["7=10x"], the files as
            prompts=["a.png"], and targets=["dog", "cat"].

    Raises:
        ConfigError: If a field is unknown or out of range.
        ValueError: If the model has no tower for texts, or a file is no picture.
    """
    return steer_pictures_of(dictionary, load_overrides(SteerRequest, [], request))


@torch.no_grad()
def steer_pictures_of(path: str | Path, request: SteerRequest) -> SteeredPictures:
    """The same for a request."""
    known, differs = placed(
        path, request.hook_point, force=request.force, read_out=request.read_out
    )
    loaded, of_model = model_of_dictionary(
        path, known, request.model, request.dtype, load_any_model, request.force
    )
    if not isinstance(loaded, LoadedVisionModel) or not request.targets:
        raise MonosemaError(
            "targets must name words for a model of pictures, and be absent for one of texts, got "
            f"{list(request.targets)}"
        )
    reader = PictureReader(loaded, request.cache)
    model, pixels = zero_shot(loaded, request.targets), reader.pixels(request.prompts)
    edits = [Edit(known, latent=latent, **change)
             for latent, change in map(latent_change, request.latents)]  # fmt: skip
    base = model(pixels).logits[:, 0]
    with Steering(model, edits, positions=Patches(n_prefix=reader.n_prefix)) as steering:
        steered = model(pixels).logits[:, 0]
    differences = {str(path): differs + of_model} if differs + of_model else {}
    title = f"{', '.join(request.latents)} of {path}"
    return SteeredPictures(
        request.prompts, request.targets, base, steered, steering.counts[0], title, differences
    )
