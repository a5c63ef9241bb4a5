"""How much a prediction depends on order and place: of rows, genes, coordinates, turns, the grid. docs/benchmarks.md.

    python benchmarks/invariance.py [--sections colon her2st synthetic] [--heads ...] [--changes ...] [--seeds 3]

Each change is made to the same section, which is fitted and predicted anew at the same targets. Differences are those
of log1p values (largest and mean) and of the mean held-out PCC. `seed` is what another seed does: the yardstick.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from sections import load, require_data

HEADS = ("in-context+kriging", "aggregate+kriging", "kriging", "ridge", "published")
SMALL_PX = 1600
"""Edge of the part of the colon that is used."""


@dataclass
class Case:
    """A section in plain arrays, from which a SpatialData is made in many ways."""

    pixels: np.ndarray
    """(h, w, 3)"""
    xy: np.ndarray
    """(n, 2) spots"""
    targets: np.ndarray
    """(m, 2)"""
    counts: object
    genes: np.ndarray
    mpp: float
    diameter_px: float
    rows: np.ndarray = None
    shapes: np.ndarray = None
    columns: np.ndarray = None
    system: str = "here"
    matrix: np.ndarray = None
    """(3, 3) from pixels to the coordinate system"""
    own: np.ndarray = None
    """(3, 3) from pixels to the coordinates of the shapes"""

    def sdata(self):
        import anndata as ad
        import geopandas as gpd
        import shapely
        from spatialdata import SpatialData
        from spatialdata.models import Image2DModel, ShapesModel, TableModel
        from spatialdata.transformations import Affine

        n, axes = len(self.xy), ("x", "y")
        world = np.eye(3) if self.matrix is None else self.matrix
        own = np.eye(3) if self.own is None else self.own
        size = np.sqrt(abs(np.linalg.det(own[:2, :2])))
        image = Image2DModel.parse(
            np.moveaxis(self.pixels, -1, 0),
            dims=("c", "y", "x"),
            c_coords=["r", "g", "b"],
            transformations={self.system: Affine(world, axes, axes)},
        )

        def circles(xy, diameter_px, names):
            moved = xy @ own[:2, :2].T + own[:2, 2]
            frame = gpd.GeoDataFrame({"radius": diameter_px / 2 * size}, geometry=shapely.points(moved), index=names)
            return ShapesModel.parse(
                frame, transformations={self.system: Affine(world @ np.linalg.inv(own), axes, axes)}
            )

        names = np.arange(n)
        rows = names if self.rows is None else self.rows
        shapes = names if self.shapes is None else self.shapes
        columns = np.arange(len(self.genes)) if self.columns is None else self.columns
        table = ad.AnnData(
            self.counts[rows][:, columns].astype(np.float32), var=pd.DataFrame(index=self.genes[columns])
        )
        table.obs["region"] = pd.Categorical(["spots"] * n)
        table.obs["instance_id"] = names[rows]
        table.obs_names = [f"s{i}" for i in rows]
        return SpatialData(
            images={"he": image},
            shapes={
                "spots": circles(self.xy[shapes], self.diameter_px, names[shapes]),
                "targets": circles(self.targets, 16 / self.mpp, np.arange(len(self.targets))),
            },
            tables={"table": TableModel.parse(table, region="spots", region_key="region", instance_key="instance_id")},
        )


def case(name: str) -> Case:
    """A part of a real section, or a synthetic one."""
    import histosge as sge
    from histosge._section import read_section

    sge.settings.verbosity, sge.settings.progress = 0, False
    if name != "synthetic":
        require_data()
    whole = {"colon": "mouse_colon_visium", "her2st": "her2st/C2"}
    sdata = load(whole[name]) if name in whole else sge.datasets.synthetic(n_rows=14, n_cols=14)
    mpp = 200 / 290.6 if name == "her2st" else None  # its array does not tell the pitch
    section = read_section(sdata, mpp=mpp, report=False)
    pixels = np.moveaxis(section.image.read(0, 0, section.image.width_px, section.image.height_px), 0, -1)
    xy, counts = section.xy_px, section.counts
    if name == "colon":
        corner = np.array([3000, 3000])
        pixels = pixels[corner[1] :, corner[0] :][:SMALL_PX, :SMALL_PX]
        inside = ((xy >= corner + 60) & (xy <= corner + SMALL_PX - 60)).all(1)
        xy, counts = xy[inside] - corner, counts[inside]
    seen = np.argsort(-np.asarray((counts > 0).sum(0)).ravel(), kind="stable")[:300]
    rng = np.random.default_rng(0)
    near = xy[rng.integers(len(xy), size=200)] + rng.uniform(-0.5, 0.5, (200, 2)) * section.pitch_um / section.mpp
    targets = np.clip(np.vstack([xy, near]), 1, np.array(pixels.shape[1::-1]) - 1)
    return Case(
        pixels, xy, targets, counts[:, seen], section.genes.to_numpy()[seen], section.mpp, section.spot_um / section.mpp
    )


def turned(base: Case, turns: int, *, mirror: bool) -> Case:
    """Turn image, spots and targets by 90 degrees, ``turns`` times, and mirror them."""
    pixels, points = base.pixels, [base.xy, base.targets]
    for _ in range(turns):
        width = pixels.shape[1]
        pixels = np.rot90(pixels)
        points = [np.column_stack([p[:, 1], width - p[:, 0]]) for p in points]
    if mirror:
        width = pixels.shape[1]
        pixels, points = pixels[:, ::-1], [np.column_stack([width - p[:, 0], p[:, 1]]) for p in points]
    return replace(base, pixels=np.ascontiguousarray(pixels), xy=points[0], targets=points[1])


def padded(base: Case, left: int, top: int) -> Case:
    """Move everything in the image: white pixels at its left and top."""
    pixels = np.pad(base.pixels, ((top, 0), (left, 0), (0, 0)), constant_values=255)
    return replace(base, pixels=pixels, xy=base.xy + [left, top], targets=base.targets + [left, top])


def changes(base: Case) -> dict[str, list[Case]]:
    """Everything that should change nothing, or little."""
    rng = np.random.default_rng(1)
    n, g = len(base.xy), len(base.genes)
    turn = np.deg2rad(33.0)
    around = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1.0]])
    unit = np.diag([base.mpp, base.mpp, 1.0])
    away = np.array([[1.0, 0, 1234.567], [0, 1.0, -891.01], [0, 0, 1]])
    return {
        "rows": [replace(base, rows=rng.permutation(n)) for _ in range(2)],
        "shapes": [replace(base, shapes=rng.permutation(n))],
        "genes": [replace(base, columns=rng.permutation(g))],
        "system": [replace(base, system="µm", matrix=unit), replace(base, own=unit @ around @ away)],
        "place": [replace(base, matrix=away), replace(base, matrix=away, own=away)],
        "turned system": [replace(base, matrix=around, own=around)],
        "moved in the image": [padded(base, 64, 32), padded(base, 37, 11)],
        "turns": [turned(base, k, mirror=False) for k in (1, 2, 3)],
        "flips": [turned(base, k, mirror=True) for k in (0, 1)],
    }


def ask(one: Case, head: str, rng: int = 0):
    import histosge as sge

    table = sge.tl.predict(
        one.sdata(), target_key="targets", encoder="stain-texture", head=head, mpp=one.mpp, genes=100, n_folds=4, rng=rng,
        dense="aggregate" in head, inplace=False, progress=False,
    )  # fmt: skip
    values = pd.DataFrame(np.asarray(table.X), columns=table.var_names)
    return values, float(table.uns["histosge"]["held_out"][head]["pcc"])


def compare(first, other) -> dict[str, float]:
    (a, pcc_a), (b, pcc_b) = first, other
    common = a.columns.intersection(b.columns)  # turns and seeds may choose other genes at the end of the list
    apart = np.abs(a[common].to_numpy() - b[common].to_numpy())
    return {"largest": apart.max(), "mean": apart.mean(), "pcc": abs(pcc_a - pcc_b), "genes": len(common)}


def predictions(options) -> None:
    rows = []
    for name in options.sections:
        base = case(name)
        print(f"{name}: {len(base.xy)} spots, {len(base.targets)} targets", flush=True)
        for head in options.heads:
            first = ask(base, head)
            found = [("seed", compare(first, ask(base, head, rng=seed))) for seed in range(1, options.seeds + 1)]
            for change, made in changes(base).items():
                if not options.changes or change in options.changes:
                    found += [(change, compare(first, ask(one, head))) for one in made]
            rows += [{"section": name, "head": head, "change": change, **each} for change, each in found]
            mine = pd.DataFrame(rows)
            mine = mine[(mine["section"] == name) & (mine["head"] == head)]
            of_change = mine.groupby("change", sort=False)
            print(
                head, "| spread of the values", round(float(first[0].to_numpy().std()), 3), "| pcc", round(first[1], 3)
            )
            print(
                of_change.agg(
                    largest=("largest", "max"), mean=("mean", "mean"), pcc=("pcc", "max"), genes=("genes", "min")
                )
                .round(5)
                .to_string(),
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=["synthetic"])
    parser.add_argument("--heads", nargs="+", default=list(HEADS))
    parser.add_argument("--changes", nargs="+", default=[])
    parser.add_argument("--seeds", type=int, default=2)
    predictions(parser.parse_args())


if __name__ == "__main__":
    main()
