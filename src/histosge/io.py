"""Read sections from instruments and other programs, and write tables for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from histosge._atomic import replacing
from histosge._readers import open_section
from histosge._remote import shown
from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from spatialdata import SpatialData
    from upath import UPath

__all__ = ["read", "write_h5ad"]


def read(
    source: str | Path | UPath,
    *,
    image: str | Path | None = None,
    bin_size: int | None = None,
    dataset_id: str | None = None,
) -> SpatialData:
    """Read a section from the folder or file of an instrument or another program.

    The result has one image, one set of spots and one table, so that :func:`histosge.tl.predict` needs no key.

    Parameters
    ----------
    source
        One of: the ``outs`` folder of Space Ranger 1 to 4, the folder above it or one inside, for Visium (CytAssist
        too) or Visium HD; a folder of files downloaded from 10x Genomics (``NAME_filtered_feature_bc_matrix.h5``,
        ``spatial``) or GEO (all in one folder, compressed or not); a ``SpatialData`` (``.zarr``), on disk or at a URL;
        an ``.h5ad`` with ``obsm["spatial"]``, x and y in pixels of its image; the counts of an ST array (``.tsv`` or
        ``.tsv.gz``, rows named ``XxY``) with the table of its spots in the same folder (columns ``x``, ``y``,
        ``pixel_x``, ``pixel_y``); an image alone, from which a model of other sections can predict (``predict(model=, mpp=)``).
    image
        The full-resolution image that the spots were aligned to: TIFF (also OME-TIFF, ``.svs``, ``.ndpi``,
        ``.qptiff``), JPEG or PNG. It is read as RGB of 8 bits, as the file states: YCbCr, names of channels, bit depth,
        opacity on white, EXIF or TIFF orientation. Other formats and fluorescence are refused. ``None`` takes the only
        image in the folder (or above ``outs``) that has the size of the one that the spots were aligned to, or that
        contains all spots. It is compared with Space Ranger's thumbnail, or the one in ``uns["spatial"]``.
    bin_size
        Visium HD: edge in µm of the bins to read. ``None`` takes 8, or the only ones.
    dataset_id
        Name of the section; it is the prefix of the names of its elements. ``None`` takes the prefix of the files, or
        the name of the folder. For an ``.h5ad`` with several sections, the one to read.

    Returns
    -------
    A ``SpatialData``; from a ``.zarr`` all its elements, otherwise:

    ``images["{dataset_id}_full_image"]``
        uint8 RGB, channels ``r``, ``g``, ``b``, with halved scales down to 1000 px. Without a full-resolution image
        ``images["{dataset_id}_hires_image"]``, Space Ranger's thumbnail, or no image, and a warning.
    ``shapes["{dataset_id}"]``
        Circles, or with Visium HD the squares ``shapes["{dataset_id}_square_008um"]``, in pixels of the full image.
    ``tables["table"]``
        Counts of genes at the spots on the tissue, or ``tables["square_008um"]``; from an ``.h5ad`` the whole table,
        linked to the shapes by columns of ``obs`` with free names (``"region"``, ``"spot_id"``). ``obsm["spatial"]``
        (n, 2): (x, y) in pixels of the full image. From an image alone neither shapes nor table.

    Raises
    ------
    FileNotFoundError
        Where ``source``, ``image`` or one of the files of Space Ranger does not exist.
    PermissionError
        Where a URL cannot be read with the credentials of this machine.
    OSError
        Where a URL cannot be read, also not at the fifth try.
    ValueError
        Where ``source`` is none of these, an argument does not apply to it, there are several sections or images to
        choose from, the image is not RGB, or it is not the one that the spots were aligned to: of another size,
        mirrored or turned.

    Notes
    -----
    :func:`spatialdata_io.visium` and :func:`spatialdata_io.visium_hd` read counts and positions. Thumbnails (where
    there is a full-resolution image), other bins and cells are left out: use these functions to read them.

    A TIFF stays on disk and is read lazily in pieces of about 3 MB, its coarser scales as well: keep the file where it
    is, or call ``sdata.write``. Of a store at a URL (``https://``, ``s3://`` and what else ``fsspec`` knows) the tables
    and shapes are read, and images and labels are left there: chunks are read when they are needed, and again where
    reading fails. Points are left out, with a warning. A ``upath.UPath`` holds options, such as ``anon=True`` for
    public buckets. Passwords and tokens in a URL are used, and neither shown nor stored. A JPEG or PNG is held in memory, 3 bytes a pixel, and takes 10 while it is read, as
    does a TIFF that is compressed in one piece.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> import histosge as sge
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> sge.datasets.synthetic().write(folder / "section.zarr")
    >>> sdata = sge.io.read(folder / "section.zarr")
    >>> sorted(sdata.images), sorted(sdata.shapes)
    (['he'], ['spots'])
    """
    sdata = open_section(source, image=image, bin_size=bin_size, dataset_id=dataset_id)
    logger.info(
        "read %s: images %s, shapes %s, tables %s",
        shown(source),
        *map(list, (sdata.images, sdata.shapes, sdata.tables)),
    )
    return sdata


def write_h5ad(
    sdata: SpatialData | AnnData,
    path: str | Path,
    *,
    key: str = "histosge",
    layers: Sequence[str] = (),
    overwrite: bool = False,
) -> None:
    """Write a predicted table as an ``.h5ad`` for cellxgene and other viewers.

    Parameters
    ----------
    sdata
        A section with a predicted table, or such a table. One that is on disk (``predict(store=..., inplace=False)``)
        is copied piece by piece.
    path
        File to write, ``"NAME.h5ad"``.
    key
        The table in ``sdata.tables``.
    layers
        Layers to write in addition to ``X``; each is as large as ``X``.
    overwrite
        Whether to replace an existing file.

    Returns
    -------
    ``None``. The file has the table with these changes:

    ``X``
        (n, genes) float32.
    ``obsm["X_spatial"]``
        (n, 2) float32, (x, -y): viewers draw y upwards, images have it downwards. ``obsm["spatial"]`` stays (x, y) in
        pixels.
    ``obs``
        Categories are text.
    ``uns``
        Without ``"spatialdata_attrs"``, since the file has no shapes, and without values that an h5ad cannot store,
        which are logged.
    ``layers``
        Those in ``layers=``.

    Raises
    ------
    FileExistsError
        Where ``path`` exists and ``overwrite`` is not set.
    KeyError
        Where there is no such table or layer.
    ValueError
        Where the table has no ``obsm["spatial"]``, or names of rows, genes or columns are not unique.

    Notes
    -----
    Requirements of cellxgene 1.x, by its documentation ("data requirements") and the checks of its server: counts or
    expression in ``X``, float32; unique names of ``obs``, ``var`` and their columns; an embedding in ``obsm`` whose
    name begins with ``X_``, a numpy array of two columns or more without infinite values. It does not show
    ``obsm["spatial"]`` (its issue 2553).

    Examples
    --------
    >>> import tempfile, pathlib
    >>> import histosge as sge
    >>> sdata = sge.datasets.synthetic()
    >>> sge.tl.predict(sdata, encoder="stain-texture", head="ridge", genes=20)
    >>> sge.io.write_h5ad(sdata, pathlib.Path(tempfile.mkdtemp()) / "predicted.h5ad")
    """
    import anndata as ad

    if isinstance(sdata, ad.AnnData):
        table = sdata
    elif key in sdata.tables:
        table = sdata.tables[key]
    else:
        msg = f"key={key!r} is not among the tables of this SpatialData: {list(sdata.tables)}."
        raise KeyError(msg)
    path = Path(path).expanduser()
    if path.exists() and not overwrite:
        msg = f"path={str(path)!r} exists already. Name another file, or pass overwrite=True."
        raise FileExistsError(msg)
    unknown = [name for name in layers if name not in table.layers]
    if unknown:
        known = [name for name in table.layers if name is not None]
        msg = f"layers={unknown} are not among the layers of the table: {known}."
        raise KeyError(msg)
    out = _for_viewers(table, layers)
    # anndata before 0.11 cannot read nullable strings
    with replacing(path) as draft, ad.settings.override(allow_write_nullable_strings=False):
        out.write_h5ad(draft)
    logger.info("wrote %d targets x %d genes to %s", *out.shape, path)


def _for_viewers(table: AnnData, layers: Sequence[str]) -> AnnData:
    """Return the table for viewers; it shares values with the given table."""
    import anndata as ad

    axes = {
        "obs": table.obs_names,
        "var": table.var_names,
        "columns of obs": table.obs.columns,
        "columns of var": table.var.columns,
    }
    for what, names in axes.items():
        if not names.is_unique:
            twice = list(names[names.duplicated()][:3])
            msg = f"names of {what} are not unique (for example {twice}), which viewers refuse. Rename or drop them."
            raise ValueError(msg)
    if "spatial" not in table.obsm:
        msg = (
            f'the table has no obsm["spatial"], (n, 2), to draw its rows at: it has {list(table.obsm)}. Write '
            "positions there first."
        )
        raise ValueError(msg)
    xy = np.asarray(table.obsm["spatial"])
    uns = {name: value for name, value in table.uns.items() if name != "spatialdata_attrs"}
    unfit = [name for name, value in uns.items() if not _fits_h5ad(name, value)]
    if unfit:
        logger.warning("leaving out uns%s: an h5ad cannot hold it", unfit)
    return ad.AnnData(
        X=table.X.astype(np.float32, copy=False),
        obs=_text_categories(table.obs),
        var=_text_categories(table.var),
        obsm={**table.obsm, "X_spatial": np.column_stack([xy[:, 0], -xy[:, 1]]).astype(np.float32)},
        varm=dict(table.varm),
        obsp=dict(table.obsp),
        uns={name: value for name, value in uns.items() if name not in unfit},
        layers={name: table.layers[name] for name in layers},
    )


def _text_categories(frame: pd.DataFrame) -> pd.DataFrame:
    frame = frame.copy(deep=False)
    for name in frame.columns[frame.dtypes == "category"]:
        frame[name] = frame[name].cat.rename_categories(lambda value: str(value))
    return frame


def _fits_h5ad(name: str, value: Any) -> bool:
    """Whether an h5ad can store it, tested by writing to memory; older anndata of viewers cannot read ``None``."""
    import anndata as ad
    import h5py

    kinds: list[str | None] = []
    with h5py.File("uns", "w", driver="core", backing_store=False) as file:
        try:
            with ad.settings.override(allow_write_nullable_strings=False):
                ad.io.write_elem(file, name, value)
        except Exception as err:  # noqa: BLE001  after any error the file cannot store it
            logger.debug("uns[%r]: %s", name, err)
            return False
        file.visititems(lambda _, item: kinds.append(item.attrs.get("encoding-type")))
    return "/" not in name and "null" not in kinds
