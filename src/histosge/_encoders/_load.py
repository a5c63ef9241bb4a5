"""Which encoders there are, and how one is found by name.

The table says what lazyslide-models' registry does not, the µm per pixel each encoder was trained at, and repeats
what must be known before a model is loaded; a test compares it with the installed registry.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from histosge._encoders._hub import PAGES
from histosge._encoders._spec import EncoderSpec
from histosge._options import DEFAULT_ENCODER

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

BUILT_IN = "stain-texture"


class Row(NamedTuple):
    """An encoder of lazyslide-models."""

    repo: str
    """On the hub, spelt as it is asked for: the cache is looked up by it"""
    how: str
    """Where its weights can come from: see :func:`histosge._encoders._pilm.load_registered`"""
    mpp: float
    mpp_source: str
    tile_px: int
    token_px: int | None
    """Edge of a patch, where it gives a token for each"""
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
_TEXT = """
# name              repository                               how                    µm/px    known by      px  patch dim  gated commercial parameters licence
h-optimus-0         bioptimus/H-optimus-0                    timm                   0.5      stated        224 14    1536 yes   yes        1.13B      Apache 2.0
h-optimus-1         bioptimus/H-optimus-1                    timm                   0.5      stated        224 14    1536 yes   no         1.13B      CC-BY-NC-ND-4.0
h0-mini             bioptimus/H0-mini                        timm                   0.5      magnification 224 14    1536 yes   no         85.7M      CC-BY-NC-ND-4.0
uni                 MahmoodLab/uni                           timm                   0.5      magnification 224 16    1024 yes   no         303.4M     CC-BY-NC-ND-4.0
uni2                MahmoodLab/UNI2-h                        timm                   0.5      convention    224 14    1536 yes   no         681.4M     CC-BY-NC-ND-4.0
virchow             paige-ai/Virchow                         timm                   0.5      stated        224 14    2560 yes   yes        631.2M     Apache 2.0
virchow2            paige-ai/Virchow2                        timm                   0.5      stated        224 14    2560 yes   no         631.2M     CC-BY-NC-ND-4.0
crisp               FTZhou/CRISP                             file:CRISP.pth         0.5      convention    224 14    2560 yes   no         631.2M     MIT; CC-BY-NC-ND-4.0
crown               LexieK/Crown                             file:CROWN.pth         0.5      convention    224 16    1024 yes   yes        -          Apache-2.0
gigapath            prov-gigapath/prov-gigapath              timm                   0.5      stated        224 16    1536 yes   no         1.13B      Apache 2.0 with conditions
gigapath-flash      prov-gigapath/prov-gigapath-flash        file:pytorch_model.bin 0.5      stated        224 16    384  yes   no         21.7M      Apache 2.0
gpfm                majiabo/GPFM                             hub                    0.5      magnification 224 14    1024 no    no         303M       CC BY-NC-ND 4.0
genbio-pathfm       genbio-ai/genbio-pathfm                  remote-code            0.5      convention    224 16    4608 no    no         1.1B       GenBio AI Community License
hibou-b             histai/hibou-b                           remote-code            0.5      convention    224 14    768  yes   yes        85.7M      Apache 2.0
hibou-l             histai/hibou-l                           remote-code            0.5      convention    224 14    1024 yes   yes        303.7M     Apache 2.0
lunit-bt            1aurent/resnet50.lunit_bt                timm                   0.5      stated        224 -     2048 no    no         23.6M      lunit-non-commercial
lunit-mocov2        1aurent/resnet50.lunit_mocov2            timm                   0.5      stated        224 -     2048 no    no         23.6M      lunit-non-commercial
lunit-swav          1aurent/resnet50.lunit_swav              timm                   0.5      stated        224 -     2048 no    no         23.6M      lunit-non-commercial
lunit-dino-s8       1aurent/vit_small_patch8_224.lunit_dino  timm                   0.5      stated        224 8     384  no    no         21.7M      lunit-non-commercial
lunit-dino-s8-moozy 1aurent/vit_small_patch8_224.lunit_dino  timm                   0.5      stated        224 8     384  no    no         21.7M      lunit-non-commercial
lunit-dino-s16      1aurent/vit_small_patch16_224.lunit_dino timm                   0.5      stated        224 16    384  no    no         21.1M      lunit-non-commercial
midnight            kaiko-ai/midnight                        transformers           0.5      stated        224 14    3072 no    yes        1.14B      MIT
open-midnight       SophontAI/OpenMidnight                   hub                    0.5      convention    224 14    1536 yes   yes        1.1B       Apache 2.0
mstar               Wangyh/mSTAR                             timm                   0.5      magnification 224 16    1024 yes   no         303.4M     CC-BY-NC-ND-4.0
path_orchestra      AI4Pathology/PathOrchestra               timm                   0.5      convention    224 -     1024 yes   no         -          CC-BY-NC-ND-4.0
phikon              owkin/phikon                             transformers           0.5      stated        224 16    768  no    no         85.8M      Owkin non-commercial license
phikonv2            owkin/phikon-v2                          transformers           0.5      stated        224 16    1024 no    no         303.4M     Owkin non-commercial license
rudolfv2-s          Aignostics/RudolfV-2-S                   remote-code            0.5      stated        224 8     384  yes   no         21.4M      CC-BY-NC-ND-4.0 with supplementary terms
rudolfv2-b          Aignostics/RudolfV-2-B                   remote-code            0.5      stated        224 8     768  yes   no         85.2M      CC-BY-NC-ND-4.0 with supplementary terms
rudolfv2            Aignostics/RudolfV-2                     remote-code            0.5      stated        224 8     1536 yes   no         1.13B      CC-BY-NC-ND-4.0 with supplementary terms
mascaret            wearewaiv/mascaret                       remote-code            0.5      convention    224 14    1536 yes   no         1.14B      Waiv custom non-commercial license
phaet               wearewaiv/phaet                          remote-code            0.5      convention    224 16    1024 yes   no         303.4M     Waiv custom non-commercial license
ctranspath          RendeiroLab/LazySlide-models-gpl         exported               1.0      magnification 224 -     768  no    no         27.5M      GPL-3.0
chief               RendeiroLab/LazySlide-models-gpl         exported               1.0      magnification 224 -     768  no    no         27.5M      AGPL-3.0
conch               MahmoodLab/conch                         file:pytorch_model.bin 0.571429 magnification 448 16    512  yes   no         395.2M     CC-BY-NC-ND-4.0
conch-madeleine     MahmoodLab/conch                         file:pytorch_model.bin 1.142857 magnification 224 16    512  yes   no         395.2M     CC-BY-NC-ND-4.0
conch_v1.5          MahmoodLab/TITAN                         hub                    0.571429 magnification 448 -     768  yes   no         158.9M     CC-BY-NC-ND-4.0
keep                Astaxanthin/KEEP                         hub                    0.5      convention    224 -     768  no    yes        -          MIT
musk                xiangjx/musk                             hub                    0.5      convention    384 -     1024 yes   no         675.2M     CC-BY-NC-ND-4.0
omiclip             WangGuangyuLab/Loki                      file:checkpoint.pt     0.5      convention    224 -     768  yes   yes        638.5M     BSD-3-Clause
plip                vinid/plip                               folder                 0.5      convention    224 32    512  no    no         87.8M      Non-commercial
quiltnet-b16        wisdomik/QuiltNet-B-16                   hub                    0.5      convention    224 16    512  no    yes        -          MIT
quiltnet-b16-pmb    wisdomik/QuiltNet-B-16-PMB               hub                    0.5      convention    224 16    512  no    yes        -          MIT
quiltnet-b32        wisdomik/QuiltNet-B-32                   hub                    0.5      convention    224 32    512  no    yes        -          MIT
"""


def _rows() -> dict[str, Row]:
    rows = {}
    for line in _TEXT.strip().splitlines()[1:]:
        name, repo, how, mpp, known_by, px, patch, dim, gated, commercial, n, licence = line.split(maxsplit=11)
        rows[name] = Row(
            repo=repo,
            how=how,
            mpp=float(mpp),
            mpp_source=known_by,
            tile_px=int(px),
            token_px=None if patch == "-" else int(patch),
            embed_dim=int(dim),
            gated=gated == "yes",
            commercial=commercial == "yes",
            n_parameters=None if n == "-" else n,
            licence=licence,
        )
    return rows


_TABLE = _rows()


def _plain(name: str) -> str:
    """Spelling without case and marks: ``H-Optimus-0`` is ``hoptimus0``."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


_ALIASES = {"uni2-h": "uni2", "prov-gigapath": "gigapath", "midnight-12k": "midnight", "titan": "conch_v1.5"}
_BY_PLAIN = {_plain(name): name for name in (BUILT_IN, *_TABLE)} | {_plain(k): v for k, v in _ALIASES.items()}
# a page stands for the first encoder of it: lunit-dino-s8 and conch, not what MOOZY and MADELEINE make of them
_BY_REPO = {row.repo.lower(): name for name, row in reversed(_TABLE.items()) if row.how != "exported"}


def registered(name: str) -> EncoderSpec:
    """Spec of an encoder of the table, as far as it is known without loading it."""
    row = _TABLE[name]
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
    """Names of the encoders that give dense tokens, the built-in one first."""
    return [BUILT_IN, *(name for name, row in _TABLE.items() if row.token_px is not None)]


def lacks_tokens(encoder: Any) -> bool:
    """Whether it is known, without loading it, that an encoder gives no dense tokens."""
    spec = getattr(encoder, "spec", None)
    if spec is None and isinstance(encoder, str):
        name = _BY_PLAIN.get(_plain(encoder)) or _BY_REPO.get(encoder.lower().removeprefix("hf-hub:"))
        spec = registered(name) if name in _TABLE else None
    return spec is not None and spec.token_px is None


def encoders() -> pd.DataFrame:
    """List the encoders that can be named in ``encoder=``, beside any model of timm (``"timm:NAME"``).

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

    from histosge._encoders.stain_texture import StainTexture

    specs = [
        StainTexture().spec,
        *(registered(name) for name in (DEFAULT_ENCODER, *sorted(set(_TABLE) - {DEFAULT_ENCODER}))),
    ]
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


def load_encoder(
    encoder: Any = DEFAULT_ENCODER,
    *,
    weights: str | Path | None = None,
    revision: str | None = None,
    mpp: float | None = None,
    spec: EncoderSpec | None = None,
) -> Any:
    """Load an encoder, from the hub, its cache, a local folder, or a module of your own.

    Parameters
    ----------
    encoder
        A name of :func:`histosge.encoders`; any model of timm as ``"timm:NAME"`` or ``"hf-hub:ORG/NAME"``; an
        ``nn.Module`` together with ``spec=``; or an encoder loaded before, which is returned as it is.
    weights
        Local folder in the hub's layout (``config.json`` and ``model.safetensors``), for machines without network.
        A copied hub cache needs no ``weights``: point ``HF_HOME`` to it.
    revision
        Commit, branch or tag on the hub.
    mpp
        µm per pixel to feed the encoder with. ``None`` takes what it was trained at; for other models of timm 0.5.
    spec
        What your own module needs. It is given normalised tiles (n, 3, tile_px, tile_px) and returns (n, embed_dim).
        The module is put into evaluation mode, and moved to the device that computes. It has dense tokens only where
        it is a vision transformer of timm.

    Returns
    -------
    An encoder with ``spec``, ``to(device)`` and ``embed(tiles)`` (where it has tokens also ``embed_tokens(tiles)``) or,
    where it works on whole blocks, ``embed_block(...)``.

    Raises
    ------
    ValueError
        Where the name is unknown, arguments do not go together, or weights are another encoder's.
    RuntimeError
        Where the weights cannot be had: no access, no network. There is no fallback to another encoder.
    FileNotFoundError
        Where ``weights`` is no such folder.

    Examples
    --------
    >>> import histosge as sge
    >>> sge.load_encoder("stain-texture").spec.embed_dim
    120
    """
    options = {"weights": weights, "revision": revision, "mpp": mpp}
    given = ", ".join(f"{k}=" for k, v in options.items() if v is not None)
    if not isinstance(encoder, str):
        if given:
            msg = f"{given} is for encoders that are loaded by name; encoder={encoder!r:.80} is not a name. Leave it out, or name the encoder."
            raise ValueError(msg)
        if spec is None and hasattr(encoder, "spec") and (hasattr(encoder, "embed") or hasattr(encoder, "embed_block")):
            return encoder
        return _own_module(encoder, spec)
    if spec is not None:
        msg = f"spec= describes a module of your own; encoder={encoder!r} is a name and has a spec already. Leave spec= out."
        raise ValueError(msg)
    name = _BY_PLAIN.get(_plain(encoder)) or _BY_REPO.get(encoder.lower().removeprefix("hf-hub:"))
    if name == BUILT_IN:
        from histosge._encoders.stain_texture import StainTexture

        if given:
            msg = f"encoder='stain-texture' is built in: it takes no weights=, revision= or mpp=; not {given}."
            raise ValueError(msg)
        return StainTexture()
    from histosge._encoders import _tile_encoder as _pilm

    if name is not None:
        known, row = registered(name), _TABLE[name]
        known = known if mpp is None else replace(known, mpp=float(mpp), mpp_source="given")
        return _pilm.load_registered(known, how=row.how, repo=row.repo, weights=weights, revision=revision)
    timm_name = encoder.removeprefix("timm:").replace("hf_hub:", "hf-hub:")
    if not encoder.startswith("timm:") and not timm_name.startswith("hf-hub:") and not _pilm.is_timm(encoder):
        names = {_plain(n): n for n in (*_TABLE, *_ALIASES, BUILT_IN)}
        close = [names[n] for n in difflib.get_close_matches(_plain(encoder), names, n=3, cutoff=0.5)]
        hint = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
        msg = (
            f"encoder={encoder!r} is unknown.{hint} List the encoders with `histosge.encoders()`, name any model of "
            "timm as 'timm:NAME' or 'hf-hub:ORG/NAME', or pass a module of your own to `histosge.load_encoder`."
        )
        raise ValueError(msg)
    return _pilm.load_timm(timm_name, mpp=None if mpp is None else float(mpp), weights=weights, revision=revision)


def _own_module(module: Any, spec: EncoderSpec | None) -> Any:
    from torch import nn

    from histosge._encoders import _tile_encoder as _pilm

    if not isinstance(module, nn.Module):
        msg = (
            f"encoder={module!r} is neither a name, an encoder of `histosge.load_encoder`, nor a torch module. "
            "List the names with `histosge.encoders()`."
        )
        raise ValueError(msg)
    if spec is None:
        msg = (
            "a module of your own needs spec=: histosge.EncoderSpec(name=..., mpp=..., tile_px=..., embed_dim=...), "
            "so that it is fed at the right scale. Make it with `histosge.load_encoder(module, spec=...)`."
        )
        raise ValueError(msg)
    return _pilm.own(module, spec)
