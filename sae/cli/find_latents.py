"""What `sae find` does, and how it is shown."""

import torch

from activations_cache.models import LoadedModel
from sae.cli import console
from sae.cli.steer_dictionary import placed_in_model
from sae.pretrained import load as load_dictionary
from sae.steer.attribution import agreement, attribute, integrated_gradients, logit_difference
from sae.steer.config import FindRequest
from sae.steer.place import Placed
from sae.steer.search import Counting, find_latents, nearest_latents


def find_latents_of(path: str, request: FindRequest) -> None:
    """Print the latents that a request asks for."""
    if request.near is not None:
        _near(path, request.near, request)
        return
    where = (request.model, request.dtype, request.hook_point)
    placed, loaded = placed_in_model(path, *where)
    if request.prompt is not None:
        _behind(placed, loaded, request)
    else:
        _by_texts(placed, loaded, request)


def _near(path: str, latent: int, request: FindRequest) -> None:
    other = None if request.among is None else load_dictionary(request.among)
    found = nearest_latents(load_dictionary(path), torch.tensor([latent]), other, k=request.n)
    pairs = zip(found.latents[0].tolist(), found.cosines[0].tolist(), strict=True)
    rows = [[str(number), f"{cosine:+.3f}"] for number, cosine in pairs]
    title = f"latents of {request.among or path} near latent {latent} of {path}"
    console.table(title, ["latent", "cosine"], rows, "cosines of the decoder's rows")


def _by_texts(placed: Placed, loaded: LoadedModel, request: FindRequest) -> None:
    with console.step("find") as report:
        found = find_latents(
            loaded.model, loaded.tokenizer, placed, request.pos, request.neg,
            Counting(request.where, request.first_position), progress=report,
        )  # fmt: skip
    texts = [loaded.tokenizer(text)["input_ids"] for text in request.pos]
    rows = []
    for entry in found[: request.n]:
        tokens = [
            str(loaded.tokenizer.decode([t[p]])) for t, p in zip(texts, entry.tokens, strict=True)
        ]
        rows.append([
            str(entry.latent),
            f"{entry.score:.3f}",
            f"{entry.weakest:.3f}",
            " ".join(tokens),
        ])
    unit = "of its maximum" if placed.stats is not None else "no statistics: as it is"
    console.table(
        f"latents that fire in all of {len(request.pos)} texts and in none of {len(request.neg)}",
        ["latent", f"score, {unit}", "activation", "where"],
        rows,
        f"{len(found)} of {placed.dictionary.config.d_sae:,}; its weakest peak among the texts",
    )


def _behind(placed: Placed, loaded: LoadedModel, request: FindRequest) -> None:
    assert request.prompt is not None
    assert request.target is not None
    ids = torch.tensor([loaded.tokenizer(request.prompt)["input_ids"]])
    target = _token(loaded, request.target)
    against = None if request.against is None else _token(loaded, request.against)
    metric = logit_difference(target, against)
    first = {"first_position": request.first_position}
    found = attribute(loaded.model, placed, ids, metric, **first)
    path = integrated_gradients(loaded.model, placed, ids, metric, **first)
    with console.step("ablate") as report:
        agreed = agreement(loaded.model, placed, ids, metric, n=request.n_ablated, progress=report)
    strings = [str(loaded.tokenizer.decode([i])) for i in ids[0].tolist()]
    activations = found.latents.values
    rows = []
    for position, latent, score in found.top(request.n):
        f = float((activations[position] * (found.latents.indices[position] == latent)).sum())
        rows.append([f"{position} {strings[position]}", str(latent), f"{score:+.3f}", f"{f:.2f}"])
    note = (
        f"logit {found.metric:+.2f}; over {agreed.n} ablations attribution correlates "
        f"{agreed.attribution:.2f} with the effect and activation {agreed.activation:.2f}; "
        f"integrated gradients sum to {path.total:+.2f} of {path.difference:+.2f}"
    )
    columns = ["position", "latent", "gradient x activation", "activation"]
    console.table(f"{request.target!r} after {request.prompt!r}", columns, rows, note)


def _token(loaded: LoadedModel, text: str) -> int:
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"target and against must be one token each, got {text!r} with {len(ids)}")
    return ids[0]
