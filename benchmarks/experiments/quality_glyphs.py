"""Letters of three alphabets and digits, rendered from the fonts that matplotlib ships: 32 x 32 pixels, more than 100 classes.

16 faces of DejaVu and STIX; every letter in every face several times, each time turned, shifted and scaled at random, with noise.
Letters that look alike in two alphabets are there once; some, as Z and z, are told apart by size alone. A fifth of the
renderings is held out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SIZE = 32
TIMES = 6  # renderings of a letter in a face
LETTERS = (
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    "αβγδεζηθλμξπρστφχψωΔΘΛΞΣΨΩ"
    "БГДЖЗИЙЛПФЦЧШЩЪЫЬЭЮЯбдйлшщъыьэюя"
)
FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)

Labelled = tuple[Tensor, Tensor]


def glyphs(seed: int = 0) -> tuple[Labelled, Labelled]:
    """(training, held out), each images [N, 32, 32] from -1 to 1 and labels [N]."""
    rng = np.random.default_rng(seed)
    drawn = [
        (_rendered(letter, _fonts()[face], rng), label)
        for label, letter in enumerate(LETTERS)
        for face in FACES
        for _ in range(TIMES)
    ]
    order = rng.permutation(len(drawn))
    images = torch.from_numpy(np.stack([drawn[i][0] for i in order]))
    labels = torch.tensor([drawn[i][1] for i in order])
    cut = len(labels) // 5
    return (images[cut:], labels[cut:]), (images[:cut], labels[:cut])


def _fonts() -> dict[str, Path]:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    return {face: folder / f"{face}.ttf" for face in FACES}


def _rendered(letter: str, font: Path, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("L", (SIZE, SIZE))
    sized = ImageFont.truetype(str(font), int(rng.integers(16, 25)))
    where = tuple(SIZE / 2 + rng.uniform(-3, 3, 2))
    ImageDraw.Draw(picture).text(where, letter, fill=255, font=sized, anchor="mm")
    turned = picture.rotate(float(rng.uniform(-12, 12)), resample=Image.Resampling.BILINEAR)
    noise = rng.normal(0, 0.1, (SIZE, SIZE))
    return (np.asarray(turned) / 127.5 - 1 + noise).astype(np.float32)
