"""Qwen Scope: layerN.sae.pt, pickled; TopK whose k stands in the repository's config or name."""

import re

from sae.architecture import SAEConfig, TopK
from sae.pretrained.canonical import Reading, Weights, in_memory
from sae.pretrained.files import Files, expect_keys, expect_shape
from sae.pretrained.foreign import DictionaryFormatError, Fields

FORMAT = "qwen_scope"
CHECKED_AGAINST = "sae-lens 6.54's reader of this release, read"
K_IN_NAME = re.compile(r"SAE-Res-.+-W\w+-L0_(\d+)")
CONFIG = "config.json"
NAME = re.compile(r"layer\d+\.sae\.pt")


def fits(files: Files) -> bool:
    """Whether it is one file with the release's name."""
    return not files.path.is_dir() and NAME.fullmatch(files.path.name) is not None


def read(files: Files) -> Reading:
    """Read one dictionary; W_enc is stored as (d_sae, d_in), W_dec as (d_in, d_sae).

    Raises:
        DictionaryFormatError: If something is missing or unknown, or if no directory above the file
            has the repository's name, which tells k.
    """
    name = files.one_file()
    k = _k(files)
    raw = files.pickled(name).tensors
    expect_keys(raw, {"W_enc", "W_dec", "b_enc", "b_dec"}, name)
    d_sae, d_in = len(raw["b_enc"]), len(raw["b_dec"])
    expect_shape(raw["W_enc"], (d_sae, d_in), "W_enc")
    expect_shape(raw["W_dec"], (d_in, d_sae), "W_dec")
    if d_in == d_sae and not files.is_named:
        raise DictionaryFormatError(
            f"W_enc must show its orientation by its shape, got {(d_sae, d_in)}; name the format "
            f"by format={FORMAT!r} if its rows are latents"
        )
    stored = Weights(
        enc_rows=raw["W_enc"], dec_rows=raw["W_dec"].T, b_enc=raw["b_enc"], b_dec=raw["b_dec"]
    )
    weights = in_memory(stored, files.latents)
    config = SAEConfig(d_in=d_in, d_sae=d_sae, activation=TopK(k=k), b_in="none")
    return Reading(config=config, weights=weights, site={"layer": name.split(".")[0]})


def _k(files: Files) -> int:
    """The k of the release's config and of the repository's name; where both tell it, one k."""
    names = [match for part in files.path.parts if (match := K_IN_NAME.search(part))]
    result = {int(names[-1][1])} if names else set()
    if files.has_sibling(CONFIG):
        cfg = Fields(files.json(CONFIG), CONFIG)
        cfg.word("model_type", ("topk_sae",))
        result.add(cfg.whole("k"))
    if len(result) != 1:
        raise DictionaryFormatError(
            f"{files.path} must lie beside the release's {CONFIG}, or in a directory that has the "
            f"repository's name, SAE-Res-MODEL-W..K-L0_<k>, got the k {sorted(result)}: k stands "
            "nowhere else"
        )
    return result.pop()
