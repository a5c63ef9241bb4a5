"""Published sections that can be downloaded: addresses, hashes and licences, as public sources state them.

Nothing was downloaded to write this file. Every address was read in public code in November 2026; the comments name the
source. The addresses of her2st are composed of the repository's name, commits and paths. A ``sha256`` is given only
where it is published; for other files it is recorded at the first download and compared later.
"""

from __future__ import annotations

from dataclasses import dataclass

NOT_STATED = "not stated"
_TENX_LICENCE = (
    "CC BY 4.0"  # as kerniz/auto_analysis_by_nextflow (docs/planning/spatial-fixtures.md) quotes 10x's pages
)

VISIUM, VISIUM_HD, LEGACY_ST = "Visium", "Visium HD", "Spatial Transcriptomics"
LAYERS = "layers.tsv"
COUNTS, SPOTS = "counts.tsv.gz", "spots.tsv"
DLPFC_SECTIONS = tuple(str(i) for i in (*range(151507, 151511), *range(151669, 151677)))
HER2ST_SECTIONS = ("B4", "C2", "C3", "C4", "C5", "C6")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a section: its address and its path."""

    url: str
    path: str
    """Path in the folder of the section"""
    sha256: str | None = None
    """``None`` where no public source states it"""
    unpack: str | None = None
    """For a tar archive, which is removed: the folder in it, or the folder for its contents"""


@dataclass(frozen=True)
class PublishedSection:
    """A published section and its files."""

    name: str
    technology: str
    tissue: str
    files: tuple[RemoteFile, ...]
    image: str
    """Path of the full H&E image in the folder of the section"""
    licence: str
    citation: str
    url: str
    """Page of the source"""
    size_gb: float | None = None
    """Approximate size of the download; ``None`` where no public source states it"""


def _tenx(
    name: str,
    stem: str,
    *,
    version: str,
    tissue: str,
    page: str,
    image: str = "image.tif",
    technology: str = VISIUM,
    archives: tuple[tuple[str, str], ...] = (("spatial", "spatial"),),
    plain: tuple[str, ...] = ("filtered_feature_bc_matrix.h5",),
    sha256: dict[str, str] | None = None,
) -> PublishedSection:
    """Section from 10x Genomics' page of datasets, named here as Space Ranger does."""
    known = sha256 or {}
    base = f"https://cf.10xgenomics.com/samples/spatial-exp/{version}/{stem}/{stem}_"
    endings: list[tuple[str, str | None]] = [(ending, None) for ending in (*plain, image)]
    endings += [(f"{archive}.tar.gz", unpack) for archive, unpack in archives]
    return PublishedSection(
        name=name,
        technology=technology,
        tissue=tissue,
        files=tuple(
            RemoteFile(base + ending, ending, sha256=known.get(ending), unpack=unpack) for ending, unpack in endings
        ),
        image=image,
        licence=_TENX_LICENCE,
        citation=f"10x Genomics, Space Ranger {version}, {stem}",
        url=f"https://www.10xgenomics.com/datasets/{page}",
    )


def _dlpfc(section: str) -> PublishedSection:
    # counts and images: table of raw data in the README of LieberInstitute/HumanPilot; text files: its folder 10X. The
    # same addresses are in sumeer1/AtlasTailor (counts, with the two hashes below). Images are 533 MB each and come
    # slowly.
    known = {
        "151507": "686521ab02a68dfdd810c3cde26daea2257d016c8047859877ffb8c7ac5bdd01",
        "151508": "48ab74b340c79f19070e433b8b7db67932a6e889d421a691f70293587fff0621",
    }
    bucket = "https://spatial-dlpfc.s3.us-east-2.amazonaws.com"
    texts = "https://raw.githubusercontent.com/LieberInstitute/HumanPilot/master/10X"
    return PublishedSection(
        name=f"dlpfc_{section}",
        technology=VISIUM,
        tissue="human dorsolateral prefrontal cortex",
        files=(
            RemoteFile(f"{texts}/{section}/tissue_positions_list.txt", "spatial/tissue_positions_list.csv"),
            RemoteFile(f"{texts}/{section}/scalefactors_json.json", "spatial/scalefactors_json.json"),
            RemoteFile(f"{texts}/barcode_level_layer_map.tsv", LAYERS),
            RemoteFile(
                f"{bucket}/h5/{section}_filtered_feature_bc_matrix.h5",
                "filtered_feature_bc_matrix.h5",
                sha256=known.get(section),
            ),
            RemoteFile(f"{bucket}/images/{section}_full_image.tif", "full_image.tif"),
        ),
        image="full_image.tif",
        licence=NOT_STATED,
        citation="Maynard et al. 2021, doi:10.1038/s41593-020-00787-0",
        url="https://github.com/LieberInstitute/HumanPilot",
        size_gb=0.55,
    )


def _her2st(section: str, image: str) -> PublishedSection:
    # paths and commits as the public index of almaan/her2st lists them; the six sections whose image it lists. Their
    # names and columns: the readers of HisToGene and its many descendants.
    def at(commit: str, path: str) -> str:
        return f"https://raw.githubusercontent.com/almaan/her2st/{commit}/data/{path}"

    counts_at, rest_at = "e75e5c53a994726a8ad251aaf653a02d7932eb6a", "9f2260c6aa8347996955d53f0a5f06ac14c93470"
    return PublishedSection(
        name=f"her2st_{section}",
        technology=LEGACY_ST,
        tissue="human breast cancer, HER2-positive",
        files=(
            RemoteFile(at(counts_at, f"ST-cnts/{section}.tsv.gz"), COUNTS),
            RemoteFile(at(rest_at, f"ST-spotfiles/{section}_selection.tsv"), SPOTS),
            RemoteFile(at(rest_at, f"ST-imgs/{section[0]}/{section}/{image}"), "image.jpg"),
        ),
        image="image.jpg",
        licence=f"{NOT_STATED} in the repository; the same data at doi:10.5281/zenodo.4751624 are CC BY 4.0",
        citation="Andersson et al. 2021, doi:10.1038/s41467-021-26271-2",
        url="https://github.com/almaan/her2st",
    )


def _all() -> tuple[PublishedSection, ...]:
    return (
        *map(_dlpfc, DLPFC_SECTIONS),
        # The three sections of 10x Genomics that HisToSGE's README links to. Addresses: scanpy's and squidpy's
        # datasets; hashes of all files: datasets.yaml of squidpy 1.8.2. kerniz/auto_analysis_by_nextflow
        # (docs/planning/spatial-fixtures.md) states the same for counts and spatial of the first and the third. In
        # squidpy's registry the image of the first is the one of visium_hne_image: it is H&E.
        _tenx(
            "mouse_brain",
            "V1_Adult_Mouse_Brain",
            version="1.1.0",
            tissue="mouse brain, coronal",
            page="mouse-brain-section-coronal-1-standard-1-1-0",
            sha256={
                "filtered_feature_bc_matrix.h5": "eb78379e02dcf48036abf05b67233e73ecb0d880787feb82f76ff16f6ce01eb3",
                "image.tif": "39d0a85a7cecb0bde9ad2566260d571bb49834d26fc443cb32b96475f30668b2",
                "spatial.tar.gz": "46d6b05ba740f232d6bf4b27b9a8846815851e000985fb878f1364bab04e5bd4",
            },
        ),
        _tenx(
            "breast_cancer_1",
            "V1_Breast_Cancer_Block_A_Section_1",
            version="1.1.0",
            tissue="human breast cancer, invasive ductal carcinoma, fresh frozen",
            page="human-breast-cancer-block-a-section-1-1-standard-1-1-0",
            sha256={
                "filtered_feature_bc_matrix.h5": "b3cbb6ead60afad848ebcc07a34835613d9d2d79e416ad8300b210d9de584b65",
                "image.tif": "73a94ca956d1b5c027dcaf1ac42c15fed4d4a12eefee4b4b597e62f34cc5959e",
                "spatial.tar.gz": "415530a9d31172f63fd358d5d1cefb0798698ef9c0e614f52825894cd45c61bf",
            },
        ),
        _tenx(
            "breast_cancer_2",
            "Visium_FFPE_Human_Breast_Cancer",
            version="1.3.0",
            tissue="human breast cancer, ductal carcinoma in situ and invasive carcinoma, FFPE",
            page="human-breast-cancer-ductal-carcinoma-in-situ-invasive-carcinoma-ffpe-1-standard-1-3-0",
            sha256={
                "filtered_feature_bc_matrix.h5": "64321f603f7200b0bedffbe353c04dde72bbe7c7be7390e503d955aa9b2584c5",
                "image.tif": "b3fbbdb5006769ef7d2b614171e208b6caf901bde52272a02da6e3d019626ce0",
                "spatial.tar.gz": "2937fcc44b7adee70f162a9e09857410dcf22eed89a3e3187950dfc1574fea14",
            },
        ),
        # addresses: SpatialHackathon/SpaceHack2023 (data/visium_hd_cancer_colon), which reads them with spatialdata-io;
        # the hash: kerniz/auto_analysis_by_nextflow. Bins of 8 µm alone: those of all sizes together are 15.9 GB.
        _tenx(
            "colorectal_cancer_hd",
            "Visium_HD_Human_Colon_Cancer",
            version="3.0.0",
            tissue="human colorectal cancer, FFPE",
            page="visium-hd-cytassist-gene-expression-libraries-of-human-crc",
            technology=VISIUM_HD,
            image="tissue_image.btf",
            plain=("feature_slice.h5",),
            archives=(("spatial", "spatial"), ("square_008um_outputs", "binned_outputs")),
            sha256={"spatial.tar.gz": "70141b1b60d3ae50ebbf63b4800bf574168b186f8665018e4f38c852fd017105"},
        ),
        _her2st("B4", "BT10737_D2_HE.jpg"),
        _her2st("C2", "5714_HE_BT_C2.jpg"),
        _her2st("C3", "5714_HE_BT_D1.jpg"),
        _her2st("C4", "5714_HE_BT_D2.jpg"),
        _her2st("C5", "5714_HE_BT_E1.jpg"),
        _her2st("C6", "5714_HE_BT_E2.jpg"),
    )


SECTIONS: dict[str, PublishedSection] = {section.name: section for section in _all()}
