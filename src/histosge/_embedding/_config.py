"""How places are embedded: which encoder, at which scale, from tiles or from tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from histosge._embedding._embed import STACKS
from histosge._encoders import DEFAULT_ENCODER, lacks_tokens, load_encoder, with_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from histosge._section import Section


_COARSEST_PILM_MPP = 1.5


@dataclass(frozen=True)
class EmbeddingConfig:
    """How places are embedded. The same config makes comparable embeddings."""

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
    def from_dict(cls, values: dict[str, Any]) -> EmbeddingConfig:
        """Restore what :meth:`to_dict` gave."""
        return cls(values["encoder"], values["tile_um"], tuple(values["stack"].split("+")), values["dense"])


def prepare(
    section: Section, encoder: Any, *, tile_um: float | None, stack: Sequence[str], dense: bool = False
) -> tuple[Any, EmbeddingConfig]:
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
    return loaded, EmbeddingConfig(spec.to_dict(), float(tile_um or spec.tile_um), stack, dense)


def _check_dense(encoder: Any, *, dense: bool) -> None:
    if dense and lacks_tokens(encoder):
        name = getattr(getattr(encoder, "spec", None), "name", encoder)
        msg = (
            f"encoder {name!r} gives no tokens below its tile, so that nothing smaller than a spot can be embedded "
            f"by its area. Choose one of {with_tokens()}, or pass dense=False to embed the tile around each place."
        )
        raise ValueError(msg)


def encoder_of_model(config: EmbeddingConfig, encoder: Any) -> tuple[Any, float | None, tuple[str, ...]]:
    """Encoder, tile and stack that a fitted model needs."""
    wanted = config.encoder
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
    tile_um = None if abs(config.tile_um - own_tile) < 1e-6 else config.tile_um
    return use, tile_um, config.stack


def _tile_um(config: EmbeddingConfig, encoder: Any) -> float | None:
    """The tile's edge where it is not the encoder's own."""
    return None if abs(config.tile_um - encoder.spec.tile_um) < 1e-6 else config.tile_um
