"""List of the encoders: those built in, and those of lazyslide-models with facts that are needed before loading.

The table has the µm per pixel that each encoder was trained at, which the registry of lazyslide-models lacks, and
repeats facts that are needed before a model is loaded. A test compares it with the installed registry.
"""

from __future__ import annotations

import difflib
import importlib
import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from histosge._encoders._hub import PAGES
from histosge._encoders._spec import EncoderSpec
from histosge._options import DEFAULT_ENCODER

if TYPE_CHECKING:
    import pandas as pd

QUICK_ENCODER = "stain-texture"
"""Offered where another encoder is slow: it needs no weights and no download."""
BUILT_IN = {"stain-texture": "StainTexture", "rgb": "MeanColour"}
"""Class of each built-in encoder by name; it is in the file of that name."""


class Row(NamedTuple):
    """An encoder of lazyslide-models."""

    repo: str
    """Name on the hub, in the spelling of requests: the cache is looked up by it"""
    how: str
    """Source of its weights: see :func:`histosge._encoders._lazyslide.load_registered`"""
    mpp: float
    mpp_source: str
    tile_px: int
    token_px: int | None
    """Edge of a patch, where it returns a token for each"""
    dense: str | None
    """How one pass returns tokens and embedding: see :data:`histosge._encoders._lazyslide.PASSES`"""
    embed_dim: int
    gated: bool
    commercial: bool
    n_parameters: str | None
    licence: str


# µm per pixel: as its authors state. Where they mix scales (virchow2, midnight, rudolfv2: 0.25 to 2; lunit: 0.25 and
# 0.5; musk: 0.25 to 1), the scale that benchmarks use. Where they cut tiles of another size and shrink them to the
# input (CONCH: 512 px at 20x to 448; conch-madeleine: 256 px at 10x to 224), the scale of the input. CTransPath was
# trained at 20x, but its authors, and CHIEF after them, recommend 10x. Collected in November 2026 from model cards and
# from the tables of TRIDENT (README), slide2vec (encoders/models) and raw2features (docs/models.md), which agree except
# on GPFM (card: 512 px at 40x, shrunk to 224, 0.57; all three use 0.5).
# Access: in lazyslide-models 0.1.0 h-optimus-0 is open and midnight gated. On the hub it is the other way round, by the
# same tables and by the notes of lazyslide-models (docs/model-candidates.md, "gated: auto").
# Patches: of encoders whose class has `encode_image_dense`; from names and model cards, and from the registry's flops.
# Dense: how one pass returns tokens and the embedding of `encode_image`; from the code of the classes.
_WEIGHTS = """
# name              repository                               licence
h-optimus-0         bioptimus/H-optimus-0                    Apache 2.0
h-optimus-1         bioptimus/H-optimus-1                    CC-BY-NC-ND-4.0
h0-mini             bioptimus/H0-mini                        CC-BY-NC-ND-4.0
uni                 MahmoodLab/uni                           CC-BY-NC-ND-4.0
uni2                MahmoodLab/UNI2-h                        CC-BY-NC-ND-4.0
virchow             paige-ai/Virchow                         Apache 2.0
virchow2            paige-ai/Virchow2                        CC-BY-NC-ND-4.0
crisp               FTZhou/CRISP                             MIT; CC-BY-NC-ND-4.0
crown               LexieK/Crown                             Apache-2.0
gigapath            prov-gigapath/prov-gigapath              Apache 2.0 with conditions
gigapath-flash      prov-gigapath/prov-gigapath-flash        Apache 2.0
gpfm                majiabo/GPFM                             CC BY-NC-ND 4.0
genbio-pathfm       genbio-ai/genbio-pathfm                  GenBio AI Community License
hibou-b             histai/hibou-b                           Apache 2.0
hibou-l             histai/hibou-l                           Apache 2.0
lunit-bt            1aurent/resnet50.lunit_bt                lunit-non-commercial
lunit-mocov2        1aurent/resnet50.lunit_mocov2            lunit-non-commercial
lunit-swav          1aurent/resnet50.lunit_swav              lunit-non-commercial
lunit-dino-s8       1aurent/vit_small_patch8_224.lunit_dino  lunit-non-commercial
lunit-dino-s8-moozy 1aurent/vit_small_patch8_224.lunit_dino  lunit-non-commercial
lunit-dino-s16      1aurent/vit_small_patch16_224.lunit_dino lunit-non-commercial
midnight            kaiko-ai/midnight                        MIT
open-midnight       SophontAI/OpenMidnight                   Apache 2.0
mstar               Wangyh/mSTAR                             CC-BY-NC-ND-4.0
path_orchestra      AI4Pathology/PathOrchestra               CC-BY-NC-ND-4.0
phikon              owkin/phikon                             Owkin non-commercial license
phikonv2            owkin/phikon-v2                          Owkin non-commercial license
rudolfv2-s          Aignostics/RudolfV-2-S                   CC-BY-NC-ND-4.0 with supplementary terms
rudolfv2-b          Aignostics/RudolfV-2-B                   CC-BY-NC-ND-4.0 with supplementary terms
rudolfv2            Aignostics/RudolfV-2                     CC-BY-NC-ND-4.0 with supplementary terms
mascaret            wearewaiv/mascaret                       Waiv custom non-commercial license
phaet               wearewaiv/phaet                          Waiv custom non-commercial license
ctranspath          RendeiroLab/LazySlide-models-gpl         GPL-3.0
chief               RendeiroLab/LazySlide-models-gpl         AGPL-3.0
conch               MahmoodLab/conch                         CC-BY-NC-ND-4.0
conch-madeleine     MahmoodLab/conch                         CC-BY-NC-ND-4.0
conch_v1.5          MahmoodLab/TITAN                         CC-BY-NC-ND-4.0
keep                Astaxanthin/KEEP                         MIT
musk                xiangjx/musk                             CC-BY-NC-ND-4.0
omiclip             WangGuangyuLab/Loki                      BSD-3-Clause
plip                vinid/plip                               Non-commercial
quiltnet-b16        wisdomik/QuiltNet-B-16                   MIT
quiltnet-b16-pmb    wisdomik/QuiltNet-B-16-PMB               MIT
quiltnet-b32        wisdomik/QuiltNet-B-32                   MIT
"""
_FACTS = """
# name              how                    µm/px    known by      px  patch dense    dim  gated commercial parameters
h-optimus-0         timm                   0.5      stated        224 14    head     1536 yes   yes        1.13B
h-optimus-1         timm                   0.5      stated        224 14    head     1536 yes   no         1.13B
h0-mini             timm                   0.5      magnification 224 14    cls+mean 1536 yes   no         85.7M
uni                 timm                   0.5      magnification 224 16    head     1024 yes   no         303.4M
uni2                timm                   0.5      convention    224 14    head     1536 yes   no         681.4M
virchow             timm                   0.5      stated        224 14    cls+mean 2560 yes   yes        631.2M
virchow2            timm                   0.5      stated        224 14    cls+mean 2560 yes   no         631.2M
crisp               file:CRISP.pth         0.5      convention    224 14    cls+mean 2560 yes   no         631.2M
crown               file:CROWN.pth         0.5      convention    224 16    head     1024 yes   yes        -
gigapath            timm                   0.5      stated        224 16    head     1536 yes   no         1.13B
gigapath-flash      file:pytorch_model.bin 0.5      stated        224 16    head     384  yes   no         21.7M
gpfm                hub                    0.5      magnification 224 14    head     1024 no    no         303M
genbio-pathfm       remote-code            0.5      convention    224 16    cls      4608 no    no         1.1B
hibou-b             remote-code            0.5      convention    224 14    pooler   768  yes   yes        85.7M
hibou-l             remote-code            0.5      convention    224 14    pooler   1024 yes   yes        303.7M
lunit-bt            timm                   0.5      stated        224 -     -        2048 no    no         23.6M
lunit-mocov2        timm                   0.5      stated        224 -     -        2048 no    no         23.6M
lunit-swav          timm                   0.5      stated        224 -     -        2048 no    no         23.6M
lunit-dino-s8       timm                   0.5      stated        224 8     head     384  no    no         21.7M
lunit-dino-s8-moozy timm                   0.5      stated        224 8     head     384  no    no         21.7M
lunit-dino-s16      timm                   0.5      stated        224 16    head     384  no    no         21.1M
midnight            transformers           0.5      stated        224 14    cls+mean 3072 no    yes        1.14B
open-midnight       hub                    0.5      convention    224 14    cls      1536 yes   yes        1.1B
mstar               timm                   0.5      magnification 224 16    head     1024 yes   no         303.4M
path_orchestra      timm                   0.5      convention    224 -     -        1024 yes   no         -
phikon              transformers           0.5      stated        224 16    cls      768  no    no         85.8M
phikonv2            transformers           0.5      stated        224 16    cls      1024 no    no         303.4M
rudolfv2-s          remote-code            0.5      stated        224 8     cls      384  yes   no         21.4M
rudolfv2-b          remote-code            0.5      stated        224 8     cls      768  yes   no         85.2M
rudolfv2            remote-code            0.5      stated        224 8     cls      1536 yes   no         1.13B
mascaret            remote-code            0.5      convention    224 14    pooler   1536 yes   no         1.14B
phaet               remote-code            0.5      convention    224 16    pooler   1024 yes   no         303.4M
ctranspath          exported               1.0      magnification 224 -     -        768  no    no         27.5M
chief               exported               1.0      magnification 224 -     -        768  no    no         27.5M
conch               file:pytorch_model.bin 0.571429 magnification 448 16    twice    512  yes   no         395.2M
conch-madeleine     file:pytorch_model.bin 1.142857 magnification 224 16    twice    512  yes   no         395.2M
conch_v1.5          hub                    0.571429 magnification 448 -     -        768  yes   no         158.9M
keep                hub                    0.5      convention    224 -     -        768  no    yes        -
musk                hub                    0.5      convention    384 -     -        1024 yes   no         675.2M
omiclip             file:checkpoint.pt     0.5      convention    224 -     -        768  yes   yes        638.5M
plip                folder                 0.5      convention    224 32    clip     512  no    no         87.8M
quiltnet-b16        hub                    0.5      convention    224 16    twice    512  no    yes        -
quiltnet-b16-pmb    hub                    0.5      convention    224 16    trunk    512  no    yes        -
quiltnet-b32        hub                    0.5      convention    224 32    twice    512  no    yes        -
"""


def _rows() -> dict[str, Row]:
    weights = {}
    for line in _WEIGHTS.strip().splitlines()[1:]:
        name, repo, licence = line.split(maxsplit=2)
        weights[name] = repo, licence
    rows = {}
    for line in _FACTS.strip().splitlines()[1:]:
        name, how, mpp, known_by, px, patch, dense, dim, gated, commercial, n = line.split()
        rows[name] = Row(
            repo=weights[name][0],
            how=how,
            mpp=float(mpp),
            mpp_source=known_by,
            tile_px=int(px),
            token_px=None if patch == "-" else int(patch),
            dense=None if dense == "-" else dense,
            embed_dim=int(dim),
            gated=gated == "yes",
            commercial=commercial == "yes",
            n_parameters=None if n == "-" else n,
            licence=weights[name][1],
        )
    return rows


def _plain(name: str) -> str:
    """Remove case and punctuation: ``H-Optimus-0`` is ``hoptimus0``."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


TABLE = _rows()
_CODE = {
    "open-midnight": "Python files of https://github.com/facebookresearch/dinov2",
    "conch_v1.5": "Python files of its repository",
    "omiclip": "checkpoint.pt, a pickle, which may hold any code",
}


def code_of(name: str) -> str | None:
    """Say which code of others runs when an encoder of lazyslide-models is loaded; ``None`` where none does."""
    by_source = {
        "remote-code": "Python files of its repository",
        "exported": "a program saved by torch.export, which may hold pickles and any code",
    }
    return _CODE.get(name, by_source.get(TABLE[name].how))


ALIASES = {"uni2-h": "uni2", "prov-gigapath": "gigapath", "midnight-12k": "midnight", "titan": "conch_v1.5"}
_BY_PLAIN = {_plain(name): name for name in (*BUILT_IN, *TABLE)} | {_plain(k): v for k, v in ALIASES.items()}
# several encoders may have one page, which finds the first: lunit-dino-s8 and conch, not those of MOOZY and MADELEINE
_BY_REPO = {row.repo.lower(): name for name, row in reversed(TABLE.items()) if row.how != "exported"}


def find_name(name: str) -> str | None:
    """Find the name in the list of encoders, whatever the spelling; ``None`` for any other model."""
    return _BY_PLAIN.get(_plain(name)) or _BY_REPO.get(name.lower().removeprefix("hf-hub:"))


def close_names(name: str) -> list[str]:
    """Find names of the list with a similar spelling."""
    names = {_plain(n): n for n in (*TABLE, *ALIASES, *BUILT_IN)}
    return [names[n] for n in difflib.get_close_matches(_plain(name), names, n=3, cutoff=0.5)]


def built_in(name: str) -> Any:
    """Make a built-in encoder."""
    module = importlib.import_module(f"histosge._encoders.{name.replace('-', '_')}")
    return getattr(module, BUILT_IN[name])()


def listed_spec(name: str) -> EncoderSpec:
    """Return the spec of an encoder of the list, as far as it is known without loading it."""
    if name in BUILT_IN:
        return cast("EncoderSpec", built_in(name).spec)
    row = TABLE[name]
    return EncoderSpec(
        name=name,
        mpp=row.mpp,
        mpp_source=cast("Literal['stated', 'magnification', 'convention']", row.mpp_source),
        tile_px=row.tile_px,
        token_px=row.token_px,
        embed_dim=row.embed_dim,
        licence=row.licence,
        gated=row.gated,
        commercial=row.commercial,
        source="lazyslide-models",
        url=PAGES + row.repo,
        n_parameters=row.n_parameters,
    )


def with_tokens() -> list[str]:
    """Names of the encoders with dense tokens, those built in first."""
    built = [name for name in BUILT_IN if listed_spec(name).token_px is not None]
    return [*built, *(name for name, row in TABLE.items() if row.token_px is not None)]


def encoders() -> pd.DataFrame:
    """List the encoders that can be named in ``encoder=``, in addition to any model of timm (``"timm:NAME"``).

    Names joined by ``+``, as in ``"uni+rgb"``, are used together.

    Returns
    -------
    DataFrame indexed by name: ``mpp`` (µm per pixel), ``mpp_source`` (its source), ``tile_px``, ``tile_um``,
    ``token_um`` (edge of a patch where it returns a token for each, else NaN), ``embed_dim``, ``parameters``,
    ``licence``, ``gated`` (access must be requested), ``commercial``, ``remote_code`` (code of others runs when it is
    loaded, so that it needs ``sge.load_encoder(name, trust_remote_code=True)``), ``source``, ``url``.

    Examples
    --------
    >>> import histosge as sge
    >>> uni = sge.encoders().loc["uni"]
    >>> float(uni["mpp"]), int(uni["embed_dim"]), bool(uni["gated"])
    (0.5, 1024, True)
    >>> fine = sge.encoders().query("token_um <= 4")
    >>> "lunit-dino-s8" in fine.index
    True
    """
    import pandas as pd

    names = (*BUILT_IN, DEFAULT_ENCODER, *sorted(set(TABLE) - {DEFAULT_ENCODER}))
    specs = [listed_spec(name) for name in names]
    rows = [
        {
            "mpp": s.mpp,
            "mpp_source": s.mpp_source,
            "tile_px": s.tile_px,
            "tile_um": s.tile_um,
            "token_um": float("nan") if s.token_um is None else s.token_um,
            "embed_dim": s.embed_dim,
            "parameters": s.n_parameters or "",
            "licence": s.licence,
            "gated": s.gated,
            "commercial": s.commercial,
            "remote_code": s.name in TABLE and code_of(s.name) is not None,
            "source": s.source,
            "url": s.url or "",
        }
        for s in specs
    ]
    return pd.DataFrame(rows, index=pd.Index([s.name for s in specs], name="encoder"))
