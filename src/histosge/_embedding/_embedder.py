"""Embed locations of one section with one config; reuse existing embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from time import time
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from histosge import _keys
from histosge._cluster import active_client, on_workers
from histosge._embedding._config import EmbeddingConfig, load_for, load_of_model
from histosge._embedding._device import embedding_device, resolve_device
from histosge._embedding._embed import block_edge_px, embed
from histosge._embedding._forecast import Forecast
from histosge._embedding._on_workers import EmbedderPlan, check_on_disk, embed_part, parts_of
from histosge._encoders import split_encoder
from histosge._geometry import Footprints, Targets, block_order, cut_bins, divide
from histosge._image import RESAMPLING
from histosge._section import Section, find_embedding, own_spots
from histosge._settings import is_whole, logger, progress_bar, settings

if TYPE_CHECKING:
    import torch
    from distributed import Client
    from numpy.typing import NDArray

_LARGEST_BATCH = 65_536
_EDGE_PER_SPOT = 0.44
"""Edge of a sub-spot over a spot's diameter: 24 µm of 55, a dozen sub-spots; 16 µm was no better at twice the time."""


@dataclass(frozen=True)
class SpotParts:
    """Sub-spots of the spots of a section."""

    embedding: NDArray[np.float32]
    """(p, d), of all sub-spots of all spots"""
    xy_px: NDArray[np.float64]
    """(p, 2)"""
    index: NDArray[np.int64]
    """(n, k) rows of each spot's sub-spots; padded with any row where a spot has fewer"""
    weight: NDArray[np.float32]
    """(n, k) share of the spot in each sub-spot; rows sum to 1, padding is 0"""

    def take(self, rows: NDArray[np.int64]) -> SpotParts:
        """Return the sub-spots of some of the spots."""
        return SpotParts(self.embedding, self.xy_px, self.index[rows], self.weight[rows])


@dataclass(frozen=True)
class Embedder:
    """Embeds locations of one section with one config."""

    section: Section
    encoder: Any
    """Encoder of :func:`histosge.load_encoder`"""
    config: EmbeddingConfig
    device: torch.device
    batch_size: int = 64
    """Tiles per forward pass"""
    progress: bool | None = None
    wanted: str | None = None
    """Device that the user asked for: each worker of dask chooses by it"""

    def __post_init__(self) -> None:
        if not (is_whole(self.batch_size) and 1 <= self.batch_size <= _LARGEST_BATCH):
            msg = f"batch_size={self.batch_size!r}: pass a whole number of tiles above 0, at most {_LARGEST_BATCH:,}."
            raise ValueError(msg)

    @classmethod
    def open(
        cls,
        section: Section,
        encoder: Any,
        *,
        tile_um: float | None = None,
        dense: bool = False,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        progress: bool | None = None,
    ) -> Self:
        """Load the encoder, unless it is loaded, and make the config."""
        loaded = load_for(section, encoder, dense=dense)
        config = EmbeddingConfig.of(loaded, tile_um=tile_um, dense=dense, device=embedding_device(device))
        return cls._on(section, loaded, config, device=device, batch_size=batch_size, progress=progress)

    @classmethod
    def of_model(
        cls,
        section: Section,
        config: EmbeddingConfig,
        encoder: Any,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        progress: bool | None = None,
    ) -> Self:
        """Embed with the config of a fitted model; ``encoder`` may be the loaded encoder of the model."""
        loaded = load_of_model(section, encoder, config)
        config = config.on(embedding_device(device), loaded)
        return cls._on(section, loaded, config, device=device, batch_size=batch_size, progress=progress)

    @classmethod
    def _on(cls, section: Section, encoder: Any, config: EmbeddingConfig, *, device: Any, **run: Any) -> Self:
        if active_client() is not None:
            check_on_disk(section)
        wanted = device if device is not None else settings.device
        return cls(
            section, encoder, config, resolve_device(device), wanted=None if wanted is None else str(wanted), **run
        )

    @property
    def block_edge_px(self) -> float:
        """Edge, in pixels of the image, of the blocks in which locations are embedded."""
        several = zip(split_encoder(self.encoder), self.config.encoders, strict=True)
        return max(block_edge_px(one, mpp=self.section.mpp, encoder_mpp=how.mpp) for one, how in several)

    @property
    def provenance(self) -> dict[str, Any]:
        """Provenance for ``uns``."""
        image, mpp = self.section.image_key, float(self.section.mpp)
        return {**self.config.to_uns(), "image": image, "mpp": mpp, "resampling": RESAMPLING}

    def embed(self, targets: Targets, *, forecast: Forecast | None = None, quiet: bool = False) -> NDArray[np.float32]:
        """Return the embeddings (n, d) of locations of the section: existing ones, or new ones.

        Parameters
        ----------
        targets
            The locations.
        forecast
            Forecast of the run, where these locations are only a part of it.
        quiet
            Whether to log only the forecast, without a progress bar: for parts of a run.
        """
        name = self.config.name
        log = logger.debug if quiet else logger.info
        if not quiet:
            self.warn_below_token(targets)
        wanted = self.provenance
        if settings.precision is None:  # embeddings of a GPU are used on a processor as well
            del wanted["precision"]
        found = find_embedding(self.section, targets, encoder=name, provenance=wanted)
        if found is not None:
            table = _keys.embedding_table(targets.key, name)
            made_in = self.section.written[table].uns[_keys.UNS].get("precision")
            rounding = "" if made_in == self.config.precision else f", computed in {made_in}"
            log("using the embeddings of sdata.tables[%r]%s", table, rounding)
            if forecast is not None:
                forecast.existing(len(targets))
            return found
        start = time()
        where = self.device if active_client() is None else "dask"
        log("embedding %d locations with %s on %s", len(targets), name, where)
        footprints = targets.footprints if self.config.dense else None
        progress = False if quiet else self.progress
        values = self._embed(targets.xy_px, footprints, progress=progress, report=not quiet, forecast=forecast)
        log("    finished (%.0f s)", time() - start)
        return values

    def embed_both(
        self, targets: Targets | None, *, forecast: Forecast
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.float32]]:
        """Return the embeddings of targets (``None`` without any) and of the measured spots.

        Where every spot is among the targets and both are embedded in the same way, spots are not embedded twice.
        """
        spots = own_spots(self.section)
        same_way = not self.config.dense  # the area of a spot differs from that of the target at its centre
        alone = Forecast(len(spots), alternative=forecast.alternative)
        if targets is None:
            forecast.n_locations += len(spots) * same_way
            return None, self.embed(spots, forecast=forecast if same_way else alone)
        at_spot = targets.spot_index >= 0
        among = same_way and len(np.unique(targets.spot_index[at_spot])) == len(spots)
        forecast.n_locations += len(targets) + len(spots) * (same_way and not among)
        at_targets = self.embed(targets, forecast=forecast)
        if among:
            at_spots = np.empty((len(spots), at_targets.shape[1]), np.float32)
            at_spots[targets.spot_index[at_spot]] = at_targets[at_spot]
            return at_targets, at_spots
        return at_targets, self.embed(spots, forecast=forecast if same_way else alone)

    def embed_spots(self, *, forecast: Forecast | None = None) -> NDArray[np.float32]:
        """Return the embeddings (n, d) of the measured spots."""
        return self.embed(own_spots(self.section), forecast=forecast)

    def embed_parts(self) -> SpotParts:
        """Cut spots into a dozen sub-spots each, and embed these."""
        section = self.section
        edge_px = max(_EDGE_PER_SPOT * section.spot_um, self.config.token_um or 0.0) / section.mpp
        if section.contiguous and section.lattice is not None:
            # a bin is cut along its own edges: fewer pieces than squares of one grid, which lie across its borders
            basis = section.lattice.basis
            n_side = max(1, round(section.spot_um / section.mpp / edge_px - 0.01))
            xy_px, index, weight = cut_bins(section.xy_px, basis=basis, n_side=n_side)
            turn, edge_px = float(np.arctan2(basis[0, 1], basis[0, 0])), section.spot_um / section.mpp / n_side
            areas = Footprints.squares(xy_px, edge_px=edge_px, turn=turn)
        else:
            xy_px, index, weight = divide(section.footprints, edge_px=edge_px)
            areas = Footprints.squares(xy_px, edge_px=edge_px)
        values = self._embed(xy_px, areas, progress=False)
        return SpotParts(values, xy_px, index, weight.astype(np.float32))

    def warn_below_token(self, targets: Targets) -> None:
        """Warn where targets are smaller than the tokens of the encoder."""
        token_um = self.config.token_um
        if token_um is None or len(targets) == 0:
            return
        size_um = float(np.median(targets.footprints.size_px)) * self.section.mpp
        if size_um < 0.99 * token_um:
            logger.warning(
                "%s of %.3g µm are smaller than the tokens of %r (%.3g µm): the tokens limit the resolution",
                "bins" if targets.are_bins else "targets", size_um, self.config.name, token_um,
            )  # fmt: skip

    def _embed(
        self, xy_px: NDArray[np.float64], footprints: Footprints | None, *, progress: bool | None, **how: Any
    ) -> NDArray[np.float32]:
        """Embed locations (n, 2) here, or on the workers of dask."""
        client = active_client()
        if client is None:
            return self.embed_locations(xy_px, footprints, progress=progress, **how)
        return self._on_workers(client, xy_px, footprints, progress=progress)

    def _on_workers(
        self, client: Client, xy_px: NDArray[np.float64], footprints: Footprints | None, *, progress: bool | None
    ) -> NDArray[np.float32]:
        """Embed locations on the workers of dask, a few blocks of the image in a task."""
        order = block_order(xy_px, block_px=self.block_edge_px, origin_px=(0.0, 0.0))
        # tiles do not depend on each other; pieces of a block would share tokens, or sums over the block
        whole = self.config.dense or any(one.spec.whole_blocks for one in self.config.encoders)
        parts = parts_of(xy_px, order=order, block_px=self.block_edge_px, whole_blocks=whole)
        items = [(xy_px[rows], None if footprints is None else footprints.take(rows)) for rows in parts]
        out: NDArray[np.float32] | None = None
        plan = EmbedderPlan.of(self)
        name = f"embedding with {self.config.name}"
        with progress_bar(desc=name, total=len(xy_px), unit="location", show=progress) as bar:
            for i, values in on_workers(
                embed_part, items, client=client, plan=plan, opens=EmbedderPlan.open, name="histosge_embed"
            ):
                out = np.empty((len(xy_px), values.shape[1]), np.float32) if out is None else out
                out[parts[i]] = values
                bar.update(len(parts[i]))
        return self.embed_locations(xy_px, footprints, progress=False) if out is None else out

    def embed_locations(
        self,
        xy_px: NDArray[np.float64],
        footprints: Footprints | None,
        *,
        forecast: Forecast | None = None,
        **how: Any,
    ) -> NDArray[np.float32]:
        """Embed locations (n, 2) here, with each encoder. The forecast of the run is that of the first encoder."""
        own = None if forecast is None else Forecast(len(xy_px), alternative=forecast.alternative)
        values = [
            embed(
                self.section.image,
                xy_px,
                mpp=self.section.mpp,
                encoder=encoder,
                encoder_mpp=part.mpp,
                footprints=footprints,
                device=self.device,
                batch_size=self.batch_size,
                forecast=forecast if i == 0 else own,
                **how,
            )
            for i, (encoder, part) in enumerate(zip(split_encoder(self.encoder), self.config.encoders, strict=True))
        ]
        return values[0] if len(values) == 1 else np.concatenate(values, axis=1)
