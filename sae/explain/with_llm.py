"""Labels by a language model for a dictionary: windows, labels, scores, controls, files."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from activations_cache.progress import Progress, silent
from sae.autoencoder import SparseAutoencoder
from sae.explain.baselines import baseline_dictionary
from sae.explain.collect.assemble import Assembler
from sae.explain.collect.run import collect
from sae.explain.collect.state import State
from sae.explain.collect.store import write_windows
from sae.explain.config import AutointerpConfig
from sae.explain.explainers import LLMExplainer
from sae.explain.llm.answers import AnswerCache
from sae.explain.llm.budget import Cost
from sae.explain.llm.caller import Caller
from sae.explain.llm.chat import Client
from sae.explain.pipeline import Explained, Plan, estimate_all, explain_all
from sae.explain.results import export_neuronpedia, summarise, write_results
from sae.explain.scorers.detection import Detection, Fuzzing
from sae.explain.scorers.intruder import Intruder
from sae.explain.scorers.rubric import Rubric
from sae.explain.scorers.score import Scorer
from sae.explain.scorers.simulation import Simulation
from sae.explain.windows import LatentWindows, shuffled
from sae.explain.words import Cache

ANSWERS = "llm.sqlite"
_SAMPLE = 8192

_SCORERS: dict[str, Scorer] = {
    scorer.name: scorer for scorer in (Detection(), Fuzzing(), Simulation(), Rubric(), Intruder())
}

_log = logging.getLogger(__name__)


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
    """Each token as text."""

    def collected(self, config: AutointerpConfig, **more: Any) -> tuple[State, Assembler]:
        """Go over the cache once."""
        state = collect(self.dictionary, self.cache, self.hook_point, config.windows, **more)
        tokens = self.cache.examples.tokens.numpy()
        return state, Assembler(state, tokens, self.token_strings)


def label_with_llm(
    subject: Subject,
    config: AutointerpConfig,
    out_dir: Path,
    client: Client,
    *,
    promoted: Sequence[tuple[Sequence[str], Sequence[str]]] = (),
    identity: dict[str, object] | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Collect windows, ask for labels, score them and their controls, write all down.

    Args:
        subject: What is explained.
        config: How many latents, which style, which scorers, what it may cost.
        out_dir: Where the files go; the answers are kept there too unless the config says where.
        client: Who answers.
        promoted: For each latent the tokens that it makes likelier and less likely.
        identity: What the saved state of an interrupted pass depends on.
        progress: Called in every stage.

    Returns:
        The summary, as it is written to explanations.json.

    Raises:
        EndpointError: If the endpoint does not serve us.
        ReplayMissError: If an answer is missing in replay mode.
    """
    report = progress or silent
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "windows.state.safetensors"
    state, assembler = subject.collected(
        config, state_path=path, identity=identity, progress=report
    )
    write_windows(out_dir, state, assembler, report)
    path.unlink(missing_ok=True)
    latents = [assembler.of(latent) for latent in _chosen(state, config)]
    if promoted:
        latents = [_with_tokens(latent, *promoted[latent.latent]) for latent in latents]
    groups = {"": latents}
    if config.n_baseline:
        groups |= _baselines(subject, config, latents, report)
    found, caller = asyncio.run(_run(groups, config, out_dir, client, report))
    summary = summarise(found[""], caller)
    summary["baselines"] = {
        name: summarise(results, None) for name, results in found.items() if name
    }
    summary["config"] = asdict(config)
    write_results(out_dir, found[""], summary)
    if config.neuronpedia_model:
        export_neuronpedia(
            out_dir, found[""], latents, config.neuronpedia_model, config.neuronpedia_layer
        )
    return summary


async def _run(
    groups: dict[str, list[LatentWindows]],
    config: AutointerpConfig,
    out_dir: Path,
    client: Client,
    report: Progress,
) -> tuple[dict[str, list[Explained]], Caller]:
    answers = None
    if config.llm.cache_mode != "off":
        where = Path(config.llm.cache_path) if config.llm.cache_path else out_dir / ANSWERS
        answers = AnswerCache(where, replay=config.llm.cache_mode == "replay")
    caller = Caller(client, config.llm, answers)
    wanted = Cost()
    for latents in groups.values():
        wanted = wanted.plus(await estimate_all(latents, plan_of(config), caller))
    _log.warning(
        "at most about %s calls, %s tokens, $%.4f before answers that are cached",
        f"{wanted.requests:,}", f"{wanted.tokens:,}", wanted.usd(config.llm),
    )  # fmt: skip
    found = {}
    try:
        for name, latents in groups.items():
            plan = plan_of(config, with_controls=not name)
            found[name] = await explain_all(latents, plan, caller, report)
    finally:
        if answers is not None:
            answers.close()
    return found, caller


def plan_of(config: AutointerpConfig, *, with_controls: bool = True) -> Plan:
    """The explainer and the scorers that a config names."""
    return Plan(
        LLMExplainer(config.style, config.contrastive, config.logit_lens),
        tuple(_SCORERS[name] for name in config.scorers),
        config.min_windows,
        config.n_controls if with_controls else 0,
    )


def _chosen(state: State, config: AutointerpConfig) -> list[int]:
    """The latents that are named, or as many of the live ones as wanted, by a hash."""
    if config.latents:
        beyond = [latent for latent in config.latents if latent >= state.d_sae]
        if beyond:
            raise ValueError(f"latents must be below d_sae={state.d_sae}, got {beyond[0]}")
        return sorted(config.latents)
    live = state.counts["n_fired"].nonzero()[0].tolist()
    return sorted(shuffled(live, "latents", config.windows.seed)[: config.n_latents])


def _with_tokens(
    latent: LatentWindows, promoted: Sequence[str], suppressed: Sequence[str]
) -> LatentWindows:
    return replace(latent, promoted=tuple(promoted), suppressed=tuple(suppressed))


def _baselines(
    subject: Subject, config: AutointerpConfig, latents: list[LatentWindows], report: Progress
) -> dict[str, list[LatentWindows]]:
    """Random directions and raw neurons as dense as the median of the latents."""
    ids = subject.cache.rows(("explain",))
    rows = subject.cache[subject.hook_point][ids[:: max(1, len(ids) // _SAMPLE)]]
    densities = sorted(latent.density for latent in latents)
    n, density = config.n_baseline, densities[len(densities) // 2] if densities else 0.01
    seed = config.windows.seed
    untrained = baseline_dictionary(rows.cpu(), n, min(max(density, 1e-4), 0.5), seed)
    _, assembler = replace(subject, dictionary=untrained).collected(config, progress=report)
    made = [assembler.of(latent) for latent in range(2 * n)]
    return {"random directions": made[:n], "raw neurons": made[n:]}


def client_of(config: AutointerpConfig) -> Client:
    """The client that a config names; a local model is loaded.

    Raises:
        EndpointError: If a key is wanted and the environment has none.
        FileNotFoundError: If a local model is not there.
    """
    if config.llm.kind == "openai":
        from sae.explain.llm.openai_client import OpenAIClient

        return OpenAIClient(config.llm)
    from activations_cache.config import ModelConfig
    from activations_cache.models import load_model
    from sae.explain.llm.local_client import LocalClient

    path = config.llm.model
    with torch.no_grad():
        return LocalClient(load_model(ModelConfig(path=path, dtype="float32")), path.split("/")[-1])
