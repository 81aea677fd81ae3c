"""Whole runs of models that do not predict the next token: masked ones and encoders."""

import copy
import json

import pytest

from sae import run
from tests.families import make


@pytest.mark.parametrize(
    ("family", "hook_point", "loss"),
    [
        ("Bert", "bert.encoder.layer.1:out", "masked token"),
        ("T5", "encoder.block.1:out", None),
    ],
)
def test_a_run_goes_to_its_end(family, hook_point, loss, tiny_tokenizer, tiny_records, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    model = make(family)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    record = {
        "output": str(tmp_path / "run"),
        "cache": {
            "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
            "text": {"sources": [{"path": str(tiny_records), "field": "gloss"}], "context": 31},
            "hook_points": [hook_point],
            "n_rows": 3001,
        },
        "train": {"batch": 127, "saes": {"topk": {"d_sae": 41}}},
        "evaluate": {"n_contexts": 3, "n_contexts_special": 1},
    }
    record["train"]["saes"]["topk"]["activation"] = {"kind": "topk", "k": 3}
    (tmp_path / "run.yaml").write_text(json.dumps(record))
    result = run.job(tmp_path / "run.yaml")
    assert result.page is not None
    assert result.page.is_file()
    assert ("masked tokens" in result.table.note) is (loss is not None)
    measured = result.report.substitution
    assert (measured["intact"].loss if measured else None) == loss
    steering = json.loads((tmp_path / "run" / "steer" / "steering.json").read_text())
    assert steering["shown"] is None
    assert "does not predict the next token" in steering["reason"]
