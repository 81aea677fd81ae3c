"""`sae cache info`, `sae cache sites`, `sae cache import` and `sae verify`."""

from pathlib import Path

import activations_cache
from activations_cache import ActivationCache
from activations_cache.config import Dtype, ModelConfig
from activations_cache.hooks import sites
from activations_cache.importing import import_array
from activations_cache.recompute import recompute
from activations_cache.summary import HookSummary, summarise
from activations_cache.vision import load_any_model
from sae.cli import console
from sae.cli.run_config import CacheRunConfig

BARS = " ▁▂▃▄▅▆▇█"


def build_cache(config: CacheRunConfig) -> None:
    """Build the cache of a configuration, or go on with it, and print its page."""
    path = config.cache_path or Path(config.output) / "cache"
    with console.step("cache") as report:
        cache = activations_cache.build(config.cache, path, progress=report)
    show_cache(cache)


def verify_cache(path: str, *, with_model: bool, moved: str | None) -> int:
    """Check a cache's files, and on request its rows; returns the exit code."""
    cache = activations_cache.open(path)
    with console.step("verify") as report:
        problems = cache.verify(progress=report)
    if with_model:
        with console.step("recompute") as report:
            problems += recompute(cache, load_any_model(model_of(cache, moved)), progress=report)
    for problem in problems:
        console.error(str(problem))
    if not problems:
        also = ", 64 of them computed again" if with_model else ""
        console.OUT.print(
            f"{path}: {cache.n_rows:,} rows in {len(cache.hook_points)} hook points, whole{also}"
        )
    return 1 if problems else 0


def show_cache(cache: ActivationCache) -> None:
    """Print one page about a cache."""
    with console.step("look") as report:
        found = [summarise(cache, name, report) for name in cache.hook_points]
    show_page(cache, found)


def show_page(cache: ActivationCache, found: list[HookSummary]) -> None:
    """Print what a cache is, and what the rows of each hook point look like."""
    plan, manifest = cache.manifest.plan, cache.manifest
    n_positions = plan.n_examples * plan.context
    left_out = n_positions - manifest.n_rows
    facts = [
        ("rows", f"{manifest.n_rows:,} in {plan.n_shards:,} shards"),
        ("size", f"{cache.n_bytes / 1e9:,.2f} GB, {plan.dtype}, compression {plan.compression}"),
        ("examples", f"{plan.n_examples:,} of {plan.context:,} positions"),
        ("left out", f"{left_out:,} of {n_positions:,} positions ({left_out / n_positions:.2%})"),
        ("not finite", f"{manifest.n_quarantined:,} of these"),
        ("fingerprint", cache.fingerprint),
    ]
    console.facts(str(cache.path), [*facts, *_made_from(cache)])
    for summary in found:
        note = f"{summary.n_sampled:,} training rows, spread evenly"
        console.facts(summary.hook_point, _summary_rows(cache, summary), note)


def _made_from(cache: ActivationCache) -> list[tuple[str, str]]:
    request = cache.manifest.plan.request.get("config", {})
    model = request.get("model", {}).get("path")
    return [("model", f"{model} ({cache.identity['model']['dtype']})")] if model else []


def _summary_rows(cache: ActivationCache, summary: HookSummary) -> list[tuple[str, str]]:
    quantiles = cache[summary.hook_point].statistics.norm_quantiles
    low, high = summary.norm_edges[0], summary.norm_edges[-1]
    top = max(summary.norm_counts)
    bars = "".join(BARS[-(-8 * count // top)] for count in summary.norm_counts)
    massive = ", ".join(f"{m.dimension} ({m.ratio:.0f} x)" for m in summary.massive)
    return [
        ("width", f"{cache.d_model(summary.hook_point):,}"),
        ("norm", "  ".join(f"{name}: {value:.4g}" for name, value in quantiles.items())),
        ("norms, log scale", f"{low:.3g} {bars} {high:.3g}"),
        ("massive dimensions", massive or "none"),
        ("effective rank", f"{summary.effective_rank:.0f} (RankMe)"),
        ("share of the mean", f"{summary.mean_share:.1%} of the mean square norm"),
    ]


def model_of(cache: ActivationCache, moved: str | None) -> ModelConfig:
    """Return the configuration of the model that a cache records."""
    recorded = cache.manifest.plan.request.get("config", {}).get("model")
    if recorded is None:
        raise ValueError(f"{cache.path} must record its model to be compared, got a cache without")
    path, revision = (moved, None) if moved else (recorded["path"], recorded["revision"])
    return ModelConfig(path=path, revision=revision, dtype=recorded["dtype"])


def list_sites(model: str) -> None:
    """Print the hook points of a model, one per line."""
    with console.step("load") as report:
        loaded = load_any_model(ModelConfig(path=model), progress=report)
    for name in sites(loaded.model):
        console.OUT.print(name, soft_wrap=True)


def import_cache(array: str, path: str, hook_point: str, dtype: Dtype) -> None:
    """Turn an array into a cache and print its page."""
    with console.step("import") as report:
        cache = import_array(array, path, hook_point=hook_point, dtype=dtype, progress=report)
    show_cache(cache)
