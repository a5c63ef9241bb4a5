"""A token for each patch of a tile, from the same pass as the embedding."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True)
class Dense:
    """How a network gives a token for each patch of a tile."""

    tokens: Callable[[Tensor], Any]
    """From normalised tiles to (n, patches, C): row by row, after the last norm, no class token, no registers"""
    shared: tuple[tuple[Any, str], ...]
    """Methods (owner, name) that the embedding is computed through as well: one pass is enough for both"""


def patch_px(module: Any, tile_px: int) -> int | None:
    """Edge of a patch of timm's vision transformers, where whole ones fill a tile; ``None`` for other networks."""
    from timm.models import Beit, Eva, VisionTransformer, VisionTransformerRelPos

    if not isinstance(module, Beit | Eva | VisionTransformer | VisionTransformerRelPos):
        return None
    embed: Any = module.patch_embed
    height, width = embed.feat_ratio(as_scalar=False)  # with what convolutions before the patches shrink
    return int(height) if height == width and tile_px % height == 0 else None


def of_timm(module: Any) -> Dense:
    """Tokens of a vision transformer of timm."""

    def tokens(x: Tensor) -> Tensor:
        patches = module.forward_features(x)[:, module.num_prefix_tokens :]  # (n, patches, C)
        # where the norm follows the pooling, each patch is brought to scale by that norm
        return module.fc_norm(patches) if isinstance(module.norm, nn.Identity) else patches

    return Dense(tokens, ((module, "forward_features"),))


def of_library(model: Any) -> Dense:
    """Tokens as lazyslide-models takes them from the network.

    Some of its encoders make the embedding from the tokens, some have the network pool; either way the network runs once.
    It runs twice for ``conch``, ``conch-madeleine`` and ``quiltnet-b16`` and ``-b32``, whose two ways share no method.
    """
    network = model.model
    vision = getattr(network, "vision_model", None)  # CLIP of transformers
    inner = vision or getattr(getattr(network, "visual", None), "trunk", None) or network
    passes = "forward_features" if hasattr(inner, "forward_features") else "forward"
    # transformers leaves CLIP's last norm to the class token alone
    norm: nn.Module = getattr(vision, "post_layernorm", None) or nn.Identity()
    return Dense(
        lambda x: norm(model.encode_image_dense(x).patch_tokens), ((model, "encode_image_dense"), (inner, passes))
    )


@contextmanager
def once(methods: tuple[tuple[Any, str], ...]) -> Iterator[None]:
    """Let methods of objects compute once: asked for the same tensor again, they give what they gave before.

    Tokens and embedding are each computed in the library's own way, and the network they share runs once. Where they
    share less than was thought, it runs twice: what they are never depends on it.
    """
    before = [vars(owner).get(name) for owner, name in methods]
    try:
        for owner, name in methods:
            setattr(owner, name, _remembering(getattr(owner, name)))
        yield
    finally:
        for (owner, name), own in zip(methods, before, strict=True):
            if own is not None:
                setattr(owner, name, own)
            elif name in vars(owner):
                delattr(owner, name)


def _remembering(method: Callable[..., Any]) -> Callable[..., Any]:
    seen: list[tuple[Tensor, Any]] = []

    @wraps(method)
    def remembered(*args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        for tensor, result in seen:
            if len(given) == 1 and tensor is given[0]:
                return result
        result = method(*args, **kwargs)
        if len(given) == 1:
            seen.append((given[0], result))
        return result

    return remembered
