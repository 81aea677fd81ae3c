"""What is explained: a dictionary on a cache, its windows, and its scorers by name.

The windows are collected once for whatever needs them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from activations_cache import seals
from activations_cache.checks import Progress, silent
from monosema.checks import MonosemaError
from sae.autoencoder import SparseAutoencoder
from sae.explain.assemble import Assembler
from sae.explain.collect import collect, write_windows
from sae.explain.config import ScorerName, WindowConfig
from sae.explain.judges import Scorer
from sae.explain.model_scorers import (
    Embed,
    Embedding,
    LogLikelihood,
    NextLogProbs,
    OutputSide,
    Sensitivity,
    Surprisal,
)
from sae.explain.question_scorers import Detection, Fuzzing, Intruder, Rubric, Simulation
from sae.explain.reservoir import State
from sae.explain.text_at_rows import Cache
from sae.explain.windows import shuffled

_SCORERS: dict[str, Scorer] = {
    scorer.name: scorer for scorer in (Detection(), Fuzzing(), Simulation(), Rubric(), Intruder())
}

WITH_TOOLS: tuple[ScorerName, ...] = ("embedding", "surprisal", "output side", "sensitivity")
"""Those that need a model."""


@dataclass(frozen=True)
class Tools:
    """What a model gives to scorers."""

    embed: Embed
    """Texts to vectors."""
    log_likelihood: LogLikelihood
    """How probable a text is after a prefix."""
    next_log_probs: NextLogProbs
    """What amplifying a latent does to the next token."""
    promoted: Int[Tensor, "d_sae k"]
    """Token ids by the logit lens."""
    peaks_on: Callable[[int, Sequence[str]], list[float]]
    """A latent's largest activation on texts."""


def scorers_of(names: Sequence[ScorerName], tools: Tools | None = None) -> tuple[Scorer, ...]:
    """In the order of the names.

    Raises:
        ValueError: If one needs a model and there is none.
    """
    known = dict(_SCORERS)
    if tools is not None:
        more: tuple[Scorer, ...] = (
            Embedding(tools.embed),
            Surprisal(tools.log_likelihood),
            OutputSide(tools.next_log_probs, tools.promoted),
            Sensitivity(None, tools.peaks_on),
        )
        known |= {scorer.name: scorer for scorer in more}
    missing = [name for name in names if name not in known]
    if missing:
        raise MonosemaError(
            f"scorers must be {', '.join(known)} without a model, got {missing[0]!r}; "
            "use `sae explain`, which has one"
        )
    return tuple([known[name] for name in names])


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
