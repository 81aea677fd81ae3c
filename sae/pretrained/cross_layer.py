"""A cross-layer transcoder on disk: a directory with one dictionary directory per source."""

import json
from collections.abc import Mapping
from pathlib import Path

from activations_cache import io
from sae.cross_layer import CrossLayerTranscoder
from sae.pretrained.errors import DictionaryFormatError
from sae.pretrained.own import save
from sae.pretrained.recognise import load

LIST = "cross_layer.json"


def save_cross_layer(
    transcoder: CrossLayerTranscoder,
    path: str | Path,
    provenance: Mapping[str, object] | None = None,
) -> Path:
    """Write `source-N` for each source, and last the list of them."""
    path = Path(path)
    names = [f"source-{layer:03d}" for layer in range(len(transcoder.autoencoders))]
    for name, source in zip(names, transcoder.autoencoders, strict=True):
        save(source, path / name, provenance)
    io.write_files({path / LIST: (json.dumps({"sources": names}) + "\n").encode()})
    return path


def load_cross_layer(path: str | Path) -> CrossLayerTranscoder:
    """Read what `save_cross_layer` wrote.

    Raises:
        DictionaryFormatError: If the list or a source is missing or damaged, or the sources do not
            fit each other.
    """
    path = Path(path)
    try:
        names = json.loads((path / LIST).read_text())["sources"]
        whole = [f"source-{layer:03d}" for layer in range(len(names))]
        if not names or names != whole:
            raise ValueError(f"sources must be {whole}, got {names}")
        return CrossLayerTranscoder([load(path / name) for name in names])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DictionaryFormatError(
            f"{path} must be a cross-layer transcoder, got: {error}"
        ) from error
