"""Tiles out of an image: our reader, the others', and the floor under all of them, decoding."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any

import numpy as np
import slides
from timing import Contender, interleave, table

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

TILE_PX = slides.TILE_PX


def installed(*names: str) -> bool:
    """Whether all of these can be imported; says so where not."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        pip = {"wsidata": "lazyslide"}
        print(f"{', '.join(missing)} not installed: left out (pip install {' '.join(pip.get(m, m) for m in missing)})")
    return not missing


def in_rows(tiles: Any) -> NDArray[np.uint8]:
    """Tiles as (b, tile, tile, 3), whichever way they came."""
    tiles = np.asarray(tiles)
    return tiles if tiles.shape[-1] == 3 else np.moveaxis(tiles, 1, -1)


# ------------------------------------------------------------------------------------------------------------ readers


def ours(data: Any, xy_px: NDArray[np.float64], *, scale: float = 1.0) -> Iterator[Any]:
    """Batches of our reader."""
    for tiles, _ in _tile_batches(data, xy_px, scale=scale):
        yield tiles


def _tile_batches(data: Any, xy_px: NDArray[np.float64], *, scale: float) -> Iterator[tuple[Any, NDArray[np.int64]]]:
    from histosge._image import LazyImage, batches, tile_blocks

    found = tile_blocks(LazyImage(data), xy_px, scale=scale, tile_px=TILE_PX)
    return batches(found, tile_px=TILE_PX, batch_size=64)


def one_by_one(data: Any, xy_px: NDArray[np.float64]) -> Iterator[Any]:
    """One lazy slice per tile, of a dask or zarr array."""
    for x, y in xy_px.astype(int) - TILE_PX // 2:
        yield np.moveaxis(np.asarray(data[:, y : y + TILE_PX, x : x + TILE_PX]), 0, -1)[None]


def by_wsidata(reader: Any, xy_px: NDArray[np.float64]) -> Iterator[Any]:
    """Read tiles with wsidata's reader of SpatialData images, which LazySlide reads with."""
    for x, y in xy_px.astype(int) - TILE_PX // 2:
        yield reader.get_region(int(x), int(y), TILE_PX, TILE_PX)[None]


def by_squidpy(container: Any, xy_px: NDArray[np.float64]) -> Iterator[Any]:
    """Crop with squidpy's ImageContainer, which its image features are computed from."""
    for x, y in xy_px.astype(int) - TILE_PX // 2:
        yield np.asarray(container.crop_corner(int(y), int(x), size=TILE_PX)["he"]).reshape(1, TILE_PX, TILE_PX, 3)


def count(read: Callable[..., Iterator[Any]], *arguments: Any, **options: Any) -> Callable[[], int]:
    return lambda: sum(len(tiles) for tiles in read(*arguments, **options))


def check_same(reads: dict[str, Iterator[Any]], *, n: int, truth: NDArray[np.uint8]) -> None:
    """Stop where a reader gives other pixels than the image has: its speed would be worth nothing."""
    for name, batches in reads.items():
        found, have = [], 0
        for tiles in batches:
            found.append(in_rows(tiles))
            have += len(tiles)
            if have >= n:
                break
        if not np.array_equal(np.concatenate(found)[:n], truth):
            msg = f"{name} gives other pixels than the image has."
            raise RuntimeError(msg)
    print(f"pixels of {n} tiles are those of the image: {', '.join(reads)}")


def decode_zarr(path: Path, array: Any, *, n_threads: int) -> Callable[[], int]:
    """Read and decompress every chunk of a zarr (format 3) array, and nothing else."""
    from numcodecs import Zstd

    meta = json.loads((path / "zarr.json").read_text())
    codecs = [codec["name"] for codec in meta["codecs"]]
    if codecs not in (["bytes", "zstd"], ["bytes"]):
        msg = f"{path} is compressed by {codecs}; this benchmark decodes zstd only."
        raise RuntimeError(msg)
    chunks = [p for p in (path / "c").rglob("*") if p.is_file()]
    decode = Zstd().decode if codecs[-1] == "zstd" else np.frombuffer

    def one(chunk: Path) -> int:
        content = chunk.read_bytes()
        return len(decode(content) if codecs[-1] == "zstd" else np.frombuffer(content, np.uint8).copy())

    def run() -> int:
        with ThreadPoolExecutor(n_threads) as pool:
            n_bytes = sum(pool.map(one, chunks))
        if n_bytes != np.prod(array.shape):
            msg = f"{path}: {n_bytes} bytes decoded, {np.prod(array.shape)} expected."
            raise RuntimeError(msg)
        return len(chunks)

    return run


def reader(options: argparse.Namespace) -> None:
    """Tiles out of a page-cached zarr in 256-px chunks."""
    import dask.array as da
    import zarr
    from spatialdata import read_zarr

    path, bare_path = (
        slides.store(options.work, edge_px=options.edge),
        slides.bare_zarr(options.work, edge_px=options.edge),
    )
    sdata = read_zarr(path)
    array, bare = slides.image_array(path), zarr.open_array(bare_path, mode="r")
    lazy = sdata["he"].data
    print(f"{array.shape} in chunks {array.chunks}, {[type(c).__name__ for c in array.compressors]}", end=", ")
    print(
        f"{sum(f.stat().st_size for f in path.rglob('*') if f.is_file()) / 2**20:.0f} MiB; dask chunks {lazy.chunksize}"
    )
    memory = array[:]  # read once: from here on it comes from the page cache
    xy = slides.hexagonal_px(options.edge)
    few = xy[:: max(1, len(xy) // options.slow)][: options.slow]
    some = xy[:: max(1, len(xy) // (8 * options.slow))][: 8 * options.slow]
    others: list[Contender] = []
    others_see: dict[str, Iterator[Any]] = {}
    if installed("wsidata"):
        from wsidata import open_wsi

        theirs = open_wsi(sdata, image_key="he").reader
        others.append(Contender("wsidata, SpatialData reader", count(by_wsidata, theirs, few)))
        others_see["wsidata"] = by_wsidata(theirs, few[:8])
    if installed("squidpy"):
        import xarray as xr
        from squidpy.im import ImageContainer

        container = ImageContainer(xr.DataArray(lazy.transpose(1, 2, 0), dims=("y", "x", "c")), layer="he")
        others.append(Contender("squidpy, ImageContainer.crop_corner", count(by_squidpy, container, few[:8])))
        others_see["squidpy"] = by_squidpy(container, few[:8])

    corner = few[:8].astype(int) - TILE_PX // 2
    truth = np.stack([np.moveaxis(memory[:, y : y + TILE_PX, x : x + TILE_PX], 0, -1) for x, y in corner])
    order = np.concatenate([rows for _, rows in _rows_of(array, few[:8])])
    same = {"ours": iter([np.concatenate([in_rows(t) for t in ours(lazy, few[:8])])[np.argsort(order)]])}
    check_same(same | {"slices": one_by_one(lazy, few[:8])} | others_see, n=len(corner), truth=truth)

    reference = "ours, SpatialData element (dask)"
    contenders = [
        Contender(reference, count(ours, lazy, xy)),
        Contender("ours, zarr array", count(ours, array, xy)),
        Contender("ours, zarr without compression", count(ours, bare, xy)),
        Contender("ours, dask of that", count(ours, da.from_zarr(bare), xy)),
        Contender("ours, numpy array in memory", count(ours, memory, xy)),
        Contender(f"ours, zarr array resampled by {options.scale:g}", count(ours, array, xy, scale=options.scale)),
        Contender("one slice per tile, dask", count(one_by_one, lazy, few)),
        Contender("one slice per tile, zarr", count(one_by_one, array, some)),
        Contender("one slice per tile, zarr without compression", count(one_by_one, bare, some)),
        *others,
    ]
    n_threads = os.cpu_count() or 1
    where = path / "images" / "he" / array.basename
    for title, folder, one in (("zstd", where, array), ("none", bare_path, bare)):
        if (folder / "zarr.json").exists():
            contenders.append(
                Contender(f"floor: chunks decoded, {title}", decode_zarr(folder, one, n_threads=n_threads), "chunks")
            )
    measured = interleave(contenders, repeats=options.repeats)
    print(f"\n{len(xy)} tiles of {TILE_PX} px, {options.edge} px image, {n_threads} threads")
    table("reader", measured, reference=reference)
    for title, name in (("zstd", "ours, zarr array"), ("none", "ours, zarr without compression")):
        floor = measured.get(f"floor: chunks decoded, {title}")
        if floor is not None:
            decode_s, whole_s = (float(np.median(measured[n].seconds)) for n in (floor.name, name))
            print(
                f"{name}: {whole_s:.3f} s, of which decoding every chunk once is {decode_s:.3f} s ({decode_s / whole_s:.0%})"
            )


def _rows_of(data: Any, xy_px: NDArray[np.float64]) -> list[tuple[Any, NDArray[np.int64]]]:
    return [(None, rows) for _, rows in _tile_batches(data, xy_px, scale=1.0)]


# --------------------------------------------------------------------------------------------------------------- TIFF


class DecoderClock:
    """Count the processor time that all threads spend in the JPEG decoder."""

    def __init__(self) -> None:
        self.seconds, self.calls, self._lock = 0.0, 0, threading.Lock()

    def __enter__(self) -> DecoderClock:
        import imagecodecs

        self._codec = imagecodecs.jpeg_decode

        def timed(*arguments: Any, **options: Any) -> Any:
            start = thread_time()
            out = self._codec(*arguments, **options)
            spent = thread_time() - start
            with self._lock:
                self.seconds += spent
                self.calls += 1
            return out

        imagecodecs.jpeg_decode = timed
        return self

    def __exit__(self, *_: object) -> None:
        import imagecodecs

        imagecodecs.jpeg_decode = self._codec


def tiff(options: argparse.Namespace) -> None:
    """Tiles out of a JPEG-compressed tiled TIFF, through dask."""
    import dask.array as da
    import tifffile
    import zarr

    if not installed("tifffile", "imagecodecs"):
        return
    path = slides.jpeg_tiff(options.work, edge_px=options.edge)
    stored = zarr.open_array(tifffile.imread(path, aszarr=True), mode="r")  # (y, x, c)
    lazy = da.from_zarr(stored).transpose(2, 0, 1)
    print(f"{path.stat().st_size / 2**20:.0f} MiB, {stored.shape} in chunks {stored.chunks}")
    xy = slides.hexagonal_px(options.edge)
    few = xy[:: max(1, len(xy) // options.slow)][: options.slow]
    n_threads = os.cpu_count() or 1

    def decode() -> int:
        with tifffile.TiffFile(path) as file:
            return sum(1 for _ in file.pages[0].segments(maxworkers=n_threads))

    reference, floor = "ours, dask", "floor: every tile of the TIFF decoded once"
    measured = interleave(
        [
            Contender(reference, count(ours, lazy, xy)),
            Contender("one slice per tile, dask", count(one_by_one, lazy, few)),
            Contender(floor, decode, "chunks"),
        ],
        repeats=options.repeats,
    )
    table("JPEG-compressed TIFF", measured, reference=reference)
    whole, least = (float(np.median(measured[name].seconds)) for name in (reference, floor))
    print(
        f"decoding alone takes {least:.2f} s of our {whole:.2f} s with the same {n_threads} threads: {least / whole:.0%}"
    )
    with DecoderClock() as clock:
        start = perf_counter()
        n = count(ours, lazy, xy)()
        wall = perf_counter() - start
    n_chunks = measured[floor].n
    print(f"a run of {wall:.2f} s ({n} tiles): {clock.seconds:.2f} s of processor in the decoder,", end=" ")
    print(f"{clock.seconds / wall / n_threads:.0%} of {n_threads} threads;", end=" ")
    print(f"{clock.calls} chunks decoded, {clock.calls / n_chunks:.2f} x as many as there are")
