"""`sae explain DICT --cache CACHE`: explain any dictionary on any cache that fits it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

import activations_cache
from activations_cache import ActivationCache
from activations_cache.vision import load_any_model
from sae import pretrained
from sae.autoencoder import SparseAutoencoder
from sae.cli import console
from sae.cli.caches import model_of
from sae.cli.explained import (
    show_atlas,
    show_estimate,
    show_labels,
    show_scores,
    show_summary,
)
from sae.cli.image_runs import explain_pictures, holds_images
from sae.cli.image_table import show_image_labels
from sae.cli.run_config import refuse_unread
from sae.cli.scoring_tools import tools_for
from sae.config import ConfigError
from sae.explain.atlas.run import draw_atlas
from sae.explain.autointerp import client_of, estimate_cost, label_with_llm
from sae.explain.config import AtlasConfig, AutointerpConfig, ExplainConfig, RuleConfig
from sae.explain.logit_lens import promoted_tokens
from sae.explain.rule_scores import score_rules_of
from sae.explain.run import explain
from sae.explain.subject import Subject

N_TOKENS = 10
"""Promoted and suppressed tokens that an explainer is shown."""


class Task(NamedTuple):
    """What the command was asked."""

    path: str
    """The dictionary."""
    cache: str
    hook_point: str | None
    out: str | None
    narrow: str | None
    """A narrower dictionary, whose latents are the parents."""
    dry_run: bool


def explain_dictionary(task: Task, config: ExplainConfig) -> None:
    """Label a dictionary without a language model, and by one if the config names one.

    Raises:
        ValueError: If the dictionary does not fit the cache.
    """
    cache = activations_cache.open(task.cache)
    hook = task.hook_point or cache.hook_points[0]
    if hook not in cache.hook_points:
        known = ", ".join(cache.hook_points)
        raise ConfigError(f"--hook-point must be one of {known}, got {hook!r}")
    refuse_unread("explain", config, of_images=holds_images(cache))
    if holds_images(cache):
        _of_images(task, cache, hook, config)
        return
    # A wrong key must not cost the passes over the cache that come first.
    wants_client = config.autointerp is not None and not task.dry_run
    client = client_of(config.autointerp) if config.autointerp and wants_client else None
    dictionary, narrow = (
        None if path is None else _fitting(path, cache, hook, task.cache)
        for path in (task.path, task.narrow)
    )
    assert dictionary is not None
    loaded = load_any_model(model_of(cache, None))
    tools = tools_for(config, dictionary, cache, hook, loaded)  # pyright: ignore[reportArgumentType]
    subject = Subject(dictionary, cache, hook, _token_strings(loaded), tools)
    out_dir = Path(task.out) if task.out else Path(task.path) / "explain"
    identity: dict[str, object] = {
        "cache": cache.fingerprint, "dictionary": digest_of(dictionary)
    }  # fmt: skip
    promoted = []
    if config.autointerp is not None:
        promoted = promoted_strings(
            dictionary, loaded.model, subject.token_strings, config.autointerp
        )
    more = {"promoted": promoted, "identity": identity}
    if task.dry_run and config.autointerp is not None:
        with console.step("estimate") as report:
            cost = estimate_cost(subject, config.autointerp, out_dir, **more, progress=report)
        show_estimate(task.path, cost, config.autointerp)
        return
    without_llm(subject, config, out_dir, identity, narrow)
    if config.autointerp is not None and client is not None:
        with console.step("labels") as report:
            found_by_llm = label_with_llm(
                subject, config.autointerp, out_dir, client, **more, progress=report
            )
        show_summary(task.path, found_by_llm, out_dir)


def _of_images(task: Task, cache: ActivationCache, hook: str, config: ExplainConfig) -> None:
    out_dir = Path(task.out) if task.out else Path(task.path) / "explain"
    dictionary = _fitting(task.path, cache, hook, task.cache)
    with console.step("explain") as report:
        found = explain_pictures(dictionary, cache, hook, config, out_dir, report)
    show_image_labels(str(out_dir), found)


def _fitting(
    path: str, cache: ActivationCache, hook_point: str, cache_path: str
) -> SparseAutoencoder:
    dictionary = pretrained.load(path)
    if dictionary.config.d_in != cache.d_model(hook_point):
        raise ValueError(
            f"{path} must read rows as wide as {hook_point} of {cache_path}, "
            f"{cache.d_model(hook_point)}, got d_in={dictionary.config.d_in}; name the hook point "
            "it was trained on"
        )
    return dictionary


def without_llm(
    subject: Subject,
    config: ExplainConfig,
    out_dir: Path,
    identity: dict[str, object],
    narrow: SparseAutoencoder | None,
) -> None:
    """Labels, the rules executed, the map."""
    dictionary, cache, hook = subject.dictionary, subject.cache, subject.hook_point
    with console.step("explain") as report:
        found = explain(
            dictionary, cache, hook, subject.token_strings, config, out_dir, progress=report
        )
    show_labels(str(out_dir), found.summary, found.baselines)
    with console.step("rules") as report:
        scores = score_rules_of(
            subject, found.labels, found.names, config.rules or RuleConfig(), out_dir,
            identity=identity, progress=report,
        )  # fmt: skip
    show_scores("labels executed as rules, on windows", scores, out_dir)
    with console.step("atlas") as report:
        drawn = draw_atlas(
            dictionary, cache, hook, config.atlas or AtlasConfig(), out_dir,
            narrow=narrow, progress=report,
        )  # fmt: skip
    show_atlas(drawn, out_dir)


def _token_strings(loaded: Any) -> list[str]:
    embeddings = loaded.model.get_input_embeddings().weight
    return loaded.tokenizer.batch_decode([[i] for i in range(embeddings.shape[0])])


def digest_of(dictionary: SparseAutoencoder) -> str:
    """A hash of a dictionary's configuration and parameters."""
    digest = hashlib.sha256(repr(dictionary.config).encode())
    for name, parameter in dictionary.state_dict().items():
        digest.update(name.encode() + parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def promoted_strings(
    dictionary: SparseAutoencoder,
    model: nn.Module,
    token_strings: Sequence[str],
    config: AutointerpConfig,
) -> list[tuple[list[str], list[str]]]:
    """Tokens that each latent makes likelier and less likely; nothing if they are not wanted."""
    readout: Any = model
    if not config.logit_lens:
        return []
    weight: Tensor = readout.get_output_embeddings().weight.detach()
    found = promoted_tokens(dictionary, weight, None, N_TOKENS)
    ends = zip(found.promoted.tolist(), found.suppressed.tolist(), strict=True)
    return [
        ([str(token_strings[i]) for i in up], [str(token_strings[i]) for i in down])
        for up, down in ends
    ]
