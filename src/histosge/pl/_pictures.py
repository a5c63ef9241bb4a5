"""Figures as pictures of a page."""

from __future__ import annotations

import base64
import io
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_MOST_PX = 1800
_DPI = 144


@dataclass(frozen=True)
class Picture:
    """A figure as a picture of the page."""

    src: str
    width: int
    height: int
    alt: str
    caption: str

    @property
    def width_css(self) -> int:
        """Width in CSS pixels of the size in matplotlib: no picture is shown larger."""
        return round(self.width * 96 / _DPI)


@contextmanager
def figures_closed() -> Iterator[None]:
    """Close the figures that are opened inside, and no other figures."""
    import matplotlib.pyplot as plt

    before = set(plt.get_fignums())
    try:
        yield
    finally:
        for number in set(plt.get_fignums()) - before:
            plt.close(number)


def pictures_of(axes: NDArray[Any], texts: list[tuple[str, str]]) -> list[Picture]:
    """Turn the figure of axes (rows, panels) or (panels,) into a picture for each row, with alt text and caption."""
    import matplotlib.pyplot as plt
    from matplotlib.transforms import Bbox
    from PIL import Image, ImageChops, ImageOps

    figure = axes.flat[0].figure
    dpi = min(_DPI, _MOST_PX / figure.get_figwidth())
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, transparent=False)
    whole = Image.open(drawn).convert("RGB")
    boxes = [Bbox.union([ax.get_tightbbox() for ax in row]) for row in np.atleast_2d(axes)]
    cuts = [(above.y0 + below.y1) / 2 * dpi / figure.dpi for above, below in pairwise(boxes)]
    edges = [0, *(round(whole.height - cut) for cut in cuts), whole.height]
    plt.close(figure)
    found = []
    for (top, bottom), (alt, caption) in zip(pairwise(edges), texts, strict=True):
        part = whole.crop((0, top, whole.width, bottom))
        drawn_on = ImageChops.difference(part, Image.new("RGB", part.size, "white")).getbbox()
        part = ImageOps.expand(part.crop(drawn_on), border=8, fill="white")
        kinds: dict[str, dict[str, Any]] = {
            "png": {"optimize": True},
            "jpeg": {"quality": 88, "subsampling": 0, "optimize": True},
        }
        encoded = {kind: io.BytesIO() for kind in kinds}
        for kind, options in kinds.items():
            part.save(encoded[kind], format=kind, **options)
        n_png, n_jpeg = (len(content.getvalue()) for content in encoded.values())
        kind = "jpeg" if n_jpeg < 0.7 * n_png else "png"  # text is sharper as PNG
        found.append(Picture(data_uri(encoded[kind].getvalue(), f"image/{kind}"), *part.size, alt, caption))
    return found


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
