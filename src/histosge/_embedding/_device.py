"""The device: choose it, copy tiles to it, and run batches that fit into its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from histosge._cluster import active_client, device_of_workers
from histosge._settings import logger, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from histosge._embedding._forecast import Forecast


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Choose where to compute: the argument, else ``settings.device``, else a GPU if there is one, else the CPU.

    With a ``Client`` of dask it is the CPU: its workers choose their own device, and this process only shares out work.
    """
    if active_client() is not None:
        return torch.device("cpu")
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


def embedding_device(device: str | torch.device | None) -> torch.device:
    """Return the device that embeds: of this process, or with a ``Client`` of dask the kind that its workers have."""
    client = active_client()
    if client is None:
        return resolve_device(device)
    wanted = device if device is not None else settings.device
    return torch.device(device_of_workers(client, _kind, None if wanted is None else str(wanted)))


def _kind(device: str | None) -> str:
    return resolve_device(device).type


def _on_device(block: Any, device: torch.device) -> Tensor:
    # torch cannot share read-only memory
    pixels = block.pixels if block.pixels.flags.writeable else block.pixels.copy()
    return torch.from_numpy(np.ascontiguousarray(pixels)).to(device)  # (3, h, w)


def _buffers(*, pinned: bool) -> Callable[[tuple[int, ...]], NDArray[np.uint8]]:
    """Allocate memory for tiles; a GPU copies from pinned memory in the background."""
    return lambda shape: torch.empty(shape, dtype=torch.uint8, pin_memory=pinned).numpy()


_LARGE = 2e8
"""Networks with more parameters take a second or more for a tile on a processor."""
_FIRST_TILES = 4


class _Forward:
    """Run tiles through an encoder in batches, halved once if memory runs out; forecast the time of the run."""

    def __init__(
        self,
        encoder: Any,
        *,
        device: torch.device,
        batch_size: int,
        forecast: Forecast,
        report: Callable[[float], None],
    ) -> None:
        self.encoder, self.device, self.wanted_batch_size = encoder, device, batch_size
        self.batch_size, self.halved = batch_size, False
        self.locations_per_tile = 1.0
        """Locations that are embedded for each tile"""
        self._forecast, self._report = forecast, report
        # small first batches, so that there is a forecast even where a whole batch takes minutes
        self._first_sizes = [_FIRST_TILES] * 2 if device.type == "cpu" and _is_large(encoder) else []

    def begin(self) -> None:
        """Call before a batch or block is computed."""
        self._forecast.begin()

    def fetched(self, n_tiles: int) -> None:
        """Call when embeddings of tiles are copied back from a GPU; for a processor this does nothing."""
        if self.device.type != "cpu":
            self.computed(n_tiles * self.locations_per_tile)

    def computed(self, n_locations: float) -> None:
        """Call when embeddings of locations are computed."""
        seconds = self._forecast.computed(n_locations)
        if seconds is not None:
            self._report(seconds)

    def __call__(self, tiles: NDArray[np.uint8], call: Callable[[Tensor], Any]) -> Iterator[Any]:
        """Yield the output of the encoder for (b, 3, tile, tile) uint8, batch by batch."""
        start = 0
        self.begin()
        while start < len(tiles):
            size = min([self.batch_size, *self._first_sizes[:1]])
            some = torch.from_numpy(tiles[start : start + size])
            try:
                on_device = some.to(self.device, non_blocking=True)  # (b, 3, tile, tile) uint8
                copied = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
                values = call(on_device)
                if copied is not None:
                    copied.synchronize()  # the caller fills the buffer of these tiles with the next ones
            except torch.OutOfMemoryError as err:
                if self.halved or self.batch_size == 1:
                    spec = self.encoder.spec
                    msg = (
                        f"{self.device} ran out of memory with {self.batch_size} tiles of {spec.tile_px} px for "
                        f"encoder {spec.name!r}. Pass a smaller batch_size= (it was {self.wanted_batch_size}), "
                        "a smaller encoder, or device='cpu'."
                    )
                    raise RuntimeError(msg) from err
                self.batch_size, self.halved = max(1, len(some) // 2), True
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                logger.warning(
                    "out of memory with batch_size=%d: continuing with %d. Pass batch_size= to choose.",
                    self.wanted_batch_size, self.batch_size,
                )  # fmt: skip
                continue
            if self.device.type == "cpu":
                self.computed(len(some) * self.locations_per_tile)
            self._first_sizes = self._first_sizes[1:]
            yield values
            start += len(some)


def _is_large(encoder: Any) -> bool:
    module = getattr(encoder, "module", None)
    return module is not None and sum(p.numel() for p in module.parameters()) > _LARGE
