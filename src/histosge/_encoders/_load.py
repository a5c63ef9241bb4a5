"""Encoders by name, by object, or several joined; their specs before they are loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from histosge._encoders._spec import EncoderSpec
from histosge._encoders._table import BUILT_IN, built_in, close_names, find_name, listed_spec
from histosge._options import DEFAULT_ENCODER

if TYPE_CHECKING:
    from pathlib import Path

_LOADED_BY: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
"""Arguments that each encoder was loaded with, where it was loaded by name"""


@dataclass(frozen=True)
class JoinedEncoder:
    """Encoders that are used together; their embeddings are joined."""

    encoders: tuple[Any, ...]

    def __repr__(self) -> str:
        return f"JoinedEncoder({'+'.join(encoder.spec.name for encoder in self.encoders)!r})"


def load_encoder(
    encoder: Any = DEFAULT_ENCODER,
    *,
    weights: str | Path | None = None,
    revision: str | None = None,
    mpp: float | None = None,
    spec: EncoderSpec | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load an encoder, from the hub, its cache, a local folder, or a module of your own.

    Parameters
    ----------
    encoder
        A name of :func:`histosge.encoders`; any model of timm as ``"timm:NAME"`` or ``"hf-hub:ORG/NAME"``; an
        ``nn.Module`` together with ``spec=``; or a loaded encoder, which is returned unchanged. Names joined by
        ``+``, or a list of names and encoders, are used together.
    weights
        Local folder in the hub's layout (``config.json`` and ``model.safetensors``), for machines without network.
        A copied hub cache needs no ``weights``: set ``HF_HOME`` to it.
    revision
        Commit, branch or tag on the hub.
    mpp
        µm per pixel of the tiles. ``None`` takes the scale that the encoder was trained at; for other models of timm
        0.5.
    spec
        Input of your own module. The module takes normalised tiles (n, 3, tile_px, tile_px) and returns
        (n, embed_dim). It is put into evaluation mode, and moved to the device that computes. It has dense tokens only
        where it is a vision transformer of timm.
    trust_remote_code
        Whether code of others may run: some encoders are loaded by Python files of their repository or folder, or from
        a file that may hold code (column ``remote_code`` of :func:`histosge.encoders`). Such code can do all that you
        can do on this machine. ``revision`` pins it.

    Returns
    -------
    An encoder with ``spec``, ``to(device)`` and ``embed(tiles)`` (where it has tokens also ``embed_tokens(tiles)``) or,
    where its spec has ``whole_blocks``, ``embed_block(block, centres)``. Several are joined in the given order.

    Raises
    ------
    ValueError
        Where the name is unknown, arguments do not go together, weights are another encoder's, incomplete or not
        finite, or code of others would run without ``trust_remote_code``.
    RuntimeError
        Where the weights cannot be loaded: no access, no network. There is no fallback to another encoder.
    FileNotFoundError
        Where ``weights`` is no such folder.

    Examples
    --------
    >>> import histosge as sge
    >>> sge.load_encoder("stain-texture").spec.embed_dim
    120
    """
    given = [
        f"{k}="
        for k, v in {"weights": weights, "revision": revision, "mpp": mpp, "spec": spec}.items()
        if v is not None
    ]
    encoders = split_encoder(encoder)
    if encoders != [encoder]:
        return _join(encoders, given, trusted=trust_remote_code)
    if not isinstance(encoder, str):
        return _of_object(encoder, spec, [name for name in given if name != "spec="])
    if spec is not None:
        msg = (
            f"spec= describes a module of your own; encoder={encoder!r} is a name and has a spec already. Leave spec= "
            "out."
        )
        raise ValueError(msg)
    found = _by_name(
        encoder, find_name(encoder), given, weights=weights, revision=revision, mpp=mpp, trusted=trust_remote_code
    )
    arguments = {"weights": weights, "revision": revision, "mpp": mpp, "trust_remote_code": trust_remote_code or None}
    _LOADED_BY[found] = {"encoder": encoder} | {k: v for k, v in arguments.items() if v is not None}
    return found


def loaded_by(encoder: Any) -> dict[str, Any] | None:
    """Arguments of :func:`load_encoder` that load a single encoder again, in any process; ``None`` for an object."""
    return _LOADED_BY.get(encoder)


def _by_name(
    encoder: str,
    name: str | None,
    given: list[str],
    *,
    weights: str | Path | None,
    revision: str | None,
    mpp: float | None,
    trusted: bool,
) -> Any:
    if name in BUILT_IN:
        if given:
            msg = f"encoder={name!r} is built in: it takes no weights=, revision= or mpp=; not {', '.join(given)}."
            raise ValueError(msg)
        return built_in(name)
    if name is not None:
        from histosge._encoders._lazyslide import load_registered

        known = listed_spec(name)
        known = known if mpp is None else replace(known, mpp=float(mpp), mpp_source="given")
        return load_registered(known, weights=weights, revision=revision, trusted=trusted)
    from histosge._encoders._timm import is_timm, load_timm

    timm_name = encoder.removeprefix("timm:").replace("hf_hub:", "hf-hub:")
    if not encoder.startswith("timm:") and not timm_name.startswith("hf-hub:") and not is_timm(encoder):
        close = close_names(encoder)
        hint = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
        msg = (
            f"encoder={encoder!r} is unknown.{hint} List the encoders with `histosge.encoders()`, name any model of "
            "timm as 'timm:NAME' or 'hf-hub:ORG/NAME', or pass a module of your own to `histosge.load_encoder`."
        )
        raise ValueError(msg)
    return load_timm(timm_name, mpp=None if mpp is None else float(mpp), weights=weights, revision=revision)


def split_encoder(encoder: Any) -> list[Any]:
    """Return the joined encoders, or the single one: names, or objects."""
    if isinstance(encoder, JoinedEncoder):
        return list(encoder.encoders)
    if isinstance(encoder, str):
        return list(encoder.split("+"))
    if isinstance(encoder, list | tuple):
        return [part for one in encoder for part in split_encoder(one)]
    return [encoder]


def known_spec(encoder: Any) -> EncoderSpec | None:
    """Return the spec of a single encoder without loading it; ``None`` where it is read from the network."""
    if isinstance(encoder, str):
        name = find_name(encoder)
        return None if name is None else listed_spec(name)
    spec = getattr(encoder, "spec", None)
    return spec if isinstance(spec, EncoderSpec) else None


def _join(encoders: list[Any], given: list[str], *, trusted: bool) -> Any:
    if given:
        msg = (
            f"{', '.join(given)} is for one encoder, not for several. Load each with `histosge.load_encoder` and pass "
            'them as a list, for example encoder=[histosge.load_encoder("uni", weights=FOLDER), "rgb"].'
        )
        raise ValueError(msg)
    if not encoders:
        msg = "encoder=[] is an empty list: name at least one encoder."
        raise ValueError(msg)
    names = [spec.name if spec else repr(one) for one, spec in zip(encoders, map(known_spec, encoders), strict=True)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        msg = f"encoder names {', '.join(twice)} twice. Name each encoder once."
        raise ValueError(msg)
    loaded = [load_encoder(one, trust_remote_code=trusted) for one in encoders]
    return loaded[0] if len(loaded) == 1 else JoinedEncoder(tuple(loaded))


def _of_object(encoder: Any, spec: EncoderSpec | None, given: list[str]) -> Any:
    """Return an encoder unchanged, or make one from a module of the user's."""
    if given:
        msg = (
            f"{', '.join(given)} is for encoders that are loaded by name; encoder={encoder!r:.80} is not a name. Leave "
            "it out, or name the encoder."
        )
        raise ValueError(msg)
    known = known_spec(encoder)
    if spec is None and known is not None:
        method = "embed_block" if known.whole_blocks else "embed"
        if not hasattr(encoder, method):
            msg = (
                f"encoder {known.name!r} has no method {method}(), which its spec needs with "
                f"whole_blocks={known.whole_blocks}. Add the method, or change the spec."
            )
            raise ValueError(msg)
        return encoder
    from torch import nn

    from histosge._encoders._timm import wrap_module

    if not isinstance(encoder, nn.Module):
        msg = (
            f"encoder={encoder!r} is neither a name, an encoder of `histosge.load_encoder`, nor a torch module. "
            "List the names with `histosge.encoders()`."
        )
        raise ValueError(msg)
    if spec is None:
        msg = (
            "a module of your own needs spec=: histosge.EncoderSpec(name=..., mpp=..., tile_px=..., embed_dim=...), "
            "so that its input has the right scale. Make it with `histosge.load_encoder(module, spec=...)`."
        )
        raise ValueError(msg)
    return wrap_module(encoder, spec)
