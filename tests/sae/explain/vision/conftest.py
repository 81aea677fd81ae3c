"""A cache of images with planted latents."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

SPLITS = ("explain", "score", "hold")
N_PATCHES = 6
WIDTH = N_PATCHES + 1


@dataclass
class ImageCache:
    """Rows are the class token, which is token N_PATCHES at position 0, and the patches."""

    acts: Tensor  # (example, pos, d_in)
    split: Tensor  # (example)
    label: Tensor  # (example)
    label_names: tuple[str, ...]

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
