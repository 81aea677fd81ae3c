"""The chain of steps behind `sae run`; a step whose result is there and fits is skipped."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

import activations_cache
from activations_cache import ActivationCache, io
from activations_cache.builder import rank_of_this_process
from activations_cache.checks import Progress, silent
from activations_cache.models import LoadedModel, load_model
from activations_cache.vision import LoadedVisionModel, load_vision_model
from sae import pretrained
from sae.autoencoder import SparseAutoencoder
from sae.cli import console, steps
from sae.cli.estimate import announce
from sae.cli.run_config import RunConfig
from sae.config import ConfigError, digest, dump


class Run:
    """What the steps of one run share; slow things are loaded when a step first needs them."""

    def __init__(self, config: RunConfig) -> None:
        """Take a checked config; nothing is read yet."""
        self.config = config
        self.output = Path(config.output)
        self.cache_path = Path(config.cache_path or self.output / "cache")
        self.hook_point = config.cache.hook_points[0]

    def path(self, step: str) -> Path:
        """Directory of a step's result."""
        return self.cache_path if step == "cache" else self.output / step

    @cached_property
    def cache(self) -> ActivationCache:
        """The finished cache."""
        return activations_cache.open(self.cache_path)

    @property
    def of_images(self) -> bool:
        """Whether the cache is of images."""
        return self.config.cache.images is not None

    @cached_property
    def vision(self) -> LoadedVisionModel:
        """The vision model of a cache of images."""
        return load_vision_model(self.config.cache.model)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model and its tokenizer."""
        return load_model(self.config.cache.model)

    @cached_property
    def token_strings(self) -> list[str]:
        """Each token id as text, with its leading space if it has one."""
        embeddings = self.loaded.model.get_input_embeddings().weight
        assert isinstance(embeddings, Tensor), type(embeddings)
        n_tokens = embeddings.shape[0]
        return self.loaded.tokenizer.batch_decode([[i] for i in range(n_tokens)])

    @cached_property
    def dictionaries(self) -> dict[str, SparseAutoencoder]:
        """The trained dictionaries by name."""
        return {n: pretrained.load(self.path("train") / n) for n in self.config.train.saes}

    def is_frozen(self, name: str) -> bool:
        """Whether an entry of `saes:` is a frozen baseline."""
        return self.config.train.saes[name].frozen != "none"


class _Step(NamedTuple):
    name: str
    action: Callable[[Run, Progress], None]
    config: Callable[[RunConfig], object]
    """The part of the config that decides this step's result, besides the steps before it."""
    of_images: bool = True
    """Whether it is done where the cache is of images."""


STEPS = (
    _Step("cache", steps.cache, lambda c: asdict(c.cache)),
    _Step("train", steps.train, lambda c: asdict(c.train)),
    _Step("evaluate", steps.evaluate, lambda c: asdict(c.evaluate)),
    _Step("explain", steps.explain, lambda c: asdict(c.explain)),
    _Step("steer", steps.steer, lambda c: asdict(c.steer), of_images=False),
    _Step("browse", steps.browse, lambda c: {"title": c.title}),
)


CONFIG = "run.yaml"
"""The run's own config, beside its results: what `sae browse RUN` goes by."""

TOGETHER = ("cache", "train")
"""What all processes of a launcher do together; the first one marks it as done."""


def run_chain(config: RunConfig, last: str) -> None:
    """Run the steps up to `last`, then print the results.

    A step is skipped when its marker names the same digest of all the configs that decide it.
    Each step writes its result before its marker, so a killed run repeats at most that step.
    """
    run = Run(config)
    rank, _ = rank_of_this_process()
    if rank == 0:
        io.write_files({run.output / CONFIG: dump(config).encode()})
    identity = ""
    began = time.monotonic()
    announced = False
    for step in _todo(run, last):
        identity = digest({"after": identity, step.name: step.config(config)})
        marker = run.path(step.name) / "done.json"
        if rank > 0:
            if not _is_done(marker, identity):
                step.action(run, silent)
        elif _is_done(marker, identity):
            console.skipped(step.name, run.path(step.name))
        else:
            if not announced and step.name in TOGETHER:  # later there is nothing to train
                announce(config)
                announced = True
            with console.step(step.name) as report:
                marker.unlink(missing_ok=True)
                step.action(run, report)
            _mark(marker, identity)
        if rank > 0 and step.name == TOGETHER[-1]:
            return  # what follows is the first process's alone
        if step.name == last:
            break
        steps.check(run, step.name, last)
    steps.show(run, last, time.monotonic() - began)


def _todo(run: Run, last: str) -> list[_Step]:
    todo = [step for step in STEPS if step.of_images or not run.of_images]
    if last not in {step.name for step in todo}:
        raise ConfigError(
            f"cache must be of texts for `sae {last}`, got images; they end with `sae run`"
        )
    return todo


def _is_done(marker: Path, identity: str) -> bool:
    try:
        return json.loads(marker.read_text())["identity"] == identity
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _mark(marker: Path, identity: str) -> None:
    io.write_files({marker: json.dumps({"identity": identity}).encode()})
