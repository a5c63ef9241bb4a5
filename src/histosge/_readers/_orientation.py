"""Orientation of a stored image, 1 to 8 as in EXIF and TIFF."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WORDS = {
    2: "mirrored left to right",
    3: "upside down",
    4: "mirrored top to bottom",
    5: "mirrored along its diagonal",
    6: "turned by 90 degrees",
    7: "mirrored along its other diagonal",
    8: "turned by 270 degrees",
}


@dataclass(frozen=True)
class Turn:
    """How stored pixels become the image as shown: rows and columns are swapped, then either is reversed."""

    orientation: int

    @property
    def words(self) -> str:
        return _WORDS[self.orientation]

    @property
    def swaps(self) -> bool:
        return self.orientation >= 5

    @property
    def flips(self) -> tuple[bool, bool]:
        """Whether rows and columns of the shown image are reversed."""
        return self.orientation in (3, 4, 7, 8), self.orientation in (2, 3, 6, 7)

    def swapped(self, pair: tuple[int, int]) -> tuple[int, int]:
        return (pair[1], pair[0]) if self.swaps else pair

    def source(self, key: tuple[slice, slice], shown: tuple[int, int]) -> tuple[slice, slice]:
        """Stored rows and columns of a part (y, x) of the shown image."""
        there = []
        for part, n, flip in zip(key, shown, self.flips, strict=True):
            start, stop, _ = part.indices(n)
            there.append(slice(n - stop, n - start) if flip else slice(start, stop))
        return (there[1], there[0]) if self.swaps else (there[0], there[1])

    def apply(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Turn stored pixels (c, y, x)."""
        if self.swaps:
            pixels = pixels.transpose(0, 2, 1)
        y, x = (-1 if flip else 1 for flip in self.flips)
        return pixels[:, ::y, ::x]
