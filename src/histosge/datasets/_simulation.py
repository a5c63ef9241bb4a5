"""A simulated tissue with known truth: hidden fields, the expression that follows from them, and their H&E image.

Positions are (x, y) in µm. A value of a raster belongs to the centre of its cell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from histosge._settings import available_memory, is_number, is_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

PITCH_UM, MARGIN_UM = 100.0, 250.0
RASTER_UM = 8.0
COARSE_UM, DETAIL_UM = 250.0, 70.0
"""Sigma of the hidden fields"""
_GLAND_RASTER_UM = 4.0
_CROSSINGS = 4.44
"""Mean distance of the zeros of Gaussian noise along a line, in sigmas of its filter (Rice, 1945)"""
_GLAND_FACTOR, _GLAND_STAIN = 0.8, 0.15
_MOST = 100_000
"""Rows, columns and genes"""
_MPP = (0.05, 50.0)
_BYTES_PER_PX = 24
_PART = 2**24
"""Values that are computed at once, 128 MiB of float64"""
# optical density of a full stain in red, green and blue
_HAEMATOXYLIN, _EOSIN = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])


def parts(n: int, values: int, *, most: int | None = None) -> Iterator[slice]:
    """Split ``n`` rows of so many values each into slices of at most ``most`` values."""
    step = max(1, (_PART if most is None else most) // max(1, values))
    for start in range(0, n, step):
        yield slice(start, start + step)


def _extent_um(params: Mapping[str, Any]) -> tuple[float, float]:
    """Height and width of the image."""
    width = params["n_cols"] * PITCH_UM + 2 * MARGIN_UM
    height = params["n_rows"] * PITCH_UM * np.sqrt(0.75) + 2 * MARGIN_UM
    return height, width


def hidden_fields(params: dict[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Hidden fields (5, h, w) of unit variance on an 8 µm raster, and where there is tissue (h, w)."""
    from scipy.ndimage import gaussian_filter

    random = np.random.default_rng([params["seed"], 0])
    height, width = _extent_um(params)
    shape = (int(np.ceil(height / RASTER_UM)), int(np.ceil(width / RASTER_UM)))
    smooth = []
    detail_um = params.get("detail_um", DETAIL_UM)
    for sigma_um in (COARSE_UM, detail_um, COARSE_UM, detail_um, COARSE_UM):
        noise = gaussian_filter(random.standard_normal(shape), sigma_um / RASTER_UM, mode="wrap")
        smooth.append((noise - noise.mean()) / noise.std())
    y, x = np.indices(shape)
    angle = np.arctan2(y / shape[0] - 0.5, x / shape[1] - 0.5)
    radius = np.hypot((y / shape[0] - 0.5) / 0.46, (x / shape[1] - 0.5) / 0.46)
    outline = 0.93 + 0.05 * np.sin(3 * angle + 1) + 0.03 * np.cos(5 * angle)
    return np.stack(smooth), radius < outline


def sample(
    rasters: NDArray[np.float64], xy_um: NDArray[np.float64], *, raster_um: float = RASTER_UM
) -> NDArray[np.float64]:
    """Interpolate rasters (k, h, w) at locations (n, 2): (n, k)."""
    from scipy.ndimage import map_coordinates

    at = xy_um.T[::-1] / raster_um - 0.5
    return np.column_stack([map_coordinates(r, at, order=1, mode="nearest") for r in rasters])


def expected_rates(
    fields: NDArray[np.float64], params: dict[str, Any], xy_um: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Expected counts at locations (n, 2), up to a factor for each location: (n, genes)."""
    random = np.random.default_rng([params["genes_seed"], 2])
    n_genes = params["n_genes"]
    loading = np.zeros((len(fields), n_genes))
    first = random.integers(len(fields), size=n_genes)
    loading[first, np.arange(n_genes)] = random.choice([-1.0, 1.0], n_genes) * random.uniform(0.5, 0.9, n_genes)
    loading += random.normal(0, 0.1, loading.shape)
    loading[:, n_genes - n_genes // 5 :] = 0
    base = random.normal(0, 1, n_genes)
    rate = sample(fields, xy_um) @ loading
    rate += base
    inside = glands(params)
    if inside is not None:
        rate += (sample(inside[None], xy_um, raster_um=_GLAND_RASTER_UM) - 0.5) * _gland_factors(params)
    return np.exp(rate, out=rate)


def glands(params: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """Where there are glands, 0 to 1 on a 4 µm raster, (h, w): bands of about one width with sharp edges."""
    from scipy.ndimage import gaussian_filter

    width_um = params.get("gland_um", 0.0)
    if not width_um:
        return None
    sigma = width_um / _CROSSINGS / _GLAND_RASTER_UM
    noise = np.random.default_rng([params["seed"], 3]).standard_normal(
        [int(np.ceil(side_um / _GLAND_RASTER_UM)) for side_um in _extent_um(params)]
    )
    band = gaussian_filter(noise, sigma, mode="wrap") - gaussian_filter(noise, 2.5 * sigma, mode="wrap")
    return np.clip(0.5 + 2 * band / band.std(), 0, 1)


def _gland_factors(params: Mapping[str, Any]) -> NDArray[np.float64]:
    """Log fold change of each gene from stroma to glands, (genes,); more than half of the genes change."""
    random, n_genes = np.random.default_rng([params["genes_seed"], 4]), params["n_genes"]
    factor = random.choice([-1.0, 1.0], n_genes) * random.uniform(0.5, 1.0, n_genes) * (random.random(n_genes) < 0.6)
    factor[n_genes - n_genes // 5 :] = 0
    return 2 * _GLAND_FACTOR * factor


def disc_points(radius_um: float) -> NDArray[np.float64]:
    """Points of a 7 x 7 grid inside a disc around the origin, (k, 2)."""
    x, y = (a.ravel() for a in np.meshgrid(*[np.linspace(-radius_um, radius_um, 7)] * 2))
    return np.column_stack([x, y])[np.hypot(x, y) <= radius_um]


def draw(
    fields: NDArray[np.float64],
    tissue: NDArray[np.bool_],
    *,
    mpp: float,
    random: np.random.Generator,
    inside: NDArray[np.float64] | None = None,
) -> NDArray[np.uint8]:
    """Draw the H&E image (h, w, 3): nuclei, stroma and lumen follow the fields, absorption the law of Beer and Lambert.

    ``inside`` is 1 in glands, which are bluer than the stroma around them, and 0 elsewhere.
    """
    from scipy.ndimage import affine_transform, gaussian_filter, zoom

    h, w = (round(side * RASTER_UM / mpp) for side in tissue.shape)
    crowding, size, pink, lumen, _ = fields

    def fine(raster: NDArray[np.float64]) -> NDArray[np.float32]:
        big: NDArray[np.float32] = zoom(raster, (h / raster.shape[0], w / raster.shape[1]), np.float32, order=1)
        return big

    def mottled(sigma_um: float, gain: float) -> NDArray[np.float32]:
        noise = np.empty((h, w), np.float32)
        for rows in parts(h, w):
            noise[rows] = random.standard_normal(noise[rows].shape)
        noise = gaussian_filter(noise, sigma_um / mpp)
        noise *= np.float32(gain / mpp)
        return noise

    # nuclei: one field sets their density, another the shares of small and large ones
    per_um2 = 0.0035 * np.exp(0.6 * crowding) * tissue
    n_small = random.poisson(per_um2 * RASTER_UM**2 / (1 + np.exp(1.5 * size)))
    n_large = random.poisson(per_um2 * RASTER_UM**2 / (1 + np.exp(-1.5 * size)))
    haematoxylin = np.zeros((h, w), np.float32)
    for seeds, sigma_um in ((n_small, 1.6), (n_large, 3.2)):
        row, col = np.nonzero(seeds)
        times = seeds[row, col]
        row, col = np.repeat(row, times), np.repeat(col, times)
        y = np.clip(((row + random.random(len(row))) * RASTER_UM / mpp).astype(int), 0, h - 1)
        x = np.clip(((col + random.random(len(col))) * RASTER_UM / mpp).astype(int), 0, w - 1)
        dots = np.zeros((h, w), np.float32)
        np.add.at(dots, (y, x), 1.0)
        dots = gaussian_filter(dots, sigma_um / mpp)
        dots *= np.float32(2 * np.pi * (sigma_um / mpp) ** 2)
        haematoxylin += np.minimum(dots, 1.3, out=dots)
    del dots
    # memory: few whole images at once, in float32; everything else in strips
    eosin, rosy = mottled(2.0, 4.0), fine(pink)
    for rows in parts(h, w):
        eosin[rows] = 0.32 + 0.10 * np.tanh(rosy[rows]) + 0.05 * eosin[rows]
    del rosy
    eosin *= fine(tissue.astype(float)) > 0.5
    holes, opening = mottled(5.0, 10.0), fine(lumen)
    image = np.empty((h, w, 3), np.uint8)
    blue = None
    if inside is not None:
        step = mpp / _GLAND_RASTER_UM
        middle, size = (step - 1) / 2, (h, w)
        blue = affine_transform(inside, [step, step], middle, size, np.float32, order=1, mode="nearest")
    for rows in parts(h, 3 * w):
        open_here = holes[rows] > 2.2 - 0.9 * opening[rows]
        pinkness, blueness = np.where(open_here, 0.02, eosin[rows]), np.where(open_here, 0.0, haematoxylin[rows])
        density = 0.55 * blueness[..., None] * _HAEMATOXYLIN + np.clip(pinkness, 0, None)[..., None] * _EOSIN
        if blue is not None:
            solid = blue[rows] * (pinkness > 0.1)  # neither holes nor glass
            density += _GLAND_STAIN * solid[..., None] * (_HAEMATOXYLIN - _EOSIN)
        light = 245 * 10 ** (-density) + random.normal(0, 2, density.shape)
        image[rows] = np.clip(np.rint(light), 0, 255)
    return image


def check_size(*, n_rows: int, n_cols: int, n_genes: int, mpp: float) -> None:
    """Raise where a section is too large to simulate, for its memory or at all."""
    for argument, number in (("n_rows", n_rows), ("n_cols", n_cols), ("n_genes", n_genes)):
        if not (is_whole(number) and 1 <= number <= _MOST):
            msg = f"{argument}={number!r}: choose a whole number from 1 to {_MOST:,}."
            raise ValueError(msg)
    if not (is_number(mpp) and _MPP[0] <= mpp <= _MPP[1]):
        msg = f"mpp={mpp!r}: choose a number of µm per pixel from {_MPP[0]:g} to {_MPP[1]:g}."
        raise ValueError(msg)
    n_px = n_rows * n_cols * PITCH_UM**2 / mpp**2
    n_bytes = n_px * _BYTES_PER_PX + 8 * n_rows * n_cols * n_genes
    if n_bytes > available_memory():
        msg = (
            f"n_rows={n_rows}, n_cols={n_cols}, n_genes={n_genes}, mpp={mpp:g} take about {n_bytes / 2**30:.1f} GiB of "
            f"memory, and {available_memory() / 2**30:.1f} GiB are free. Choose fewer rows, columns or genes, or a "
            "larger mpp=."
        )
        raise MemoryError(msg)
