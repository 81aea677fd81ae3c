"""A dictionary with the place in a model where it belongs: what steering and attribution take."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from activations_cache import io
from sae.autoencoder import SparseAutoencoder
from sae.metrics import STATS, Firing
from sae.pretrained import Source, load_with_source
from sae.pretrained.hub import OURS, directory_of
from sae.pretrained.monosema_format import PROVENANCE

MEASURED = "measured_on.json"
"""What an evaluation learned of a dictionary that is not ours, beside its statistics."""
IDENTITY = ("model_sha256", "config_sha256", "tokenizer_sha256", "model")
"""What must agree between the model that a dictionary was trained on and the one it is put into."""


@dataclass(frozen=True)
class Placed:
    """A dictionary, where it reads and writes, and the unit of its activations."""

    dictionary: SparseAutoencoder
    """On the model's device."""
    hook_point: str
    """The place whose stream it reads."""
    hook_point_out: str | None = None
    """The place whose stream it predicts; for a transcoder, as it is hook_point when absent."""
    stats: Firing | None = None
    """Its firing statistics; strengths in units of a latent's maximum need them."""
    model: Mapping[str, str] = field(default_factory=dict)
    """Identity of the model that it was trained on, and its path, as far as they are known."""

    def __post_init__(self) -> None:
        """Check the widths and the statistics against the dictionary."""
        config = self.dictionary.config
        if self.hook_point_out is None and config.d_in != config.width_out:
            raise ValueError(
                f"d_out must be d_in={config.d_in} for a dictionary that writes where it reads, "
                f"got {config.width_out}; say where a transcoder writes by hook_point_out"
            )
        if self.stats is not None and len(self.stats.max_activation) != config.d_sae:
            raise ValueError(
                f"stats must be of a dictionary with d_sae={config.d_sae}, "
                f"got {len(self.stats.max_activation)}"
            )

    @property
    def writes(self) -> str:
        """The place whose stream is predicted."""
        return self.hook_point_out or self.hook_point

    def require_latent(self, latent: int) -> None:
        """Check the number of a latent.

        Raises:
            ValueError: If there is no such latent.
        """
        d_sae = self.dictionary.config.d_sae
        if not 0 <= latent < d_sae:
            raise ValueError(f"latent must be below d_sae={d_sae}, got {latent}")

    def require_model(self, identity: Mapping[str, str]) -> None:
        """Check that a loaded model is the one that the dictionary was trained on.

        Args:
            identity: As `LoadedModel.identity` has it; only what both know is compared.

        Raises:
            ValueError: If it is another model.
        """
        for key in IDENTITY:
            if key in self.model and key in identity and self.model[key] != identity[key]:
                raise ValueError(
                    f"the model must be the one that the dictionary was trained on, with {key} "
                    f"{self.model[key]}, got {identity[key]}"
                )


def load(
    path: str | Path,
    hook_point: str | None = None,
    hook_point_out: str | None = None,
    *,
    format: str | None = None,
    allow_pt: bool = False,
) -> Placed:
    """Load a dictionary of any format together with its place and its statistics.

    Args:
        path: As for `sae.load`.
        hook_point: Where it reads; needed where its files do not say so in this project's words.
        hook_point_out: Where a transcoder writes.
        format: As for `sae.load`.
        allow_pt: As for `sae.load`.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ValueError: If the place is unknown or another than the files say, or if the files are
            damaged.
    """
    loaded = load_with_source(path, format, allow_pt)
    home = directory_of(path, loaded.source)
    record = _record(home / MEASURED) | _record(home / PROVENANCE)
    config = loaded.dictionary.config
    if len(config.inputs) > 1 or len(config.outputs) > 1:
        points = ", ".join(part.hook_point for part in config.inputs + config.outputs)
        raise ValueError(f"{path} must read one hook point and predict one, got {points}")
    found = config.slices_in[0].hook_point or record.get("hook_point")
    written = config.outputs[0].hook_point if config.outputs else None
    if not (hook_point or found):
        said = ", ".join(f"{k} {v}" for k, v in loaded.source.site.items()) or "nothing of it"
        raise ValueError(
            f"hook_point must be given for {path} of format {loaded.source.source_format}, whose "
            f"files say {said}; name a place such as model.layers.7:out"
        )
    for given, trained in ((hook_point, found), (hook_point_out, written)):
        if given and trained and given != trained:
            raise ValueError(f"hook_point must be {trained}, where {path} was trained, got {given}")
    return Placed(
        loaded.dictionary.requires_grad_(False),
        str(hook_point or found),
        hook_point_out or written or None,
        statistics_of(home, loaded.source),
        _model(record.get("model"), loaded.source),
    )


def _model(recorded: object, source: Source) -> Mapping[str, str]:
    """The model of a provenance or an evaluation, or the name that a release has for it."""
    if isinstance(recorded, Mapping) and recorded:
        return recorded
    name = source.site.get("model_name", "")
    return {"path": name} if name else {}


def statistics_of(home: Path, source: Source) -> Firing | None:
    """Return a dictionary's statistics from where they lie; None where there are none."""
    if not (home / STATS).is_file():
        return None
    return Firing.read(home, None if source.source_format == OURS else source.weights_sha256)


def keep_measured(
    path: str | Path, source: Source, firing: Firing, hook_point: str, model: Mapping[str, str]
) -> Path:
    """Keep what an evaluation learned of a dictionary, for steering and for the browser.

    Args:
        path: As for `sae.load`.
        source: What it was read from.
        firing: Its statistics.
        hook_point: Where it was measured.
        model: Path and dtype of the model that it was measured on.
    """
    home = directory_of(path, source)
    if home == Path(path):
        return firing.save(home)
    io.make_directory(home)
    record = {"source": source.source_path, "hook_point": hook_point, "model": dict(model)}
    io.write_files({home / MEASURED: (json.dumps(record, indent=1) + "\n").encode()})
    return firing.save(home, source.weights_sha256)


def _record(file: Path) -> dict[str, Any]:
    """What a file says of how a dictionary came about; empty where there is no file."""
    try:
        record = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} must be JSON, got: {error}") from error
    return record if isinstance(record, dict) else {}
