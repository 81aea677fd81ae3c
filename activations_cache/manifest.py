"""What a cache was made from, and what it holds: `plan.json` at the start, `manifest.json` last.

The plan is written before the first shard and says what is being built; the manifest is written
when every shard is there, so a directory with a manifest is a complete cache.
"""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from activations_cache import io
from activations_cache.checks import CacheFormatError, MonosemaError, at_least, require
from activations_cache.config import COMPRESSIONS, DTYPES, parse_hook_point
from activations_cache.journal import (
    Files,
    fingerprint,
    first_difference,
    require_types,
    seal,
    unseal,
)

FORMAT_VERSION = 1
"""The version of FORMAT.md that this package writes, and the newest that it reads."""

PLAN = "plan.json"
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a cache is made from and how it is laid out; both are its identity."""

    made_from: dict[str, Any]
    """Model, tokenizer, text and whatever else the numbers depend on; JSON."""
    hook_points: dict[str, int]
    """d_model of each hook point, in order."""
    dtype: str
    """bfloat16, float16, float32 or int8."""
    context: int
    """Tokens per example."""
    skip_positions: int
    """Positions at the start of each example that give no row."""
    rows_per_shard: int
    """Rows that a shard can hold."""
    n_examples: int
    """Examples in the whole cache."""
    source_names: tuple[str, ...]
    """Names of the values of `examples/source`."""
    label_names: tuple[str, ...] = ()
    """Names of the values of `examples/label`; empty where there are no labels."""
    compression: str = "none"
    """none, or zstd for the files of `acts`."""
    has_segments: bool = False
    """Whether an example may hold several pieces of text that do not see each other."""
    exclude_tokens: tuple[int, ...] = ()
    """Token ids that give no row, ascending."""
    request: dict[str, Any] = field(default_factory=dict)
    """What the caller asked for, so that the same request is recognised; not identity."""

    def __post_init__(self) -> None:
        """Check what a damaged or foreign file could have wrong."""
        require(self.dtype in DTYPES, "dtype", f"be one of {', '.join(DTYPES)}", self.dtype)
        known = self.compression in COMPRESSIONS
        require(known, "compression", f"be one of {', '.join(COMPRESSIONS)}", self.compression)
        if not self.hook_points:
            raise MonosemaError("hook_points must name at least one, got none")
        for name, d_model in self.hook_points.items():
            parse_hook_point(name)
            at_least("d_model", d_model, 1)
        at_least("skip_positions", self.skip_positions, 0)
        at_least("context", self.context, self.skip_positions + 1)
        at_least("rows_per_shard", self.rows_per_shard, self.rows_per_example)
        at_least("n_examples", self.n_examples, 1)

    @property
    def rows_per_example(self) -> int:
        """Rows that an example gives when all are kept."""
        return self.context - self.skip_positions

    @property
    def examples_per_shard(self) -> int:
        """Shard s covers the examples from s times this number on."""
        return self.rows_per_shard // self.rows_per_example

    @property
    def n_shards(self) -> int:
        """Shards of the complete cache."""
        return math.ceil(self.n_examples / self.examples_per_shard)

    @property
    def identity(self) -> dict[str, Any]:
        """What the content of every shard depends on."""
        layout = asdict(self)
        del layout["request"]
        if not self.exclude_tokens:  # the key is newer than many caches
            del layout["exclude_tokens"]
        return layout.pop("made_from") | layout

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity's canonical JSON."""
        return fingerprint(self.identity)

    def only(self, n_examples: int, why: str) -> "Plan":
        """Return the plan of some of the examples; `why` becomes part of the identity."""
        made_from = {**self.made_from, "examples": why}
        return replace(self, n_examples=n_examples, made_from=made_from)

    def examples_of(self, shard: int) -> range:
        """Return the numbers of the examples that a shard covers."""
        start = shard * self.examples_per_shard
        return range(start, min(start + self.examples_per_shard, self.n_examples))

    def record(self) -> dict[str, Any]:
        """Return the plan as `plan.json` holds it."""
        return {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "request": self.request,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any], name: str) -> "Plan":
        """Read a plan or the plan inside a manifest.

        Raises:
            CacheFormatError: If the record is of a newer version, or is no plan.
        """
        require_version(record, name)
        try:
            identity, request = dict(record["identity"]), dict(record["request"])
            own = {f.name for f in fields(cls)} - {"made_from", "request"}
            identity.setdefault("exclude_tokens", ())
            layout = {key: identity.pop(key) for key in own}
            for key in ("source_names", "label_names", "exclude_tokens"):
                layout[key] = tuple(layout[key])
            plan = cls(made_from=identity, request=request, **layout)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CacheFormatError(f"{name} must follow FORMAT.md, got {error!r}") from error
        require_types(plan, name)
        return plan


@dataclass(frozen=True, kw_only=True)
class HookStatistics:
    """Statistics of a hook point over the rows of the splits explain and score."""

    n_rows: int
    """Rows that the statistics are over."""
    mean_square_norm: float
    """Mean of the squared Euclidean norm."""
    norm_quantiles: dict[str, float]
    """Norm at the quantiles 0, 0.01, 0.05, 0.5, 0.95, 0.99 and 1."""
    n_nonfinite: int
    """Rows, of any split, kept out because of this hook point."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A complete cache in one page; the shards themselves are listed in the journals."""

    plan: Plan
    """What it was made from."""
    n_rows: int
    """Valid rows of all shards."""
    n_quarantined: int
    """Rows kept out because they were not finite."""
    statistics: dict[str, HookStatistics]
    """By hook point."""
    journals: Files
    """Size and checksum of each journal, by name."""
    files: Files
    """Size and checksum of the files that belong to no shard, by path."""
    provenance: dict[str, Any]
    """Versions, device, threads, date: recorded, never compared."""

    def record(self) -> dict[str, Any]:
        """Return the manifest as `manifest.json` holds it."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "plan"}
        statistics = {name: asdict(value) for name, value in self.statistics.items()}
        return self.plan.record() | own | {"n_shards": self.plan.n_shards, "statistics": statistics}

    @classmethod
    def from_record(cls, record: dict[str, Any], name: str) -> "Manifest":
        """Read a manifest.

        Raises:
            CacheFormatError: If the record is of a newer version, or is no manifest.
        """
        plan = Plan.from_record(record, name)
        try:
            own = {f.name: record[f.name] for f in fields(cls) if f.name != "plan"}
            given = {
                hook: HookStatistics(**record["statistics"][hook]) for hook in plan.hook_points
            }
        except (KeyError, TypeError) as error:
            raise CacheFormatError(f"{name} must follow FORMAT.md, got {error!r}") from error
        manifest = cls(**{**own, "plan": plan, "statistics": given})
        for part in (manifest, *given.values()):
            require_types(part, name)
        return manifest


def require_version(record: dict[str, Any], name: str) -> None:
    """Refuse a record that a newer package wrote.

    Raises:
        CacheFormatError: If its version is not one that this package reads.
    """
    version = record.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:  # True and 1.0 are equal to 1
        raise CacheFormatError(
            f"{name} must have format_version {FORMAT_VERSION}, got {version!r}; "
            "read it with the version of monosema that wrote it, or build the cache again"
        )


def read_plan(path: Path) -> Plan | None:
    """Return the plan of the cache at `path`, or None where none was begun."""
    name = path / PLAN
    return Plan.from_record(unseal(name.read_bytes(), str(name)), str(name)) if _is(name) else None


def read_manifest(path: Path) -> Manifest | None:
    """Return the manifest of the cache at `path`, or None where none is complete."""
    name = path / MANIFEST
    if not _is(name):
        return None
    return Manifest.from_record(unseal(name.read_bytes(), str(name)), str(name))


def write_plan(path: Path, plan: Plan) -> None:
    """Begin a cache."""
    io.write_files({path / PLAN: seal(plan.record(), indent=2)})


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Complete a cache."""
    io.write_files({path / MANIFEST: seal(manifest.record(), indent=2)})


def require_same(path: Path, there: Plan, wanted: Plan) -> None:
    """Refuse to go on with what was begun from something else.

    Raises:
        CacheFormatError: Naming the first key of the identities that differs, and both values.
    """
    difference = first_difference(wanted.identity, there.identity)
    if difference is not None:
        raise CacheFormatError(
            f"{path} must be a cache of the same identity, got another {difference}; "
            "choose another directory or remove this one"
        )


def _is(path: Path) -> bool:
    return path.is_file()
