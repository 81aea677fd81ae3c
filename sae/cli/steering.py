"""The steering step: candidates from the labels, a choice by measured effect."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from activations_cache.checks import Progress
from activations_cache.config import SPLITS
from sae.explain.tables import LATENTS, LatentRecord, read_latents
from sae.metrics import Firing
from sae.steer.choice import Candidate, Subject, choose_latent, target_tokens
from sae.steer.place import Placed

if TYPE_CHECKING:
    from sae.cli.chain import Run

N_NEUTRAL = 2
"""Held-out contexts on which the side effect is measured."""

N_COMMON = 300
"""So many of the most frequent tokens do not show that steering worked."""


def steering_example(run: "Run", report: Progress) -> dict[str, Any]:
    """Steer the prompt by one labelled latent; plain data for the page and for `steering.json`.

    `shown` holds the fields of the page's SteeringExample; `choice` how the latent was found.
    """
    config = run.config.steer
    name = config.dictionary or _steerable(run)
    [hook_point], _ = run.dictionaries[name].config.sites(run.hook_point)
    subject = Subject(
        model=run.loaded.model,
        tokenizer=run.loaded.tokenizer,
        dictionary=Placed(
            run.dictionaries[name],
            hook_point,
            stats=Firing.read(run.path("train") / name),
        ),
        first_position=run.config.cache.skip_positions,
    )
    records = read_latents(run.path("explain") / name / LATENTS)
    common = _common_tokens(run.cache.examples.tokens)
    candidates = [_candidate(run, r, common) for r in records if r.status == "scored"]
    held_out = (run.cache.examples.split == SPLITS.index("hold")).nonzero().flatten()[:N_NEUTRAL]
    neutral = run.cache.examples.tokens[held_out]
    choice = choose_latent(subject, candidates, config, neutral=neutral, progress=report)
    chosen = choice.chosen.candidate
    return {
        "shown": {
            "dictionary": name,
            "latent": chosen.latent,
            "label": chosen.label,
            "strength": float(config.strength),
            "prompt": config.prompt,
            "base": choice.base.text,
            "steered": choice.chosen.text,
        },
        "choice": asdict(choice),
    }


def _steerable(run: "Run") -> str:
    """The first dictionary that is no baseline and gives back the one stream that it reads."""
    for name, dictionary in run.dictionaries.items():
        config = dictionary.config
        if not run.is_frozen(name) and not config.outputs and len(config.inputs) < 2:
            return name
    raise ValueError(
        "train.saes must have a dictionary that reads and predicts one hook point to steer by, "
        f"got {', '.join(run.dictionaries)}; add one, or end with `sae explain`"
    )


def _common_tokens(tokens: Int[Tensor, "example pos"]) -> frozenset[int]:
    """Return the most frequent tokens of the texts."""
    counts = tokens[tokens >= 0].bincount()
    return frozenset(counts.topk(min(N_COMMON, len(counts))).indices.tolist())


def _candidate(run: "Run", record: LatentRecord, common: frozenset[int]) -> Candidate:
    assert record.auc is not None, record.latent
    words = record.words if record.kind in ("word", "token") else ()
    return Candidate(
        latent=record.latent,
        label=record.label,
        auc=record.auc,
        density=record.density,
        targets=target_tokens(run.loaded.tokenizer, [word.strip() for word in words], common),
    )
