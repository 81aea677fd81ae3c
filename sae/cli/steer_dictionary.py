"""`sae steer DICT`: base and steered text of one dictionary, and sweeps over strengths."""

import json
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from activations_cache import io
from activations_cache.config import ModelConfig, TextSource
from activations_cache.documents import documents
from activations_cache.models import LoadedModel, Tokenizer, load_model
from sae.cli import console
from sae.cli.unembedding import unembedding
from sae.explain.logit_lens import promoted_tokens
from sae.pretrained import load as load_dictionary
from sae.steer.config import SteerRequest, latent_change
from sae.steer.edits import Edit
from sae.steer.generation import generate
from sae.steer.place import Placed, load
from sae.steer.steering import Steering
from sae.steer.sweep import Point, Sweep, Target, plot, sweep

GLOSSES = TextSource(path="package://sae/demo_data/wordnet_glosses.jsonl.gz", field="gloss")
EVERY = 997
"""Of the glosses one in so many is neutral text, so that they come from all over WordNet."""

N_NEUTRAL_TOKENS = 48
N_TARGETS = 10
"""So many promoted tokens stand for a latent."""


def steer_dictionary(path: str, request: SteerRequest) -> None:
    """Print base and steered text of each prompt, or sweep and write what was found."""
    placed, loaded = placed_in_model(path, request.model, request.dtype, request.hook_point)
    if request.sweep:
        _sweep(path, placed, loaded, request)
    else:
        _steer(placed, loaded, request)


def placed_in_model(
    path: str, model: str | None, dtype: str | None, hook_point: str | None
) -> tuple[Placed, LoadedModel]:
    """Load a dictionary and the model that it belongs to.

    Raises:
        ValueError: If the model is not known and not named, or if it is another one.
    """
    placed = load(path, hook_point)
    name = model or placed.model.get("path")
    if name is None:
        raise ValueError(f"--model must name the model of {path}, whose files do not say it")
    kind = dtype or placed.model.get("dtype") or "bfloat16"
    loaded = load_model(ModelConfig(path=name, dtype=kind))  # pyright: ignore[reportArgumentType]
    placed.require_model(loaded.identity)
    return placed, loaded


def _steer(placed: Placed, loaded: LoadedModel, request: SteerRequest) -> None:
    changes = [latent_change(text) for text in request.latents]
    edits = [Edit(placed, latent=latent, **words) for latent, words in changes]
    where = {"positions": request.positions, "first_position": request.first_position}
    for prompt in request.prompts:
        n_new = request.max_new_tokens
        base = generate(loaded.model, loaded.tokenizer, prompt, max_new_tokens=n_new)
        with Steering(loaded.model, edits, **where) as steering:
            steered = generate(loaded.model, loaded.tokenizer, prompt, max_new_tokens=n_new)
        (count,) = steering.counts
        note = (
            f"{', '.join(request.latents)} ran on {count.n_chosen} tokens and changed "
            f"{count.n_changed}, by {count.relative_size:.2f} of the stream's norm"
        )
        console.side_by_side(prompt, ("base", base.text), ("steered", steered.text), note)


def _sweep(path: str, placed: Placed, loaded: LoadedModel, request: SteerRequest) -> None:
    latent, words = latent_change(request.latents[0])
    mode = "add" if "add" in words else "clamp"
    tokens = _promoted(path, placed, loaded, latent)
    shown = " ".join(repr(loaded.tokenizer.decode([token])) for token in tokens.tolist())
    target = Target(loaded.model, loaded.tokenizer, placed, latent, tokens)
    with console.step("sweep") as report:
        config = replace(request, mode=mode)
        found = sweep(target, _neutral(request, loaded.tokenizer), config, progress=report)
    name = Path(path).name
    output = Path(request.output or f"steer-{name}-{latent}")
    output.mkdir(parents=True, exist_ok=True)
    title = f"latent {latent} of {name} at {placed.writes}"  # tokens may have glyphs no font has
    unit = f"x {request.unit}"
    found.write_csv(output / "sweep.csv")
    picture, record = plot(found, title, unit), json.dumps(asdict(found), indent=1).encode()
    io.write_files({output / "sweep.png": picture, output / "sweep.json": record})
    columns = ["arm", unit, "gain", "KL", "top-1", "perplexity", "repeated", "moved"]
    rows = [_row(point) for point in found.points]
    console.table(f"{title}; promoted: {shown}", columns, rows, _note(found, output))


def _row(point: Point) -> list[str]:
    return [
        point.arm,
        f"{point.strength:g}",
        f"{point.target_gain:+.2f}",
        f"{point.kl_neutral:.3f}",
        f"{point.top1_agreement:.2f}",
        f"{point.perplexity:.1f}",
        f"{point.repeated:.2f}{' loop' if point.is_loop else ''}",
        f"{point.n_moved:.1f}",
    ]


def _note(found: Sweep, output: Path) -> str:
    best = found.best
    if best is None:
        return f"no strength keeps KL within {found.max_kl:g}; {output}"
    return (
        f"the largest strength with KL <= {found.max_kl:g} is {best.strength:g}"
        f"{', which loops' if best.is_loop else ''}: {best.text!r} (base: {found.base!r}); "
        f"{output}/sweep.png, .csv, .json"
    )


def _promoted(path: str, placed: Placed, loaded: LoadedModel, latent: int) -> Int[Tensor, " k"]:
    """The tokens that a latent's direction promotes most, which stand for it in a sweep."""
    placed.require_latent(latent)
    alone = load_dictionary(path, latents=slice(latent, latent + 1))
    return promoted_tokens(alone, *unembedding(loaded.model), N_TARGETS).promoted[0]


def _neutral(request: SteerRequest, tokenizer: Tokenizer) -> Int[Tensor, "example pos"]:
    """Neutral texts as token ids, -1 where one is short."""
    source = TextSource(path=request.neutral) if request.neutral else GLOSSES
    step = 1 if request.neutral else EVERY
    texts = islice(documents(source), 0, step * request.n_neutral, step)
    ids = [tokenizer(document.text)["input_ids"][:N_NEUTRAL_TOKENS] for document in texts]
    width = max(len(row) for row in ids)
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in ids])
