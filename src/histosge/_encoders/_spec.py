"""The spec of an encoder, which is known before it is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal

from histosge._settings import is_number, is_whole

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SOURCES = ("built-in", "lazyslide-models", "timm", "user")
MPP_SOURCES = ("stated", "magnification", "convention", "given")


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Input of an encoder (scale, tile size, colours), and who may use it.

    Attributes
    ----------
    name
        Name, as in :func:`histosge.encoders`.
    mpp
        µm per pixel that it was trained at; tiles are resampled to it.
    mpp_source
        Source of ``mpp``: ``"stated"`` by its authors; from the ``"magnification"`` that they state (20x is 0.5);
        ``"convention"`` among its users, where they state neither; ``"given"`` by you.
    tile_px
        Edge of its input in pixels.
    embed_dim
        Length of an embedding.
    token_px
        Edge of a patch in pixels of its input, where it returns a token for each patch; whole patches fill a tile.
        ``None`` where it returns an embedding of the whole tile only. A module of your own has tokens only where it is
        a vision transformer of timm; the edge is then read from it.
    mean
        Mean of red, green and blue (0 to 1) that it was trained with.
    std
        Spread of red, green and blue.
    licence
        Licence of the weights.
    gated
        Whether access to the weights must be requested.
    commercial
        Whether commercial use is allowed; ``None`` where it is not known.
    source
        ``"built-in"``, ``"lazyslide-models"``, ``"timm"`` or ``"user"``.
    url
        Page of the weights.
    revision
        Commit of the weights, where they are from the hub.
    n_parameters
        Number of parameters that its authors state.
    coarsest_mpp
        Largest µm per pixel of an image for this encoder.
    fixed_tile
        Whether the size of its tile in µm is fixed, so that ``tile_um=`` cannot change it.
    whole_blocks
        Whether it embeds all locations in a block of the image at once (method ``embed_block``), instead of a tile
        around each location (method ``embed``).

    Examples
    --------
    >>> import histosge as sge
    >>> spec = sge.EncoderSpec(name="mine", mpp=0.5, tile_px=224, embed_dim=384)
    >>> spec.tile_um
    112.0
    >>> sge.EncoderSpec(name="vit", mpp=0.5, tile_px=224, embed_dim=384, token_px=14).token_um
    7.0
    """

    name: str
    mpp: float
    tile_px: int
    embed_dim: int
    token_px: int | None = None
    mpp_source: Literal["stated", "magnification", "convention", "given"] = "given"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    licence: str = "unknown"
    gated: bool = False
    commercial: bool | None = None
    source: Literal["built-in", "lazyslide-models", "timm", "user"] = "user"
    url: str | None = None
    revision: str | None = None
    n_parameters: str | None = None
    coarsest_mpp: float = 1.5
    fixed_tile: bool = False
    whole_blocks: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            msg = f"EncoderSpec: name={self.name!r} must be a word."
            raise ValueError(msg)
        for field in ("mpp", "coarsest_mpp"):
            value = getattr(self, field)
            if not (is_number(value) and 0.01 <= value <= 100):
                msg = f"EncoderSpec {self.name!r}: {field}={value!r} is not a number of µm per pixel (0.5 is usual)."
                raise ValueError(msg)
            object.__setattr__(self, field, float(value))
        for field in ("tile_px", "embed_dim", "token_px"):
            value = getattr(self, field)
            if field == "token_px" and value is None:
                continue
            if not (is_whole(value) and value >= 1):
                msg = f"EncoderSpec {self.name!r}: {field}={value!r} must be a whole number above 0."
                raise ValueError(msg)
            object.__setattr__(self, field, int(value))  # JSON has no numbers of numpy
        if self.token_px is not None and self.tile_px % self.token_px:
            msg = (
                f"EncoderSpec {self.name!r}: token_px={self.token_px} does not divide tile_px={self.tile_px}; whole "
                "patches must fill a tile. Give another tile_px, or leave token_px out where there are no dense tokens."
            )
            raise ValueError(msg)
        for field in ("mean", "std"):
            value = tuple(float(v) for v in getattr(self, field))
            if len(value) != 3 or not all(map(isfinite, value)) or (field == "std" and min(value) <= 0):
                msg = f"EncoderSpec {self.name!r}: {field}={value!r} must be three numbers, for red, green and blue."
                raise ValueError(msg)
            object.__setattr__(self, field, value)
        for field, allowed in (("source", SOURCES), ("mpp_source", MPP_SOURCES)):
            if getattr(self, field) not in allowed:
                msg = f"EncoderSpec {self.name!r}: {field}={getattr(self, field)!r} must be one of {allowed}."
                raise ValueError(msg)

    @property
    def tile_um(self) -> float:
        """Edge of a tile in µm."""
        return self.mpp * self.tile_px

    @property
    def token_um(self) -> float | None:
        """Edge of a patch in µm; ``None`` where there are no dense tokens."""
        return None if self.token_px is None else self.mpp * self.token_px

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and ``uns``."""
        values = {k: v for k, v in asdict(self).items() if v is not None}
        return values | {"mean": list(self.mean), "std": list(self.std)}
