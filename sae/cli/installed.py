"""Whether what a run will need is installed, asked before anything runs; torch is not loaded."""

from activations_cache.config import PACKAGE, locate, require_extra, require_reader
from sae.cli.run_config import CacheRunConfig, RunConfig


def require_installed(config: CacheRunConfig | RunConfig) -> None:
    """Refuse a run whose model, data or optional libraries are not there.

    Raises:
        FileNotFoundError: If a package that carries the model or data is missing.
        ValueError: If a library of one of the extras is missing.
    """
    cache = config.cache
    paths = [cache.model.path, *(source.path for source in cache.data.sources)]
    for path in paths:
        if path.startswith(PACKAGE):
            locate(path)
    require_reader(cache.model.path)
    if not isinstance(config, RunConfig):
        return
    explain = config.explain
    if explain.atlas is not None and explain.atlas.plane == "umap":
        require_extra("umap", "explain.atlas.plane=umap", "umap")
    if explain.autointerp is not None and explain.autointerp.llm.kind == "openai":
        require_extra("openai", "explain.autointerp.llm", "llm")
    if config.train.wandb is not None:
        require_extra("wandb", "train.wandb", "wandb")
