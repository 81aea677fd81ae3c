"""Labels of any dictionary's latents on any cache that fits it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from activations_cache import ActivationCache, capture, io, seals
from activations_cache.checks import MonosemaError, Progress, require_extra, silent
from activations_cache.models import LoadedModel
from activations_cache.probe import readout, record_of
from activations_cache.text import NO_TOKEN
from activations_cache.vision import load_any_model
from sae.autoencoder import SparseAutoencoder
from sae.config import ConfigError
from sae.explain.atlas import draw_atlas
from sae.explain.autointerp import client_of, estimate_cost, label_with_llm
from sae.explain.config import AtlasConfig, AutointerpConfig, ExplainConfig, RuleConfig
from sae.explain.image_summary import ExplainedImages
from sae.explain.llm.chat import Client
from sae.explain.llm.local_client import LocalClient
from sae.explain.llm.store import Cost
from sae.explain.logit_lens import promoted_tokens, word_vectors
from sae.explain.model_scorers import amplified, divergences
from sae.explain.run import ExplainedTexts, Null, TextUnits
from sae.explain.run import explain as explain_latents
from sae.explain.subject import WITH_TOOLS, Subject, Tools, score_rules_of
from sae.read_out import ReadOutName
from sae.run.caches import words_of
from sae.run.config import refuse_unread
from sae.run.context import (
    CacheOrPath,
    DictionaryOrPath,
    FittedDictionary,
    Steps,
    fitted,
    holds_images,
    model_of,
    opened,
    pieces_of,
    results_of,
    silent_steps,
    steps_to,
)
from sae.run.images import image_label_table, pictures_of

N_PROMPTS, PROMPT_TOKENS, N_PROMOTED = 8, 16, 10
N_TOKENS = 10
"""Promoted and suppressed tokens that an explainer is shown."""


class ExplainRequest(NamedTuple):
    """Which dictionary is explained, and on what."""

    dictionary: DictionaryOrPath
    cache: CacheOrPath
    hook_point: str | None = None
    """That of the dictionary when absent."""
    out: str | Path | None = None
    """Where the files go; `explain` in the dictionary's directory when absent."""
    narrow: DictionaryOrPath | None = None
    """A narrower dictionary, whose latents are the parents."""
    force: bool = False
    """Whether a dictionary of another model or place is explained as well."""
    read_out: ReadOutName | None = None
    """How its latents are read; as the dictionary is when absent."""


class DictionaryExplanation(NamedTuple):
    """What is known of a dictionary's latents after explaining it; a part not made is None."""

    path: Path | None
    """Directory of the files; None where none were written."""
    labels: ExplainedTexts | ExplainedImages
    """Labels without a language model, and their scores."""
    rules: dict[str, Any] | None = None
    """Scores of the labels, executed as rules on windows; of texts."""
    atlas: dict[str, Any] | None = None
    """What the map says; of texts."""
    by_llm: dict[str, Any] | None = None
    """Summary of the labels by a language model, if the config names one."""
    differs: tuple[str, ...] = ()
    """In what the cache differs from what the dictionary was trained on; only where forced."""

    def _repr_html_(self) -> str:
        if isinstance(self.labels, ExplainedImages):
            return image_label_table(self.labels)._repr_html_()
        return self.labels._repr_html_()


Parts = tuple[ActivationCache, FittedDictionary, SparseAutoencoder | None]
"""The cache, the dictionary and the narrower one."""


def explain(  # noqa: PLR0913
    dictionary: DictionaryOrPath,
    cache: CacheOrPath,
    config: ExplainConfig | None = None,
    *,
    hook_point: str | None = None,
    out: str | Path | None = None,
    narrow: DictionaryOrPath | None = None,
    force: bool = False,
    read_out: ReadOutName | None = None,
    progress: Progress = silent,
) -> DictionaryExplanation:
    """Label a dictionary's latents and score the labels.

    A dictionary that is passed by its path is explained into its directory. One that is passed as
    it is, without `out`, is only labelled: what needs files (rules, map, baselines, a language
    model) is left out.

    Args:
        dictionary: What is explained.
        cache: On what.
        config: How; the defaults when absent.
        hook_point: Which stream of the cache; that of the dictionary when absent.
        out: Where the files go.
        narrow: A narrower dictionary: which of its latents were split?
        force: Explain a dictionary of another model or place too; the result names what differs.
        read_out: "linear" or "refined"; as the dictionary is read when absent.
        progress: Called in every step.

    Raises:
        TypeError: If an argument is of another class.
        ValueError: If the dictionary does not fit the cache.
    """
    request = ExplainRequest(dictionary, cache, hook_point, out, narrow, force, read_out)
    return explain_dictionary(request, config or ExplainConfig(), steps_to(progress))


def explain_dictionary(
    request: ExplainRequest, config: ExplainConfig, steps: Steps = silent_steps
) -> DictionaryExplanation:
    """Label a dictionary without a language model, and by one if the config names one."""
    parts, out = _parts(request, config), _out_of(request)
    # A wrong key must not cost the passes over the cache that come first.
    client = None if config.autointerp is None else client_of(config.autointerp)
    if out is None:
        if client is not None:
            raise ConfigError("out must be given for labels by a language model, got none")
        if unread := [name for name in ("rules", "atlas", "weights") if getattr(config, name)]:
            raise ConfigError(f"out must be given for {unread[0]}, which writes files, got none")
        return _explained(parts, config, None, client, steps)
    with io.only_one(out / ".explain.lock", f"the labels in {out}"):
        _record_origin(out, *parts[:2])
        return _explained(parts, config, out, client, steps)


def _explained(
    parts: Parts, config: ExplainConfig, out: Path | None, client: Client | None, steps: Steps
) -> DictionaryExplanation:
    cache, one, narrow = parts
    if holds_images(cache):
        with steps("explain") as progress:
            words = words_of(cache, config.images, progress)
            pictures = pictures_of(cache, config, one.dictionary, one.hook_point, words)
            labels = explain_latents(one.dictionary, pictures, out, progress=progress)
        return DictionaryExplanation(out, labels, differs=one.differs)
    if out is not None:
        rules, atlas = config.rules or RuleConfig(), config.atlas or AtlasConfig()
        config = replace(config, rules=rules, atlas=atlas)
    return explain_texts(
        one, cache, _language_model(cache), config, out, narrow=narrow, client=client, steps=steps
    )


def _language_model(cache: ActivationCache) -> LoadedModel:
    loaded = load_any_model(model_of(cache))
    assert isinstance(loaded, LoadedModel), "a cache of texts records a language model"
    return loaded


def explain_texts(  # noqa: PLR0913
    one: FittedDictionary,
    cache: ActivationCache,
    loaded: LoadedModel,
    config: ExplainConfig,
    out: Path | None,
    *,
    null: Null = "random",
    narrow: SparseAutoencoder | None = None,
    client: Client | None = None,
    steps: Steps = silent_steps,
) -> DictionaryExplanation:
    """Label a dictionary, and do what else the config has: the rules executed, the map, a model.

    Args:
        one: The dictionary.
        cache: Of texts.
        loaded: The model that made it.
        config: How.
        out: Where the files go; None writes none, and then only labels are made.
        null: What stands beside the curve of completeness.
        narrow: A narrower dictionary, whose latents are the parents.
        client: Who answers; the one that the config names when absent.
        steps: Shows the steps.
    """
    subject, more = _subject(one, config, cache, loaded)
    vectors = word_vectors(loaded.tokenizer, readout(loaded.model)) if config.weights else None
    strings = subject.token_strings
    texts = TextUnits(subject.cache, subject.hook_point, config, strings, null, vectors)
    with steps("explain") as progress:
        labels = explain_latents(one.dictionary, texts, out, progress=progress)
    result = DictionaryExplanation(out, labels, differs=one.differs)
    if out is None:
        return result
    if config.rules is not None:
        with steps("rules") as progress:
            rules = score_rules_of(
                subject, labels.labels, labels.names, config.rules, out,
                identity=more["identity"], progress=progress,
            )  # fmt: skip
        result = result._replace(rules=rules)
    if config.atlas is not None:
        with steps("atlas") as progress:
            atlas = draw_atlas(
                one.dictionary, subject.cache, subject.hook_point, config.atlas, out,
                narrow=narrow, progress=progress,
            )  # fmt: skip
        result = result._replace(atlas=atlas)
    if (asked := config.autointerp) is not None:
        client = client or client_of(asked)
        with steps("labels") as progress:
            by_llm = label_with_llm(subject, asked, out, client, **more, progress=progress)
        result = result._replace(by_llm=by_llm)
    return result


def estimate(request: ExplainRequest, config: ExplainConfig, progress: Progress = silent) -> Cost:
    """Estimate what the answers of a language model would take at most; nothing is called.

    Raises:
        ConfigError: If the config names none, or the cache is of images.
    """
    cache, one, _ = _parts(request, config)
    if config.autointerp is None:
        raise ConfigError("autointerp.llm.model must be named to be estimated, got none")
    subject, more = _subject(one, config, cache, _language_model(cache))
    out = _out_of(request) or Path()
    return estimate_cost(subject, config.autointerp, out, **more, progress=progress)


def _parts(request: ExplainRequest, config: ExplainConfig) -> Parts:
    """The cache, the dictionary and the narrower one, once all fit each other and the config."""
    cache, force = opened(request.cache), request.force
    hook = request.hook_point
    if hook is not None and hook not in cache.hook_points:
        known = ", ".join(cache.hook_points)
        raise ConfigError(f"--hook-point must be one of {known}, got {hook!r}")
    refuse_unread("explain", config, of_images=holds_images(cache))
    if config.atlas is not None and config.atlas.plane == "umap":
        require_extra("umap", "explain.atlas.plane=umap", "umap")
    one = fitted(request.dictionary, cache, hook, force=force, read_out=request.read_out)
    if request.narrow is None:
        return cache, one, None
    narrow = fitted(request.narrow, cache, one.hook_point, force=force)
    if narrow.outputs != one.outputs:
        raise MonosemaError(
            f"{narrow.name} must predict {', '.join(one.outputs)} as {one.name} does, got one of "
            f"{', '.join(narrow.outputs)}; pass a narrower dictionary of that place"
        )
    return cache, one, narrow.dictionary


def _out_of(request: ExplainRequest) -> Path | None:
    if request.out is not None:
        return Path(request.out)
    if isinstance(request.dictionary, SparseAutoencoder):
        return None
    return results_of(request.dictionary) / "explain"


ORIGIN = "origin.json"
"""What labels were made of, next to them."""


def _record_origin(out: Path, cache: ActivationCache, one: FittedDictionary) -> None:
    record = {
        "dictionary": one.name,
        "dictionary_sha256": digest_of(one.dictionary),
        "cache": cache.fingerprint,
        "inputs": one.inputs,
        "outputs": one.outputs,
        "differs": one.differs,
        "read_out": one.dictionary.read_by,
    }
    seals.write(out, {ORIGIN: (json.dumps(record, indent=1) + "\n").encode()})


def _subject(
    one: FittedDictionary, config: ExplainConfig, cache: ActivationCache, loaded: LoadedModel
) -> tuple[Subject, dict[str, Any]]:
    """What is explained, and what a language model is told beside it."""
    dictionary, strings = one.dictionary, pieces_of(loaded)
    tools = tools_for(config, one, cache, loaded)
    subject = Subject(dictionary, one.rows_of(cache), one.hook_point, strings, tools)
    promoted = []
    if config.autointerp is not None:
        promoted = promoted_strings(dictionary, loaded.model, strings, config.autointerp)
    identity = {"cache": cache.fingerprint, "dictionary": digest_of(dictionary)}
    return subject, {"promoted": promoted, "identity": identity}


def tools_for(
    config: ExplainConfig,
    one: FittedDictionary,
    cache: ActivationCache,
    loaded: LoadedModel,
) -> Tools | None:
    """The tools, or None if no scorer that is asked for needs them.

    Raises:
        ConfigError: If one is asked for that writes to the one stream that a dictionary predicts,
            and it predicts several.
    """
    parts = (config.rules, config.autointerp)
    wanted = {name for part in parts if part is not None for name in part.scorers}
    if not wanted & set(WITH_TOOLS):
        return None
    if len(one.outputs) != 1:
        raise ConfigError(
            f"scorers must be none of {', '.join(WITH_TOOLS)} for a dictionary that predicts "
            f"{', '.join(one.outputs)}, got one; leave it out"
        )
    client = LocalClient(loaded, "the model that is explained")
    skipped = cache.manifest.plan.skip_positions

    @torch.no_grad()
    def peaks_on(latent: int, texts: Sequence[str]) -> list[float]:
        peaks = []
        for text in texts:
            ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
            with capture(loaded.model, list(one.inputs)) as run:
                streams = run(ids)
            rows = torch.cat([streams[point][0, skipped:].float() for point in one.inputs], dim=1)
            acts = one.dictionary.encode_dense(rows)[:, latent]
            peaks.append(float(acts.max()) if len(acts) else 0.0)
        return peaks

    examples = cache.examples
    neutral = examples.tokens[examples.split == 2][:, :PROMPT_TOKENS]
    neutral = neutral[(neutral != NO_TOKEN).all(dim=1)][:N_PROMPTS]
    if not len(neutral):
        raise MonosemaError(f"{cache.path} must have held-out examples for prompts, got none")
    lens = promoted_tokens(one.dictionary, readout(loaded.model), None, N_PROMOTED)
    return Tools(
        client.embed, client.log_likelihood,
        amplified(loaded.model, neutral.long(), one.dictionary, one.outputs[0]), lens.promoted,
        peaks_on,
        divergences(
            loaded.model, examples.tokens, one.dictionary, (one.inputs, one.outputs[0]),
            first_position=skipped,
        ),
    )  # fmt: skip


def digest_of(dictionary: SparseAutoencoder) -> str:
    """A hash of a dictionary's configuration and parameters, and of a refined read-out."""
    digest = hashlib.sha256(repr(dictionary.config).encode())
    for name, parameter in dictionary.state_dict().items():
        digest.update(name.encode() + parameter.detach().cpu().contiguous().numpy().tobytes())
    if dictionary.read_by == "refined":
        digest.update(dictionary.require_read_out().sha256.encode())
    return digest.hexdigest()


def promoted_strings(
    dictionary: SparseAutoencoder,
    model: nn.Module,
    token_strings: Sequence[str],
    config: AutointerpConfig,
) -> list[tuple[list[str], list[str]]]:
    """Tokens that each latent makes likelier and less likely; nothing if they are not wanted."""
    if not config.logit_lens or record_of(model).logits is None:
        return []
    lens = promoted_tokens(dictionary, readout(model), None, N_TOKENS)
    ends = zip(lens.promoted.tolist(), lens.suppressed.tolist(), strict=True)
    return [
        ([str(token_strings[i]) for i in up], [str(token_strings[i]) for i in down])
        for up, down in ends
    ]
