"""Embed on the workers of dask: each opens the image and loads the encoder itself, once."""

from __future__ import annotations

import hashlib
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from histosge import _keys
from histosge._cluster import n_bytes
from histosge._encoders import JoinedEncoder, load_encoder, loaded_by, split_encoder

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from histosge._embedding._config import EmbeddingConfig
    from histosge._embedding._embedder import Embedder
    from histosge._geometry import Footprints
    from histosge._image import LazyImage
    from histosge._section import Section

_N_PARTS, _FEWEST, _MOST = 64, 32, 4096
"""Wanted number of tasks, and limits of the locations in one: enough tasks for many workers, large ones for a GPU"""
_PROBES, _PROBE_PX = 5, 64
_MOST_IN_MEMORY = 10_000
"""Bytes of an image that may travel with it: those of its metadata"""

Part = tuple["NDArray[np.float64]", "Footprints | None"]
"""Locations (m, 2) in pixels of the image, and their areas where they are embedded densely"""


@dataclass(frozen=True)
class EmbedderPlan:
    """What a worker needs to embed locations of a section."""

    section: Section
    pixels: str
    """Digest of a few pixels: a worker that cannot see the file would read it as black"""
    encoders: tuple[Any, ...]
    """Arguments of ``load_encoder`` by name (dict), or the encoder itself where it is an object of the user's"""
    config: EmbeddingConfig
    device: str | None
    """As the user gave it; by default each worker chooses"""
    batch_size: int

    @classmethod
    def of(cls, embedder: Embedder, *, genes: pd.Index | None = None, target_key: str | None = None) -> Self:
        """Pack an embedder, with the expression of ``genes`` and the existing embeddings of ``target_key`` only."""
        section = embedder.section
        check_on_disk(section)
        genes = section.genes[:0] if genes is None else genes
        name = None if target_key is None else _keys.embedding_table(target_key, embedder.config.name)
        written = {key: table for key, table in section.written.items() if key == name}
        slim = replace(section.with_genes(genes), counts=None, transformations={}, written=written)
        encoders = tuple(loaded_by(one) or one for one in split_encoder(embedder.encoder))
        return cls(slim, _pixels(section.image), encoders, embedder.config, embedder.wanted, embedder.batch_size)

    def open(self) -> Embedder:
        """Open it, on a worker."""
        from histosge._embedding._embedder import Embedder

        found = _pixels(self.section.image)
        if found != self.pixels:
            msg = (
                f"the worker on host {socket.gethostname()!r} does not read the pixels of image "
                f"{self.section.image_key!r} that this process reads. The file must lie where all workers see it, under "
                "the same path: copy it to a disk that they share, or start the workers where it is."
            )
            raise RuntimeError(msg)
        loaded = tuple(load_encoder(**one) if isinstance(one, dict) else one for one in self.encoders)
        encoder = loaded[0] if len(loaded) == 1 else JoinedEncoder(loaded)
        embedder = Embedder.of_model(
            self.section, self.config, encoder, device=self.device, batch_size=self.batch_size, progress=False
        )
        if embedder.config.precision != self.config.precision:
            msg = (
                f"the worker on host {socket.gethostname()!r} computes embeddings in {embedder.config.precision} on "
                f"{embedder.device.type}, and the first worker in {self.config.precision}. Start all workers on one kind "
                "of device, or choose one: device='cpu', or settings.precision='float32'."
            )
            raise RuntimeError(msg)
        return embedder


def check_on_disk(section: Section) -> None:
    """Raise where the image of a section lies in memory: workers open it from its file."""
    try:
        size = n_bytes(section.image)
    except Exception as err:
        msg = (
            f"image {section.image_key!r} cannot be opened on the workers of dask ({type(err).__name__}: {err}). "
            f"{_REMEDY}"
        )
        raise ValueError(msg) from err
    if size > _MOST_IN_MEMORY:
        msg = (
            f"image {section.image_key!r} lies in the memory of this process ({size / 1e6:.3g} MB), and is not sent to "
            f"the workers of dask: they open it from its file. {_REMEDY}"
        )
        raise ValueError(msg)


_REMEDY = (
    "Write the section to a disk that they see and read it again: sdata.write('section.zarr'); "
    "sdata = spatialdata.read_zarr('section.zarr'). Or compute in this process: settings.dask=False."
)


def embed_part(embedder: Embedder, part: Part) -> NDArray[np.float32]:
    """Embed one part, on a worker: (m, d)."""
    xy_px, footprints = part
    return embedder.embed_locations(xy_px, footprints, progress=False, report=False)


def parts_of(
    xy_px: NDArray[np.float64], *, order: NDArray[np.int64], block_px: float, whole_blocks: bool
) -> list[NDArray[np.int64]]:
    """Cut the order of locations into parts of whole blocks or also of pieces, whatever the number of workers."""
    wanted = min(max(len(xy_px) // _N_PARTS, _FEWEST), _MOST)
    block = np.floor(xy_px[order] / block_px)
    first = np.flatnonzero(np.any(np.diff(block, axis=0) != 0, axis=1)) + 1
    cuts: list[int] = []
    for at in first.tolist():
        if at - (cuts[-1] if cuts else 0) >= wanted:
            cuts.append(at)
    whole = [rows for rows in np.split(order, cuts) if len(rows)]
    if whole_blocks:
        return whole
    return [piece for rows in whole for piece in np.array_split(rows, max(1, len(rows) // wanted))]


def _pixels(image: LazyImage) -> str:
    """Digest of small squares along the diagonal of an image."""
    digest = hashlib.sha256()
    for i in range(1, _PROBES + 1):
        x, y = (side * i // (_PROBES + 1) for side in (image.width_px, image.height_px))
        digest.update(image.read(x, y, x + _PROBE_PX, y + _PROBE_PX).tobytes())
    return digest.hexdigest()
