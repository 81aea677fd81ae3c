"""Pictures of shapes on a grey ground; the folder of each says its colour and its form."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("dark-disc", "dark-square", "red-disc")
N_EACH, SIDE = 41, 28


def drawing(name: str, made: np.random.Generator) -> bytes:
    """A shape somewhere on a grey ground: its colour and its form are the class."""
    image = Image.new("RGB", (SIDE, SIDE), (230, 230, 230))
    left, top = (int(place) for place in made.integers(0, 14, 2))
    colour, form = name.split("-")
    draw = ImageDraw.Draw(image)
    shape = draw.ellipse if form == "disc" else draw.rectangle
    shape((left, top, left + 13, top + 13), {"dark": (20, 20, 60), "red": (230, 20, 20)}[colour])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def packed(path: Path, classes=CLASSES, n=N_EACH, broken=0, once=()) -> Path:
    made = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for number in range(n):
            for name in classes if number else (*classes, *once):
                data = b"no picture" if number < broken else drawing(name, made)
                entry = tarfile.TarInfo(f"{name}/{number}.png")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return path


def pictures(path: Path) -> list[Path]:
    """Two dark discs, then two red squares."""
    made = np.random.default_rng(5)
    files = [path / f"{i}.png" for i in range(4)]
    for file, name in zip(
        files, ("dark-disc", "dark-disc", "red-square", "red-square"), strict=True
    ):
        file.write_bytes(drawing(name, made))
    return files
