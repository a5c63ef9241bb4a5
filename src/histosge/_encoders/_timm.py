"""Encoders of timm: any of its models with timm's pooling; vision transformers also return a token for each patch."""

from __future__ import annotations

import difflib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from histosge._encoders._hub import PAGES, commit, explained
from histosge._encoders._spec import EncoderSpec
from histosge._encoders._tile_encoder import TileEncoder
from histosge._encoders._weights import watched
from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Callable


def _transformers() -> tuple[Any, ...]:
    from timm.models import Beit, Eva, VisionTransformer, VisionTransformerRelPos

    return Beit, Eva, VisionTransformer, VisionTransformerRelPos


def patch_px(module: Any, tile_px: int) -> int | None:
    """Edge of a patch of timm's vision transformers, where whole patches fill a tile; ``None`` for other networks."""
    if not isinstance(module, _transformers()):
        return None
    embed: Any = module.patch_embed
    height, width = embed.feat_ratio(as_scalar=False)  # includes convolutions before the patches
    return int(height) if height == width and tile_px % height == 0 else None


def tokens_and_embedding(module: Any) -> Callable[[Tensor], tuple[Tensor, Any]]:
    """Return a function that gives tokens and embedding of a vision transformer of timm in one pass.

    In timm ``forward`` applies the head to the features. A network with another ``forward`` runs twice.
    """
    of_timm = any(type(module).forward is kind.forward for kind in _transformers()) and "forward" not in vars(module)

    def both(x: Tensor) -> tuple[Tensor, Any]:
        features = module.forward_features(x)  # (n, prefix + patches, C)
        patches = features[:, module.num_prefix_tokens :]
        # where the norm follows the pooling, apply it to each patch
        tokens = module.fc_norm(patches) if isinstance(module.norm, nn.Identity) else patches
        return tokens, module.forward_head(features) if of_timm else module(x)

    return both


def wrap_module(module: nn.Module, spec: EncoderSpec) -> TileEncoder:
    """Make an encoder from a module of the user's, in evaluation mode. A vision transformer of timm has tokens."""
    found_px = patch_px(module, spec.tile_px)
    if spec.token_px not in (None, found_px):
        found = "it is no vision transformer of timm" if found_px is None else f"its patches are {found_px} px"
        msg = (
            f"EncoderSpec {spec.name!r}: token_px={spec.token_px} does not fit the module: {found}. Leave token_px "
            "out: of your own modules only those have tokens, and the size of their patches is read from them."
        )
        raise ValueError(msg)
    dense = None if found_px is None else tokens_and_embedding(module)
    return TileEncoder(replace(spec, token_px=found_px), module.eval(), module, dense=dense)


def is_timm(name: str) -> bool:
    """Whether timm has an architecture of this name."""
    import timm

    return timm.is_model(name.split(".")[0])


def load_timm(name: str, *, mpp: float | None, weights: str | Path | None, revision: str | None) -> TileEncoder:
    """Load any model of timm, with its pooled output and its own colour statistics."""
    import timm
    from timm.data import resolve_model_data_config

    repo = name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else None
    if revision is not None and (repo is None or weights is not None):
        msg = (
            f"revision={revision!r}: only models named 'hf-hub:ORG/NAME', without weights=, have revisions ({name!r})."
        )
        raise ValueError(msg)
    given: dict[str, Any] = {}
    source = f"{name}@{revision}" if revision else name
    if repo is None:
        _known_to_timm(name, weights)
        repo = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
    if weights is not None:
        local = local_weights(weights, "", one_file=not name.startswith("hf-hub:"))
        if local.is_file():
            given["pretrained_cfg_overlay"] = {"file": str(local)}
        else:
            _same_architecture(name, local)
            source = f"local-dir:{local}"
    url = None if repo is None else PAGES + repo
    spec = EncoderSpec(
        name=name,
        mpp=0.5 if mpp is None else mpp,
        mpp_source="convention" if mpp is None else "given",
        tile_px=224,
        embed_dim=1,
        source="timm",
        url=url,
        revision=revision,
    )
    if mpp is None:
        logger.info("encoder %r does not state the scale it was trained at: taking 0.5 µm per pixel (mpp=)", name)
    bare = None if repo is None else repo.partition("@")[0]  # timm takes a revision in the name
    with explained(spec, repo=bare, weights=weights, takes_weights=True), watched() as loading:
        model: Any = timm.create_model(source, pretrained=True, num_classes=0, **given).eval()
    # timm loads archives of JAX (custom_load) value by value, and raises where one is missing
    by_torch = not model.pretrained_cfg.get("custom_load")
    loading.check(model, name=name, weights=weights, by_torch=by_torch)
    data = resolve_model_data_config(model)
    _, height, width = data["input_size"]
    if height != width:
        msg = f"encoder {name!r} takes images of {height} x {width} px; histosge cuts square tiles only."
        raise ValueError(msg)
    spec = replace(
        spec,
        tile_px=int(height),
        embed_dim=int(getattr(model, "head_hidden_size", None) or model.num_features),  # the width with num_classes=0
        mean=data["mean"],
        std=data["std"],
        licence=str(model.pretrained_cfg.get("license") or "unknown"),
        token_px=patch_px(model, int(height)),
        revision=commit(repo, revision) if weights is None and repo is not None else None,
    )
    return TileEncoder(spec, model, model, dense=None if spec.token_px is None else tokens_and_embedding(model))


def _known_to_timm(name: str, weights: str | Path | None) -> None:
    import timm

    if not is_timm(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(repr(f'timm:{c}') for c in close)}?" if close else ""
        msg = f"encoder='timm:{name}' is unknown to timm.{hint} List its models with `timm.list_models()`."
        raise ValueError(msg)
    architecture, _, tag = name.partition(".")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if (tag and tag not in tags) or (not tags and weights is None):
        trained = f"those are {', '.join(repr(f'{architecture}.{t}') for t in tags)}" if tags else "there are none"
        msg = f"encoder='timm:{name}': timm has no such trained weights of {architecture!r}; {trained}."
        raise ValueError(msg)


def _same_architecture(name: str, folder: Path) -> None:
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architecture")
    if not name.startswith("hf-hub:") and found != name.split(".")[0]:
        msg = (
            f"encoder='timm:{name}', but weights={str(folder)!r} holds {found!r}. Name that one, or pass another "
            "folder."
        )
        raise ValueError(msg)


def local_weights(weights: str | Path, filename: str, *, one_file: bool) -> Path:
    """Find local weights: a folder in the hub's layout, or one file where that is enough."""
    path = Path(weights).expanduser()
    if one_file and path.is_file():
        return path
    if filename and (path / filename).is_file():
        return path / filename
    has_weights = any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
    if filename or not (path / "config.json").is_file() or not has_weights:
        needed = repr(filename) if filename else "config.json and model.safetensors or pytorch_model.bin"
        also = ", nor the file of weights itself" if one_file else ""
        msg = (
            f"weights={str(weights)!r} is not a folder in the hub's layout{also}: it must hold {needed}, as "
            "`hf download ORG/NAME --local-dir FOLDER` makes it."
        )
        raise FileNotFoundError(msg)
    return path
