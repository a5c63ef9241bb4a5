"""Pathology image large models: from lazyslide-models, from timm, or the user's own; normalised on the device."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

import torch
from torch import Tensor, nn

from histosge._encoders._spec import EncoderSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class EncoderAccessError(RuntimeError):
    """The weights of an encoder cannot be had."""


class TileEncoder:
    """An encoder of tiles.

    Parameters
    ----------
    spec
        What it is fed with.
    forward
        From prepared tiles to embeddings.
    module
        What is moved between devices.
    prepares_itself
        It takes raw uint8 tiles and scales and normalises them itself.
    """

    def __init__(
        self, spec: EncoderSpec, forward: Callable[[Tensor], Any], module: Any, *, prepares_itself: bool = False
    ) -> None:
        self.spec = spec
        self._forward = forward
        self._module = module
        self._prepares_itself = prepares_itself
        self._mean = torch.tensor(spec.mean).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(spec.std).view(1, 3, 1, 1) * 255

    def __repr__(self) -> str:
        return f"TileEncoder({self.spec.name!r}, {self.spec.tile_px} px at {self.spec.mpp:g} µm per pixel)"

    def to(self, device: torch.device | str) -> Self:
        """Move to ``device``."""
        self._module.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    @torch.inference_mode()
    def embed(self, tiles: Tensor) -> Tensor:
        """Embed tiles.

        Parameters
        ----------
        tiles
            (n, 3, tile_px, tile_px) uint8, red, green, blue, at ``spec.mpp``, on the device of the encoder.

        Returns
        -------
        (n, embed_dim) float32.
        """
        prepared = tiles if self._prepares_itself else (tiles.float() - self._mean) / self._std
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=tiles.device.type == "cuda"):
            out = self._forward(prepared)
        out = torch.as_tensor(out)
        if out.shape != (len(tiles), self.spec.embed_dim):
            msg = (
                f"encoder {self.spec.name!r} gave an array of shape {tuple(out.shape)} for {len(tiles)} tiles; "
                f"its spec says {(len(tiles), self.spec.embed_dim)}. Give the spec the right embed_dim, or pool the tokens."
            )
            raise ValueError(msg)
        return out.float()


def is_timm(name: str) -> bool:
    """Whether timm has an architecture of this name."""
    import timm

    return timm.is_model(name.split(".")[0])


def load_registered(spec: EncoderSpec, *, weights: str | Path | None, revision: str | None) -> TileEncoder:
    """Load an encoder of lazyslide-models' registry, keeping its own pooling and colour statistics."""
    from lazyslide_models._model_registry import MODEL_REGISTRY
    from lazyslide_models.base import TimmModel

    cls = MODEL_REGISTRY[spec.name]
    by_timm = issubclass(cls, TimmModel)
    if revision is not None or (weights is not None and not by_timm):
        what = "revision=" if revision is not None else "weights="
        msg = (
            f"encoder {spec.name!r} is loaded by a library that takes no {what}. Put the wanted files into the hub's "
            "cache (`hf download`, then point HF_HOME to it on the other machine)."
        )
        raise ValueError(msg)
    with _explained(spec, weights):
        if weights is not None:
            with _timm_from_folder(_folder(weights)):
                model: Any = cls()
        else:
            model = cls()
    module = model.model
    module.eval()
    transform = model.get_transform()
    mean, std = _normalisation(transform)
    spec = replace(spec, mean=mean or spec.mean, std=std or spec.std, revision=_cached_revision(spec.url))
    return TileEncoder(spec, model.encode_image, module, prepares_itself=transform is None)


def load_timm(name: str, *, mpp: float, weights: str | Path | None, revision: str | None) -> TileEncoder:
    """Load any model of timm, with its pooled output and its own colour statistics."""
    import timm
    from timm.data import resolve_model_data_config

    source = f"{name}@{revision}" if revision else name
    if revision and not name.startswith("hf-hub:"):
        msg = f"revision={revision!r}: only models named 'hf-hub:ORG/NAME' have revisions (encoder={name!r})."
        raise ValueError(msg)
    url = "https://huggingface.co/" + name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else None
    asked = EncoderSpec(name=name, mpp=mpp, tile_px=224, embed_dim=1, source="timm", url=url, revision=revision)
    with _explained(asked, weights):
        if weights is not None:
            source = f"local-dir:{_folder(weights)}"
        model: Any = timm.create_model(source, pretrained=True, num_classes=0).eval()
    data = resolve_model_data_config(model)
    spec = replace(
        asked,
        tile_px=int(data["input_size"][1]),
        embed_dim=int(getattr(model, "num_features", 0) or model.head_hidden_size),
        mean=data["mean"],
        std=data["std"],
        licence=str(model.pretrained_cfg.get("license") or "unknown"),
        revision=revision or _cached_revision(url),
    )
    return TileEncoder(spec, model, model)


def _normalisation(transform: Any) -> tuple[Any, Any]:
    """Colour statistics of a model's own transform."""
    for step in getattr(transform, "transforms", []):
        if hasattr(step, "mean") and hasattr(step, "std"):
            return tuple(float(v) for v in step.mean), tuple(float(v) for v in step.std)
    return None, None


def _folder(weights: str | Path) -> Path:
    folder = Path(weights)
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    if not (folder / "config.json").is_file() or not has_weights:
        msg = (
            f"weights={str(weights)!r} is not a folder in the hub's layout: it must hold config.json and "
            "model.safetensors or pytorch_model.bin, as `hf download ORG/NAME --local-dir FOLDER` makes it."
        )
        raise FileNotFoundError(msg)
    return folder


@contextmanager
def _timm_from_folder(folder: Path) -> Iterator[None]:
    """Let a model of lazyslide-models, whose hub name is fixed, be made by timm from a local folder."""
    import timm

    create = timm.create_model

    def from_folder(_name: str, **kwargs: Any) -> nn.Module:
        return create(f"local-dir:{folder}", **kwargs)

    with mock.patch.object(timm, "create_model", from_folder):
        yield


def _cached_revision(url: str | None) -> str | None:
    """Commit of the weights in the hub's cache, read from the path of what was just loaded."""
    if url is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(url.removeprefix("https://huggingface.co/"), "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


@contextmanager
def _explained(spec: EncoderSpec, weights: str | Path | None) -> Iterator[None]:
    """Turn what the hub says into what to do. Never another encoder instead."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    page = spec.url or "https://huggingface.co"
    instead = (
        "Or use an open one: encoder='h-optimus-0' needs no permission, 'stain-texture' no download; "
        "a local folder goes by histosge.load_encoder(..., weights=FOLDER)."
    )
    try:
        yield
    except GatedRepoError as err:
        msg = (
            f"encoder {spec.name!r} is gated and this machine has no access. Ask for it at {page}, wait for the "
            f"approval, then log in with `hf auth login`. {instead}"
        )
        raise EncoderAccessError(msg) from err
    except RepositoryNotFoundError as err:
        msg = (
            f"the hub shows no weights of encoder {spec.name!r} at {page} to this machine: the name is wrong, or it is "
            f"gated and you are not logged in. Ask for access there and log in with `hf auth login`. {instead}"
        )
        raise EncoderAccessError(msg) from err
    except HfHubHTTPError as err:
        status = getattr(getattr(err, "response", None), "status_code", "unknown")
        msg = (
            f"the hub answered with HTTP status {status} for encoder {spec.name!r} ({page}). Try again later. {instead}"
        )
        raise EncoderAccessError(msg) from err
    except OSError as err:
        if weights is not None:
            raise
        msg = (
            f"the weights of encoder {spec.name!r} are not in the hub's cache and {page} cannot be reached. Check the "
            "network; on a machine without one, copy a filled cache and point HF_HOME to it, or pass a folder, "
            f"histosge.load_encoder({spec.name!r}, weights=FOLDER). The encoder 'stain-texture' needs no download."
        )
        raise EncoderAccessError(msg) from err
