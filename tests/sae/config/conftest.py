"""A schema with every shape that a configuration may have, and a file that fits it."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest

VALID = """\
title: a run
n_rows: 4096
share: 0.5
quick: false
hook_points: [layers.3:out, layers.5:in]
betas: [0.9, 0.99]
text:
  context: 16
  sources:
    - path: a.txt
    - path: b.txt
      share: 2
saes:
  wide:
    d_sae: 64
    activation: {kind: topk, k: 8}
  plain:
    d_sae: 32
    activation:
      kind: relu
      limits: {low: 0, high: 1.5}
"""


@dataclass(frozen=True, kw_only=True)
class ReLU:
    kind: Literal["relu"] = "relu"
    limits: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TopK:
    k: int
    """Latents that may fire."""
    kind: Literal["topk", "batch_topk"] = "topk"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    d_sae: int
    activation: ReLU | TopK
    frozen: Literal["decoder"] | None = None
    schedule: ReLU | TopK | None = None

    def __post_init__(self) -> None:
        if isinstance(self.activation, TopK) and self.activation.k > self.d_sae:
            rule = f"at most d_sae={self.d_sae}"
            raise ValueError(f"activation.k must be {rule}, got {self.activation.k}")


@dataclass(frozen=True, kw_only=True)
class Source:
    path: str
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.path.startswith("/"):
            raise ValueError(f"path must be relative, got {self.path!r}; write it from here")


@dataclass(frozen=True, kw_only=True)
class Text:
    sources: tuple[Source, ...]
    """Files of text."""
    context: int = 256
    """Tokens per
    context."""

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ValueError(f"context must be at least 2, got {self.context}")
        if len({source.path for source in self.sources}) < len(self.sources):
            raise ValueError("the files must differ")


@dataclass(frozen=True, kw_only=True)
class Run:
    title: str
    """Heading of the page."""
    n_rows: int
    text: Text
    saes: dict[str, Dictionary]
    share: float = 1.0
    quick: bool = True
    dtype: Literal["bfloat16", "float32"] = "float32"
    hook_points: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    revision: str | None = None
    device: int | str = 0
    cache: Path | None = None


@pytest.fixture(scope="session")
def schema() -> SimpleNamespace:
    """The classes of the schema, and the text of a valid file."""
    return SimpleNamespace(
        Run=Run, Text=Text, Source=Source, Dictionary=Dictionary, TopK=TopK, ReLU=ReLU, VALID=VALID
    )


@pytest.fixture
def file() -> Path:
    """A valid file, under the name `run.yaml` in the working directory."""
    path = Path("run.yaml")
    path.write_text(VALID)
    return path
