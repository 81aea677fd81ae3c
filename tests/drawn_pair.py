"""A small CLIP that is trained here on the shipped drawings and the names of their folders."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from activations_cache.config import ImagePreprocessing, ImagesConfig, ImageSource
from activations_cache.images import PickedImages, pick, read_pixels
from activations_cache.preprocessing import resolve
from sae.explain.image_labels import spoken
from tests import pairs

SOURCE = "package://sae/demo_data/openclipart_20x45.tar"
SIDE, PATCH, BATCH = 56, 8, 100
WIDE = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
        "intermediate_size": 192}  # fmt: skip
TEMPLATE = "a drawing of {}"


def images_config() -> ImagesConfig:
    """The drawings, half of them to label from and three in ten to score on."""
    return ImagesConfig(
        sources=(ImageSource(path=SOURCE),), explain=0.5, score=0.3, hold=0.2,
        preprocessing=ImagePreprocessing(size=SIDE, crop=False),
    )  # fmt: skip


def drawn_pair(path: Path, *, epochs: int, seed: int = 0) -> float:
    """Train on the drawings outside the score split; return the share in it that is told right."""
    picked = pick(images_config(), n_rows=700, rows_per_image=1)
    words = [spoken(name) for name in picked.label_names]
    path.mkdir(parents=True)
    tokenizer = pairs.word_tokenizer([TEMPLATE, *words], path, begins=True)
    text = {**WIDE, "num_hidden_layers": 1, "vocab_size": len(tokenizer), "bos_token_id": 2,
            "eos_token_id": 3, "pad_token_id": 0, "max_position_embeddings": 13}  # fmt: skip
    eyes = {**WIDE, "image_size": SIDE, "patch_size": PATCH}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=eyes, projection_dim=48))
    pairs.image_settings(path, SIDE)
    pixels, label = _pixels(picked)
    inside = torch.tensor([record.split == "score" for record in picked.records])
    texts = tokenizer([TEMPLATE.format(w) for w in words], return_tensors="pt", padding=True)
    _train(model, pixels[~inside], label[~inside], dict(texts), epochs, seed)
    model.eval().save_pretrained(path)
    with torch.no_grad():
        logits = model(pixel_values=pixels[inside], **texts).logits_per_image
    return float((logits.argmax(dim=1) == label[inside]).float().mean())


def _pixels(picked: PickedImages) -> tuple[Tensor, Tensor]:
    half = (0.5, 0.5, 0.5)
    asked = ImagePreprocessing(size=SIDE, crop=False, interpolation="bicubic", mean=half, std=half)
    numbers = range(len(picked.records))
    pixels = read_pixels(resolve(asked, ImagePreprocessing()), picked.image, numbers)
    names = {name: i for i, name in enumerate(picked.label_names)}
    return torch.from_numpy(pixels), torch.tensor([names[str(r.label)] for r in picked.records])


def _train(
    model: CLIPModel, pixels: Tensor, label: Tensor, texts: dict, epochs: int, seed: int
) -> None:
    """Each image against all names, both flipped and moved by some pixels."""
    made = np.random.default_rng(seed)
    n_steps = epochs * (len(pixels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=n_steps)
    order = torch.zeros(0, dtype=torch.int64)
    for _ in range(n_steps):
        if len(order) < BATCH:
            order = torch.from_numpy(made.permutation(len(pixels)))
        some, order = order[:BATCH], order[BATCH:]
        moved = [pixels[i].roll(tuple(made.integers(-5, 6, 2).tolist()), (1, 2)) for i in some]
        batch = torch.stack([p.flip(2) if made.random() < 0.5 else p for p in moved])
        logits = model(pixel_values=batch, **texts).logits_per_image
        loss = torch.nn.functional.cross_entropy(logits, label[some], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def run_config(path: Path, tower: Path) -> Path:
    """A run on the tower's own patches, labelled by words of the same pair."""
    topk = {"d_sae": 384, "activation": {"kind": "topk", "k": 8}, "dead_after_tokens": 20_000}
    record = {
        "output": str(path / "run"),
        "cache": {
            "model": {"path": str(tower), "dtype": "float32"},
            "images": {
                "sources": [{"path": SOURCE}], "explain": 0.5, "score": 0.3, "hold": 0.2,
                "preprocessing": {"size": SIDE, "crop": False},
            },
            "hook_points": ["encoder.layers.1:out"],
            "n_rows": 34_000,
        },
        "train": {
            "batch": 256, "epochs": 6, "precision": "fp32",
            "saes": {"topk": topk, "topk-frozen": {**topk, "frozen": "decoder"}},
        },
        "evaluate": {"n_resamples": 97, "n_images": 0},
        "explain": {
            "n_baseline": 96,
            "images": {
                "words": {"tower": str(tower), "templates": [TEMPLATE], "share": 0.05},
            },
        },
    }  # fmt: skip
    file = path / "drawings.yaml"
    file.write_text(json.dumps(record))
    return file
