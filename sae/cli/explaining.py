"""`sae explain DICT --cache CACHE`: explain any dictionary on any cache that fits it."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import activations_cache
from activations_cache.vision import load_any_model
from sae import pretrained
from sae.autoencoder import SparseAutoencoder
from sae.cli import console
from sae.cli.caches import model_of
from sae.config import ConfigError
from sae.explain.config import AutointerpConfig, ExplainConfig
from sae.explain.logit_lens import promoted_tokens
from sae.explain.run import explain
from sae.explain.scores import Mean
from sae.explain.summary import Summary
from sae.explain.with_llm import Subject, client_of, label_with_llm

N_TOKENS = 10
"""Promoted and suppressed tokens that an explainer is shown."""


def explain_dictionary(
    path: str, cache_path: str, hook_point: str | None, out: str | None, config: ExplainConfig
) -> None:
    """Label a dictionary without a language model, and by one if the config names one.

    Raises:
        ValueError: If the dictionary does not fit the cache.
    """
    cache = activations_cache.open(cache_path)
    hook = hook_point or cache.hook_points[0]
    if hook not in cache.hook_points:
        known = ", ".join(cache.hook_points)
        raise ConfigError(f"--hook-point must be one of {known}, got {hook!r}")
    # A wrong key must not cost the passes over the cache that come first.
    client = client_of(config.autointerp) if config.autointerp else None
    dictionary = pretrained.load(path)
    if dictionary.config.d_in != cache.d_model(hook):
        raise ValueError(
            f"{path} must read rows as wide as {hook} of {cache_path}, {cache.d_model(hook)}, got "
            f"d_in={dictionary.config.d_in}; name the hook point it was trained on"
        )
    out_dir = Path(out) if out else Path(path) / "explain"
    loaded = load_any_model(model_of(cache, None))
    if not hasattr(loaded, "tokenizer"):
        raise ValueError(
            f"{cache_path} must hold text to be explained by words, got images; "
            "see sae.explain.vision for those"
        )
    strings = _token_strings(loaded)
    with console.step("explain") as report:
        found = explain(dictionary, cache, hook, strings, config, out_dir, progress=report)
    show_labels(str(out_dir), found.summary, found.baselines)
    if config.autointerp is not None and client is not None:
        subject = Subject(dictionary, cache, hook, strings)
        with console.step("labels") as report:
            found_by_llm = label_with_llm(
                subject, config.autointerp, out_dir, client,
                promoted=promoted_strings(dictionary, loaded.model, strings, config.autointerp),
                identity={"cache": cache.fingerprint, "dictionary": digest_of(dictionary)},
                progress=report,
            )  # fmt: skip
        show_summary(path, found_by_llm, out_dir)


def show_labels(title: str, summary: Summary, baselines: Mapping[str, Summary]) -> None:
    """Print what came of the labels without a language model, failures first."""
    arms = {"its latents": summary, **baselines}
    rows = [
        (
            name,
            f"{arm.n_insufficient:,}",
            f"{arm.n_scored:,}",
            _with_ends(arm.beats_null),
            _with_ends(arm.auc),
            _with_ends(arm.auc_strong),
            _with_ends(arm.control_auc),
        )
        for name, arm in arms.items()
    ]
    columns = (
        "", "insufficient", "scored", "beat null", "AUC", "AUC, strongest tenth", "exchanged",
    )  # fmt: skip
    note = (
        f"{summary.n_latents:,} latents, {summary.n_dead:,} dead; labels without a language model, "
        f"scored on {summary.n_rows_score:,} rows of other documents; beat null: share of the live "
        "latents whose AUC beats its permutations at 1 %; chance is 0.5"
    )
    console.table(title, columns, rows, note)


def _with_ends(found: Mean) -> str:
    return f"{found.mean:.3f} ±{(found.high - found.low) / 2:.3f}"


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


def show_summary(name: str, summary: dict[str, Any], path: Path) -> None:
    """Print what came of the labels by a language model, failures first."""
    reasons = ", ".join(f"{n} {reason}" for reason, n in summary["failed_by_reason"].items())
    facts = [
        ("failed", f"{summary['n_failed']:,}" + (f" ({reasons})" if reasons else "")),
        ("insufficient", f"{summary['n_insufficient']:,}"),
        ("labelled", f"{summary['n_done']:,}"),
    ]
    facts += [(scorer, _figures(figures)) for scorer, figures in summary["scores"].items()]
    arms = {**summary["controls"]}
    arms |= {arm: found["scores"] for arm, found in summary["baselines"].items()}
    for arm, scores in arms.items():
        facts += [(f"{scorer}: {arm}", _figures(figures)) for scorer, figures in scores.items()]
    cost = summary["cost"]
    calls = f"{cost['requests']:,} calls, {cost['cached']:,} answers from the cache"
    n_tokens = cost["input_tokens"] + cost["output_tokens"]
    facts.append(("cost", f"{calls}, {n_tokens:,} tokens, ${cost['usd']:.4f}"))
    console.facts(f"{name}: labels by {_model(summary)}", facts, str(path))


def _figures(figures: dict[str, Any]) -> str:
    if figures["mean"] is None:
        return f"no value for {figures['n_without_value']} latents"
    half = "" if figures["half_width"] is None else f" ± {figures['half_width']:.3f}"
    return f"{figures['mean']:.3f}{half} (floor {figures['floor']:.2f}, n {figures['n']})"


def _model(summary: dict[str, Any]) -> str:
    return re.sub(r"[^\w./:-]", "", summary["config"]["llm"]["model"])
