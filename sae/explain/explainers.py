"""Labels written by a language model from activation-marked contexts: three styles, three aids.

A style is a prompt version: how contexts and activations are shown.
- "levels": contexts from all steps of activation, each with its level 0 to 9, the strongest tokens
  marked (after Templeton et al. 2024, Scaling Monosemanticity, and Bricken et al. 2023).
- "bills": one line per token with its activation as an integer 0 to 10 (Bills et al. 2023).
- "delphi": contexts with the tokens above 0.3 of the maximum marked, followed by these tokens and
  their activations 0 to 10 (Paulo et al. 2024).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import assert_never

from monosema.checks import MonosemaError
from sae.explain.config import Style
from sae.explain.llm.caller import Caller
from sae.explain.llm.chat import CallFailedError, Message, Request
from sae.explain.llm.corpus_text import NOTE, Item, escape, item, items_text, read_label
from sae.explain.windows import NEGATIVES, LatentWindows, Window

_ASK = (
    "You label what a neuron of a language model responds to. Find what the shown texts have in "
    "common where it responds strongly. Be specific; say at most 20 words. Answer with one line "
    "that begins with LABEL: and nothing after it. "
)
_SHOWN = {
    "levels": "Each numbered text has the level of its strongest response, 0 to 9, in brackets; "
    "the tokens with the strongest responses are marked <<so>>. ",
    "bills": "Each text lists its tokens, one a line, each with a tab and its response, 0 to 10. ",
    "delphi": "In each numbered text the tokens with strong responses are marked <<so>>; the line "
    "below lists them with their responses, 0 to 10. ",
}
_END = "Now the one line: LABEL: and what the texts have in common."
_MAX_LABEL_TOKENS = 120


@dataclass(frozen=True)
class Explanation:
    """A label and where it comes from."""

    latent: int
    """Whose."""
    text: str
    """The label: one line, nothing invisible."""
    method: str
    """Name and version of what made it."""
    client: str = ""
    """Endpoint and model, for a label by a language model."""


@dataclass(frozen=True)
class LLMExplainer:
    """Asks a language model for a label.

    With `contrastive` it also sees windows in which the latent is silent, of all sources; with
    `logit_lens` the tokens that the latent's direction promotes and suppresses.
    """

    style: Style = "levels"
    """How contexts are shown."""
    contrastive: bool = False
    """Whether silent windows are shown too."""
    logit_lens: bool = False
    """Whether promoted and suppressed tokens are shown too."""
    n_windows: int = 20
    """Active windows shown, at most."""
    n_silent: int = 8
    """Silent ones, at most."""

    @property
    def name(self) -> str:
        """Name and version of the prompt; any change of its words is a new version."""
        aids = "+contrastive" * self.contrastive + "+logit-lens" * self.logit_lens
        return f"explain-{self.style}{aids}/1"

    def request(self, latent: LatentWindows) -> Request:
        """The question; only explain windows are in it.

        Raises:
            ValueError: If there is no active window.
        """
        active = latent.of("explain", "active")[: self.n_windows]
        if not active:
            raise MonosemaError(
                f"latent {latent.latent} must have windows to be explained, got none"
            )
        parts = [_contexts(self.style, active, latent.max_activation)]
        if self.contrastive:
            silent = latent.of("explain", *NEGATIVES)[: self.n_silent]
            quoted = "\n".join(f"silent: {escape(window.text)}" for window in silent)
            parts.append(f"Texts on which it is silent:\n{quoted}")
        if self.logit_lens:
            parts.append(f"Tokens that it makes likelier: {_quoted(latent.promoted)}")
            parts.append(f"Tokens that it makes less likely: {_quoted(latent.suppressed)}")
        parts.append(_END)
        system = _ASK + _SHOWN[self.style] + NOTE
        messages = (Message("system", system), Message("user", "\n\n".join(parts)))
        return Request(prompt=self.name, messages=messages, max_tokens=_MAX_LABEL_TOKENS)

    async def explain(self, latent: LatentWindows, caller: Caller) -> Explanation:
        """Ask for the label.

        Raises:
            CallFailedError: If no answer holds a label.
            ValueError: If there is no active window.
        """
        n_shown = min(self.n_windows, len(latent.of("explain", "active")))
        try:
            text = await caller.ask(self.request(latent), read_label, is_last=n_shown <= 1)
        except CallFailedError as error:
            if error.reason != "context" or n_shown <= 1:
                raise
            caller.note("shortened")
            shorter = replace(self, n_windows=n_shown // 2, n_silent=self.n_silent // 2)
            return await shorter.explain(latent, caller)
        return Explanation(latent.latent, text, self.name, caller.client.name)


def _contexts(style: Style, windows: Sequence[Window], largest: float) -> str:
    match style:
        case "levels":
            return items_text([_levels(window, largest) for window in windows])
        case "bills":
            return "\n".join(_bills(window, largest) for window in windows)
        case "delphi":
            texts = [item(w.tokens, _strong(w, largest)) for w in windows]
            lines = items_text(texts).split("\n")
            below = (_responses(window, largest) for window in windows)
            return "\n".join(part for pair in zip(lines, below, strict=True) for part in pair)
        case _:
            assert_never(style)


def _levels(window: Window, largest: float) -> Item:
    return item(window.tokens, window.marks(), note=f"level {level(window.peak, largest, 9)}")


def level(value: float, largest: float, top: int) -> int:
    """floor(top x value / largest), within 0 and top."""
    return min(max(math.floor(top * value / largest), 0), top) if largest > 0 else 0


def _strong(window: Window, largest: float) -> list[bool]:
    """Tokens above 0.3 of the latent's maximum; of a weak window its peak."""
    marks = [value > 0.3 * largest for value in window.activations]
    return marks if any(marks) else [value == window.peak > 0 for value in window.activations]


def _bills(window: Window, largest: float) -> str:
    pairs = [
        (escape(token), level(value, largest, 10))
        for token, value in zip(window.tokens, window.activations, strict=True)
    ]
    lines = [f"{token}\t{value}" for token, value in pairs]
    strong = [f"{token}\t{value}" for token, value in pairs if value > 0]
    if 0 < len(strong) < 0.2 * len(lines):  # Bills et al. repeat them where they are few
        lines += ["<again>", *strong]
    return "\n".join(["<start>", *lines, "<end>"])


def _responses(window: Window, largest: float) -> str:
    marks = _strong(window, largest)
    strong = [
        f'("{escape(token)}", {level(value, largest, 10)})'
        for token, value, mark in zip(window.tokens, window.activations, marks, strict=True)
        if mark
    ]
    return "Activations: " + ", ".join(strong)


def _quoted(tokens: Sequence[str]) -> str:
    return ", ".join(f'"{escape(token)}"' for token in tokens)
