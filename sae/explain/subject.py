"""What is explained, and its windows: collected once for whatever needs them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from activations_cache import seals
from activations_cache.checks import MonosemaError, Progress, silent
from sae.autoencoder import SparseAutoencoder
from sae.explain.collect.assemble import Assembler
from sae.explain.collect.run import collect
from sae.explain.collect.state import State
from sae.explain.collect.windows_file import write_windows
from sae.explain.config import WindowConfig
from sae.explain.scorers.choice import Tools
from sae.explain.text_at_rows import Cache
from sae.explain.windows import shuffled


@dataclass(frozen=True)
class Subject:
    """What is explained."""

    dictionary: SparseAutoencoder
    """The dictionary."""
    cache: Cache
    """Activations and texts, split by document."""
    hook_point: str
    """Which activations the dictionary reads."""
    token_strings: Sequence[str]
    """`activations_cache.Pieces`, or what stands for each id everywhere."""
    tools: Tools | None = None
    """What scorers need that look into the model."""
    known: dict[object, tuple[State, Assembler]] = field(default_factory=dict, repr=False)
    """What was collected, by its settings and where it was written."""

    def collected(
        self,
        config: WindowConfig,
        out_dir: Path | None = None,
        *,
        identity: dict[str, object] | None = None,
        progress: Progress | None = None,
    ) -> tuple[State, Assembler]:
        """Go over the cache once, and write the windows; an interrupted pass goes on.

        Args:
            config: What to keep.
            out_dir: Where windows.parquet and activity.parquet go; None writes nothing.
            identity: What the saved state of an interrupted pass depends on.
            progress: Called in both stages.
        """
        if (config, out_dir) in self.known:
            return self.known[config, out_dir]
        report, path = progress or silent, None
        if out_dir is not None:
            out_dir.mkdir(parents=True, exist_ok=True)
            path = out_dir / "windows.state.safetensors"
        state = collect(
            self.dictionary, self.cache, self.hook_point, config,
            state_path=path, identity=identity, progress=report,
        )  # fmt: skip
        tokens = self.cache.examples.tokens.numpy()
        assembler = Assembler(state, tokens, self.token_strings)
        if out_dir is not None and path is not None:
            write_windows(out_dir, state, assembler, report)
            seals.remove(out_dir, (path.name,))
        self.known[config, out_dir] = state, assembler
        return state, assembler


def chosen(state: State, n: int, named: Sequence[int], seed: int) -> list[int]:
    """The latents that are named, or n of the live ones by a hash.

    Raises:
        ValueError: If a named one is beyond the dictionary.
    """
    beyond = [latent for latent in named if latent >= state.d_sae]
    if beyond:
        raise MonosemaError(f"latents must be below d_sae={state.d_sae}, got {beyond[0]}")
    live = state.counts["n_fired"].nonzero()[0].tolist()
    return sorted(named) if named else sorted(shuffled(live, "latents", seed)[:n])
