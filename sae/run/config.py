"""What `sae run` reads: one file with a part per step."""

import re
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from activations_cache.checks import (
    PACKAGE,
    at_least,
    locate,
    require,
    require_extra,
    require_reader,
)
from activations_cache.config import CacheConfig
from monosema.checks import LATER, MonosemaError, all_at_least
from sae.evaluate.config import EvaluateConfig
from sae.explain.config import ExplainConfig
from sae.steer.config import OnModel, SteerConfig
from sae.train.config import TrainConfig
from sae.train.hook_points import hook_points_of

OF_TEXT = {
    "evaluate": ("n_contexts", "n_contexts_special", "contexts_per_forward"),
    "explain": (
        "kinds", "min_firings", "min_examples", "wide_words", "min_word_count", "prior_rows",
        "permutations", "null_permutations", "top_contexts", "contexts_per_fifth", "context_tokens",
        "weights", "rules", "atlas", "autointerp",
    ),
    "steer": tuple(entry.name for entry in fields(SteerConfig)),
}  # fmt: skip
"""Fields, by their part of a file, that are not read where a cache is of images."""

OF_IMAGES = {"evaluate": ("n_images", "n_neighbours"), "explain": ("images",)}
"""Those that are not read where it is of texts."""


def refuse_unread(part: str, config: Any, *, of_images: bool) -> None:
    """Refuse what is set and would not be read.

    Args:
        part: Its name in a file.
        config: Its fields.
        of_images: Whether the cache is of images.

    Raises:
        ValueError: If a field that is of the other kind of data is not as it is by default.
    """
    here, there = ("images", "texts") if of_images else ("texts", "images")
    by_name = {entry.name: entry for entry in fields(config)}
    for name in (OF_TEXT if of_images else OF_IMAGES).get(part, ()):
        value, entry = getattr(config, name), by_name[name]
        made = entry.default_factory
        if value != (entry.default if made is MISSING else made()):
            got = "one" if is_dataclass(value) else repr(value)
            raise MonosemaError(
                f"{part}.{name} must be absent where the cache is of {here}, got {got}; it is for "
                f"{there} alone"
            )


@dataclass(frozen=True, kw_only=True)
class _Output:
    """What is common: where the results go, and the cache."""

    output: str
    """Directory of everything that the run writes."""
    cache_path: str | None = None
    """Directory of the cache, so that runs may share one; output/cache when absent."""
    title: str = "Monosema"
    """Heading of the page."""
    cache: CacheConfig
    """Model, data and hook points."""

    def __post_init__(self) -> None:
        """Check what no type tells."""
        if not self.output:
            raise MonosemaError("output must name a directory, got ''")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What `sae study` makes of a run with dictionaries of several widths."""

    passes: tuple[float, ...] = (0.25, 0.5)
    """Each width is also trained on these shares of the rows, for the scaling law; () for none."""
    families: str = "package://sae/demo_data/concept_families.json"
    """Families of texts and their controls that latents are searched for (a JSON file)."""
    exchanges: int = 199
    """Copies of the search with texts and controls exchanged."""
    trees: int = 12
    """Latents of the narrowest width whose descendants are shown."""
    resamples: int = 200
    """Of the law's intervals."""
    seed: int = 0
    """Of what is drawn here."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for share in self.passes:
            require(0 < share < 1, "passes", "lie above 0 and below 1", share)
        distinct = len(set(self.passes)) == len(self.passes)
        require(distinct, "passes", "be shares of the rows, each once", self.passes)
        all_at_least(self, exchanges=19, trees=1, resamples=20, seed=0)


@dataclass(frozen=True, kw_only=True)
class CacheRunConfig(_Output):
    """The first step alone; the parts of the others may stand in the same file."""

    train: TrainConfig | None = None
    """Not needed."""
    evaluate: EvaluateConfig | None = None
    """Not needed."""
    explain: ExplainConfig | None = None
    """Not needed."""
    steer: SteerConfig | None = None
    """Not needed."""
    study: StudyConfig | None = None
    """Not needed."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Output):
    """The chain of steps: cache, train, evaluate, explain, steer, page."""

    train: TrainConfig
    """Dictionaries, side by side."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Measurements on held-out text."""
    explain: ExplainConfig = field(default_factory=ExplainConfig)
    """Labels without an LLM."""
    steer: SteerConfig = field(default_factory=SteerConfig)
    """The steering example."""
    read_out: Literal["linear", "refined"] = field(default="linear", metadata=LATER)
    """How latents are read after training: by the encoder alone, or refined (`sae.read_out`)."""
    study: StudyConfig | None = field(default=None, metadata=LATER)
    """What `sae study` does after explaining; `sae run` refuses it."""

    def __post_init__(self) -> None:
        """Check the parts against each other."""
        super().__post_init__()
        of_images = self.cache.images is not None
        for part in OF_TEXT:
            refuse_unread(part, getattr(self, part), of_images=of_images)
        where = hook_points_of(self.train.saes, self.cache.hook_points, "train.")
        other = next((entry for entry, place in where.items() if place.outputs), None)
        if self.read_out == "refined" and other is not None:
            raise MonosemaError(
                f"read_out must be 'linear' beside train.saes.{other}, which does not predict what "
                "it reads, got 'refined'"
            )
        name = self.steer.dictionary
        if name is not None and name not in self.train.saes:
            raise MonosemaError(
                f"steer.dictionary must be one of {', '.join(self.train.saes)}, got {name!r}"
            )
        if name is not None and (len(where[name].inputs) > 1 or where[name].outputs):
            raise MonosemaError(
                f"steer.dictionary must be one that reads and predicts one hook point, got {name!r}"
            )
        if self.train.source == "live" and not self.cache.data.hold:
            part = "images" if of_images else "text"
            raise MonosemaError(
                f"cache.{part}.hold must be above 0 beside train.source 'live', which is measured "
                f"on what is held out, got {self.cache.data.hold}"
            )
        if self.train.source == "cache" and self.train.batch > self.cache.n_rows:
            raise MonosemaError(
                f"train.batch must be at most cache.n_rows={self.cache.n_rows}, "
                f"got {self.train.batch}"
            )


def part_of(config: RunConfig, part: str) -> RunConfig:
    """Return the run of some of the dictionaries, on the cache that all parts share.

    Args:
        config: The run of all of them.
        part: "I/N": each Nth dictionary, from the Ith one on.

    Raises:
        MonosemaError: If the text is no such part, or no dictionary is in it.
    """
    saes, found = config.train.saes, re.fullmatch(r"0*([1-9]\d*)/0*([1-9]\d*)", part)
    number, n_parts = map(int, found.groups()) if found else (1, 0)
    if not 1 <= number <= n_parts <= len(saes):
        raise MonosemaError(
            f"--part must be I/N with I from 1 to N and N at most the {len(saes)} dictionaries, "
            f"got {part!r}; in an array job it is $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
        )
    names = [*saes][number - 1 :: n_parts]
    output = Path(config.output)
    return replace(
        config,
        output=str(output / f"part-{number}-of-{n_parts}"),
        cache_path=config.cache_path or str(output / "cache"),
        train=replace(config.train, saes={name: saes[name] for name in names}),
    )


def require_installed(config: CacheRunConfig | RunConfig) -> None:
    """Refuse a run whose model, data or optional libraries are not there.

    Raises:
        FileNotFoundError: If a package that carries the model or data is missing.
        ValueError: If a library of one of the extras is missing.
    """
    cache = config.cache
    paths = [cache.model.path, *(source.path for source in cache.data.sources)]
    for path in paths:
        if path.startswith(PACKAGE):
            locate(path)
    require_reader(cache.model.path)
    if not isinstance(config, RunConfig):
        return
    explain = config.explain
    if explain.atlas is not None and explain.atlas.plane == "umap":
        require_extra("umap", "explain.atlas.plane=umap", "umap")
    if explain.autointerp is not None and explain.autointerp.llm.kind != "local":
        require_extra("openai", "explain.autointerp.llm", "llm")
    if config.train.wandb is not None:
        require_extra("wandb", "train.wandb", "wandb")


RUN_CONFIG = "run.yaml"
"""A run's own config, in its output."""


DICTIONARY_FILES = ("sae.safetensors", "cfg.json", "explain/summary.json")
"""What tells a dictionary's directory: its weights, or that it was explained there."""
_NAME = re.compile(r"[\w.\-]+(:|/[\w.\-]).*")
"""A name on the hub, or RELEASE:ID."""


def browsed_config(path: str | Path) -> RunConfig | None:
    """Return the config of the run that a path names; None where it names a dictionary.

    Args:
        path: A run's directory, its YAML file, a recipe's name, or a dictionary's directory.

    Raises:
        ConfigError: If it is neither, or the config is wrong.
    """
    # A config alone needs neither pydantic nor YAML.
    from sae.config import ConfigError, config_file, is_config, load

    place = config_file(str(path)) if is_config(str(path)) else Path(path)
    if place.is_file():
        return load(RunConfig, place)
    if (place / RUN_CONFIG).is_file():
        moved = [f"output={_quoted(place)}"]
        if not Path(load(RunConfig, place / RUN_CONFIG).cache_path or "").is_dir():
            moved.append(f"cache_path={_quoted(place / 'cache')}")
        return load(RunConfig, place / RUN_CONFIG, moved)
    is_name = not place.exists() and isinstance(path, str) and bool(_NAME.fullmatch(path))
    if is_name or any((place / name).is_file() for name in DICTIONARY_FILES):
        return None
    raise ConfigError(
        f"RUN must be a directory with {RUN_CONFIG}, which `sae run` writes, a YAML file, a "
        f"recipe or a dictionary, got {path}"
    )


def _quoted(path: Path) -> str:
    text = str(path).replace("'", "''")
    return f"'{text}'"


@dataclass(frozen=True, kw_only=True)
class ConceptsRequest(OnModel):
    """What `sae concepts DICT` tests: whether an answer of the model moves along concepts."""

    concepts: str
    """A folder (NAME.txt: a text per line; NAME/: a text per file), or records with labels."""
    prompts: tuple[str, ...] = ()
    """Inputs whose next token is asked for."""
    prompt_file: str | None = None
    """A .txt, .jsonl or .parquet file of more of them."""
    target: str
    """The token whose logit is the answer."""
    against: str | None = None
    """A token whose logit is taken off."""
    field: str = "text"
    """Field of a record that holds its text."""
    label: str = "concept"
    """Field of a record that names its concept."""
    random: str | None = None
    """A .txt, .jsonl or .parquet file of texts for random sets; WordNet's glosses when absent."""
    random_field: str = "text"
    """Field of its records that holds the text."""
    sets: int = 40
    """Random sets."""
    texts: int = 30
    """Texts of a set at most; all sets have as many as the smallest concept."""
    sides: Literal["greater", "both"] = "both"
    """Whether a score below chance counts as well."""
    level: float = 0.05
    """Of the test, before the correction for the number of concepts."""
    first_position: int = 1
    """Positions below this one, the attention sinks, do not count."""
    seed: int = 0
    """Decides which texts are in which random set."""

    def __post_init__(self) -> None:
        """Check ranges."""
        given = bool(self.prompts) or self.prompt_file is not None
        require(given, "prompts", "hold at least two texts", self.prompts)
        require(all(self.prompts), "prompts", "not be empty", self.prompts)
        at_least("sets", self.sets, 4)
        at_least("texts", self.texts, 2)
        at_least("first_position", self.first_position, 0)
        require(0 < self.level < 1, "level", "be above 0 and below 1", self.level)


@dataclass(frozen=True, kw_only=True)
class BottleneckRequest(OnModel):
    """What `sae concepts DICT --bottleneck FILE` fits: answers by concepts, and corrected ones."""

    records: str
    """A .jsonl file: a text, its answer, and which concepts it has, in each record."""
    field: str = "text"
    """Field of a record that holds its text."""
    answer: str = "answer"
    """Field that holds the answer."""
    concepts: str = "concepts"
    """Field that lists the names of a text's concepts, or says true or false of each name."""
    k: int = 5
    """Units that tell a concept in the bottleneck."""
    head: Literal["linear", "tree"] = "linear"
    """What the bottleneck's answer is made by; "tree" learns XOR."""
    held_out: float = 0.3
    """Share of the texts that are scored and not fitted on."""
    first_position: int = 1
    """Positions below this one, the attention sinks, do not count."""
    seed: int = 0
    """Decides which texts are held out, and the exchanged concepts of the control."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("k", self.k, 1)
        at_least("first_position", self.first_position, 0)
        at_least("seed", self.seed, 0)
        require(0 < self.held_out < 1, "held_out", "be above 0 and below 1", self.held_out)
