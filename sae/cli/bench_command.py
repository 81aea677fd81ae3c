"""`sae bench`: the benchmarks of a source checkout."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from sae.config import ConfigError

Bench = Literal[
    "auto", "gpu", "cpu", "cache", "storage", "loop", "labels", "image-labels", "windows", "browser"
]  # fmt: skip
MODULES: dict[Bench, str] = {
    "gpu": "benchmarks.gpu_suite",
    "cpu": "benchmarks.bench_cpu_step",
    "cache": "benchmarks.bench_cache",
    "storage": "benchmarks.bench_storage",
    "loop": "benchmarks.bench_loop",
    "labels": "benchmarks.bench_labels",
    "image-labels": "benchmarks.bench_image_labels",
    "windows": "benchmarks.bench_windows",
    "browser": "benchmarks.browser",
}
ROOT = Path(__file__).resolve().parents[2]
PASSED_ON = {"ignore_unknown_options": True}
"""Settings of the command: options that it does not know are the benchmark's."""


def bench(
    name: Annotated[Bench, typer.Argument(help="auto: gpu where there is one, else cpu.")] = "auto",
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[OPTION]...", help="Those of the benchmark.")
    ] = None,
) -> None:
    """Measure kernels, steps, caches, the browser; e.g. sae bench cpu --rounds 5."""
    if not (ROOT / "benchmarks").is_dir():
        raise ConfigError(
            f"sae bench must run from a source checkout, got the installed package in {ROOT}; "
            "clone the repository and run `make install`"
        )
    module = MODULES[_here() if name == "auto" else name]
    raise typer.Exit(subprocess.call([sys.executable, "-m", module, *(options or ())], cwd=ROOT))


def _here() -> Literal["gpu", "cpu"]:
    import torch  # half a second, for this alone

    return "gpu" if torch.cuda.is_available() else "cpu"
