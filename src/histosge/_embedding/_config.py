"""How the places of a section are embedded: which encoder, at which scale, what is stacked; made once, used again."""

from __future__ import annotations

from dataclasses import dataclass
from time import time
from typing import TYPE_CHECKING, Any

import numpy as np

from histosge import _keys
from histosge._embedding._embed import STACKS, embed
from histosge._encoders import DEFAULT_ENCODER, lacks_tokens, load_encoder, with_tokens
from histosge._geometry import Footprints, divide
from histosge._section import Section, Targets, find_embedding
from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from spatialdata import SpatialData

    from histosge._embedding._forecast import Forecast

_COARSEST_PILM_MPP = 1.5
_PARTS_PER_SPOT = 0.44
"""Edge of a part over a spot's diameter: 24 µm of 55, a dozen parts; 16 µm was no better at twice the time."""


@dataclass(frozen=True)
class Recipe:
    """How places were embedded: the same recipe makes comparable embeddings."""

    encoder: dict[str, Any]
    """The encoder's spec"""
    tile_um: float
    stack: tuple[str, ...] = ("pilm",)
    dense: bool = False
    """Whether the area of a place was embedded, from tokens, instead of a tile around its centre"""

    @property
    def token_um(self) -> float | None:
        """Edge of a token, of a dense embedding."""
        token_px = self.encoder.get("token_px")
        return None if not self.dense or token_px is None else self.tile_um * token_px / self.encoder["tile_px"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and ``uns``."""
        spec = {k: v for k, v in self.encoder.items() if v is not None}
        return {"encoder": spec, "tile_um": float(self.tile_um), "stack": "+".join(self.stack), "dense": self.dense}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Restore what :meth:`to_dict` gave."""
        return cls(values["encoder"], values["tile_um"], tuple(values["stack"].split("+")), values["dense"])


def prepare(
    section: Section, encoder: Any, *, tile_um: float | None, stack: Sequence[str], dense: bool = False
) -> tuple[Any, Recipe]:
    """Load the encoder, if it is not loaded, and settle how places are embedded."""
    stack = (stack,) if isinstance(stack, str) else tuple(stack)
    if not stack or set(stack) - set(STACKS):
        msg = f"stack={stack!r}: choose any of {STACKS}."
        raise ValueError(msg)
    name = getattr(getattr(encoder, "spec", None), "name", encoder)
    if section.mpp > _COARSEST_PILM_MPP * (1 + 1e-6) and name != "stain-texture":
        msg = (
            f"image {section.image_key!r} has {section.mpp:.3g} µm per pixel, far too coarse for a pathology encoder "
            f"(at most {_COARSEST_PILM_MPP}): it is probably the hires image. Read the section with the full-resolution "
            "image, `sge.io.read(path, image=...)`, or use encoder='stain-texture'."
        )
        raise ValueError(msg)
    _check_dense(encoder, dense=dense)  # before gigabytes are loaded
    loaded = load_encoder(encoder)
    if tile_um is not None and not 1 <= tile_um <= 10_000:
        msg = f"tile_um={tile_um!r} is not the edge of a tile in µm. Pass a positive number, or None for the encoder's own."
        raise ValueError(msg)
    spec = loaded.spec
    if tile_um is not None and hasattr(loaded, "embed_block"):
        msg = f"tile_um={tile_um!r}: encoder {spec.name!r} looks at several scales of its own. Leave tile_um out."
        raise ValueError(msg)
    _check_dense(loaded, dense=dense)
    return loaded, Recipe(spec.to_dict(), float(tile_um or spec.tile_um), stack, dense)


def _check_dense(encoder: Any, *, dense: bool) -> None:
    if dense and lacks_tokens(encoder):
        name = getattr(getattr(encoder, "spec", None), "name", encoder)
        msg = (
            f"encoder {name!r} gives no tokens below its tile, so that nothing smaller than a spot can be embedded "
            f"by its area. Choose one of {with_tokens()}, or pass dense=False to embed the tile around each place."
        )
        raise ValueError(msg)


def again(recipe: Recipe, encoder: Any) -> tuple[Any, float | None, tuple[str, ...]]:
    """Encoder, tile and stack that a fitted model needs."""
    wanted = recipe.encoder
    name = getattr(getattr(encoder, "spec", None), "name", encoder)
    if name not in (wanted["name"], DEFAULT_ENCODER):
        msg = f"encoder={name!r}, but the model was trained on embeddings of {wanted['name']!r}. Leave encoder= out."
        raise ValueError(msg)
    use = encoder if not isinstance(encoder, str) else wanted["name"]
    if isinstance(use, str) and wanted["source"] not in ("built-in", "lazyslide-models"):
        msg = (
            f"the model was trained on embeddings of {wanted['name']!r}, which is not in the list of encoders: pass the "
            "same one, encoder=histosge.load_encoder(...)."
        )
        raise ValueError(msg)
    use = load_encoder(use)
    differs = [k for k in ("mpp", "tile_px", "embed_dim", "token_px") if getattr(use.spec, k) != wanted.get(k)]
    if differs:
        told = ", ".join(f"{k} {getattr(use.spec, k)} instead of {wanted.get(k)}" for k in differs)
        msg = (
            f"encoder {wanted['name']!r} is not the one the model was trained with: {told}. Pass that one as encoder=."
        )
        raise ValueError(msg)
    own_tile = wanted["mpp"] * wanted["tile_px"]
    tile_um = None if abs(recipe.tile_um - own_tile) < 1e-6 else recipe.tile_um
    return use, tile_um, recipe.stack


def embed_targets(
    sdata: SpatialData,
    section: Section,
    targets: Targets,
    encoder: Any,
    recipe: Recipe,
    *,
    device: Any,
    batch_size: int,
    progress: bool | None,
    report: bool = True,
    forecast: Forecast | None = None,
) -> NDArray[np.float32]:
    """Take embeddings that are there already, or make them; ``report`` logs it.

    ``forecast`` is that of the run that these places are a part of; by default they are all of it.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        msg = f"batch_size={batch_size!r}: pass a whole number of tiles above 0."
        raise ValueError(msg)
    name = encoder.spec.name
    log = logger.info if report else logger.debug
    if report:
        warn_below_token(section, targets, recipe)
    found = find_embedding(
        sdata,
        target_key=targets.key,
        encoder=name,
        instances=targets.instances,
        xy_px=targets.xy_px,
        provenance=provenance(section, recipe),
    )
    if found is not None:
        log("using the embeddings of sdata.tables[%r]", _keys.embedding_table(targets.key, name))
        if forecast is not None:
            forecast.existing(len(targets))
        return found
    start = time()
    log("embedding %d places with %s on %s", len(targets), name, device)
    values = embed(
        section.image,
        targets.xy_px,
        mpp=section.mpp,
        encoder=encoder,
        footprints=targets.footprints if recipe.dense else None,
        tile_um=_tile_um(recipe, encoder),
        stack=recipe.stack,
        device=device,
        batch_size=batch_size,
        progress=progress,
        report=report,
        forecast=forecast,
    )
    log("    finished (%.0f s)", time() - start)
    return values


def warn_below_token(section: Section, targets: Targets, recipe: Recipe) -> None:
    """Say so where places are smaller than what the encoder tells apart."""
    token_um = recipe.token_um
    if token_um is None or len(targets) == 0:
        return
    size_um = float(np.median(targets.footprints.size_px)) * section.mpp
    if size_um < 0.99 * token_um:
        logger.warning(
            "%s of %.3g µm are smaller than the tokens of %r (%.3g µm): what is resolved is the token",
            "bins" if targets.footprints.kind == "square" else "places",
            size_um, recipe.encoder["name"], token_um,
        )  # fmt: skip


@dataclass(frozen=True)
class SpotParts:
    """What lies below the spots of a section."""

    embedding: NDArray[np.float32]
    """(p, d), of all parts of all spots"""
    xy_px: NDArray[np.float64]
    """(p, 2)"""
    index: NDArray[np.int64]
    """(n, k) rows of each spot's parts; filled up with any row where a spot has fewer"""
    weight: NDArray[np.float32]
    """(n, k) share of the spot in each part; rows sum to 1"""

    def take(self, rows: NDArray[np.int64]) -> SpotParts:
        """Return the parts of some of the spots."""
        return SpotParts(self.embedding, self.xy_px, self.index[rows], self.weight[rows])


def embed_parts(section: Section, encoder: Any, recipe: Recipe, *, device: Any, batch_size: int) -> SpotParts:
    """Cut spots into a dozen parts each, and embed these."""
    edge_um = max(_PARTS_PER_SPOT * section.spot_um, recipe.token_um or 0.0)
    edge_px = edge_um / section.mpp
    xy_px, index, weight = divide(section.footprints, edge_px=edge_px)
    values = embed(
        section.image,
        xy_px,
        mpp=section.mpp,
        encoder=encoder,
        footprints=Footprints.squares(xy_px, edge_px=edge_px),
        tile_um=_tile_um(recipe, encoder),
        stack=recipe.stack,
        device=device,
        batch_size=batch_size,
        progress=False,
    )
    return SpotParts(values, xy_px, index, weight.astype(np.float32))


def _tile_um(recipe: Recipe, encoder: Any) -> float | None:
    """The tile's edge where it is not the encoder's own."""
    return None if abs(recipe.tile_um - encoder.spec.tile_um) < 1e-6 else recipe.tile_um


def provenance(section: Section, recipe: Recipe) -> dict[str, Any]:
    """What goes into ``uns``, where lists come back from disk as arrays: they are arrays from the start."""
    made = recipe.to_dict()
    made["encoder"] = {k: np.array(v) if isinstance(v, list) else v for k, v in made["encoder"].items()}
    return {**made, "image": section.image_key, "mpp": float(section.mpp)}
