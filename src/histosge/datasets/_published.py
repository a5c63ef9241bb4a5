"""Published sections: downloaded once, read at every call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from histosge._readers import open_section
from histosge._settings import logger
from histosge.datasets._download import data_folder, fetch_files, missing
from histosge.datasets._registry import COUNTS, DLPFC_SECTIONS, HER2ST_SECTIONS, LAYERS, LEGACY_ST, SECTIONS, VISIUM_HD

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from spatialdata import SpatialData

    from histosge.datasets._registry import PublishedSection


def published() -> pd.DataFrame:
    """List the published sections that can be downloaded, and which of them are on disk.

    This downloads nothing. Addresses and hashes were taken from public code in November 2026 and are checked at
    use.

    Returns
    -------
    DataFrame, one row for each section, indexed by the name that :func:`fetch` takes, with the columns

    ``technology``, ``tissue``
        Technology of the measurement, and the tissue.
    ``size_gb``
        Approximate size of the download in gigabytes (10⁹ bytes); NaN where no public source states it.
    ``licence``
        Licence of the data, or "not stated".
    ``citation``, ``url``
        What to cite, and the page of the source.
    ``on_disk``
        Whether all files are on disk.
    ``folder``
        Folder of the files, which need not exist yet: in the folder that the environment variable ``HISTOSGE_DATA``
        names or, without it, in ``histosge/datasets`` in the system's cache folder.

    See Also
    --------
    fetch : download a section without reading it.
    load : read it.

    Examples
    --------
    >>> import histosge as sge
    >>> sections = sge.datasets.published()
    >>> sections.loc["mouse_brain", ["technology", "licence"]].tolist()
    ['Visium', 'CC BY 4.0']
    """
    import pandas as pd

    rows = [
        {
            "name": section.name,
            "technology": section.technology,
            "tissue": section.tissue,
            "size_gb": section.size_gb,
            "licence": section.licence,
            "citation": section.citation,
            "url": section.url,
            "on_disk": not missing(_folder(section), section.files),
            "folder": str(_folder(section)),
        }
        for section in SECTIONS.values()
    ]
    return pd.DataFrame(rows).set_index("name").astype({"size_gb": float})


def fetch(name: str) -> Path:
    """Download the missing files of a published section, without reading it.

    Complete files are kept; an interrupted file is downloaded anew. Files whose hash is published are compared with it;
    for the others the hash of the first download is recorded next to the file and logged. All files are
    compared at every later call, except archives, which are unpacked and removed.

    Parameters
    ----------
    name
        One of the names that :func:`published` lists.

    Returns
    -------
    Folder with the files.

    Raises
    ------
    ValueError
        No section has this name.
    DownloadError
        A file cannot be downloaded: the message has its address, and the path for a file from elsewhere. Or a file
        has changed.

    Examples
    --------
    >>> import histosge as sge
    >>> sge.datasets.fetch("mouse_brain")  # doctest: +SKIP
    """
    section = _section(name)
    folder = _folder(section)
    left = missing(folder, section.files)
    if left:
        size = "" if section.size_gb is None else f", about {section.size_gb:g} GB in all"
        logger.info("%s: %d of %d files to download%s", name, len(left), len(section.files), size)
    fetch_files(folder, section.files)
    return folder


def load(name: str) -> SpatialData:
    """Read a published section by its name, and download its missing files first.

    Parameters
    ----------
    name
        One of the names that :func:`published` lists.

    Returns
    -------
    A ``SpatialData`` with image, spots or bins, and table of raw counts; some have more, as their functions document.

    Raises
    ------
    ValueError
        No section has this name, or a file of it, put there by other means, is of another section.
    DownloadError
        A file cannot be downloaded, or has changed.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.load("dlpfc_151673")  # doctest: +SKIP
    """
    section, folder = _section(name), fetch(name)
    source = folder / COUNTS if section.technology == LEGACY_ST else folder
    bin_size = 8 if section.technology == VISIUM_HD else None
    sdata = open_section(source, image=folder / section.image, bin_size=bin_size, dataset_id=name)
    if any(file.path == LAYERS for file in section.files):
        _add_layers(sdata, folder / LAYERS, section=name.removeprefix("dlpfc_"))
    return sdata


def dlpfc(section: str = "151673") -> SpatialData:
    """Read a section of the human dorsolateral prefrontal cortex, with the layer of each spot (Maynard et al. 2021).

    Twelve Visium sections of three donors, on which spatial domains are usually scored; the first of the four data sets
    of the HisToSGE paper. The download is 0.55 GB a section, and slow.

    Addresses and hashes were taken from public code in November 2026 and are checked at use. See :func:`fetch` for what
    happens without a network.

    Parameters
    ----------
    section
        ``"151507"`` to ``"151510"``, ``"151669"`` to ``"151676"``.

    Returns
    -------
    A ``SpatialData`` with image, spots and table of raw counts, and in the table

    ``obs["layer"]``
        Categorical: ``"L1"`` to ``"L6"``, ``"WM"`` (white matter); missing where the authors gave none.

    Raises
    ------
    ValueError
        There is no such section.
    DownloadError
        A file cannot be downloaded, or has changed.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.dlpfc("151673")  # doctest: +SKIP
    >>> sge.tl.predict(sdata)  # doctest: +SKIP
    """
    return load(f"dlpfc_{_one_of(section, DLPFC_SECTIONS)}")


def mouse_brain() -> SpatialData:
    """Read a coronal section of an adult mouse brain, stained with H&E (10x Genomics).

    This is "Mouse Brain Section (Coronal)", ``V1_Adult_Mouse_Brain``, Space Ranger 1.1.0: the section that the HisToSGE
    paper links to, and that squidpy has as ``visium_hne_image``.

    The paper's own figures are very likely of another section. It counts 2903 spots, while squidpy's copy of this one
    has 2688, and its image is very likely the immunofluorescence of "Adult Mouse Brain Section 1 (Coronal)",
    ``V1_Adult_Mouse_Brain_Coronal_Section_1``, for which 10x Genomics lists DAPI and anti-NeuN. Encoders of H&E are not
    made for that: use this section instead, and do not expect the paper's numbers.

    Addresses and hashes were taken from public code in November 2026 and are checked at use. See :func:`fetch` for what
    happens without a network.

    Returns
    -------
    A ``SpatialData`` with image, spots and table of raw counts.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.mouse_brain()  # doctest: +SKIP
    """
    return load("mouse_brain")


def breast_cancer_1() -> SpatialData:
    """Read a section of an invasive ductal carcinoma of the breast, fresh frozen (10x Genomics).

    Block A, section 1, the third data set of the HisToSGE paper. These are the counts of Space Ranger 1.1.0; the paper
    links to those of 1.0.0 of the same section, and counts 3813 spots.

    Addresses and hashes were taken from public code in November 2026 and are checked at use. See :func:`fetch` for what
    happens without a network.

    Returns
    -------
    A ``SpatialData`` with image, spots and table of raw counts.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.breast_cancer_1()  # doctest: +SKIP
    """
    return load("breast_cancer_1")


def breast_cancer_2() -> SpatialData:
    """Read a section of a ductal carcinoma in situ with invasive carcinoma, FFPE (10x Genomics).

    Space Ranger 1.3.0, the fourth data set of the HisToSGE paper.

    Addresses and hashes were taken from public code in November 2026 and are checked at use. See :func:`fetch` for what
    happens without a network.

    Returns
    -------
    A ``SpatialData`` with image, spots and table of raw counts.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.breast_cancer_2()  # doctest: +SKIP
    """
    return load("breast_cancer_2")


def colorectal_cancer_hd() -> SpatialData:
    """Read a Visium HD section of a colorectal carcinoma, in bins of 8 µm (10x Genomics).

    FFPE, Space Ranger 3.0.0, with an image of 0.27 µm per pixel: a large download.

    Addresses and hashes were taken from public code in November 2026 and are checked at use. See :func:`fetch` for what
    happens without a network.

    Returns
    -------
    A ``SpatialData`` with image, bins and table of raw counts.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.colorectal_cancer_hd()  # doctest: +SKIP
    """
    return load("colorectal_cancer_hd")


def her2st(section: str = "C2") -> SpatialData:
    """Read a section of a HER2-positive breast cancer: Spatial Transcriptomics, before Visium (Andersson et al. 2021).

    A square array of spots 100 µm wide and 200 µm apart; 187 of them are under the tissue of ``C2``, whose image has
    0.69 µm per pixel. ``C2`` to ``C6`` are serial sections of one patient.

    Addresses were taken from public code in November 2026 and are checked at use; no hash is published. See
    :func:`fetch` for what happens without a network.

    Parameters
    ----------
    section
        ``"B4"``, or ``"C2"`` to ``"C6"``.

    Returns
    -------
    A ``SpatialData`` with image, spots and table of raw counts.

    Raises
    ------
    ValueError
        There is no such section.
    DownloadError
        A file cannot be downloaded, or has changed.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.her2st("C2")  # doctest: +SKIP
    """
    return load(f"her2st_{_one_of(section, HER2ST_SECTIONS)}")


def _add_layers(sdata: SpatialData, path: Path, *, section: str) -> None:
    """Write the authors' layers to the table; one file holds those of all sections."""
    import pandas as pd

    (table,) = sdata.tables.values()
    rows = pd.read_csv(path, sep="\t", header=None, names=["barcode", "section", "layer"], dtype=str)
    layers = rows[rows["section"] == section].set_index("barcode")["layer"].reindex(table.obs_names)
    if layers.isna().all():
        msg = f"{path} names no spot of section {section}: it is not the right file. Remove it and call again."
        raise ValueError(msg)
    table.obs["layer"] = pd.Categorical(layers, categories=[*(f"L{i}" for i in range(1, 7)), "WM"])


def _section(name: str) -> PublishedSection:
    if name not in SECTIONS:
        msg = f"name={name!r} is no published section. Choose one of {', '.join(SECTIONS)}."
        raise ValueError(msg)
    return SECTIONS[name]


def _folder(section: PublishedSection) -> Path:
    return data_folder() / section.name


def _one_of(section: str, allowed: Sequence[str]) -> str:
    if str(section) not in allowed:
        msg = f"section={section!r}: choose one of {', '.join(allowed)}."
        raise ValueError(msg)
    return str(section)
