"""Two evaluations of SAEBench on a dictionary, without a network; two environments meet in files.

SAEBench 0.6 needs numpy < 2, so it never shares a process with this project. `prepare` writes what
it reads: the dictionary as SAELens has it, the model's folder, and texts under the names of the
data sets that SAEBench loads. `evaluate` runs in SAEBench's environment and imports none of ours.

    make saebench DICT=runs/demo/train/topk
"""

import argparse
import itertools
import json
import os
from pathlib import Path

CLASSES = ("noun.animal", "noun.artifact", "noun.person", "noun.plant")
"""What stands for the four classes of the news."""
NEWS = "fancyzhx/ag_news"
"""The one data set of sparse probing that is no more than texts and labels."""
N_TRAIN, N_TEST, CONTEXT = 400, 200, 64
"""Texts of a class and tokens of a context."""


def stand_in(work: Path) -> Path:
    """A small dictionary of the tutorials' random model, where no other is given."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import sae
    import stand_ins
    from activations_cache import ModelConfig, TextConfig, TextSource

    os.chdir(work)
    model = ModelConfig(path=stand_ins.language_model(), dtype="float32")
    text = TextConfig(
        sources=(TextSource(path="text.txt", document_pattern="CHAPTER "),), context=64
    )
    cache = sae.run.cache(model, text, "model.layers.1:out", n_rows=6000, out="cache")
    return sae.run.train(cache, k=8, d_sae=128, out="train")["topk"].resolve()


def prepare(dictionary: Path | None, work: Path) -> None:
    """Write the dictionary, its model and the texts."""
    import sae
    from activations_cache import ModelConfig, TextSource, load_model
    from activations_cache.documents import documents

    work.mkdir(parents=True, exist_ok=True)
    work = work.resolve()
    path = stand_in(work) if dictionary is None else dictionary.resolve()
    sae.run.convert(path, work / "dictionary", "saebench")
    made_from = sae.load(path).provenance["model"]
    loaded = load_model(ModelConfig(path=made_from["path"], dtype="float32"))
    loaded.model.save_pretrained(work / "model")
    loaded.tokenizer.save_pretrained(work / "model")
    glosses = TextSource(
        path="package://sae/demo_data/wordnet_glosses.jsonl.gz", field="gloss", label="supersense"
    )
    by_class: dict[str, list[str]] = {name: [] for name in CLASSES}
    for document in documents(glosses):
        if document.label in by_class:
            by_class[document.label].append(document.text)
    parts = {"train": slice(None, N_TRAIN), "test": slice(N_TRAIN, N_TRAIN + N_TEST)}
    for part, where in parts.items():
        rows = [
            {"text": text, "label": CLASSES.index(name)}
            for name, texts in by_class.items()
            for text in texts[where]
        ]
        write(work / NEWS / f"{part}.jsonl", rows)
    others = itertools.chain(*(texts[N_TRAIN + N_TEST :] for texts in by_class.values()))
    write(work / "texts" / "train.jsonl", [{"text": text} for text in others])


def write(path: Path, rows: list[dict]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluate(work: Path) -> None:
    """Run the core metrics and sparse probing, and print what they say."""
    os.chdir(work)
    # SAEBench's probes name one axis differently in a function and in what it calls, which newer
    # releases of jaxtyping refuse.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "JAXTYPING_DISABLE": "1"}
    from sae_bench.evals.core.main import multiple_evals
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
    from sae_bench.evals.sparse_probing.main import run_eval
    from sae_lens import SAE
    from transformer_lens.loading_from_pretrained import OFFICIAL_MODEL_NAMES

    OFFICIAL_MODEL_NAMES.append("model")  # it reads a folder, but only under a name from its list
    dictionary = SAE.load_from_disk("dictionary")
    site = dictionary.cfg.metadata
    site.model_name = "model"
    site.prepend_bos = bool(site.prepend_bos)
    multiple_evals(
        [("ours", dictionary)], n_eval_reconstruction_batches=8, n_eval_sparsity_variance_batches=8,
        compute_featurewise_density_statistics=True, compute_featurewise_weight_based_metrics=True,
        dataset="texts", context_size=CONTEXT, output_folder="core", device="cpu", force_rerun=True,
    )  # fmt: skip
    config = SparseProbingEvalConfig(
        model_name="model", dataset_names=[NEWS], probe_train_set_size=2 * N_TRAIN,
        probe_test_set_size=2 * N_TEST, context_length=CONTEXT, llm_batch_size=32,
        llm_dtype="float32",
    )  # fmt: skip
    run_eval(config, [("ours", dictionary)], "cpu", "sparse_probing", force_rerun=True)
    for name in ("core", "sparse_probing"):
        (file,) = Path(name).glob("*.json")
        metrics = json.loads(file.read_text())["eval_result_metrics"]
        print(name, json.dumps(metrics, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["prepare", "evaluate"])
    parser.add_argument("work", type=Path, help="Where the files lie.")
    parser.add_argument("--dictionary", type=Path, help="One of ours; a small one when absent.")
    given = parser.parse_args()
    prepare(given.dictionary, given.work) if given.step == "prepare" else evaluate(given.work)
