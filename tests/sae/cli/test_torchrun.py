"""`sae train` under torchrun: two processes from the command line give what one gives."""

import json
import subprocess
import sys

import pytest
import torch

from sae import load


@pytest.mark.long
def test_two_processes_train_what_one_trains(tmp_path, tiny_model_dir, tiny_text):
    entry = {"d_sae": 67, "activation": {"kind": "batchtopk", "k": 5}, "dead_after_tokens": 500}
    record = {
        "output": str(tmp_path / "two"),
        "cache_path": str(tmp_path / "cache"),
        "cache": {
            "model": {"path": str(tiny_model_dir), "dtype": "float32"},
            "text": {
                "sources": [{"path": str(tiny_text), "document_pattern": "CHAPTER"}],
                "context": 31,
            },
            "hook_points": ["model.layers.1:out"],
            "n_rows": 2003,
            "rows_per_shard": 509,
        },
        "train": {"batch": 127, "precision": "fp32", "log_every": 5, "saes": {"a": entry}},
    }
    config = tmp_path / "tiny.yaml"
    config.write_text(json.dumps(record))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "sae.cli"]
    done = subprocess.run(
        [sys.executable, *command, "train", str(config)],
        check=True, timeout=400, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.count("rows/s") >= 1
    assert done.stdout.count("curves: ") == 1  # the first process alone shows the table
    assert (tmp_path / "two" / "train" / "curves.png").stat().st_size > 10_000
    alone = [sys.executable, "-m", "sae.cli", "train", str(config), f"output={tmp_path / 'one'}"]
    subprocess.run(alone, check=True, timeout=400)
    ours, theirs = (load(tmp_path / n / "train" / "a").state_dict() for n in ("two", "one"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)
