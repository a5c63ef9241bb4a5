"""Which encoders there are, and how one is found by name.

The table says what lazyslide-models' registry does not, the µm per pixel each encoder was trained at, and repeats
what must be known before a model is loaded; a test compares it with the installed registry.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from histosge._encoders._spec import EncoderSpec
from histosge._settings import logger

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

DEFAULT = "h-optimus-0"
BUILT_IN = "stain-texture"
_ALIASES = {"uni2-h": "uni2", "hoptimus0": "h-optimus-0", "h-optimus0": "h-optimus-0", "phikon-v2": "phikonv2"}

_NC, _LUNIT, _OWKIN = "CC-BY-NC-ND-4.0", "lunit-non-commercial", "Owkin non-commercial license"
_RUDOLF, _WAIV = "CC-BY-NC-ND-4.0 with supplementary terms", "Waiv custom non-commercial license"
_HF = "https://huggingface.co/"
# name: (mpp, embedding, licence, gated, commercial, page, parameters). All take 224 px tiles. 0.5 µm per pixel (20x) is
# what the model cards train at or, where they mix magnifications (virchow2, midnight, rudolfv2, lunit), the one in
# their middle that benchmarks use; CTransPath and CHIEF were trained at 10x
_TABLE: dict[str, tuple[float, int, str, bool, bool, str | None, str | None]] = {
    "chief": (1.0, 768, "AGPL-3.0", False, False, None, "27.5M"),
    "conch-madeleine": (0.5, 512, _NC, True, False, "MahmoodLab/conch", "395.2M"),
    "crisp": (0.5, 2560, "MIT; CC-BY-NC-ND-4.0", True, False, "FTZhou/CRISP", "631.2M"),
    "crown": (0.5, 1024, "Apache-2.0", True, True, "LexieK/Crown", None),
    "ctranspath": (1.0, 768, "GPL-3.0", False, False, None, "27.5M"),
    "genbio-pathfm": (0.5, 4608, "GenBio AI Community License", False, False, "genbio-ai/genbio-pathfm", "1.1B"),
    "gigapath": (0.5, 1536, "Apache 2.0 with conditions", True, False, "prov-gigapath/prov-gigapath", "1.13B"),
    "gigapath-flash": (0.5, 384, "Apache 2.0", True, False, "prov-gigapath/prov-gigapath-flash", "21.7M"),
    "gpfm": (0.5, 1024, "CC BY-NC-ND 4.0", False, False, "majiabo/GPFM", "303M"),
    "h-optimus-0": (0.5, 1536, "Apache 2.0", False, True, "bioptimus/H-optimus-0", "1.13B"),
    "h-optimus-1": (0.5, 1536, _NC, True, False, "bioptimus/H-optimus-1", "1.13B"),
    "h0-mini": (0.5, 1536, _NC, True, False, "bioptimus/H0-mini", "85.7M"),
    "hibou-b": (0.5, 768, "Apache 2.0", True, True, "histai/hibou-b", "85.7M"),
    "hibou-l": (0.5, 1024, "Apache 2.0", True, True, "histai/hibou-l", "303.7M"),
    "lunit-bt": (0.5, 2048, _LUNIT, False, False, "1aurent/resnet50.lunit_bt", "23.6M"),
    "lunit-mocov2": (0.5, 2048, _LUNIT, False, False, "1aurent/resnet50.lunit_mocov2", "23.6M"),
    "lunit-swav": (0.5, 2048, _LUNIT, False, False, "1aurent/resnet50.lunit_swav", "23.6M"),
    "lunit-dino-s8": (0.5, 384, _LUNIT, False, False, "1aurent/vit_small_patch8_224.lunit_dino", "21.7M"),
    "lunit-dino-s8-moozy": (0.5, 384, _LUNIT, False, False, "1aurent/vit_small_patch8_224.lunit_dino", "21.7M"),
    "lunit-dino-s16": (0.5, 384, _LUNIT, False, False, "1aurent/vit_small_patch16_224.lunit_dino", "21.1M"),
    "mascaret": (0.5, 1536, _WAIV, True, False, "wearewaiv/mascaret", "1.14B"),
    "midnight": (0.5, 3072, "MIT", True, True, "kaiko-ai/midnight", "1.14B"),
    "mstar": (0.5, 1024, _NC, True, False, "Wangyh/mSTAR", "303.4M"),
    "open-midnight": (0.5, 1536, "Apache 2.0", True, True, "SophontAI/OpenMidnight", "1.1B"),
    "path_orchestra": (0.5, 1024, _NC, True, False, "AI4Pathology/PathOrchestra", None),
    "phaet": (0.5, 1024, _WAIV, True, False, "wearewaiv/phaet", "303.4M"),
    "phikon": (0.5, 768, _OWKIN, False, False, "owkin/phikon", "85.8M"),
    "phikonv2": (0.5, 1024, _OWKIN, False, False, "owkin/phikon-v2", "303.4M"),
    "rudolfv2-s": (0.5, 384, _RUDOLF, True, False, "Aignostics/RudolfV-2-S", "21.4M"),
    "rudolfv2-b": (0.5, 768, _RUDOLF, True, False, "Aignostics/RudolfV-2-B", "85.2M"),
    "rudolfv2": (0.5, 1536, _RUDOLF, True, False, "Aignostics/RudolfV-2", "1.13B"),
    "uni": (0.5, 1024, _NC, True, False, "MahmoodLab/UNI", "303.4M"),
    "uni2": (0.5, 1536, _NC, True, False, "MahmoodLab/UNI2-h", "681.4M"),
    "virchow": (0.5, 2560, "Apache 2.0", True, True, "paige-ai/Virchow", "631.2M"),
    "virchow2": (0.5, 2560, _NC, True, False, "paige-ai/Virchow2", "631.2M"),
}


def registered(name: str) -> EncoderSpec:
    """Spec of an encoder of the table, as far as it is known without loading it."""
    mpp, embed_dim, licence, gated, commercial, repo, n_parameters = _TABLE[name]
    return EncoderSpec(
        name=name,
        mpp=mpp,
        tile_px=224,
        embed_dim=embed_dim,
        licence=licence,
        gated=gated,
        commercial=commercial,
        source="lazyslide-models",
        url=None if repo is None else _HF + repo,
        n_parameters=n_parameters,
    )


def encoders() -> pd.DataFrame:
    """List the encoders that can be named in ``encoder=``, beside any model of timm (``"timm:NAME"``).

    Returns
    -------
    DataFrame indexed by name: ``mpp`` (µm per pixel), ``tile_px``, ``tile_um``, ``embed_dim``, ``parameters``,
    ``licence``, ``gated`` (access must be asked for), ``commercial``, ``source``, ``url``.

    Examples
    --------
    >>> import histosge as sge
    >>> uni = sge.encoders().loc["uni"]
    >>> float(uni["mpp"]), int(uni["embed_dim"]), bool(uni["gated"])
    (0.5, 1024, True)
    """
    import pandas as pd

    from histosge._encoders.stain_texture import StainTexture

    specs = [StainTexture().spec, *(registered(name) for name in (DEFAULT, *sorted(set(_TABLE) - {DEFAULT})))]
    rows = [
        {
            "mpp": s.mpp,
            "tile_px": s.tile_px,
            "tile_um": s.tile_um,
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
    encoder: Any = DEFAULT,
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
        Commit, branch or tag on the hub, for models of timm.
    mpp
        µm per pixel to feed the encoder with. ``None`` takes what it was trained at; for other models of timm 0.5.
    spec
        What your own module needs. It is given normalised tiles (n, 3, tile_px, tile_px) and returns (n, embed_dim).

    Returns
    -------
    An encoder with ``spec``, ``to(device)`` and ``embed(tiles)`` or, where it is dense, ``embed_block(...)``.

    Raises
    ------
    ValueError
        Where the name is unknown, or arguments do not go together.
    RuntimeError
        Where the weights cannot be had: no access, no network, no such folder. There is no fallback to another.

    Examples
    --------
    >>> import histosge as sge
    >>> sge.load_encoder("stain-texture").spec.embed_dim
    120
    """
    if hasattr(encoder, "spec") and (hasattr(encoder, "embed") or hasattr(encoder, "embed_block")):
        return encoder
    if not isinstance(encoder, str):
        return _own_module(encoder, spec)
    if spec is not None:
        msg = f"spec= describes a module of your own; encoder={encoder!r} is a name and has a spec already."
        raise ValueError(msg)
    name = _ALIASES.get(encoder.lower(), encoder)
    if name == BUILT_IN:
        from histosge._encoders.stain_texture import StainTexture

        if weights is not None or revision is not None or mpp is not None:
            msg = "encoder='stain-texture' is built in: it takes no weights=, revision= or mpp=."
            raise ValueError(msg)
        return StainTexture()
    from histosge._encoders import _pilm

    if name in _TABLE:
        known = registered(name)
        known = known if mpp is None else replace(known, mpp=float(mpp))
        return _pilm.load_registered(known, weights=weights, revision=revision)
    timm_name = name.removeprefix("timm:")
    if not (name.startswith("timm:") or timm_name.startswith("hf-hub:")) and not _pilm.is_timm(name):
        close = difflib.get_close_matches(name.lower(), [*_TABLE, *_ALIASES, BUILT_IN], n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
        msg = (
            f"encoder={encoder!r} is unknown.{hint} List the encoders with `histosge.encoders()`, name any model of "
            "timm as 'timm:NAME' or 'hf-hub:ORG/NAME', or pass a module of your own to `histosge.load_encoder`."
        )
        raise ValueError(msg)
    if mpp is None:
        logger.info("encoder %r does not say at which scale it was trained: taking 0.5 µm per pixel (mpp=)", name)
    return _pilm.load_timm(timm_name, mpp=0.5 if mpp is None else float(mpp), weights=weights, revision=revision)


def _own_module(module: Any, spec: EncoderSpec | None) -> Any:
    from torch import nn

    from histosge._encoders._pilm import TileEncoder

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
    return TileEncoder(spec, module.eval(), module)
