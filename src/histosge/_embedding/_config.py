"""Config of embeddings: the encoders, the scale of each, tiles or tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from histosge import _keys
from histosge._encoders import (
    DEFAULT_ENCODER,
    EncoderSpec,
    encoder_digest,
    known_spec,
    load_encoder,
    precision_of,
    split_encoder,
    with_tokens,
)
from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from histosge._section import Section

_BY_NAME = ("built-in", "lazyslide-models")
"""Sources of encoders that are loaded by their name alone."""


@dataclass(frozen=True)
class EncoderConfig:
    """One encoder, and the scale of its tiles."""

    spec: EncoderSpec
    mpp: float
    """µm per pixel of its tiles; ``spec.mpp`` unless the user chose another tile"""
    digest: str = ""
    """What the encoder is, its weights above all: :func:`histosge._encoders.encoder_digest`"""
    precision: str = "float32"
    """Type that embeddings were computed in"""

    @property
    def tile_um(self) -> float:
        """Edge of a tile in µm."""
        return self.mpp * self.spec.tile_px

    @property
    def token_um(self) -> float | None:
        """Edge of a token in µm; ``None`` where there are none."""
        return None if self.spec.token_px is None else self.mpp * self.spec.token_px


@dataclass(frozen=True)
class EmbeddingConfig:
    """How locations are embedded. Embeddings of the same config are comparable."""

    encoders: tuple[EncoderConfig, ...]
    """Usually one; embeddings of several are joined"""
    dense: bool = False
    """Whether areas are embedded, from tokens, instead of tiles around their centres"""
    splits: tuple[int, ...] = ()
    """First columns of the embeddings of the second and later encoders"""

    @classmethod
    def of(
        cls, encoder: Any, *, tile_um: float | None = None, dense: bool = False, device: torch.device | None = None
    ) -> Self:
        """Make the config of a loaded encoder.

        Parameters
        ----------
        encoder
            The encoder.
        tile_um
            Edge of a tile, by default the encoder's own.
        dense
            Whether areas are embedded.
        device
            Where it computes; by default a processor.
        """
        device = torch.device("cpu") if device is None else device
        several = split_encoder(encoder)
        _check_tile([one.spec for one in several], tile_um)
        mpps = [
            one.spec.mpp if tile_um is None or one.spec.fixed_tile else tile_um / one.spec.tile_px for one in several
        ]
        ends = np.cumsum([_n_columns(one, dense=dense) for one in several[:-1]])
        parts = tuple(
            EncoderConfig(one.spec, float(mpp), encoder_digest(one), precision_of(one, device))
            for one, mpp in zip(several, mpps, strict=True)
        )
        return cls(parts, dense, tuple(ends.astype(int).tolist()))

    @property
    def name(self) -> str:
        """Names of the encoders, joined by ``+``."""
        return "+".join(one.spec.name for one in self.encoders)

    @property
    def by_name(self) -> bool:
        """Whether the encoders are loaded by their names alone."""
        return all(one.spec.source in _BY_NAME for one in self.encoders)

    @property
    def precision(self) -> str:
        """Types that embeddings are computed in, joined by ``+`` where they differ."""
        return "+".join(dict.fromkeys(one.precision for one in self.encoders))

    def on(self, device: torch.device, encoder: Any) -> EmbeddingConfig:
        """Return the config of the same embeddings computed on ``device``, whose precision may differ."""
        pairs = zip(self.encoders, split_encoder(encoder), strict=True)
        there = replace(self, encoders=tuple(replace(one, precision=precision_of(e, device)) for one, e in pairs))
        if there.precision != self.precision:
            logger.info(
                "the model was trained on embeddings in %s, and %s computes them in %s: predictions differ by the "
                "rounding (histosge.settings.precision)",
                self.precision, device, there.precision,
            )  # fmt: skip
        return there

    @property
    def token_um(self) -> float | None:
        """Edge of a token of a dense embedding, the widest where encoders are joined."""
        sizes = [one.token_um for one in self.encoders if one.token_um is not None]
        return max(sizes) if self.dense and sizes else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        encoders = [
            {"spec": one.spec.to_dict(), "mpp": one.mpp, "digest": one.digest, "precision": one.precision}
            for one in self.encoders
        ]
        return {"encoders": encoders, "dense": self.dense, "splits": list(self.splits)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EmbeddingConfig:
        """Restore a config from its :meth:`to_dict`."""
        unknown = [one["spec"]["name"] for one in values["encoders"] if not {"digest", "precision"} <= one.keys()]
        if unknown:
            msg = (
                f"it does not say which weights of encoder {unknown[0]!r} it was trained with (an older version of "
                "histosge wrote it). Fit it again."
            )
            raise ValueError(msg)
        encoders = tuple(
            EncoderConfig(EncoderSpec(**one["spec"]), one["mpp"], one["digest"], one["precision"])
            for one in values["encoders"]
        )
        return cls(encoders, values["dense"], tuple(values["splits"]))

    def to_uns(self) -> dict[str, Any]:
        """Values for ``uns``, with arrays instead of lists, since files return arrays."""
        each = {
            _keys.slug(one.spec.name): {
                k: np.array(v) if isinstance(v, list) else v
                for k, v in (one.spec.to_dict() | {"digest": one.digest}).items()
            }
            for one in self.encoders
        }
        rest = {"dense": self.dense, "precision": self.precision}
        if len(each) == 1:
            return {"encoder": next(iter(each.values())), "tile_um": self.encoders[0].tile_um, **rest}
        tile_um = np.array([one.tile_um for one in self.encoders])
        return {"encoder": {"name": self.name, "joined": each}, "tile_um": tile_um, **rest}


def load_for(section: Section, encoder: Any, *, dense: bool) -> Any:
    """Load an encoder, unless it is loaded. Raise before that where it cannot be used on the section."""
    for one in split_encoder(encoder):
        _check_spec(section, known_spec(one), dense=dense)
    loaded = load_encoder(encoder)
    for one in split_encoder(loaded):
        _check_spec(section, one.spec, dense=dense)
    return loaded


def load_of_model(section: Section | None, encoder: Any, config: EmbeddingConfig) -> Any:
    """Load the encoder of a fitted model, unless ``encoder`` is this encoder, already loaded; ``None``: any section."""
    if isinstance(encoder, str) and encoder == DEFAULT_ENCODER:  # the default of the doors: the user chose none
        encoder = config.name
    given = [one if (spec := known_spec(one)) is None else spec.name for one in split_encoder(encoder)]
    if given != [one.spec.name for one in config.encoders]:
        msg = (
            f"encoder={'+'.join(map(str, given))!r}, but the model was trained on embeddings of {config.name!r}. "
            "Leave encoder= out."
        )
        raise ValueError(msg)
    if isinstance(encoder, str) and not config.by_name:
        msg = (
            f"the model was trained on embeddings of {config.name!r}, which is not in the list of encoders: pass the "
            "same one, encoder=histosge.load_encoder(...)."
        )
        raise ValueError(msg)
    if section is not None:
        for part in config.encoders:
            _check_spec(section, part.spec, dense=config.dense)
    loaded = load_encoder(encoder)
    for one, wanted in zip(split_encoder(loaded), config.encoders, strict=True):
        _check_same(one, wanted)
    return loaded


_COMPARED = ("mpp", "tile_px", "embed_dim", "token_px", "mean", "std")


def _check_same(encoder: Any, wanted: EncoderConfig) -> None:
    """Raise where an encoder is another than that of a model, though it has the name."""
    pairs = {k: (getattr(encoder.spec, k), getattr(wanted.spec, k)) for k in _COMPARED}
    differs = ", ".join(f"{k} {got} instead of {want}" for k, (got, want) in pairs.items() if got != want)
    found = encoder_digest(encoder)
    if found != wanted.digest and not differs:
        what = {"built-in": "another version", "user": "other weights, class or revision"}
        differs = (
            f"{what.get(wanted.spec.source, 'other weights')} (digest {found[:12]} instead of {wanted.digest[:12]})"
        )
    if not differs:
        return
    remedy = "Pass that one as encoder=."
    if wanted.spec.source == "built-in":
        remedy = "Fit the model again with this version of histosge."
    elif wanted.spec.revision is not None and wanted.spec.source != "user":
        name, revision = wanted.spec.name, wanted.spec.revision
        remedy += f" Its revision was {revision}: encoder=histosge.load_encoder({name!r}, revision={revision!r})."
    msg = f"encoder {wanted.spec.name!r} is not the one the model was trained with: {differs}. {remedy}"
    raise ValueError(msg)


def _check_spec(section: Section, spec: EncoderSpec | None, *, dense: bool) -> None:
    """Raise where an encoder cannot be used on a section; ``None`` where its spec is read from the network."""
    coarsest = EncoderSpec.coarsest_mpp if spec is None else spec.coarsest_mpp
    if section.mpp > coarsest * (1 + 1e-6):
        msg = (
            f"image {section.image_key!r} has {section.mpp:.3g} µm per pixel, far too coarse for a pathology encoder "
            f"(at most {coarsest}): it is probably the hires image. Read the section with the full-resolution "
            "image, `sge.io.read(path, image=...)`, or use encoder='stain-texture'."
        )
        raise ValueError(msg)
    if dense and spec is not None and spec.token_px is None:
        msg = (
            f"encoder {spec.name!r} gives no tokens below its tile, so that smaller areas cannot be embedded. Choose "
            f"one of {with_tokens()}, or pass dense=False to embed the tile around each target."
        )
        raise ValueError(msg)


def _check_tile(specs: Sequence[EncoderSpec], tile_um: float | None) -> None:
    if tile_um is None:
        return
    if not 1 <= tile_um <= 10_000:
        msg = f"tile_um={tile_um!r} is not the edge of a tile in µm. Pass a number above 0, or None for the default."
        raise ValueError(msg)
    if all(spec.fixed_tile for spec in specs):
        names = " and ".join(repr(spec.name) for spec in specs)
        msg = f"tile_um={tile_um!r}: the tile of encoder {names} has a fixed size. Leave tile_um out."
        raise ValueError(msg)


def _n_columns(encoder: Any, *, dense: bool) -> int:
    """Length of an embedding. The width of tokens is read from tokens of the encoder."""
    spec = encoder.spec
    if not dense:
        return int(spec.embed_dim)
    if spec.whole_blocks:
        block = torch.zeros(3, spec.tile_px, spec.tile_px, dtype=torch.uint8)
        tokens, around = encoder.embed_block_dense(block, torch.zeros(0, 2))
    else:
        tokens, around = encoder.embed_tokens(torch.zeros(0, 3, spec.tile_px, spec.tile_px, dtype=torch.uint8))
    return int(tokens.shape[-1] + around.shape[-1])
