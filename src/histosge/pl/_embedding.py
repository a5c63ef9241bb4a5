"""Draw embeddings as colours over the tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from histosge import _keys
from histosge.pl._canvas import PLAIN, lay_panels, open_canvas, panel_inches, region
from histosge.pl._places import fill

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray
    from spatialdata import SpatialData

_MOST_FITTED = 20_000
"""Number of rows from which components are computed; all rows are drawn."""


def embedding(sdata: SpatialData, *, key: str | None = None, panel_size: float = 4.0) -> NDArray[Any]:
    """Draw the first three principal components of embeddings as red, green and blue over the tissue.

    Locations of the same colour have similar embeddings.

    Parameters
    ----------
    sdata
        Section with a table that :func:`histosge.tl.embed` wrote.
    key
        Name of that table, ``"{target}_{encoder}"``. ``None`` takes the only one.
    panel_size
        Longer edge of a panel in inches.

    Returns
    -------
    Axes, (2,): H&E; the components, each from its 1st to its 99th percentile. The title has the share of variance of
    each. Components are those of standardised embeddings, of at most 20,000 locations, drawn at random with a fixed
    seed.

    Raises
    ------
    KeyError
        Where there is no such table, or ``sdata`` lacks the image or the shapes.
    ValueError
        Where there are several tables, or too few locations or numbers for three components.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.synthetic(n_rows=12, n_cols=12, n_genes=20, mpp=2.0)
    >>> sge.tl.embed(sdata, encoder="stain-texture")
    >>> sge.pl.embedding(sdata).shape
    (2,)
    """
    key, table = _embedded(sdata, key)
    made = table.uns[_keys.UNS]
    encoder = str(made["encoder"]["name"])
    colours, share = _as_colours(np.asarray(table.obsm[_keys.embedding(encoder)]), key)
    canvas = open_canvas(sdata, table, key)
    places = canvas.outlines(region(table), table.obs[_keys.INSTANCE].to_numpy())
    axes = lay_panels(1, panel=panel_inches([places], panel_size), gaps=[PLAIN, PLAIN])[0]
    canvas.tissue(axes[0])
    axes[0].set_title("H&E", fontsize=9)
    fill(axes[1], places, colours=colours)
    shares = ", ".join(f"{name} {s:.0%}" for name, s in zip(("red", "green", "blue"), share, strict=True))
    what = "area of each location" if made.get("dense") else "tile around each location"
    axes[1].set_title(f"{encoder}, {what}\nshare of variance: {shares}", fontsize=9)
    canvas.frame(axes, [places])
    return axes


def _embedded(sdata: SpatialData, key: str | None) -> tuple[str, AnnData]:
    """Return the name of the table of embeddings, and the table."""
    have = [
        name
        for name, table in sdata.tables.items()
        if "encoder" in (made := table.uns.get(_keys.UNS, {}))
        and _keys.embedding(str(made["encoder"]["name"])) in table.obsm
    ]
    if key is None and len(have) > 1:
        msg = f"there are several tables of embeddings. Name one: key= one of {have}."
        raise ValueError(msg)
    if not have or (key is not None and key not in have):
        what = "there is no table" if key is None else f"key={key!r} is not a table"
        msg = f"{what} that histosge.tl.embed wrote; there are {have}. Run sge.tl.embed(sdata, target_key=...) first."
        raise KeyError(msg)
    key = have[0] if key is None else key
    return key, sdata.tables[key]


def _as_colours(values: NDArray[Any], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return three components as (n, 4) colours, and the share of variance of each."""
    from sklearn.decomposition import PCA

    if min(values.shape) < 4:
        msg = (
            f"sdata.tables[{key!r}] holds {values.shape[0]} embeddings of {values.shape[1]} numbers: too few for three "
            "components. Embed more locations."
        )
        raise ValueError(msg)
    rng = np.random.default_rng(0)
    some = (
        values if len(values) <= _MOST_FITTED else values[np.sort(rng.choice(len(values), _MOST_FITTED, replace=False))]
    )
    mean, spread = some.mean(0, dtype=np.float64), some.std(0, dtype=np.float64)
    spread = np.where(spread > 0, spread, 1)
    # numbers of stain-texture differ in unit; those of a network hardly change
    fitted = PCA(3, svd_solver="randomized", random_state=0).fit((some - mean) / spread)
    found = (values - mean) @ (fitted.components_.T / spread[:, None])
    low, high = np.percentile(found, [1, 99], axis=0)
    scaled = np.clip((found - low) / np.where(high > low, high - low, 1), 0, 1)
    return np.column_stack([scaled, np.ones(len(scaled))]), fitted.explained_variance_ratio_
