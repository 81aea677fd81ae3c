"""Llama Scope R1 (OpenMOSS, 2025): config.json and sae_weights.safetensors.

The tensors are named as in Llama Scope and applied as by Llamascopium.
"""

from sae.pretrained import llamascopium
from sae.pretrained.canonical import Reading
from sae.pretrained.files import Files
from sae.pretrained.foreign import DictionaryFormatError, Fields

FORMAT = "llama_scope_r1"
CHECKED_AGAINST = "sae-lens 6.54's reader of this release, read; its norms unverified"
CONFIG, WEIGHTS = llamascopium.CONFIG, llamascopium.WEIGHTS
NAMES = {
    "encoder.weight": "W_E",
    "encoder.bias": "b_E",
    "decoder.weight": "W_D",
    "decoder.bias": "b_D",
    "log_jumprelu_threshold": llamascopium.THRESHOLD,
}


def fits(files: Files) -> bool:
    """Whether the files are there, with this format's tensors."""
    return files.has(CONFIG) and "encoder.weight" in files.tensor_names(WEIGHTS)


def read(files: Files) -> Reading:
    """Read a dictionary; weights are stored (d_sae, d_in) and (d_out, d_sae).

    Raises:
        DictionaryFormatError: As for Llamascopium; above all where a norm over the data set is not
            in the file, which a reader of others takes from a table.
    """
    cfg = Fields(files.json(CONFIG), CONFIG)
    cfg.word("act_fn", ("jumprelu",))
    stored = files.tensors(WEIGHTS)
    unknown = {n for n in stored if n not in NAMES and not n.startswith(llamascopium.NORM)}
    if unknown or any(stored[n].dim() != 2 for n in NAMES if n.endswith(".weight") & (n in stored)):
        raise DictionaryFormatError(
            f"{WEIGHTS} must hold {sorted(NAMES)}, the weights as matrices, got {sorted(stored)}"
        )
    raw = {
        NAMES.get(name, name): tensor.T if name.endswith(".weight") else tensor
        for name, tensor in stored.items()
    }
    return llamascopium.reading(cfg, raw, files)
