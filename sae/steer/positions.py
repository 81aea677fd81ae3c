"""Which tokens are changed: policies that give the same answer with and without a KV cache."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from activations_cache.prompts import Prompt
from monosema.checks import MonosemaError

POLICIES = ("all", "prompt", "generated", "last", "class")
"""`last` is the prompt's last token; `class` is position 0, the class token of a ViT."""


@dataclass(frozen=True, kw_only=True)
class Patches:
    """The patches of a ViT, without class token and registers."""

    n_prefix: int
    """Positions before the first patch: `Reading.n_prefix` of a loaded vision model."""


Positions = str | Patches | Bool[Tensor, "_example _pos"]
"""One of POLICIES, the patches of a ViT, or a mask, which has a column for each token of the
prompts, padding included; nothing after the prompts is chosen by it."""


def check_positions(positions: Positions) -> None:
    """Check a policy before a model runs.

    Raises:
        ValueError: If it is not known.
    """
    if isinstance(positions, str) and positions not in POLICIES:
        raise MonosemaError(
            f"positions must be one of {', '.join(POLICIES)}, a mask or Patches, got {positions!r}"
        )


def chosen(
    policy: Positions,
    positions: Int[Tensor, "example pos"],
    prompt: Prompt | None,
    first_position: int,
) -> Bool[Tensor, "example pos"]:
    """Where a policy holds in one forward.

    Args:
        policy: The policy.
        positions: Absolute positions of the tokens, negative for padding.
        prompt: The prompts of these examples; None where the model reads no tokens.
        first_position: Positions below this one, the attention sinks, are never chosen, but by
            `class`.

    Raises:
        ValueError: If the policy needs a prompt and there is none, or a mask has another shape.
    """
    if isinstance(policy, Patches):
        return positions >= policy.n_prefix
    if isinstance(policy, str) and policy == "class":
        return positions == 0
    if prompt is None:
        if not isinstance(policy, str) or policy != "all":
            raise MonosemaError(
                f"positions must be all, class or Patches without a prompt, got {policy}"
            )
        return positions >= first_position
    n_tokens = prompt.n_tokens[:, None].to(positions.device)
    inside = positions < n_tokens
    return (positions >= first_position) & _of_prompt(policy, positions, prompt, inside)


def _of_prompt(
    policy: Positions,
    positions: Int[Tensor, "example pos"],
    prompt: Prompt,
    inside: Bool[Tensor, "example pos"],
) -> Bool[Tensor, "example pos"]:
    if isinstance(policy, Tensor):
        return inside & _masked(policy, positions, prompt)
    match policy:
        case "all":  # what follows a whole prompt is padding
            return inside if prompt.is_whole else torch.ones_like(inside)
        case "prompt":
            return inside
        case "generated":
            return torch.zeros_like(inside) if prompt.is_whole else ~inside
        case _:
            return positions == prompt.n_tokens[:, None].to(positions.device) - 1


def _masked(
    mask: Bool[Tensor, "_example _pos"], positions: Int[Tensor, "example pos"], prompt: Prompt
) -> Bool[Tensor, "example pos"]:
    n_examples, n_columns = mask.shape
    if len(positions) % n_examples:
        raise MonosemaError(
            f"a mask of positions must have a row for each of {len(positions)} examples, "
            f"got {n_examples}"
        )
    rows = mask.to(positions.device).repeat_interleave(len(positions) // n_examples, dim=0)
    columns = positions + prompt.n_padding[:, None].to(positions.device)
    within = (columns >= 0) & (columns < n_columns)
    return rows.gather(1, columns.clamp(0, n_columns - 1)) & within
