"""Places → blocks or tiles → encoder on the device → one embedding per place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from histosge._settings import logger, progress_bar, settings
from histosge._tiles import LazyImage, blocks, prefetch, tile_batches

if TYPE_CHECKING:
    from numpy.typing import NDArray

STACKS = ("pilm", "rgb")
"""Maps that can be stacked into one embedding; the third one of the paper, position, every head takes by itself."""
_RGB_WINDOW_UM = 55.0


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Choose where to compute: as asked, else as ``settings.device``, else a GPU if there is one, else the CPU."""
    wanted = device if device is not None else settings.device
    if wanted is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(wanted)
    except RuntimeError as err:
        msg = f"device={wanted!r} is not a device torch knows. Use 'cpu', 'cuda', 'cuda:1' or 'mps', or None to choose."
        raise ValueError(msg) from err
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not usable.get(found.type, False) or (found.index or 0) >= max(torch.cuda.device_count(), 1):
        have = [name for name, there in usable.items() if there]
        msg = (
            f"device={str(wanted)!r} is not available here (usable: {', '.join(have)}; "
            f"{torch.cuda.device_count()} CUDA devices). Pass device={have[-1]!r}, or None to choose."
        )
        raise ValueError(msg)
    return found


def embed(
    image: LazyImage,
    xy_px: NDArray[np.float64],
    *,
    mpp: float,
    encoder: Any,
    tile_um: float | None = None,
    stack: tuple[str, ...] = ("pilm",),
    device: torch.device,
    batch_size: int = 32,
    progress: bool | None = None,
) -> NDArray[np.float32]:
    """Embed places of an image.

    Parameters
    ----------
    image
        The image.
    xy_px
        (n, 2) places in pixels of the image.
    mpp
        µm per pixel of the image.
    encoder
        A tile encoder or a block encoder.
    tile_um
        Edge of the tile the encoder sees; by default the one it was trained with.
    stack
        Maps to stack: ``"pilm"``, ``"rgb"`` or both.
    device
        Where to compute.
    batch_size
        Tiles per forward pass.
    progress
        Whether to show the progress bar.

    Returns
    -------
    (n, d) float32, in the order of the places.
    """
    spec = encoder.spec
    parts = []
    with progress_bar(desc=f"embedding with {spec.name}", total=len(xy_px), unit="place", show=progress) as bar:
        if "pilm" in stack:
            out = np.zeros((len(xy_px), spec.embed_dim), np.float32)
            encoder = encoder.to(device)
            scale = (spec.mpp if tile_um is None else tile_um / spec.tile_px) / mpp
            run = _embed_blocks if hasattr(encoder, "embed_block") else _embed_tiles
            for rows, values in run(image, xy_px, encoder=encoder, scale=scale, device=device, batch_size=batch_size):
                out[rows] = values
                bar.update(len(rows))
            parts.append(out)
    if "rgb" in stack:
        parts.append(_mean_colour(image, xy_px, mpp=mpp))
    joined = np.concatenate(parts, axis=1)
    if not np.isfinite(joined).all():
        msg = (
            f"encoder {spec.name!r} gave {(~np.isfinite(joined)).any(1).sum()} embeddings that are not finite, "
            "so that nothing can be learnt from them. Check its weights, or use another encoder."
        )
        raise RuntimeError(msg)
    return joined


def _embed_blocks(image, xy_px, *, encoder, scale, device, batch_size):  # type: ignore[no-untyped-def]
    for block in prefetch(blocks(image, xy_px, scale=scale, halo_px=encoder.halo_px, align_px=encoder.align_px)):
        pixels = torch.from_numpy(np.ascontiguousarray(block.pixels.transpose(2, 0, 1))).to(device)  # (3, h, w)
        yield block.rows, encoder.embed_block(pixels, torch.from_numpy(block.xy_px)).float().cpu().numpy()


def _embed_tiles(image, xy_px, *, encoder, scale, device, batch_size):  # type: ignore[no-untyped-def]
    tile_px = encoder.spec.tile_px
    batches = tile_batches(image, xy_px, scale=scale, tile_px=tile_px, batch_size=batch_size)
    size, halved = batch_size, False
    for tiles, rows in prefetch(batches):
        values = []
        start = 0
        while start < len(tiles):
            some = torch.from_numpy(tiles[start : start + size])
            try:
                on_device = some.to(device, non_blocking=True).permute(0, 3, 1, 2)  # (b, 3, tile, tile) uint8
                values.append(encoder.embed(on_device).float().cpu().numpy())
            except torch.OutOfMemoryError as err:
                if halved or size == 1:
                    msg = (
                        f"{device} ran out of memory with {size} tiles of {tile_px} px for encoder "
                        f"{encoder.spec.name!r}. Pass a smaller batch_size= (it was {batch_size}), "
                        "a smaller encoder, or device='cpu'."
                    )
                    raise RuntimeError(msg) from err
                size, halved = max(1, len(some) // 2), True
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                logger.warning(
                    "out of memory with batch_size=%d: going on with %d. Pass batch_size= to choose.", batch_size, size
                )
                continue
            start += size
        yield rows, np.concatenate(values)


def _mean_colour(image: LazyImage, xy_px: NDArray[np.float64], *, mpp: float) -> NDArray[np.float32]:
    """Mean red, green and blue (0 to 1) in a window of a spot's size: the paper's RGB map."""
    out = np.zeros((len(xy_px), 3), np.float32)
    side = max(1, round(_RGB_WINDOW_UM / mpp))
    for tiles, rows in prefetch(tile_batches(image, xy_px, scale=1.0, tile_px=side, batch_size=256)):
        out[rows] = tiles.mean(axis=(1, 2), dtype=np.float32) / 255
    return out
