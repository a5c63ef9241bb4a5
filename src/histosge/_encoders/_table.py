"""Which encoders there are: those built in, and those of lazyslide-models with what is known of each before loading.

The table says what lazyslide-models' registry does not, the µm per pixel each encoder was trained at, and repeats
what must be known before a model is loaded; a test compares it with the installed registry.
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
"""What is offered where another encoder is slow: no weights, no download."""
BUILT_IN = {"stain-texture": "StainTexture", "rgb": "MeanColour"}
"""Name of each built-in encoder and its class; the class is in the file of that name."""


class Row(NamedTuple):
    """An encoder of lazyslide-models."""

    repo: str
    """On the hub, spelt as it is asked for: the cache is looked up by it"""
    how: str
    """Where its weights can come from: see :func:`histosge._encoders._lazyslide.load_registered`"""
    mpp: float
    mpp_source: str
    tile_px: int
    token_px: int | None
    """Edge of a patch, where it gives a token for each"""
    dense: str | None
    """How one pass gives tokens and embedding: see :data:`histosge._encoders._lazyslide.PASSES`"""
    embed_dim: int
    gated: bool
    commercial: bool
    n_parameters: str | None
    licence: str


# µm per pixel: what its authors state; where they mix scales (virchow2, midnight, rudolfv2: 0.25 to 2; lunit: 0.25 and
# 0.5; musk: 0.25 to 1) the one of them that benchmarks use; where they cut tiles of another size and shrink them to the
# input (CONCH: 512 px at 20x to 448; conch-madeleine: 256 px at 10x to 224), the pixels the network sees. CTransPath
# saw 20x, but its authors, and CHIEF after them, recommend 10x. Collected in November 2026 from model cards and from the
# tables of TRIDENT (README), slide2vec (encoders/models) and raw2features (docs/models.md), which agree but for GPFM
# (card: 512 px at 40x, shrunk to 224, 0.57; all three feed 0.5).
# Access: lazyslide-models 0.1.0 calls h-optimus-0 open and midnight gated; on the hub it is the other way round by the
# same tables and by lazyslide-models' own notes (docs/model-candidates.md, "gated: auto").
# Patches: of those whose class has `encode_image_dense`; from names and model cards, and from the registry's flops.
# Dense: how one pass gives tokens and the embedding that `encode_image` gives; from the code of the classes.
_TEXT = """
# name              repository                               how                    µm/px    known by      px  patch dense     dim  gated commercial parameters licence
h-optimus-0         bioptimus/H-optimus-0                    timm                   0.5      stated        224 14    head      1536 yes   yes        1.13B      Apache 2.0
h-optimus-1         bioptimus/H-optimus-1                    timm                   0.5      stated        224 14    head      1536 yes   no         1.13B      CC-BY-NC-ND-4.0
h0-mini             bioptimus/H0-mini                        timm                   0.5      magnification 224 14    cls+mean  1536 yes   no         85.7M      CC-BY-NC-ND-4.0
uni                 MahmoodLab/uni                           timm                   0.5      magnification 224 16    head      1024 yes   no         303.4M     CC-BY-NC-ND-4.0
uni2                MahmoodLab/UNI2-h                        timm                   0.5      convention    224 14    head      1536 yes   no         681.4M     CC-BY-NC-ND-4.0
virchow             paige-ai/Virchow                         timm                   0.5      stated        224 14    cls+mean  2560 yes   yes        631.2M     Apache 2.0
virchow2            paige-ai/Virchow2                        timm                   0.5      stated        224 14    cls+mean  2560 yes   no         631.2M     CC-BY-NC-ND-4.0
crisp               FTZhou/CRISP                             file:CRISP.pth         0.5      convention    224 14    cls+mean  2560 yes   no         631.2M     MIT; CC-BY-NC-ND-4.0
crown               LexieK/Crown                             file:CROWN.pth         0.5      convention    224 16    head      1024 yes   yes        -          Apache-2.0
gigapath            prov-gigapath/prov-gigapath              timm                   0.5      stated        224 16    head      1536 yes   no         1.13B      Apache 2.0 with conditions
gigapath-flash      prov-gigapath/prov-gigapath-flash        file:pytorch_model.bin 0.5      stated        224 16    head      384  yes   no         21.7M      Apache 2.0
gpfm                majiabo/GPFM                             hub                    0.5      magnification 224 14    head      1024 no    no         303M       CC BY-NC-ND 4.0
genbio-pathfm       genbio-ai/genbio-pathfm                  remote-code            0.5      convention    224 16    cls       4608 no    no         1.1B       GenBio AI Community License
hibou-b             histai/hibou-b                           remote-code            0.5      convention    224 14    pooler    768  yes   yes        85.7M      Apache 2.0
hibou-l             histai/hibou-l                           remote-code            0.5      convention    224 14    pooler    1024 yes   yes        303.7M     Apache 2.0
lunit-bt            1aurent/resnet50.lunit_bt                timm                   0.5      stated        224 -     -         2048 no    no         23.6M      lunit-non-commercial
lunit-mocov2        1aurent/resnet50.lunit_mocov2            timm                   0.5      stated        224 -     -         2048 no    no         23.6M      lunit-non-commercial
lunit-swav          1aurent/resnet50.lunit_swav              timm                   0.5      stated        224 -     -         2048 no    no         23.6M      lunit-non-commercial
lunit-dino-s8       1aurent/vit_small_patch8_224.lunit_dino  timm                   0.5      stated        224 8     head      384  no    no         21.7M      lunit-non-commercial
lunit-dino-s8-moozy 1aurent/vit_small_patch8_224.lunit_dino  timm                   0.5      stated        224 8     head      384  no    no         21.7M      lunit-non-commercial
lunit-dino-s16      1aurent/vit_small_patch16_224.lunit_dino timm                   0.5      stated        224 16    head      384  no    no         21.1M      lunit-non-commercial
midnight            kaiko-ai/midnight                        transformers           0.5      stated        224 14    cls+mean  3072 no    yes        1.14B      MIT
open-midnight       SophontAI/OpenMidnight                   hub                    0.5      convention    224 14    cls       1536 yes   yes        1.1B       Apache 2.0
mstar               Wangyh/mSTAR                             timm                   0.5      magnification 224 16    head      1024 yes   no         303.4M     CC-BY-NC-ND-4.0
path_orchestra      AI4Pathology/PathOrchestra               timm                   0.5      convention    224 -     -         1024 yes   no         -          CC-BY-NC-ND-4.0
phikon              owkin/phikon                             transformers           0.5      stated        224 16    cls       768  no    no         85.8M      Owkin non-commercial license
phikonv2            owkin/phikon-v2                          transformers           0.5      stated        224 16    cls       1024 no    no         303.4M     Owkin non-commercial license
rudolfv2-s          Aignostics/RudolfV-2-S                   remote-code            0.5      stated        224 8     cls       384  yes   no         21.4M      CC-BY-NC-ND-4.0 with supplementary terms
rudolfv2-b          Aignostics/RudolfV-2-B                   remote-code            0.5      stated        224 8     cls       768  yes   no         85.2M      CC-BY-NC-ND-4.0 with supplementary terms
rudolfv2            Aignostics/RudolfV-2                     remote-code            0.5      stated        224 8     cls       1536 yes   no         1.13B      CC-BY-NC-ND-4.0 with supplementary terms
mascaret            wearewaiv/mascaret                       remote-code            0.5      convention    224 14    pooler    1536 yes   no         1.14B      Waiv custom non-commercial license
phaet               wearewaiv/phaet                          remote-code            0.5      convention    224 16    pooler    1024 yes   no         303.4M     Waiv custom non-commercial license
ctranspath          RendeiroLab/LazySlide-models-gpl         exported               1.0      magnification 224 -     -         768  no    no         27.5M      GPL-3.0
chief               RendeiroLab/LazySlide-models-gpl         exported               1.0      magnification 224 -     -         768  no    no         27.5M      AGPL-3.0
conch               MahmoodLab/conch                         file:pytorch_model.bin 0.571429 magnification 448 16    twice     512  yes   no         395.2M     CC-BY-NC-ND-4.0
conch-madeleine     MahmoodLab/conch                         file:pytorch_model.bin 1.142857 magnification 224 16    twice     512  yes   no         395.2M     CC-BY-NC-ND-4.0
conch_v1.5          MahmoodLab/TITAN                         hub                    0.571429 magnification 448 -     -         768  yes   no         158.9M     CC-BY-NC-ND-4.0
keep                Astaxanthin/KEEP                         hub                    0.5      convention    224 -     -         768  no    yes        -          MIT
musk                xiangjx/musk                             hub                    0.5      convention    384 -     -         1024 yes   no         675.2M     CC-BY-NC-ND-4.0
omiclip             WangGuangyuLab/Loki                      file:checkpoint.pt     0.5      convention    224 -     -         768  yes   yes        638.5M     BSD-3-Clause
plip                vinid/plip                               folder                 0.5      convention    224 32    clip      512  no    no         87.8M      Non-commercial
quiltnet-b16        wisdomik/QuiltNet-B-16                   hub                    0.5      convention    224 16    twice     512  no    yes        -          MIT
quiltnet-b16-pmb    wisdomik/QuiltNet-B-16-PMB               hub                    0.5      convention    224 16    trunk     512  no    yes        -          MIT
quiltnet-b32        wisdomik/QuiltNet-B-32                   hub                    0.5      convention    224 32    twice     512  no    yes        -          MIT
"""


def _rows() -> dict[str, Row]:
    rows = {}
    for line in _TEXT.strip().splitlines()[1:]:
        name, repo, how, mpp, known_by, px, patch, dense, dim, gated, commercial, n, licence = line.split(maxsplit=12)
        rows[name] = Row(
            repo=repo,
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
            licence=licence,
        )
    return rows


def _plain(name: str) -> str:
    """Spelling without case and marks: ``H-Optimus-0`` is ``hoptimus0``."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


TABLE = _rows()
ALIASES = {"uni2-h": "uni2", "prov-gigapath": "gigapath", "midnight-12k": "midnight", "titan": "conch_v1.5"}
_BY_PLAIN = {_plain(name): name for name in (*BUILT_IN, *TABLE)} | {_plain(k): v for k, v in ALIASES.items()}
# a page stands for the first encoder of it: lunit-dino-s8 and conch, not what MOOZY and MADELEINE make of them
_BY_REPO = {row.repo.lower(): name for name, row in reversed(TABLE.items()) if row.how != "exported"}


def find_name(name: str) -> str | None:
    """Name in the list of encoders, however it is spelt; ``None`` for any other model."""
    return _BY_PLAIN.get(_plain(name)) or _BY_REPO.get(name.lower().removeprefix("hf-hub:"))


def close_names(name: str) -> list[str]:
    """Names of the list that are spelt like this one."""
    names = {_plain(n): n for n in (*TABLE, *ALIASES, *BUILT_IN)}
    return [names[n] for n in difflib.get_close_matches(_plain(name), names, n=3, cutoff=0.5)]


def built_in(name: str) -> Any:
    """Make a built-in encoder."""
    module = importlib.import_module(f"histosge._encoders.{name.replace('-', '_')}")
    return getattr(module, BUILT_IN[name])()


def listed_spec(name: str) -> EncoderSpec:
    """Spec of an encoder of the list, as far as it is known without loading it."""
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
    """Names of the encoders that give dense tokens, those built in first."""
    built = [name for name in BUILT_IN if listed_spec(name).token_px is not None]
    return [*built, *(name for name, row in TABLE.items() if row.token_px is not None)]


def encoders() -> pd.DataFrame:
    """List the encoders that can be named in ``encoder=``, in addition to any model of timm (``"timm:NAME"``).

    Names joined by ``+``, as in ``"uni+rgb"``, are used together.

    Returns
    -------
    DataFrame indexed by name: ``mpp`` (µm per pixel), ``mpp_source`` (how that is known), ``tile_px``, ``tile_um``,
    ``token_um`` (edge of a patch where it gives a token for each, else NaN), ``embed_dim``, ``parameters``,
    ``licence``, ``gated`` (access must be asked for), ``commercial``, ``source``, ``url``.

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
            "source": s.source,
            "url": s.url or "",
        }
        for s in specs
    ]
    return pd.DataFrame(rows, index=pd.Index([s.name for s in specs], name="encoder"))
