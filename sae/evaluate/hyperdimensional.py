"""The hyperdimensional probe: what a model's stream holds, read as one vector of bound pairs.

Concepts are random vectors of +1 and -1. A role is bound to its filler by their product, which
undoes itself; several pairs are bundled by their sum (Bronzini et al. 2025). Unlike a sparse
autoencoder it is supervised: it finds the roles that it was taught and no others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.cluster import KMeans
from torch import Tensor, nn

from activations_cache.checks import Progress, silent
from activations_cache.reader import ActivationCache
from monosema.checks import MonosemaError
from sae.evaluate.probe_tasks import RowLabels, check_hook_point, labels_of
from sae.statistics import Interval

LEAST_ROWS = 256
"""A batch: fewer rows with all roles say nothing."""


class Codebook(NamedTuple):
    """Random vectors of +1 and -1: nearly orthogonal, the more so the wider."""

    roles: Float[Tensor, "role width"]
    """What fillers are bound to."""
    fillers: tuple[Float[Tensor, "filler width"], ...]
    """Of each role."""

    @classmethod
    def draw(cls, sizes: Sequence[int], width: int, generator: torch.Generator) -> "Codebook":
        """Make one for roles with so many fillers each."""

        def signs(n: int) -> Float[Tensor, "n width"]:
            return torch.randint(2, (n, width), generator=generator) * 2.0 - 1

        return cls(signs(len(sizes)), tuple([signs(n) for n in sizes]))

    def bundle(self, filler: Int[Tensor, "row role"]) -> Float[Tensor, "row width"]:
        """The sign of the sum of role times filler; 0 where there is a tie."""
        pairs = (book[filler[:, i]] * self.roles[i] for i, book in enumerate(self.fillers))
        return torch.stack(list(pairs)).sum(dim=0).sign()

    def unbind(self, bundle: Float[Tensor, "row width"]) -> Int[Tensor, "row role"]:
        """Of each role the filler whose vector is nearest to the bundle times the role."""
        books = enumerate(self.fillers)
        nearest = [(bundle * self.roles[i] @ book.T).argmax(dim=1) for i, book in books]
        return torch.stack(nearest, dim=1)


@dataclass(frozen=True, kw_only=True)
class ProbeFit:
    """How the net is fitted."""

    width: int = 1024
    """Of the codebook's vectors."""
    n_clusters: int = 2
    """Of the layers; as many as there are layers at most."""
    n_rows: int = 16_384
    """Rows to fit on at most; a quarter as many are scored."""
    steps: int = 400
    """Of 256 rows each."""
    seed: int = 0
    """Of all that is drawn."""


@dataclass(frozen=True, kw_only=True)
class RoleRecall:
    """How often what fills a role is told right, on rows of documents that were not fitted on."""

    recall: Interval
    """By unbinding what the net makes of the stream; interval over examples."""
    linear: float
    """By a linear classifier of the same rows, fitted as long: one for each role."""
    ceiling: float
    """By unbinding the true bundle: what the codebook can hold."""
    floor: float
    """Share of the most frequent filler."""
    control: float
    """By a net that was fitted to the bundles of other rows."""
    n_fillers: int
    """Fillers of the role."""


@dataclass(frozen=True, kw_only=True)
class HyperdimensionalProbe:
    """What came of a probe of one cache."""

    roles: dict[str, RoleRecall]
    """By name."""
    clusters: tuple[tuple[str, ...], ...]
    """The hook points that were averaged; their means were added."""
    n_train: int
    """Rows that were fitted on."""
    n_test: int
    """Rows that were scored on."""


def text_roles(cache: ActivationCache, n_fillers: int = 32) -> dict[str, RowLabels]:
    """Roles of any cache of texts: the token, the one before it, and the cache's label if any.

    Fillers are the most frequent of the explain split.
    """
    tokens = cache.examples.tokens.long()
    before = torch.cat([torch.full_like(tokens[:, :1], -1), tokens[:, :-1]], dim=1)
    refs = cache.refs(cache.rows(("explain",)))
    given = {"token": tokens, "token before": before, "label": labels_of(cache).label}
    roles = {}
    for name, value in given.items():
        of_rows = value[refs.example, refs.position]
        known, count = of_rows[of_rows >= 0].unique(return_counts=True)
        if not len(known):
            continue
        chosen = known[count.argsort(descending=True, stable=True)[:n_fillers]]
        filler = torch.full((int(value.max()) + 2,), -1)
        filler[chosen] = torch.arange(len(chosen))  # the last one is for -1
        names = cache.label_names if name == "label" else None
        words = tuple(str(i) if names is None else names[i] for i in chosen.tolist())
        roles[name] = RowLabels(words, filler[value])
    return roles


def hyperdimensional_probe(
    cache: ActivationCache,
    hook_points: Sequence[str],
    roles: Mapping[str, RowLabels],
    config: ProbeFit | None = None,
    *,
    progress: Progress = silent,
) -> HyperdimensionalProbe:
    """Read a model's stream as bound pairs of role and filler.

    A small net learns the bundle of each row from the stream, whose layers are clustered, averaged
    in each cluster and added up. To ask what fills a role, the net's answer is multiplied by the
    role and looked up in the codebook. Fitted on the explain split, scored on the others.

    Args:
        cache: Of a model.
        hook_points: Layers of one width.
        roles: By name, what fills each at every position; rows with all roles filled are read.
        config: How.
        progress: Called after each step of a fit.

    Raises:
        ValueError: If the layers differ in width, there are no roles, or too few rows have all.
    """
    config = config or ProbeFit()
    for point in hook_points:
        check_hook_point(cache, point)
    if len({cache.d_model(point) for point in hook_points}) != 1 or not roles:
        raise MonosemaError(
            f"hook_points must be some of one width, beside roles, got {list(hook_points)} and "
            f"{len(roles)} roles"
        )
    made = torch.Generator().manual_seed(config.seed)
    train, y = _rows(cache, roles, ("explain",), config.n_rows, made)
    test, truth = _rows(cache, roles, ("score", "hold"), config.n_rows // 4, made)
    clusters = _clusters(cache, hook_points, train[:2048], config)
    x, test_x = (_pooled(cache, clusters, rows) for rows in (train, test))
    mean, size = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
    fit = _Fit((x - mean) / size, config.steps, made, progress)
    test_x = (test_x - mean) / size
    book = Codebook.draw([len(one.names) for one in roles.values()], config.width, made)
    target = book.bundle(y)
    recalled = book.unbind(fit.net(target)(test_x))
    exchanged = target[torch.randperm(len(target), generator=made)]
    control = book.unbind(fit.net(exchanged)(test_x)) == truth
    exact, group = book.unbind(book.bundle(truth)) == truth, cache.refs(test).example.numpy()
    results = {}
    for i, (name, of_one) in enumerate(roles.items()):
        head = fit.linear(y[:, i], len(of_one.names))
        right = (recalled[:, i] == truth[:, i]).numpy()
        results[name] = RoleRecall(
            recall=_share(right, group, config.seed),
            linear=float((head(test_x).argmax(dim=1) == truth[:, i]).float().mean()),
            ceiling=float(exact[:, i].float().mean()),
            floor=float(truth[:, i].bincount().max() / len(truth)),
            control=float(control[:, i].float().mean()),
            n_fillers=len(of_one.names),
        )
    n = {"n_train": len(train), "n_test": len(test)}
    return HyperdimensionalProbe(roles=results, clusters=clusters, **n)


def _rows(
    cache: ActivationCache,
    roles: Mapping[str, RowLabels],
    splits: tuple[str, ...],
    most: int,
    generator: torch.Generator,
) -> tuple[Int[Tensor, " row"], Int[Tensor, "row role"]]:
    """Some rows of splits that have all roles, and what fills these."""
    rows = cache.rows(splits)
    fillers = torch.stack([of_one.of(cache, rows) for of_one in roles.values()], dim=1)
    whole = (fillers >= 0).all(dim=1).nonzero().flatten()
    some = whole[torch.randperm(len(whole), generator=generator)[:most]]
    if len(some) < LEAST_ROWS:
        raise MonosemaError(
            f"{LEAST_ROWS} rows of {' and '.join(splits)} must have all of {', '.join(roles)}, "
            f"got {len(some)}; take more fillers or fewer roles"
        )
    return rows[some], fillers[some]


def _clusters(
    cache: ActivationCache, points: Sequence[str], rows: Tensor, config: ProbeFit
) -> tuple[tuple[str, ...], ...]:
    """Hook points whose rows, at unit norm, are near each other."""
    streams = torch.stack([cache[point][rows].flatten() for point in points])
    unit = torch.nn.functional.normalize(streams, dim=1).numpy()
    n = min(config.n_clusters, len(points))
    number = KMeans(n, n_init="auto", random_state=config.seed).fit_predict(unit).tolist()
    return tuple(
        tuple(point for point, of_one in zip(points, number, strict=True) if of_one == cluster)
        for cluster in dict.fromkeys(number)
    )


def _pooled(
    cache: ActivationCache, clusters: Sequence[Sequence[str]], rows: Tensor
) -> Float[Tensor, "row d_model"]:
    means = [torch.stack([cache[p][rows] for p in one]).mean(dim=0) for one in clusters]
    return torch.stack(means).sum(dim=0)


class _Fit:
    """Fits nets to the same rows with the same number of steps."""

    def __init__(
        self, x: Tensor, steps: int, generator: torch.Generator, progress: Progress
    ) -> None:
        self._x, self._steps, self._generator, self._progress = x, steps, generator, progress

    def net(self, target: Float[Tensor, "row width"]) -> nn.Module:
        d_in, width = self._x.shape[1], target.shape[1]
        layers = (nn.Linear(d_in, 256), nn.GELU(), nn.Linear(256, width), nn.Tanh())
        made = nn.Sequential(*layers)
        return self._fitted(made, 2e-3, lambda out, at: (out - target[at]).square().mean())

    def linear(self, y: Int[Tensor, " row"], n: int) -> nn.Module:
        head = nn.Linear(self._x.shape[1], n)
        return self._fitted(head, 2e-2, lambda out, at: nn.functional.cross_entropy(out, y[at]))

    def _fitted(
        self, net: nn.Module, rate: float, loss: Callable[[Tensor, Tensor], Tensor]
    ) -> nn.Module:
        for layer in net.modules():  # as torch draws them, by our own generator
            if isinstance(layer, nn.Linear):
                bound = 1 / layer.in_features**0.5
                for parameter in layer.parameters():
                    nn.init.uniform_(parameter.data, -bound, bound, generator=self._generator)
        adam = torch.optim.Adam(net.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.02, self._steps)
        for step in range(self._steps):
            at = torch.randint(len(self._x), (LEAST_ROWS,), generator=self._generator)
            value = loss(net(self._x[at]), at)
            adam.zero_grad()
            value.backward()
            adam.step()
            schedule.step()
            self._progress(step + 1, self._steps, "steps of a probe")
        return net.requires_grad_(False)


def _share(right: Bool[np.ndarray, " row"], group: Int[np.ndarray, " row"], seed: int) -> Interval:
    """The share of right answers, with its bootstrap interval over whole groups."""
    names, member = np.unique(group, return_inverse=True)
    sums = np.stack([np.bincount(member, right), np.bincount(member)])
    picks = np.random.default_rng(seed).integers(0, len(names), (1000, len(names)))
    total = sums[:, picks].sum(axis=2)
    low, high = np.quantile(total[0] / total[1], [0.025, 0.975])
    return Interval(float(right.mean()), float(low), float(high))
