"""Encoders of lazyslide-models, with its pooling and colour statistics; weights from the hub or a folder."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from histosge._encoders._hub import commit, explained
from histosge._encoders._table import TABLE, code_of
from histosge._encoders._tile_encoder import TileEncoder
from histosge._encoders._timm import local_weights, tokens_and_embedding
from histosge._encoders._weights import watched
from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from histosge._encoders._spec import EncoderSpec
    from histosge._encoders._weights import Loading

    Pass = Callable[[Any, Tensor], tuple[Tensor, Any]]

_ONE_FILE = ("uni", "uni2")
"""Built by timm; lazyslide-models also reads their plain checkpoint, which many clusters have."""


# ------------------------------------------------------------------------------------- tokens and embedding in one pass


def _class_token(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    dense = model.encode_image_dense(x)
    return dense.patch_tokens, dense.cls_token


def _class_token_and_mean(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    dense = model.encode_image_dense(x)
    return dense.patch_tokens, torch.cat([dense.cls_token, dense.patch_tokens.mean(1)], dim=-1)


def _head(model: Any, x: Tensor) -> tuple[Tensor, Any]:
    return tokens_and_embedding(model.model)(x)


def _pooler(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    out = model.model(pixel_values=x)
    n_prefix = 1 + getattr(getattr(model.model, "config", None), "num_register_tokens", 0)
    return out.last_hidden_state[:, n_prefix:], out.pooler_output


def _clip(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    vision = model.model.vision_model
    out = vision(pixel_values=x)
    # transformers applies CLIP's last norm to the class token only
    return vision.post_layernorm(out.last_hidden_state[:, 1:]), model.model.visual_projection(out.pooler_output)


def _trunk(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    visual = model.model.visual
    tokens, pooled = tokens_and_embedding(visual.trunk)(x)
    return tokens, visual.head(pooled)


def _twice(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return model.encode_image_dense(x).patch_tokens, model.encode_image(x)


PASSES: dict[str, Pass] = {
    "cls": _class_token,
    "cls+mean": _class_token_and_mean,
    "head": _head,
    "pooler": _pooler,
    "clip": _clip,
    "trunk": _trunk,
    "twice": _twice,
}
"""How an encoder gives tokens and embedding: the class token, also with the mean of the patches; the head of a network
of timm, or of the trunk of open_clip; the pooled output of transformers, or of its CLIP. The network runs once, or
twice where the library's methods for tokens and for the embedding share nothing."""


def wrap_model(model: Any, spec: EncoderSpec) -> TileEncoder:
    """Make an encoder of tiles from a model of the library."""
    dense = TABLE[spec.name].dense
    both = None if dense is None else lambda x: PASSES[dense](model, x)
    # an exported graph cannot be changed: it computes in float32, for evaluation
    exported = TABLE[spec.name].how == "exported"
    module = model.model if exported else model.model.eval()
    return TileEncoder(spec, model.encode_image, module, owner=model, half=not exported, dense=both)


# -------------------------------------------------------------------------------------------------------------- loading


def load_registered(
    spec: EncoderSpec, *, weights: str | Path | None, revision: str | None, trusted: bool
) -> TileEncoder:
    """Load an encoder of lazyslide-models' registry, with its pooling and colour statistics.

    ``how`` in the table is the source of its weights: ``timm`` and ``transformers`` (``remote-code`` where the
    repository contains the code) from a folder or any revision, ``file:NAME`` from that file, ``folder`` from a folder,
    ``hub`` and ``exported`` from the hub and its cache only.
    """
    how, repo = TABLE[spec.name].how, TABLE[spec.name].repo
    kind, _, filename = how.partition(":")
    takes_weights = kind not in ("hub", "exported")
    takes_revision = takes_weights and kind != "folder"
    refused = [] if takes_weights or weights is None else ["weights="]
    refused += [] if takes_revision or revision is None else ["revision="]
    if refused:
        msg = (
            f"encoder {spec.name!r} is loaded by a library that takes no {' or '.join(refused)}. Put the wanted files "
            f"into the hub's cache (`hf download {repo}`, then point HF_HOME to it on the other machine)."
        )
        raise ValueError(msg)
    runs_code = code_of(spec.name) is not None
    if runs_code and not trusted:
        raise ValueError(_untrusted(spec, repo, weights=weights, revision=revision, takes_revision=takes_revision))
    from lazyslide_models import MODEL_REGISTRY

    spec = replace(spec, revision=revision)
    source = (
        None if weights is None else local_weights(weights, filename, one_file=kind == "file" or spec.name in _ONE_FILE)
    )
    logger.info("loading encoder %s (%s parameters) from %s", spec.name, spec.n_parameters or "?", source or "the hub")
    with (
        explained(spec, repo=repo, weights=weights, takes_weights=takes_weights),
        watched(trusted=runs_code) as loading,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="As from v0.8.2")  # about an old change of that library
        model = _make(
            MODEL_REGISTRY[spec.name],
            spec,
            kind,
            filename,
            repo=repo,
            source=source,
            revision=revision,
            loading=loading,
        )
    loading.check(model.model, name=spec.name, weights=weights, by_torch=kind in ("timm", "file"))
    module = model.model
    width = getattr(module, "num_features", None) or getattr(getattr(module, "config", None), "hidden_size", None)
    if isinstance(width, int) and spec.embed_dim not in (width, 2 * width, 3 * width):  # class token, patch mean, RGB
        msg = (
            f"weights={str(weights)!r} are not those of encoder {spec.name!r}: their network is {width} wide, the "
            f"embedding of {spec.name!r} has {spec.embed_dim} numbers. Pass the folder of {spec.url}."
        )
        raise ValueError(msg)
    mean, std = _own_colours(model)
    found = commit(repo, revision) if weights is None else None
    return wrap_model(model, replace(spec, mean=mean, std=std, revision=found))


def _untrusted(
    spec: EncoderSpec, repo: str, *, weights: str | Path | None, revision: str | None, takes_revision: bool
) -> str:
    """Say what runs when an encoder is loaded, and how to allow it."""
    kept = commit(repo, revision) if weights is None and takes_revision else None
    if weights is not None:
        where = f"its folder {str(weights)!r}, or the repository that the config.json there names"
    elif kept is not None:
        where = f"{spec.url} at revision {kept}"
    else:
        where = f"{spec.url} at its newest commit"
    options = {"weights": None if weights is None else str(weights), "revision": kept}
    given = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
    if kept is not None or weights is not None:
        pin = ""
    elif takes_revision:
        pin = f" revision= pins it to a commit that you have read ({spec.url}/commits/main)."
    else:
        pin = " Its library takes no revision=, so that the commit cannot be pinned."
    return (
        f"encoder {spec.name!r} runs code of others when it is loaded: {code_of(spec.name)} ({where}). Such code can do "
        f"all that you can do on this machine. If you trust it, load the encoder and pass it: encoder="
        f"histosge.load_encoder({spec.name!r}{given}, trust_remote_code=True); in the shell: --trust-remote-code.{pin}"
    )


def _make(
    cls: Any,
    spec: EncoderSpec,
    kind: str,
    filename: str,
    *,
    repo: str,
    source: Path | None,
    revision: str | None,
    loading: Loading,
) -> Any:
    if source is None and revision is None and kind != "transformers":
        return cls()
    if kind == "file":
        from huggingface_hub import hf_hub_download

        return cls(model_path=str(source or hf_hub_download(repo, filename, revision=revision)))
    if kind == "folder":
        model = cls(model_path=str(source))
        # a second time, since the library does not say what was left out
        _, found = type(model.model).from_pretrained(str(source), output_loading_info=True)
        loading.note(model.model, None, found["missing_keys"], found["unexpected_keys"])
        return model
    if source is not None and source.is_file():
        return cls(model_path=str(source))
    if kind == "timm":
        return _made_by_timm(cls, f"local-dir:{source}" if source else f"hf-hub:{repo}@{revision}")()
    from transformers import AutoImageProcessor, AutoModel

    # each constructor knows one repository; what it does after loading is done here
    options = {"trust_remote_code": kind == "remote-code"} | ({} if source else {"revision": revision})
    fixed = {"add_pooling_layer": False} if spec.name == "phikon" else {}
    model = cls.__new__(cls)
    model.model, found = AutoModel.from_pretrained(str(source or repo), **options, **fixed, output_loading_info=True)
    loading.note(model.model, None, found["missing_keys"], found["unexpected_keys"])
    model.num_prefix_tokens = 1 + int(getattr(model.model.config, "num_register_tokens", 0) or 0)
    if model.get_transform() is None:
        model.img_processor = AutoImageProcessor.from_pretrained(str(source or repo), **options)
    return model


def _made_by_timm(cls: Any, source: str) -> Any:
    """Derive a class that loads ``source`` with timm where ``cls`` names its repository on the hub.

    The derived class comes before ``TimmModel`` in the method resolution order, so that it gets the arguments of
    ``cls``: the options of the architecture are those of ``cls``.
    """
    from lazyslide_models import TimmModel

    class Redirected(TimmModel):
        def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(source if name.startswith(("hf-hub:", "hf_hub:")) else name, *args, **kwargs)

    return type(cls.__name__, (cls, Redirected), {})


class _Prepared:
    """Replaces a transformers processor, since tiles are normalised on the device."""

    def __call__(self, images: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"pixel_values": images}


def _own_colours(model: Any) -> tuple[Any, Any]:
    """Take the colour statistics of a model's transform, or of its processor, which is then replaced."""
    for step in getattr(model.get_transform(), "transforms", []):
        if type(step).__name__ == "Normalize":
            return tuple(float(v) for v in step.mean), tuple(float(v) for v in step.std)
    for name in ("img_processor", "processor"):
        processor = getattr(model, name, None)
        images: Any = getattr(processor, "image_processor", processor)
        if getattr(images, "image_mean", None) is not None:
            setattr(model, name, _Prepared())
            unit = 255 * float(images.rescale_factor)  # 1 where pixels are scaled to 0...1
            return tuple(v / unit for v in images.image_mean), tuple(v / unit for v in images.image_std)
    msg = f"{type(model).__name__} of lazyslide-models does not state the colours it was trained with."
    raise RuntimeError(msg)
