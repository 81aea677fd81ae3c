"""Labels by a language model for a dictionary: windows, labels, scores, controls, files."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from activations_cache.checks import Progress, silent
from sae.baselines import baseline_dictionary
from sae.explain.config import AutointerpConfig, ScorerName
from sae.explain.explainers import LLMExplainer
from sae.explain.llm.caller import Caller
from sae.explain.llm.chat import OPEN, Client, ConstantClient, UnfinishedError
from sae.explain.llm.store import AnswerCache, Cost
from sae.explain.model_scorers import Ablation, Sensitivity
from sae.explain.pipeline import ExplainPlan, LatentOutcome, estimate_all, explain_all
from sae.explain.results import export_neuronpedia, summarise, write_results
from sae.explain.subject import WITH_TOOLS, Subject, Tools, chosen, scorers_of
from sae.explain.text_at_rows import sampled_rows
from sae.explain.windows import LatentWindows

ANSWERS = "llm.sqlite"
_SAMPLE = 8192

_log = logging.getLogger(__name__)


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
        UnfinishedError: If something can be asked again; the files are written all the same.
        ReplayMissError: If an answer is missing in replay mode.
    """
    report = progress or silent
    groups = _groups(subject, config, out_dir, promoted, identity or {}, report)
    latents = groups[""]
    with _answers(config, out_dir) as answers:
        run = _run(groups, config, answers, client, subject.tools, report)
        result, caller = asyncio.run(run)
        summary = summarise(result[""], caller)
    summary["baselines"] = {
        name: summarise(results, None) for name, results in result.items() if name
    }
    summary["config"] = asdict(config)
    write_results(out_dir, result[""], summary)
    if config.neuronpedia_model:
        export_neuronpedia(
            out_dir, result[""], latents, config.neuronpedia_model, config.neuronpedia_layer
        )
    _raise_if_open(caller, result, out_dir)
    return summary


@contextlib.contextmanager
def _answers(config: AutointerpConfig, out_dir: Path) -> Iterator[AnswerCache | None]:
    """The store of answers while it is used; None where none are kept."""
    if config.llm.cache_mode == "off":
        yield None
        return
    path = Path(config.llm.cache_path) if config.llm.cache_path else out_dir / ANSWERS
    with contextlib.closing(AnswerCache(path, replay=config.llm.cache_mode == "replay")) as answers:
        yield answers


def _raise_if_open(caller: Caller, results: dict[str, list[LatentOutcome]], out_dir: Path) -> None:
    """Raise if a later run could ask something again: the work is not done."""
    lost, words = caller.tally.lost, caller.tally.words
    reasons = [reason for reason in OPEN if lost[reason]]
    if not reasons:
        return
    n_latents = sum(any(f.lost.get(r) for r in OPEN) for fs in results.values() for f in fs)
    said = "; ".join(f"{reason}: {words[reason]}" for reason in reasons)
    raise UnfinishedError(
        f"{out_dir}: all questions must have an answer, got {caller.tally.n_open:,} without one "
        f"of {n_latents:,} latents ({said}); run the same command again: it asks just those"
    )


def estimate_cost(
    subject: Subject,
    config: AutointerpConfig,
    out_dir: Path,
    *,
    promoted: Sequence[tuple[Sequence[str], Sequence[str]]] = (),
    identity: dict[str, object] | None = None,
    progress: Progress | None = None,
) -> Cost:
    """The most that `label_with_llm` is expected to take; nothing is called, no model is needed."""
    groups = _groups(subject, config, out_dir, promoted, identity or {}, progress or silent)
    return asyncio.run(_estimate(groups, config, Caller(ConstantClient(), config.llm)))


def _groups(
    subject: Subject,
    config: AutointerpConfig,
    out_dir: Path,
    promoted: Sequence[tuple[Sequence[str], Sequence[str]]],
    identity: dict[str, object],
    report: Progress,
) -> dict[str, list[LatentWindows]]:
    """The windows of the latents, under no name, and of the baselines."""
    state, assembler = subject.collected(
        config.windows, out_dir, identity=identity, progress=report
    )
    wanted = chosen(state, config.n_latents, config.latents, config.windows.seed)
    latents = [assembler.of(latent) for latent in wanted]
    if promoted:
        latents = [_with_tokens(latent, *promoted[latent.latent]) for latent in latents]
    groups = {"": latents}
    if config.n_baseline:
        groups |= _baselines(subject, config, latents, report)
    return groups


async def _estimate(
    groups: dict[str, list[LatentWindows]], config: AutointerpConfig, caller: Caller
) -> Cost:
    wanted = Cost()
    for name, latents in groups.items():
        plan = _questions_of(config, is_baseline=bool(name))
        wanted = wanted.plus(await estimate_all(latents, plan, caller))
    return wanted


async def _run(
    groups: dict[str, list[LatentWindows]],
    config: AutointerpConfig,
    answers: AnswerCache | None,
    client: Client,
    tools: Tools | None,
    report: Progress,
) -> tuple[dict[str, list[LatentOutcome]], Caller]:
    caller = Caller(client, config.llm, answers)
    wanted = await _estimate(groups, config, caller)
    _log.warning(
        "at most about %s calls, %s tokens, $%.4f before answers that are cached",
        f"{wanted.requests:,}", f"{wanted.tokens:,}", wanted.usd(config.llm),
    )  # fmt: skip
    results = {}
    for name, latents in groups.items():
        plan = plan_of(config, tools, is_baseline=bool(name))
        results[name] = await explain_all(latents, plan, caller, report)
    return results, caller


def plan_of(
    config: AutointerpConfig, tools: Tools | None = None, *, is_baseline: bool = False
) -> ExplainPlan:
    """The explainer and the scorers that a config names.

    Baselines have no controls of their own, and no scorers that look into the model: those know the
    dictionary alone.
    """
    names: list[ScorerName] = [
        name for name in config.scorers if not (is_baseline and name in WITH_TOOLS)
    ]
    return ExplainPlan(
        LLMExplainer(config.style, config.contrastive, config.logit_lens),
        scorers_of(names, tools),
        config.min_windows,
        0 if is_baseline else config.n_controls,
    )


def _questions_of(config: AutointerpConfig, *, is_baseline: bool) -> ExplainPlan:
    """The same without what asks nobody, for the estimate."""
    asking = [n for n in config.scorers if n not in WITH_TOOLS]
    some = replace(config, scorers=tuple(asking) or ("detection",))
    plan = plan_of(some, is_baseline=is_baseline)
    scorers = plan.scorers if asking else ()
    if "sensitivity" in config.scorers and not is_baseline:
        scorers += (Sensitivity(None, lambda latent, texts: [0.0] * len(texts)),)  # noqa: ARG005
    if "ablation" in config.scorers and not is_baseline:
        scorers += (Ablation(lambda latent, window, values: 0.0),)  # noqa: ARG005
    return replace(plan, scorers=scorers)


def _with_tokens(
    latent: LatentWindows, promoted: Sequence[str], suppressed: Sequence[str]
) -> LatentWindows:
    return replace(latent, promoted=tuple(promoted), suppressed=tuple(suppressed))


def _baselines(
    subject: Subject, config: AutointerpConfig, latents: list[LatentWindows], report: Progress
) -> dict[str, list[LatentWindows]]:
    """Random directions and raw neurons as dense as the median of the latents."""
    rows = sampled_rows(subject.cache, subject.hook_point, _SAMPLE)
    densities = sorted(latent.density for latent in latents)
    n, density = config.n_baseline, densities[len(densities) // 2] if densities else 0.01
    seed = config.windows.seed
    untrained = baseline_dictionary(rows, n, min(max(density, 1e-4), 0.5), seed)
    _, assembler = replace(subject, dictionary=untrained, known={}).collected(
        config.windows, progress=report
    )
    made = [assembler.of(latent) for latent in range(2 * n)]
    return {"random directions": made[:n], "raw neurons": made[n:]}


def client_of(config: AutointerpConfig) -> Client:
    """The client that a config names; a local model is loaded.

    Raises:
        EndpointError: If a key is wanted and the environment has none.
        FileNotFoundError: If a local model is not there.
    """
    if config.llm.batch_dir is not None:
        from sae.explain.llm.batch import BatchClient

        return BatchClient(config.llm)
    if config.llm.kind != "local":
        from sae.explain.llm.openai_client import OpenAIClient

        return OpenAIClient(config.llm)
    from activations_cache.config import ModelConfig
    from activations_cache.models import load_model
    from sae.explain.llm.local_client import ConstrainedClient, LocalClient

    path = config.llm.model
    kind = ConstrainedClient if config.llm.constrained else LocalClient
    on_gpu = torch.cuda.is_available()
    dtype = config.llm.dtype
    if dtype == "auto":  # half the memory where it costs no time, exact sums where it would
        dtype = "bfloat16" if on_gpu else "float32"
    loaded = load_model(ModelConfig(path=path, dtype=dtype))
    if on_gpu:
        nn.Module.to(loaded.model, "cuda")
    return kind(loaded, path.split("/")[-1])
