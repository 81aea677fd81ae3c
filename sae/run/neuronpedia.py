"""A dictionary that was explained, as the files that Neuronpedia and circuit-tracer show.

`batch-N.json` is what SAEDashboard writes and its converter turns into Neuronpedia's import;
`features/N.json` is what circuit-tracer's server shows. Both come from what `sae explain` left, so
no language model is asked; tokens that a latent promotes are there only where its model is.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from activations_cache import io
from activations_cache.checks import Progress, silent
from activations_cache.config import ModelConfig
from activations_cache.models import load_model
from activations_cache.probe import readout
from sae.autoencoder import SparseAutoencoder
from sae.explain.examples import Context
from sae.explain.logit_lens import PromotedTokens, promoted_tokens
from sae.explain.tables import (
    EXAMPLES,
    LATENTS,
    SUMMARY,
    LatentRecord,
    iter_examples,
    read_latents,
    read_summary,
)
from sae.pretrained.foreign import DictionaryFormatError
from sae.run.context import pieces_of

N_PROMOTED = 10
"""Tokens that a page shows of a latent."""
PER_BATCH = 128
"""Latents in a file of Neuronpedia's."""
QUANTILES = 5
"""Groups of examples that circuit-tracer shows, from the largest activation down."""
NOTHING: dict[str, list[float]] = {
    key: []
    for key in (
        "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
        "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
        "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson",
        "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist",
    )
}  # fmt: skip
"""What SAEDashboard's files have beside the rest, and what is not measured here."""


class Names(NamedTuple):
    """How Neuronpedia calls what is shown."""

    model: str
    """Its name of the model."""
    layer: int
    """The number of the block."""
    set: str
    """The name of the set of dictionaries."""
    hook: str
    """The hook point in TransformerLens' words."""
    dataset: str = ""
    """The hub's name of the texts, if they have one."""


class Promoted(NamedTuple):
    """Tokens that a latent makes likelier and less likely, as text, with their logits."""

    up: tuple[str, ...] = ()
    up_values: tuple[float, ...] = ()
    down: tuple[str, ...] = ()
    down_values: tuple[float, ...] = ()


def promoted_of(lens: PromotedTokens, strings: Sequence[str]) -> list[Promoted]:
    """The tokens of every latent as text."""
    parts = zip(
        lens.promoted.tolist(), lens.promoted_logits.tolist(), lens.suppressed.tolist(),
        lens.suppressed_logits.tolist(), strict=True,
    )  # fmt: skip
    return [
        Promoted(
            tuple(str(strings[i]) for i in up),
            tuple(a),
            tuple(str(strings[i]) for i in down),
            tuple(b),
        )
        for up, a, down, b in parts
    ]


def write_pages(
    explained: Path,
    target: Path,
    dictionary: SparseAutoencoder,
    site: Mapping[str, str],
    name: str,
    model: str | None,
) -> tuple[str, ...]:
    """Write the pages of an explained dictionary.

    Args:
        explained: What `sae explain` left.
        target: The directory to write.
        dictionary: The dictionary.
        site: Where it reads, in TransformerLens' words.
        name: Its name among the dictionaries of its place.
        model: The model, to show the tokens that each latent promotes.

    Returns:
        What to say of the files.
    """
    layer = re.match(r"blocks\.(\d+)\.", site.get("hook_name", ""))
    names = Names(
        site.get("model_name", "").rpartition("/")[2],
        int(layer[1]) if layer else 0,
        re.sub(r"[^\w.\-]+", "-", name),
        site.get("hook_name", ""),
        site.get("dataset_path", ""),
    )
    promoted = None
    if model is not None:
        loaded = load_model(ModelConfig(path=model))
        lens = promoted_tokens(dictionary, readout(loaded.model), None, N_PROMOTED)
        promoted = promoted_of(lens, pieces_of(loaded))
    files = export_pages(explained, target, dictionary, names, promoted)
    return tuple(f"written: {file.name}" for file in files)


def export_pages(
    explained: Path,
    target: Path,
    dictionary: SparseAutoencoder,
    names: Names,
    promoted: Sequence[Promoted] | None = None,
    progress: Progress = silent,
) -> list[Path]:
    """Write the files of both.

    Args:
        explained: What `sae explain` left.
        target: The directory.
        dictionary: Whose latents; a file has their directions.
        names: How Neuronpedia calls it.
        promoted: Tokens of every latent; none are shown when absent.
        progress: Called after every file.

    Returns:
        The files, the settings last.

    Raises:
        DictionaryFormatError: If nothing was explained there.
    """
    if not (explained / SUMMARY).is_file():
        raise DictionaryFormatError(
            f"{explained} must hold {SUMMARY}, got none; run `sae explain DICT --cache CACHE`"
        )
    records = read_latents(explained / LATENTS)
    summary = read_summary(explained / SUMMARY)
    n_rows = summary["n_rows_explain"] + summary["n_rows_score"]
    rows = dictionary.dec_rows.detach().cpu()
    written: list[Path] = []
    batch: list[dict[str, Any]] = []
    total = -(-len(records) // PER_BATCH)
    for record, contexts in _with_contexts(records, explained):
        latent = record.latent
        words = promoted[latent] if promoted else Promoted()
        vector = {"vector": [round(value, 6) for value in rows[latent].tolist()]}
        about = {"n_prompts_total": n_rows, "dataset": names.dataset}
        batch.append(_of_neuronpedia(record, contexts, words) | vector | about)
        page = _json(_of_circuits(record, contexts, words))
        io.write_files({target / "features" / f"{latent}.json": page})
        if len(batch) == PER_BATCH or latent == records[-1].latent:
            written.append(target / f"batch-{len(written)}.json")
            io.write_files({written[-1]: _json(_batch(names, batch))})
            batch = []
            progress(len(written), total, "files")
    labels = _labels(records, names)
    settings = _json(names._asdict())
    io.write_files({target / "explanations.jsonl": labels, target / "names.json": settings})
    return [*written, target / "explanations.jsonl", target / "names.json"]


def _batch(names: Names, features: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model_id": names.model,
        "layer": names.layer,
        "sae_set": names.set,
        "sae_id_suffix": None,
        "features": features,
    }


def _with_contexts(
    records: list[LatentRecord], explained: Path
) -> Iterator[tuple[LatentRecord, list[Context]]]:
    contexts = dict(iter_examples(explained / EXAMPLES))
    for record in records:
        yield record, contexts.get(record.latent, [])


def _of_neuronpedia(
    record: LatentRecord, contexts: list[Context], words: Promoted
) -> dict[str, Any]:
    edges, heights = _histogram(record)
    return {
        **NOTHING,
        "feature_index": record.latent,
        "neg_str": list(words.down),
        "neg_values": list(words.down_values),
        "pos_str": list(words.up),
        "pos_values": list(words.up_values),
        "frac_nonzero": record.density,
        "freq_hist_data_bar_values": edges,
        "freq_hist_data_bar_heights": heights,
        "n_tokens_in_prompt": max((len(c.tokens) for c in contexts), default=0),
        "activations": [_activation(context, record) for context in contexts],
    }


def _histogram(record: LatentRecord) -> tuple[list[float], list[float]]:
    """Middles of the steps and the shares of the firings in them."""
    n, total = len(record.histogram), sum(record.histogram)
    if not total:
        return [], []
    step = record.max_activation / n
    return [(i + 0.5) * step for i in range(n)], [count / total for count in record.histogram]


def _activation(context: Context, record: LatentRecord) -> dict[str, Any]:
    return {
        "bin_min": 0.0,
        "bin_max": record.max_activation,
        "bin_contains": 1.0,
        "tokens": list(context.tokens),
        "values": list(context.activations),
        "qualifying_token_index": context.peak,
    }


def _of_circuits(record: LatentRecord, contexts: list[Context], words: Promoted) -> dict[str, Any]:
    edges, heights = _histogram(record)
    ordered = sorted(contexts, key=lambda context: -context.activation)
    size = -(-len(ordered) // QUANTILES) if ordered else 0
    groups = [ordered[i : i + size] for i in range(0, len(ordered), size)] if size else []
    return {
        "transcoder_id": "",
        "index": record.latent,
        "examples_quantiles": [
            {
                "quantile_name": "Top activations" if i == 0 else f"Subsample {i}",
                "examples": [
                    {
                        "tokens_acts_list": list(context.activations),
                        "train_token_ind": context.peak,
                        "is_repeated_datapoint": False,
                        "tokens": list(context.tokens),
                    }
                    for context in group
                ],
            }
            for i, group in enumerate(groups)
        ],
        "top_logits": list(words.up),
        "bottom_logits": list(words.down),
        "act_min": 0.0,
        "act_max": record.max_activation,
        "quantile_values": edges,
        "histogram": heights,
        "activation_frequency": record.density,
    }


def _labels(records: list[LatentRecord], names: Names) -> bytes:
    """Labels as Neuronpedia's exports have explanations, a line each."""
    lines = [
        {
            "modelId": names.model,
            "layer": f"{names.layer}-{names.set}",
            "index": str(record.latent),
            "description": record.label,
            "typeName": "monosema",
            "explanationModelName": "none",
        }
        for record in records
        if record.label
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _json(record: object) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()
