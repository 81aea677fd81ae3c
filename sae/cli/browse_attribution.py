"""Attribution examples for the browser: which latents some held-out predictions depend on."""

from collections.abc import Iterator

from jaxtyping import Float, Int
from torch import Tensor

from activations_cache.checks import Progress
from activations_cache.config import SPLITS
from sae.autoencoder import SparseAutoencoder
from sae.browser import Attribution
from sae.cli.browse_subject import Around
from sae.steer.attribution import Metric, ablation_effects, attribute
from sae.steer.place import Placed

N_PROMPTS, N_TOKENS, N_LATENTS, N_KEPT = 8, 32, 24, 2
N_ABLATED = 4
"""Of each prompt's latents so many are really turned off."""

NOTE = (
    "Gradient times activation for the log-probability of the next token. An effect is measured: "
    "what turning the latent off at its strongest position takes from it, in nats."
)


def attributions_of(
    dictionary: SparseAutoencoder, hook_point: str, around: Around, report: Progress
) -> dict[int, tuple[Attribution, ...]]:
    """For the latents that matter most to some held-out predictions, the prompts and shares.

    Each prompt costs one backward pass, and one forward pass in which the first few latents are
    really turned off, each at its strongest position.
    """
    reads, writes = dictionary.config.sites(hook_point)
    if around.cache is None or around.loaded is None or len(reads) != 1 or writes != reads:
        return {}
    examples, placed = around.cache.examples, Placed(dictionary, "".join(reads))
    first_position = around.cache.manifest.plan.skip_positions
    held_out = (examples.split == SPLITS.index("hold")).nonzero().flatten()
    chosen = held_out[:: max(1, len(held_out) // N_PROMPTS)][:N_PROMPTS].tolist()
    found: dict[int, list[Attribution]] = {}
    for done, example in enumerate(chosen, 1):
        tokens = examples.tokens[example]
        tokens = tokens[tokens >= 0][: N_TOKENS + 1].long()
        if len(tokens) > first_position + 1:
            for latent, shown in _of_prompt(placed, around, tokens, first_position):
                found.setdefault(latent, []).append(shown)
        report(done, len(chosen), "predictions attributed")
    return {
        latent: tuple(sorted(shown, key=_size, reverse=True)[:N_KEPT])
        for latent, shown in found.items()
    }


def _size(shown: Attribution) -> float:
    return max(map(abs, shown.values))


def _of_prompt(
    placed: Placed, around: Around, tokens: Int[Tensor, " pos"], first_position: int
) -> Iterator[tuple[int, Attribution]]:
    """The latents on which the last token depends most, each with its score at every position."""
    assert around.loaded is not None
    model = around.loaded.model
    prompt, target = tokens[None, :-1], int(tokens[-1])
    metric = _log_probability(target)
    scored = attribute(model, placed, prompt, metric, first_position=first_position)
    strongest: dict[int, int] = {}
    for position, latent, score in scored.top(N_LATENTS):
        if score:  # what does not fire fills the places of few latents
            strongest.setdefault(latent, position)
    entries = [(position, latent) for latent, position in strongest.items()][:N_ABLATED]
    effects = ablation_effects(model, placed, prompt, metric, entries).tolist() if entries else []
    measured = {latent: effect for (_, latent), effect in zip(entries, effects, strict=True)}
    texts = tuple(around.strings[token] for token in tokens.tolist())
    for latent in strongest:
        values = (scored.scores * (scored.latents.indices == latent)).sum(dim=1).tolist()
        yield latent, Attribution(texts[:-1], tuple(values), texts[-1], measured.get(latent), NOTE)


def _log_probability(target: int) -> Metric:
    def metric(logits: Float[Tensor, "example pos vocab"]) -> Float[Tensor, " example"]:
        return logits[:, -1].float().log_softmax(dim=1)[:, target]

    return metric
