"""`sae scaling plan` and `sae scaling fit` from the command line."""

import json
from pathlib import Path

from typer.testing import CliRunner

from sae.cli.main import app

CONFIG = Path(__file__).parents[3] / "configs" / "scaling" / "smollm2.yaml"


def test_a_plan_is_printed_and_written(tmp_path):
    arguments = ["scaling", "plan", str(CONFIG), f"output={tmp_path}", "passes=3"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["config"]["passes"] == 3
    assert len(record["runs"]) == 12
    assert "12 runs in 3 passes" in " ".join(done.output.split())


def test_a_law_is_fitted_printed_and_drawn(tmp_path):
    runs = [
        {"d_sae": f, "rows": s, "k": 7, "loss": 0.1 + 5 * f**-0.4 + 60 * s**-0.6}
        for f in (64, 256, 1024, 4096)
        for s in (4_000, 16_000, 64_000, 256_000)
    ]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    done = CliRunner().invoke(
        app,
        [
            "scaling",
            "fit",
            str(tmp_path / "runs.json"),
            "--output",
            str(tmp_path / "out"),
            "--resamples",
            "20",
        ],
    )
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "out" / "fit.json").read_text())["figures"]
    assert abs(figures["exponent of F*"]["value"] - 0.6) < 0.006
    assert (tmp_path / "out" / "scaling.png").stat().st_size > 10_000
    assert "exponent of F*" in done.output
