"""A small planted corpus, a fake cache around it and a dictionary that reads planted codes.

A cache of images with planted latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.explain.firings import Codes
from sae.explain.text_at_rows import RowText
from sae.explain.windows import LatentWindows, Window

HOOK = "model.layers.3:out"
SPLITS = ("explain", "score", "hold")


@dataclass
class FakeCache:
    """What explaining reads of a cache; row ids have gaps, and position 0 has no row."""

    tokens: Tensor  # (example, pos)
    acts: Tensor  # (example, pos, d_in)
    split: Tensor  # (example)
    source: Tensor  # (example)
    source_names: tuple[str, ...] = ("package://books/novels.txt.gz", "glosses.jsonl")
    label: Tensor | None = None  # (example, pos)
    label_names: tuple[str, ...] = ()
    read_ids: list[int] = field(default_factory=list)
    hook_points: tuple[str, ...] = (HOOK,)

    @property
    def examples(self) -> SimpleNamespace:
        return SimpleNamespace(
            tokens=self.tokens,
            split=self.split,
            source=self.source,
            source_names=self.source_names,
        )

    def rows(self, splits: Sequence[str] = SPLITS) -> Tensor:
        wanted = torch.zeros(len(SPLITS), dtype=torch.bool)
        wanted[[SPLITS.index(name) for name in splits]] = True
        valid = wanted[self.split][:, None] & (self.tokens >= 0)
        valid[:, 0] = False
        return 3 + 2 * valid.flatten().nonzero().flatten()

    def refs(self, rows: Tensor) -> SimpleNamespace:
        place = (rows - 3) // 2
        width = self.tokens.shape[1]
        return SimpleNamespace(
            example=place // width, position=place % width, token=self.tokens.flatten()[place]
        )

    def token_labels(self, rows: Tensor) -> Tensor:
        if self.label is None:
            return torch.full_like(rows, -1)
        return self.label.flatten()[(rows - 3) // 2]

    def __getitem__(self, hook_point: str) -> "FakeCache._Rows":
        assert hook_point in self.hook_points
        return FakeCache._Rows(self)

    @dataclass
    class _Rows:
        cache: "FakeCache"

        def __getitem__(self, rows: Tensor) -> Tensor:
            self.cache.read_ids.extend(rows.tolist())
            return self.cache.acts.flatten(0, 1)[(rows - 3) // 2].float()


def _reader(d_sae: int) -> SparseAutoencoder:
    """A dictionary whose latent i fires with the i-th number of a row, where that is positive."""
    config = SAEConfig(d_in=d_sae, d_sae=d_sae, activation=ReLU(), b_in="none")
    dictionary = SparseAutoencoder(config)
    with torch.no_grad():
        dictionary.enc_rows.copy_(torch.eye(d_sae))
        dictionary.dec_rows.copy_(torch.eye(d_sae))
    return dictionary


def _codes(fires: np.ndarray) -> Codes:
    """Codes from a dense table (row, latent) of activations."""
    latent, row = np.nonzero(fires.T)
    values = fires.T[latent, row].astype(np.float32)
    n_fired = np.bincount(latent, minlength=fires.shape[1])
    return Codes(n_fired, row.astype(np.int32), values, len(fires))


def _text(n_examples: int, n_pos: int, **values: np.ndarray) -> RowText:
    """Rows of equally long examples; kinds that are not given have no values."""
    n = n_examples * n_pos
    example, position = np.divmod(np.arange(n, dtype=np.int32), np.int32(n_pos))
    kinds = ("word", "previous word", "token", "supersense", "source", "position")
    given = {kind.replace("_", " "): array for kind, array in values.items()}
    none = np.full(n, -1, np.int32)
    table = {kind: np.asarray(given.get(kind, none)).astype(np.int32) for kind in kinds}
    return RowText(example, position, table)


def _bursty(shape: tuple[int, int], rate: float, spread: float, seed: int) -> np.ndarray:
    """Events in (example, pos) whose rate differs between examples: gamma with shape 1 / spread."""
    made = np.random.default_rng(seed)
    rates = rate * made.gamma(1 / spread, spread, size=(shape[0], 1))
    return made.random(shape) < np.minimum(rates, 0.9)


@pytest.fixture
def fake_cache() -> type[FakeCache]:
    return FakeCache


@pytest.fixture
def hook_point() -> str:
    return HOOK


@pytest.fixture(scope="session")
def identity_dictionary() -> Callable[[int], SparseAutoencoder]:
    return _reader


@pytest.fixture
def codes_of() -> Callable[[np.ndarray], Codes]:
    return _codes


@pytest.fixture
def text_of() -> Callable[..., RowText]:
    return _text


@pytest.fixture
def bursty() -> Callable[..., np.ndarray]:
    return _bursty


@dataclass(frozen=True)
class Planted:
    """Topics with three rare words each, in Zipf noise."""

    cache: FakeCache
    strings: tuple[str, ...]
    words: list[set[str]]  # of each topic
    n_topics: int
    random: int  # a latent that knows nothing
    silent: int  # a latent that never fires
    rare: int  # a latent that fires five times


@pytest.fixture(scope="session")
def planted() -> Planted:
    """Examples of one topic; its latent fires on the topic's words, and sometimes beside them."""
    n_topics, n_zipf, n_examples, n_pos = 17, 499, 601, 61
    made = np.random.default_rng(0)
    zipf = 1 / np.arange(1, n_zipf + 1)
    tokens = made.choice(n_zipf, (n_examples, n_pos), p=zipf / zipf.sum())
    topic = np.arange(n_examples) % n_topics
    is_topical = made.random((n_examples, n_pos)) < 0.09
    rare = n_zipf + 3 * topic[:, None] + made.integers(0, 3, (n_examples, n_pos))
    tokens = np.where(is_topical, rare, tokens)
    fires = made.random((n_examples, n_pos)) < np.where(is_topical, 0.8, 0.1)
    acts = np.zeros((n_examples, n_pos, n_topics + 3), np.float32)
    strength = made.exponential(size=(n_examples, n_pos)) + 0.1
    acts[np.arange(n_examples)[:, None], np.arange(n_pos), topic[:, None]] = fires * strength
    acts[..., n_topics] = (made.random((n_examples, n_pos)) < 0.02) * strength
    acts[::113, 5, n_topics + 2] = 1.0
    strings = [f" z{_letters(rank)}" for rank in range(n_zipf)]
    strings += [f" topic{_letters(word)}" for word in range(3 * n_topics)]
    words = [
        {f"topic{_letters(word)}" for word in range(3 * t, 3 * t + 3)} for t in range(n_topics)
    ]
    split = torch.from_numpy(np.arange(n_examples) % 10 // 3).clamp(max=2)
    split[split == 2] = 0
    cache = FakeCache(
        tokens=torch.from_numpy(tokens),
        acts=torch.from_numpy(acts),
        split=split,
        source=torch.from_numpy(made.integers(0, 2, n_examples)),
    )
    return Planted(cache, tuple(strings), words, n_topics, n_topics, n_topics + 1, n_topics + 2)


def _letters(number: int) -> str:
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


def topic(latent: int) -> str:
    return "topic" + "".join(chr(ord("a") + int(digit)) for digit in str(latent))


def planted_latent(latent: int, n: int = 24, width: int = 7) -> LatentWindows:
    """A latent that fires on one word, at the strengths of its steps, and on nothing else."""
    made = np.random.default_rng(latent)

    def window(number: int, source: str) -> Window:
        tokens = [f" w{made.integers(0, 97)}" for _ in range(width)]
        acts = [0.0] * width
        step, place = -1, int(made.integers(0, width))
        if source == "active":
            step = number % 5
            tokens[place] = " " + topic(latent)
            acts[place] = 1.0 + step
        return Window(number, 0, tuple(tokens), tuple(acts), source, step, 0.5)

    sources = ["active"] * n + ["random", "lexical", "similar", "weak"] * (n // 4)
    windows = [window(number, source) for number, source in enumerate(sources)]
    splits = [[w for w in windows if w.example // 4 % 2 == split] for split in (0, 1)]
    return LatentWindows(latent, 5.0, 0.01, *map(tuple, splits))


@pytest.fixture(scope="session")
def latent_of() -> Callable[..., LatentWindows]:
    return planted_latent


@pytest.fixture(scope="session")
def topic_of() -> Callable[[int], str]:
    return topic


N_PATCHES = 6
WIDTH = N_PATCHES + 1


@dataclass
class ImageCache:
    """Rows are the class token, which is token N_PATCHES at position 0, and the patches."""

    acts: Tensor  # (example, pos, d_in)
    split: Tensor  # (example)
    label: Tensor  # (example)
    label_names: tuple[str, ...]
    hook_points: tuple[str, ...] = (HOOK,)

    @property
    def examples(self) -> SimpleNamespace:
        n = len(self.split)
        tokens = torch.tensor([N_PATCHES, *range(N_PATCHES)]).expand(n, -1)
        return SimpleNamespace(tokens=tokens, source=torch.zeros(n), source_names=("drawings",))

    def rows(self, splits=SPLITS) -> Tensor:
        wanted = torch.isin(self.split, torch.tensor([SPLITS.index(name) for name in splits]))
        every = torch.arange(len(self.split) * WIDTH)
        return every[wanted[every // WIDTH]].flip(0)  # in no particular order

    def refs(self, rows: Tensor) -> SimpleNamespace:
        position = rows % WIDTH
        token = torch.where(position == 0, N_PATCHES, position - 1)
        return SimpleNamespace(example=rows // WIDTH, position=position, token=token)

    def token_labels(self, rows: Tensor) -> Tensor:
        return self.label[rows // WIDTH]

    def __getitem__(self, _: str) -> "ImageCache.Rows":
        return ImageCache.Rows(self.acts.flatten(0, 1))

    @dataclass
    class Rows:
        values: Tensor

        def __getitem__(self, rows: Tensor) -> Tensor:
            return self.values[rows].float()


CLASSES = ("animals-birds", "animals-bugs", "food-cakes", "food-fruit", "stars")


def _cache(n: int = 499, n_random: int = 31, seed: int = 0) -> ImageCache:
    """Latents 0-4 fire on one patch of the images of a class, 5 on animals, 6 on 4 images.

    Latent 7 is dead; then come `n_random` that know nothing. The class token fires with none.
    """
    made = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 5, (n,), generator=made)
    split = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), n, True, generator=made)
    acts = torch.zeros(n, WIDTH, 8 + n_random)
    patch = 1 + torch.randint(0, N_PATCHES, (n,), generator=made)
    each = torch.arange(n)
    for i in range(5):
        hit = (label == i) & (torch.rand(n, generator=made) < 0.7)
        acts[each[hit], patch[hit], i] = 1 + torch.rand(int(hit.sum()), generator=made)
    hit = (label < 2) & (torch.rand(n, generator=made) < 0.8)
    acts[each[hit], patch[hit], 5] = 2.0
    acts[:4, 2, 6] = 1.0
    noise = torch.rand(n, WIDTH - 1, n_random, generator=made)
    acts[:, 1:, 8:] = noise * (torch.rand(noise.shape, generator=made) < 0.1)
    return ImageCache(acts, split, label, CLASSES)


@pytest.fixture
def image_cache():
    return _cache
