"""``stain-texture``: stain and texture statistics of H&E, computed densely, without weights or a download.

Colour deconvolution into haematoxylin, eosin and a residual (Ruifrok and Johnston, 2001); their amounts and
histograms; energies in bands of scale (differences of Gaussians), for nuclei also the bright side alone; strength
and coherence of edges from the structure tensor (Bigün and Granlund, 1987). Every map is averaged over discs of
several sizes around a location. All statistics are invariant to turning and mirroring the section.

Tokens, for targets smaller than a spot, are the statistics of small discs on the grid of cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
import torch
import torch.nn.functional as F

from histosge._encoders._spec import EncoderSpec

if TYPE_CHECKING:
    from torch import Tensor

MPP = 2.0
DISC_UM = (56.0, 112.0, 256.0)
"""Diameters of the discs that every map is averaged over: a Visium spot, a tile of an encoder, its surroundings."""
CELL_PX = 4
"""Maps are first averaged over cells of this edge, then over discs: 8 µm, the size of a nucleus."""
TOKEN_DISC_UM = 24.0
"""Diameter of the disc that maps are averaged over around a token: a few nuclei."""
CONTEXT_DISC_UM = DISC_UM[1:]
"""Discs around the centre of a target, joined with its tokens; a disc of a spot's size would only blur these."""

# optical density of haematoxylin, eosin and DAB in red, green and blue (Ruifrok and Johnston, 2001, table 2)
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_BANDS_PX = (1.0, 2.0, 4.0, 8.0)
_WIDEST_BLUR_PX = 24
_HISTOGRAM = {"haematoxylin": (0.0, 0.5, 6), "eosin": (0.0, 0.5, 6)}


def _gaussian(maps: Tensor, sigma_px: float) -> Tensor:
    """Blur (c, h, w); borders are repeated."""
    reach = max(1, round(3 * sigma_px))
    weight = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma_px) ** 2)
    weight /= weight.sum()
    blurred = F.pad(maps[None], (reach, reach, reach, reach), mode="replicate")[0]
    # sum of shifted copies, on a processor ten times as fast as a convolution of so few channels
    for dim, size in ((2, maps.shape[2]), (1, maps.shape[1])):
        total = blurred.narrow(dim, reach, size) * float(weight[reach])
        for away in range(1, reach + 1):
            pair = blurred.narrow(dim, reach - away, size) + blurred.narrow(dim, reach + away, size)
            total.add_(pair, alpha=float(weight[reach + away]))
        blurred = total
    return blurred


def _blur_ladder(maps: Tensor) -> list[Tensor]:
    """Blur (c, h, w) with every sigma of ``_BANDS_PX``; wide ones on a coarser grid, from the next narrower one.

    Returns maps of (c, h / 2**i, w / 2**i): the grid is halved whenever sigma reaches two of its pixels.
    """
    ladder = [_gaussian(maps, _BANDS_PX[0])]
    grid = 1.0
    for narrow, wide in zip(_BANDS_PX, _BANDS_PX[1:], strict=False):
        last = ladder[-1]
        if narrow / grid >= 2:
            last, grid = F.avg_pool2d(last[None], 2)[0], grid * 2
        ladder.append(_gaussian(last, float(np.sqrt(wide**2 - narrow**2)) / grid))
    return ladder


class StainTexture:
    """The built-in encoder: deterministic, the same on CPU and GPU to 1e-3 of a feature's spread."""

    version = 1
    """Increased when the same pixels give other embeddings"""
    align_px = CELL_PX
    # half the widest disc, cells for interpolation, the reach of the widest blur
    halo_px = int(max(DISC_UM) / MPP / 2) + 2 * CELL_PX + _WIDEST_BLUR_PX

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.names = [f"{name}_{disc:.0f}um" for disc in DISC_UM for name in _map_names()]
        self.spec = EncoderSpec(
            name="stain-texture",
            mpp=MPP,
            tile_px=int(max(DISC_UM) / MPP),
            embed_dim=len(self.names),
            licence="BSD-3-Clause",
            commercial=True,
            source="built-in",
            token_px=CELL_PX,
            coarsest_mpp=100.0,
            fixed_tile=True,
            whole_blocks=True,
        )

    def to(self, device: torch.device | str) -> Self:
        """Compute on ``device``."""
        self.device = torch.device(device)
        return self

    @torch.inference_mode()
    def embed_block(self, block: Tensor, centres: Tensor) -> Tensor:
        """Embed locations of a block.

        Parameters
        ----------
        block
            (3, height, width) uint8, red, green, blue, at 2 µm per pixel.
        centres
            (n, 2) locations (x, y) in pixels of the block, at least ``halo_px`` away from its border.

        Returns
        -------
        (n, 120) float32.
        """
        return _around(self._cells(block), centres, DISC_UM)

    @torch.inference_mode()
    def embed_block_dense(self, block: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Embed every cell of a block, and the surroundings of locations.

        Parameters
        ----------
        block
            (3, height, width) uint8, red, green, blue, at 2 µm per pixel.
        centres
            (n, 2) locations (x, y) in pixels of the block, at least ``halo_px`` away from its border.

        Returns
        -------
        tokens
            (height / 4, width / 4, 40) float32, statistics of the disc of 24 µm around each cell.
        context
            (n, 80) float32, of discs of 112 and 256 µm around each location.
        """
        cells = self._cells(block)
        _, h, w = cells.shape
        tokens = _summarise(_over_disc(cells, TOKEN_DISC_UM).flatten(1).T).view(h, w, -1)
        return tokens, _around(cells, centres, CONTEXT_DISC_UM)

    def _cells(self, block: Tensor) -> Tensor:
        h, w = (side - side % CELL_PX for side in block.shape[1:])
        return _maps(block[:, :h, :w].to(self.device))  # (maps, h / cell, w / cell)


def _over_disc(cells: Tensor, disc_um: float) -> Tensor:
    """Average (maps, h, w) over a disc around every cell."""
    kernel = _disc(disc_um / MPP / CELL_PX).to(cells)
    if cells.device.type != "cpu":
        return F.conv2d(cells[:, None], kernel[None, None], padding=kernel.shape[0] // 2)[:, 0]
    # the same sums, six times as fast: adjacent maps in memory, one group of the convolution each
    maps = cells[None].contiguous(memory_format=torch.channels_last)
    return F.conv2d(maps, kernel.expand(len(cells), 1, -1, -1), padding=kernel.shape[0] // 2, groups=len(cells))[0]


def _around(cells: Tensor, centres: Tensor, discs_um: tuple[float, ...]) -> Tensor:
    """Statistics of discs around locations: (n, 40 for each disc)."""
    grid = (centres.to(cells.device, torch.float32) / CELL_PX) * 2  # grid_sample wants [-1, 1] over the map
    grid = grid / grid.new_tensor([cells.shape[2], cells.shape[1]]) - 1
    pooled = []
    for disc_um in discs_um:
        mean = _over_disc(cells, disc_um)
        at = F.grid_sample(mean[None], grid[None, None], mode="bilinear", align_corners=False, padding_mode="border")
        pooled.append(_summarise(at[0, :, 0].T))  # (n, maps)
    return torch.cat(pooled, dim=1)


def _disc(diameter: float) -> Tensor:
    """Weights of a disc on whole cells; a cell at the rim has the share of it that lies inside."""
    reach = int(np.ceil(diameter / 2 + 0.5))
    fine = 16
    x = (np.arange((2 * reach + 1) * fine) + 0.5) / fine - reach - 0.5
    inside = (x[:, None] ** 2 + x[None] ** 2 <= (diameter / 2) ** 2).astype(np.float64)
    weight = inside.reshape(2 * reach + 1, fine, 2 * reach + 1, fine).mean(axis=(1, 3))
    return torch.as_tensor(weight / weight.sum(), dtype=torch.float32)


_CHANNELS = ("haematoxylin", "eosin", "residual", "density")


def _map_names() -> list[str]:
    bands = [f"{low:.0f}-{high:.0f}" for low, high in zip(_BANDS_PX, _BANDS_PX[1:], strict=False)]
    return [
        *(f"mean_{c}" for c in ("red", "green", "blue", *_CHANNELS)),
        *(f"spread_{c}" for c in _CHANNELS),
        *(f"energy_{b}_{c}" for b in bands for c in _CHANNELS[:2] + _CHANNELS[3:]),
        *(f"nuclei_{b}" for b in bands),
        *(f"{what}_{s}" for s in (2, 4) for what in ("edge", "coherence")),
        *(f"{c}_{i}" for c, (_, _, n) in _HISTOGRAM.items() for i in range(n)),
        "lumen",
    ]


def _maps(block: Tensor) -> Tensor:
    """Compute every map of a (3, h, w) uint8 block, averaged over cells: (maps, h / CELL_PX, w / CELL_PX)."""
    rgb = block.to(torch.float32) / 255
    od = -torch.log10(rgb.clamp_min(1 / 255))  # (3, h, w)
    unmix = torch.as_tensor(np.linalg.inv(_STAINS / np.linalg.norm(_STAINS, axis=1, keepdims=True)), dtype=od.dtype)
    stains = torch.einsum("cs,chw->shw", unmix.to(od.device), od)
    density = od.mean(dim=0, keepdim=True)
    channels = torch.cat([stains, density])  # (4, h, w)
    parts = [_cells(rgb), _cells(channels), _cells(channels**2)]

    ladder = _blur_ladder(channels[[0, 1, 3]])
    nuclei = []
    for narrow, wide in zip(ladder, ladder[1:], strict=False):
        if wide.shape != narrow.shape:
            narrow = F.avg_pool2d(narrow[None], 2)[0]
        band = narrow - wide  # (3, h, w)
        parts.append(_cells(band.abs(), full=block.shape[1]))
        nuclei.append(_cells(band[:1].clamp_min(0), full=block.shape[1]))
    parts += nuclei

    for narrow in ladder[1:3]:
        smooth = narrow[2:]
        gy, gx = torch.gradient(smooth, dim=(1, 2))
        tensor = _cells(torch.cat([gx * gx, gy * gy, gx * gy]), full=block.shape[1])
        parts.append(tensor)  # becomes edge and coherence after averaging

    for i, (low, high, n) in enumerate(_HISTOGRAM.values()):
        place = (channels[i : i + 1] - low) / (high - low) * (n - 1)
        for level in range(n):
            clipped = place.clamp(0, n - 1)
            parts.append(_cells((1 - (clipped - level).abs()).clamp_min(0)))
    parts.append(_cells(torch.sigmoid((0.06 - density) * 100)))
    return torch.cat(parts)


def _cells(maps: Tensor, full: int | None = None) -> Tensor:
    """Average over cells; maps on a grid coarser than ``full`` rows have smaller cells."""
    cell = CELL_PX if full is None else CELL_PX * maps.shape[1] // full
    return F.avg_pool2d(maps[None], cell)[0] if cell > 1 else maps


def _summarise(means: Tensor) -> Tensor:
    """Turn averaged squares into spreads and averaged structure tensors into edge strength and coherence."""
    n_mean = 3 + len(_CHANNELS)
    mean = means[:, 3:n_mean]
    second = means[:, n_mean : n_mean + len(_CHANNELS)]
    spread = (second - mean**2).clamp_min(0).sqrt()
    n_band = 4 * (len(_BANDS_PX) - 1)
    start = n_mean + len(_CHANNELS)
    bands = means[:, start : start + n_band]
    edges = []
    for i in range(2):
        xx, yy, xy = means[:, start + n_band + 3 * i : start + n_band + 3 * i + 3].unbind(1)
        trace = xx + yy
        edges += [trace.clamp_min(0).sqrt(), ((xx - yy) ** 2 + 4 * xy**2).sqrt() / (trace + 1e-8)]
    rest = means[:, start + n_band + 6 :]
    return torch.cat([means[:, :n_mean], spread, bands, torch.stack(edges, 1), rest], dim=1)
