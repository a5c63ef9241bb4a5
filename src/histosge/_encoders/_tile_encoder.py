"""Encoders of tiles: a torch module behind a spec. Tiles are normalised on the device."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from histosge._encoders._identity import encoder_digest, precision_of
from histosge._encoders._table import with_tokens
from histosge._settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from histosge._encoders._spec import EncoderSpec


class TileEncoder:
    """An encoder of tiles.

    Tiles have the scale and size of the spec, so nothing is resized or cropped. Where a model's own transform crops
    (GigaPath: 224 of 256 px), ``tile_px`` is the size after cropping.

    Parameters
    ----------
    spec
        Its input.
    forward
        From normalised tiles to embeddings.
    module
        The network.
    owner
        Object to move between devices, where that is more than the network.
    half
        Whether it computes in bfloat16 on CUDA.
    dense
        Where it has tokens: from normalised tiles to a token for each patch (n, patches, C) and to the embeddings of
        ``forward``. Patches come row by row, after the last norm, without class token and registers.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        forward: Callable[[Tensor], Any],
        module: nn.Module,
        *,
        owner: Any = None,
        half: bool = True,
        dense: Callable[[Tensor], tuple[Tensor, Any]] | None = None,
    ) -> None:
        self.spec = spec
        self._forward = forward
        self._dense = dense
        self.module = module
        self.owner = module if owner is None else owner
        self._half = half
        self._channels_last = False
        self._mean = torch.tensor(spec.mean).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(spec.std).view(1, 3, 1, 1) * 255

    def __repr__(self) -> str:
        return f"TileEncoder({self.spec.name!r}, {self.spec.tile_px} px at {self.spec.mpp:g} µm per pixel)"

    def to(self, device: torch.device | str) -> Self:
        """Move to ``device``."""
        self.owner.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        convolves = any(isinstance(part, nn.BatchNorm2d) for part in self.module.modules())
        self._channels_last = convolves and torch.device(device).type == "cuda"
        if self._channels_last:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def precision(self, device: torch.device) -> torch.dtype:
        """Type that it computes in: bfloat16 on CUDA, float32 elsewhere, or ``settings.precision``."""
        wanted = settings.precision or ("bfloat16" if device.type == "cuda" else "float32")
        return torch.bfloat16 if self._half and wanted == "bfloat16" else torch.float32

    def identity(self, device: torch.device) -> dict[str, Any] | None:
        """Return what its embeddings depend on, except pixels; ``None`` for a module of the user's without a revision.

        The code of such a module may change without a visible difference. For all others the weights are hashed, once,
        so that the name or branch on the hub does not matter.
        """
        spec = self.spec
        if spec.source == "user" and spec.revision is None:
            return None
        libraries = ("timm", "lazyslide-models", "transformers")
        return {
            **spec.to_dict(),
            "digest": encoder_digest(self),
            "precision": precision_of(self, device),
            "versions": {name: version(name) for name in libraries if _installed(name)},
        }

    def embed(self, tiles: Tensor) -> Tensor:
        """Embed tiles.

        Parameters
        ----------
        tiles
            (n, 3, tile_px, tile_px) uint8, red, green, blue, at ``spec.mpp``, on the device of the encoder.

        Returns
        -------
        (n, embed_dim) float32.
        """
        self._check(tiles)
        if len(tiles) == 0:
            return torch.zeros(0, self.spec.embed_dim, device=tiles.device)
        with torch.inference_mode():
            x = self._normalised(tiles)
            with self._autocast(tiles):
                out = self._forward(x)
        return self._pooled(out, len(tiles))

    def embed_tokens(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Embed tiles, as in ``embed``, and each of their patches.

        Returns
        -------
        Tokens (n, side, side, C) float32 by row and column, with ``side = tile_px // token_px``, after the last norm,
        without class token and registers, C as wide as the network; and the (n, embed_dim) float32 of ``embed``.
        """
        spec, n = self.spec, len(tiles)
        if self._dense is None or spec.token_px is None:
            msg = (
                f"encoder {spec.name!r} gives no token for each patch of a tile. Take one that does: "
                f"{', '.join(map(repr, with_tokens()))}; or a vision transformer of timm ('timm:vit_...')."
            )
            raise ValueError(msg)
        self._check(tiles)
        if n == 0:  # the width of tokens is known from tokens only
            tokens, pooled = self.embed_tokens(tiles.new_zeros(1, *tiles.shape[1:]))
            return tokens[:0], pooled[:0]
        with torch.inference_mode():
            x = self._normalised(tiles)
            with self._autocast(tiles):
                tokens, out = self._dense(x)  # (n, side * side, C), (n, embed_dim)
        side = spec.tile_px // spec.token_px
        if tokens.ndim != 3 or tokens.shape[:2] != (n, side * side):
            msg = (
                f"encoder {spec.name!r} gave tokens of shape {tuple(tokens.shape)} for {n} tiles; its spec says "
                f"token_px={spec.token_px}, {side} x {side} patches a tile. Are the weights those of another encoder?"
            )
            raise ValueError(msg)
        return tokens.float().clone().unflatten(1, (side, side)), self._pooled(out, n)

    def _check(self, tiles: Tensor) -> None:
        spec = self.spec
        if tiles.dtype != torch.uint8 or tiles.shape[1:] != (3, spec.tile_px, spec.tile_px):
            msg = (
                f"encoder {spec.name!r} takes uint8 tiles of shape (n, 3, {spec.tile_px}, {spec.tile_px}), red, green, "
                f"blue; not {tiles.dtype} of shape {tuple(tiles.shape)}."
            )
            raise ValueError(msg)

    def _normalised(self, tiles: Tensor) -> Tensor:
        x = (tiles.float() - self._mean) / self._std  # (n, 3, h, w)
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last else x

    def _autocast(self, tiles: Tensor) -> torch.autocast:
        half = self.precision(tiles.device) == torch.bfloat16
        return torch.autocast(tiles.device.type, dtype=torch.bfloat16, enabled=half)

    def _pooled(self, out: Any, n: int) -> Tensor:
        """Check the embeddings of ``n`` tiles; copy them out of inference mode, so that a head can train on them."""
        spec = self.spec
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        if shape != (n, spec.embed_dim):
            what = f"an array of shape {shape}" if isinstance(shape, tuple) else f"a {shape}, not an array,"
            msg = (
                f"encoder {spec.name!r} gave {what} for {n} tiles; its spec says {(n, spec.embed_dim)}. "
                "Give the spec the right embed_dim, or pool the tokens."
            )
            raise ValueError(msg)
        return out.float().clone()


def _installed(name: str) -> bool:
    return find_spec(name.replace("-", "_")) is not None
