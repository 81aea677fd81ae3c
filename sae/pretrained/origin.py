"""Where a dictionary was trained, compared in this one place with where it is to be used.

Our own files name hook points and hashes of the model. Released files name both in the words of
other libraries: `place_in_words` and `model_in_words` understand those that are in use, and what
they do not understand is not compared.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from monosema.checks import MonosemaError
from sae.architecture import SAEConfig
from sae.autoencoder import SparseAutoencoder

MODEL_KEYS = {
    "model_sha256": "model",
    "config_sha256": "model's config",
    "tokenizer_sha256": "tokenizer",
    "model": "model's class",
}
"""What must agree between two models, and how it is called."""

PLACE_WORDS = (
    "hook_name", "hook_point_in", "hook_point", "hook_point_layer", "submodule_name", "layer",
)  # fmt: skip
"""Where releases name the place that a dictionary reads, the most exact first."""

MODEL_WORDS = ("model_name", "lm_name", "model")
"""Where releases name their model."""

_ALIASES = {"gpt2small": "gpt2"}
_OURS = re.compile(r"(?:^|\.)(\d+)(?:\.([\w.]+))?(?::(in|out))?$")
_LENS = re.compile(r"blocks\.(\d+)\.(?:hook_)?(?:(resid|mlp|attn)_(pre|post|in|out))$")
_SUBMODULE = re.compile(r"(resid|mlp|attn)_(pre|post|in|out)_layer_(\d+)$")
_NUMBER = re.compile(r"(?:^|[^\d.])(\d+)$")
_PARTS = {
    "mlp": "mlp", "feed_forward": "mlp", "ffn": "mlp",
    "attn": "attn", "attention": "attn", "self_attn": "attn", "self_attention": "attn",
}  # fmt: skip
_SIDES = {"pre": "in", "post": "out", "in": "in", "out": "out"}


class Difference(NamedTuple):
    """One way in which a dictionary is used elsewhere than where it was trained."""

    what: str
    """Hook point, model, tokenizer."""
    trained: str
    """What its files say."""
    used: str
    """What it is to be used on."""

    def __str__(self) -> str:
        """In words, for tables and provenance."""
        return f"{self.what}: trained on {self.trained}, used on {self.used}"


class Place(NamedTuple):
    """A place in a model, as far as words tell it."""

    layer: int
    """Number of the block."""
    part: str = ""
    """`resid`, `mlp`, `attn` or the module's own path; empty where the words do not say."""
    side: str = ""
    """`in` or `out`; empty where the words do not say."""

    def fits(self, other: "Place") -> bool:
        """Whether both can be the same place: what follows a block precedes the next one."""
        return any(
            one.layer == two.layer
            and all(not a or not b or a == b for a, b in zip(one[1:], two[1:], strict=True))
            for one in (self, self._twin())
            for two in (other, other._twin())
        )

    def _twin(self) -> "Place":
        """The same place as the other side of the next block or of the one before."""
        if self[1:] == ("resid", "in") and self.layer > 0:
            return Place(self.layer - 1, "resid", "out")
        if self[1:] == ("resid", "out"):
            return Place(self.layer + 1, "resid", "in")
        return self


@dataclass(frozen=True)
class Origin:
    """What is known of where a dictionary was trained; empty fields are not compared."""

    inputs: tuple[str, ...] = ()
    """The hook points that it reads."""
    outputs: tuple[str, ...] = ()
    """Those that it predicts, where they are others."""
    model: Mapping[str, str] = field(default_factory=dict)
    """Hashes of the model, its class and its path."""
    words: Mapping[str, str] = field(default_factory=dict)
    """What a release says, in its own words."""

    def places(
        self, inputs: Sequence[str], outputs: Sequence[str] | None = None
    ) -> list[Difference]:
        """Differences between the places of the dictionary and those where it is used.

        Args:
            inputs: The hook points that it is to read.
            outputs: Those that it is to predict; not compared when absent.
        """
        pairs = [(self.inputs, tuple(inputs))]
        if outputs is not None:
            pairs.append((self.outputs, tuple(outputs)))
        differences = [
            Difference("hook point", ", ".join(trained), ", ".join(used))
            for trained, used in pairs
            if trained and trained != used
        ]
        said = place_in_words(self.words)
        if not self.inputs and said is not None and len(inputs) == 1:
            text, place = said
            used = place_of(inputs[0])
            if used is not None and not place.fits(used):
                differences.append(Difference("hook point", text, inputs[0]))
        return differences

    def models(self, identity: Mapping[str, Any], path: str = "") -> list[Difference]:
        """Differences between the model of the dictionary and another one.

        Args:
            identity: As `LoadedModel.identity` and the identity of a cache have it.
            path: The name of the other model, which is compared with the name in a release.
        """
        differences = [
            Difference(what, str(self.model[key]), str(identity[key]))
            for key, what in MODEL_KEYS.items()
            if self.model.get(key) and identity.get(key) and self.model[key] != identity[key]
        ]
        said = model_in_words(self.words)
        has_hashes = any(self.model.get(key) for key in MODEL_KEYS)
        if not has_hashes and said and _is_name(path) and _plain(said) != _plain(path):
            differences.append(Difference("model", said, path))
        return differences


def origin_of(
    config: SAEConfig,
    provenance: Mapping[str, Any] | None = None,
    words: Mapping[str, str] | None = None,
) -> Origin:
    """Return what a dictionary's config, its provenance and its release say.

    Args:
        config: The hook points that it records come first.
        provenance: What `sae train` or `sae convert` wrote; of a converted dictionary it holds the
            words of the release.
        words: What the files of a release say of the model and the place.
    """
    record = provenance or {}
    model = record.get("model")
    source = record.get("source")
    if isinstance(source, dict) and isinstance(source.get("site"), dict):
        words = {**source["site"], **(words or {})}
    recorded = record.get("hook_points") or [record.get("hook_point")]
    return Origin(
        _points(part.hook_point for part in config.inputs)
        or _points(recorded if isinstance(recorded, list) else ()),
        _points(part.hook_point for part in config.outputs),
        model if isinstance(model, dict) else {"model_sha256": model} if model else {},
        words or {},
    )


def require_model(
    dictionary: SparseAutoencoder,
    identity: Mapping[str, str],
    path: str = "",
    *,
    force: bool = False,
) -> tuple[str, ...]:
    """Check that a loaded model is the one that a dictionary was trained on.

    Args:
        dictionary: As `sae.load` gives it.
        identity: As `LoadedModel.identity` has it; only what both know is compared.
        path: The model's name, which is compared with the name in a release.
        force: Go on with another model.

    Returns:
        What differs, in words; only where forced.

    Raises:
        ValueError: If it is another model.
    """
    differences = origin_of(dictionary.config, dictionary.provenance).models(identity, path)
    if differences and not force:
        what, trained, used = differences[0]
        raise MonosemaError(
            f"the model must be the one that the dictionary was trained on, with {what} {trained}, "
            f"got {used}; name that one, or go on with --force (force=True)"
        )
    return tuple(map(str, differences))


def _points(names: Iterable[Any]) -> tuple[str, ...]:
    return tuple(name for name in names if isinstance(name, str) and name)


def place_of(hook_point: str) -> Place | None:
    """Return the place of a hook point of ours; None where its path has no number."""
    parts = _OURS.search(hook_point)
    if parts is None:
        return None
    layer, module, side = parts.groups()
    part = _PARTS.get(module, module) if module else "resid"
    return Place(int(layer), part, side or "")


def place_in_words(words: Mapping[str, str]) -> tuple[str, Place] | None:
    """Return the place that a release names, with its text; None where it is not understood."""
    for key in PLACE_WORDS:
        text = words.get(key, "").removesuffix(" of the base model")
        if parts := _LENS.search(text):
            layer, part, side = parts.groups()
            return text, Place(int(layer), part, _SIDES[side])
        if parts := _SUBMODULE.search(text):
            part, side, layer = parts.groups()
            return text, Place(int(layer), part, _SIDES[side])
        if "hook" in text:  # a place inside a block that has no name here
            continue
        if key in {"hook_point", "submodule_name"} and (place := place_of(text)) is not None:
            side = words.get("io", "out" if key == "submodule_name" else place.side)
            return text, place._replace(side=side if side in {"in", "out"} else "")
        if key in {"layer", "hook_point_layer"} and (parts := _NUMBER.search(text)):
            return f"layer {parts[1]}", Place(int(parts[1]))
    return None


def model_in_words(words: Mapping[str, str]) -> str:
    """Return the name of the model that a release states; empty where it states none."""
    return next((words[key] for key in MODEL_WORDS if words.get(key)), "")


def _is_name(path: str) -> bool:
    """Whether a path is a name of the hub, which says which model it is, and no directory."""
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is not None
    return is_name and not Path(path).exists()


def _plain(name: str) -> str:
    letters = re.sub(r"[^a-z0-9]", "", name.rpartition("/")[2].lower())
    return _ALIASES.get(letters, letters)
