"""Explain and score many latents through one caller: every latent ends with a status."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from activations_cache.checks import Progress, silent
from sae.explain.explainers import Explanation, LLMExplainer
from sae.explain.judges import Judge, LLMJudge, Score, Scorer
from sae.explain.llm.caller import Caller, Tally, cancelled_on_exit, tallied
from sae.explain.llm.chat import CallFailedError, ConstantClient, Request, Response
from sae.explain.llm.store import Cost, estimate
from sae.explain.windows import LatentWindows, Window, shuffled

T = TypeVar("T")

Status = Literal["done", "insufficient", "failed"]
"""How it went with a latent."""


@dataclass(frozen=True)
class LatentOutcome:
    """What came of one latent."""

    latent: int
    """Its number."""
    status: Status
    """"done"; "insufficient" where it fires too seldom; "failed" for the reason given."""
    reason: str = ""
    """Why there is no label, or what is missing."""
    explanation: Explanation | None = None
    """The label."""
    scores: tuple[Score, ...] = ()
    """One per scorer."""
    controls: dict[str, tuple[Score, ...]] = field(default_factory=dict)
    """The same scorers on what should score at chance; for a subsample of the latents."""
    outcomes: dict[str, int] = field(default_factory=dict, compare=False)
    """Questions that were answered, shortened, and unusable answers by their reason."""
    lost: dict[str, int] = field(default_factory=dict)
    """Questions that ended without an answer, by reason; scorers' too, controls' not."""


@dataclass(frozen=True)
class ExplainPlan:
    """What is done with every latent."""

    explainer: LLMExplainer
    """Writes the label."""
    scorers: tuple[Scorer, ...]
    """Score it."""
    min_windows: int = 8
    """Fewer active windows in either split: the latent is "insufficient"."""
    n_controls: int = 20
    """Latents that are also scored with another's label and on shuffled windows."""


async def explain_all(
    latents: Sequence[LatentWindows],
    plan: ExplainPlan,
    caller: Caller,
    progress: Progress | None = None,
) -> list[LatentOutcome]:
    """Explain and score latents, several at a time; the result does not depend on their order.

    Args:
        latents: What is known of each.
        plan: What is done.
        caller: Asks, keeps the answers, counts the cost.
        progress: Called after each latent; the unit carries the running cost.

    Returns:
        One result per latent, in their order. When the budget is spent the rest is "failed" for
        that reason.

    Raises:
        EndpointError: If the endpoint does not serve us.
        ReplayMissError: If an answer is missing in replay mode.
    """
    work = _LatentWork(plan, caller, progress or silent)
    result = await work.over(latents, work.one, "latents explained")
    chosen = shuffled([f.latent for f in result if f.status == "done"], "controls")
    chosen = sorted(chosen[: plan.n_controls])
    labels = {f.latent: f.explanation.text for f in result if f.explanation}
    partner = dict(zip(chosen, chosen[1:] + chosen[:1], strict=True)) if len(chosen) > 1 else {}
    subjects = [latent for latent in latents if latent.latent in partner]
    other = {number: labels[partner[number]] for number in partner}

    async def control(latent: LatentWindows) -> dict[str, tuple[Score, ...]]:
        return await work.controls(latent, labels[latent.latent], other[latent.latent])

    controls = await work.over(subjects, control, "controls scored")
    by_latent = {s.latent: c for s, c in zip(subjects, controls, strict=True)}
    return [replace(f, controls=by_latent.get(f.latent, {})) for f in result]


class _LatentWork:
    def __init__(self, plan: ExplainPlan, caller: Caller, progress: Progress) -> None:
        self._plan, self._caller, self._progress = plan, caller, progress
        self._judge: Judge = LLMJudge(caller)

    async def over(
        self,
        latents: Sequence[LatentWindows],
        do: Callable[[LatentWindows], Awaitable[T]],
        unit: str,
    ) -> list[T]:
        """Do something with every latent, `concurrency` of them at a time."""
        results: dict[int, T] = {}
        waiting = iter(enumerate(latents))

        async def worker() -> None:
            for index, latent in waiting:
                results[index] = await do(latent)
                report()

        def report(wait: str = "") -> None:
            text = f"{unit} · {cost_text(self._caller)}{wait and ' · '}{wait}"
            self._progress(len(results), len(latents), text)

        self._caller.on_wait = report
        n_workers = min(self._caller.config.concurrency, len(latents))
        tasks = [asyncio.create_task(worker()) for _ in range(n_workers)]
        async with cancelled_on_exit(tasks):
            await asyncio.gather(*tasks)
        return [results[index] for index in range(len(latents))]

    async def one(self, latent: LatentWindows) -> LatentOutcome:
        """Explain and score one latent."""
        if (outcome := too_few(latent, self._plan.min_windows)) is not None:
            return outcome
        explanation = None
        with tallied() as tally:
            try:
                explanation = await self._plan.explainer.explain(latent, self._caller)
                scores = await self._scores(latent, explanation.text)
            except CallFailedError as error:
                failed = LatentOutcome(latent.latent, "failed", str(error), explanation)
                return _counted(failed, tally)
        done = LatentOutcome(latent.latent, "done", "", explanation, scores)
        return _counted(done, tally)

    async def controls(
        self, latent: LatentWindows, label: str, other: str
    ) -> dict[str, tuple[Score, ...]]:
        """Score what should be at chance."""
        try:
            return {
                "another's label": await self._scores(latent, other),
                "shuffled windows": await self._scores(shuffled_windows(latent), label),
            }
        except CallFailedError:  # the budget; every other failure is inside the scores
            return {}

    async def _scores(self, latent: LatentWindows, label: str) -> tuple[Score, ...]:
        scores = [self._score(scorer, latent, label) for scorer in self._plan.scorers]
        return tuple(await asyncio.gather(*scores))

    async def _score(self, scorer: Scorer, latent: LatentWindows, label: str) -> Score:
        """A score, with what became of its questions; `gather` gives each its own context."""
        with tallied() as tally:
            score = await scorer.score(latent, label, self._judge)
        said = "; ".join(f"{name}: {tally.words[name]}" for name in sorted(tally.lost))
        if score.value is None and said:
            score = replace(score, reason=f"{score.reason}: {said}" if score.reason else said)
        return replace(score, lost=dict(sorted(tally.lost.items())))


def too_few(latent: LatentWindows, wanted: int) -> LatentOutcome | None:
    """What comes of a latent with fewer active windows in a split than are wanted."""
    least = min(len(latent.of(split, "active")) for split in ("explain", "score"))
    reason = f"{least} active windows of {wanted} wanted"
    return LatentOutcome(latent.latent, "insufficient", reason) if least < wanted else None


def _counted(explained: LatentOutcome, tally: Tally) -> LatentOutcome:
    """A result with what became of its questions."""
    outcomes, lost = (dict(sorted(n.items())) for n in (tally.outcomes, tally.lost))
    return replace(explained, outcomes=outcomes, lost=lost)


def shuffled_windows(latent: LatentWindows) -> LatentWindows:
    """The latent with the texts of its score windows exchanged among windows of equal length."""
    by_length: dict[int, list[Window]] = {}
    for window in latent.score:
        by_length.setdefault(len(window.tokens), []).append(window)
    texts = {
        length: iter(shuffled([w.tokens for w in windows], "shuffled windows", latent.latent))
        for length, windows in by_length.items()
    }
    score = tuple(replace(w, tokens=next(texts[len(w.tokens)])) for w in latent.score)
    return replace(latent, score=score)


def cost_text(caller: Caller) -> str:
    """What was spent so far, in one line."""
    spent, config = caller.budget.spent, caller.config
    usd = f", ${spent.usd(config):.4f}" if spent.usd(config) else ""
    return f"{spent.requests:,} calls, {spent.tokens:,} tokens{usd}, {caller.n_cached:,} cached"


async def estimate_all(latents: Sequence[LatentWindows], plan: ExplainPlan, caller: Caller) -> Cost:
    """The most that explaining these latents is expected to take; nothing is called.

    A stand-in answers every question to see which there are; nothing is allowed for questions that
    are asked again, and nothing taken off for answers that are in the cache.
    """
    listener = _Listener()
    quiet = replace(
        caller.config, cache_mode="off", max_usd=None, max_tokens=None, max_requests=None
    )
    await explain_all(latents, plan, Caller(listener, quiet))
    return estimate(listener.requests)


class _Listener(ConstantClient):
    """Answers at once and remembers what was asked."""

    def __init__(self) -> None:
        super().__init__(1, "x" * 60)
        self.requests: list[Request] = []

    async def complete(self, request: Request) -> Response:
        self.requests.append(request)
        return await super().complete(request)
