"""Pathology image large models: from lazyslide-models, from timm, or the user's own; normalised on the device."""

from __future__ import annotations

import difflib
import hashlib
import json
import warnings
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from histosge._encoders._hub import PAGES, commit, explained
from histosge._encoders._load import with_tokens
from histosge._encoders._spec import EncoderSpec
from histosge._encoders._tokens import Dense, of_library, of_timm, once, patch_px
from histosge._settings import logger, settings

if TYPE_CHECKING:
    from collections.abc import Callable

_ONE_FILE = ("uni", "uni2")
"""Made by timm, but lazyslide-models also takes their bare checkpoint, which many clusters hold."""


class TileEncoder:
    """An encoder of tiles.

    Tiles come at the scale and size of the spec, so nothing is resized or cropped: where a model's own transform cuts
    a border off (GigaPath: 224 of 256 px), ``tile_px`` is what is left after that.

    Parameters
    ----------
    spec
        What it is fed with.
    forward
        From normalised tiles to embeddings.
    module
        The network.
    owner
        What is moved between devices, where that is more than the network.
    half
        Whether it computes in bfloat16 on CUDA.
    dense
        How it gives tokens, where it does.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        forward: Callable[[Tensor], Any],
        module: nn.Module,
        *,
        owner: Any = None,
        half: bool = True,
        dense: Dense | None = None,
    ) -> None:
        self.spec = spec
        self._forward = forward
        self._dense = dense
        self.module = module
        self._owner = module if owner is None else owner
        self._half = half
        self._channels_last = False
        self._weights: str | None = None
        self._mean = torch.tensor(spec.mean).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(spec.std).view(1, 3, 1, 1) * 255

    def __repr__(self) -> str:
        return f"TileEncoder({self.spec.name!r}, {self.spec.tile_px} px at {self.spec.mpp:g} µm per pixel)"

    def to(self, device: torch.device | str) -> Self:
        """Move to ``device``."""
        self._owner.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        convolves = any(isinstance(part, nn.BatchNorm2d) for part in self.module.modules())
        self._channels_last = convolves and torch.device(device).type == "cuda"
        if self._channels_last:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def precision(self, device: torch.device) -> torch.dtype:
        """Type that it computes in: bfloat16 on CUDA, float32 elsewhere, or as ``settings.precision`` says."""
        wanted = settings.precision or ("bfloat16" if device.type == "cuda" else "float32")
        return torch.bfloat16 if self._half and wanted == "bfloat16" else torch.float32

    def identity(self, device: torch.device) -> dict[str, Any] | None:
        """What its embeddings depend on, beside the pixels; ``None`` for a module of the user's without a revision.

        Such a module may be changed and look the same. Of all others the weights are hashed, once, so that it does not
        matter what a name or a branch of the hub stood for.
        """
        spec = self.spec
        if spec.source == "user" and spec.revision is None:
            return None
        if self._weights is None:
            self._weights = weights_digest(self.module)
        libraries = ("timm", "lazyslide-models", "transformers")
        return {
            **spec.to_dict(),
            "weights": self._weights,
            "precision": str(self.precision(device)).removeprefix("torch."),
            "versions": {name: version(name) for name in libraries if _installed(name)},
        }

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
        self._check(tiles)
        if len(tiles) == 0:
            return torch.zeros(0, self.spec.embed_dim, device=tiles.device)
        with torch.inference_mode():
            x = self._normalised(tiles)
            with self._autocast(tiles):
                out = self._forward(x)
        return self._pooled(out, len(tiles))

    def embed_tokens(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Embed tiles, given as for ``embed``, and each of their patches.

        Returns
        -------
        Tokens (n, side, side, C) float32 by row and column, ``side`` being ``tile_px // token_px``, after the last norm,
        without class token and registers, C as wide as the network; and (n, embed_dim) float32, what ``embed`` gives.
        """
        spec, n = self.spec, len(tiles)
        if self._dense is None or spec.token_px is None:
            msg = (
                f"encoder {spec.name!r} gives no token for each patch of a tile. Take one that does: "
                f"{', '.join(map(repr, with_tokens()))}; or a vision transformer of timm ('timm:vit_...')."
            )
            raise ValueError(msg)
        self._check(tiles)
        if n == 0:  # how wide tokens are is known from tokens only
            tokens, pooled = self.embed_tokens(tiles.new_zeros(1, *tiles.shape[1:]))
            return tokens[:0], pooled[:0]
        with torch.inference_mode():
            x = self._normalised(tiles)
            with self._autocast(tiles), once(self._dense.shared):
                out = self._forward(x)
                tokens = self._dense.tokens(x)  # (n, side * side, C)
        side = spec.tile_px // spec.token_px
        if tokens.ndim != 3 or tokens.shape[:2] != (n, side * side):
            msg = (
                f"encoder {spec.name!r} gave tokens of shape {tuple(tokens.shape)} for {n} tiles; its spec says "
                f"token_px={spec.token_px}, {side} x {side} patches a tile. Are the weights those of another encoder?"
            )
            raise ValueError(msg)
        return tokens.float().clone().unflatten(1, (side, side)), self._pooled(out, n)

    def _check(self, tiles: Tensor) -> None:
        spec = self.spec
        if tiles.dtype != torch.uint8 or tiles.shape[1:] != (3, spec.tile_px, spec.tile_px):
            msg = (
                f"encoder {spec.name!r} takes uint8 tiles of shape (n, 3, {spec.tile_px}, {spec.tile_px}), red, green, "
                f"blue; not {tiles.dtype} of shape {tuple(tiles.shape)}."
            )
            raise ValueError(msg)

    def _normalised(self, tiles: Tensor) -> Tensor:
        x = (tiles.float() - self._mean) / self._std  # (n, 3, h, w)
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last else x

    def _autocast(self, tiles: Tensor) -> torch.autocast:
        half = self.precision(tiles.device) == torch.bfloat16
        return torch.autocast(tiles.device.type, dtype=torch.bfloat16, enabled=half)

    def _pooled(self, out: Any, n: int) -> Tensor:
        """Check what the network gave for ``n`` tiles, and copy it out of inference mode: a head may be trained on it."""
        spec = self.spec
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        if shape != (n, spec.embed_dim):
            what = f"an array of shape {shape}" if isinstance(shape, tuple) else f"a {shape}, not an array,"
            msg = (
                f"encoder {spec.name!r} gave {what} for {n} tiles; its spec says {(n, spec.embed_dim)}. "
                "Give the spec the right embed_dim, or pool the tokens."
            )
            raise ValueError(msg)
        return out.float().clone()


def weights_digest(module: nn.Module) -> str:
    """Hash all weights and buffers by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _installed(name: str) -> bool:
    return find_spec(name.replace("-", "_")) is not None


def own(module: nn.Module, spec: EncoderSpec) -> TileEncoder:
    """Wrap a module of the user's; it stops training. A vision transformer of timm has tokens."""
    found_px = patch_px(module, spec.tile_px)
    if spec.token_px not in (None, found_px):
        found = "it is no vision transformer of timm" if found_px is None else f"its patches are {found_px} px"
        msg = (
            f"EncoderSpec {spec.name!r}: token_px={spec.token_px} does not fit the module: {found}. Leave token_px out: "
            "of your own modules, only those have tokens, and their patches are read off them."
        )
        raise ValueError(msg)
    spec = replace(spec, token_px=found_px)
    return TileEncoder(spec, module.eval(), module, dense=None if found_px is None else of_timm(module))


# ------------------------------------------------------------------------------------------------- lazyslide-models


def load_registered(
    spec: EncoderSpec, *, how: str, repo: str, weights: str | Path | None, revision: str | None
) -> TileEncoder:
    """Load an encoder of lazyslide-models' registry, keeping its own pooling and colour statistics.

    ``how`` says where its weights can come from: ``timm`` and ``transformers`` (``remote-code``, if the repository
    brings its own) from a folder or any revision, ``file:NAME`` from that file, ``folder`` from a folder, ``hub`` and
    ``exported`` from the hub and its cache only.
    """
    from lazyslide_models import MODEL_REGISTRY

    kind, _, filename = how.partition(":")
    takes_weights = kind not in ("hub", "exported")
    refused = [] if takes_weights or weights is None else ["weights="]
    refused += [] if (takes_weights and kind != "folder") or revision is None else ["revision="]
    if refused:
        msg = (
            f"encoder {spec.name!r} is loaded by a library that takes no {' or '.join(refused)}. Put the wanted files "
            f"into the hub's cache (`hf download {repo}`, then point HF_HOME to it on the other machine)."
        )
        raise ValueError(msg)
    spec = replace(spec, revision=revision)
    source = None if weights is None else _local(weights, filename, one_file=kind == "file" or spec.name in _ONE_FILE)
    logger.info("loading encoder %s (%s parameters) from %s", spec.name, spec.n_parameters or "?", source or "the hub")
    with explained(spec, repo=repo, weights=weights, takes_weights=takes_weights), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="As from v0.8.2")  # on a change of their own, years ago
        model = _make(MODEL_REGISTRY[spec.name], spec, kind, filename, repo=repo, source=source, revision=revision)
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
    spec = replace(spec, mean=mean, std=std, revision=found)
    if kind == "exported":  # its graph is fixed, in float32 and for evaluation
        return TileEncoder(spec, model.encode_image, module, owner=model, half=False)
    module.eval()
    dense = None if spec.token_px is None else of_library(model)
    return TileEncoder(spec, model.encode_image, module, owner=model, dense=dense)


def _make(
    cls: Any, spec: EncoderSpec, kind: str, filename: str, *, repo: str, source: Path | None, revision: str | None
) -> Any:
    if source is None and revision is None:
        return cls()
    if kind == "file":
        from huggingface_hub import hf_hub_download

        return cls(model_path=str(source or hf_hub_download(repo, filename, revision=revision)))
    if kind == "folder" or (source is not None and source.is_file()):
        return cls(model_path=str(source))
    if kind == "timm":
        return _made_by_timm(cls, f"local-dir:{source}" if source else f"hf-hub:{repo}@{revision}")()
    from transformers import AutoImageProcessor, AutoModel

    # their constructors know one repository each; what they do beside loading it is done here
    options = {"trust_remote_code": kind == "remote-code"} | ({} if source else {"revision": revision})
    fixed = {"add_pooling_layer": False} if spec.name == "phikon" else {}
    model = cls.__new__(cls)
    model.model = AutoModel.from_pretrained(str(source or repo), **options, **fixed)
    model.num_prefix_tokens = 1 + int(getattr(model.model.config, "num_register_tokens", 0) or 0)
    if model.get_transform() is None:
        model.img_processor = AutoImageProcessor.from_pretrained(str(source or repo), **options)
    return model


def _made_by_timm(cls: Any, source: str) -> Any:
    """Derive a class that asks timm for ``source`` where ``cls`` names its repository on the hub.

    The derived class stands before ``TimmModel`` in the order of methods, so that it is handed what ``cls`` asks for:
    the architecture's options stay those of ``cls``.
    """
    from lazyslide_models import TimmModel

    class Redirected(TimmModel):
        def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(source if name.startswith(("hf-hub:", "hf_hub:")) else name, *args, **kwargs)

    return type(cls.__name__, (cls, Redirected), {})


class _Prepared:
    """Stands for a transformers processor once tiles are normalised on the device."""

    def __call__(self, images: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"pixel_values": images}


def _own_colours(model: Any) -> tuple[Any, Any]:
    """Take the colour statistics of a model's own transform, or of its processor, whose place is then taken."""
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
    msg = f"{type(model).__name__} of lazyslide-models does not say with which colours it was trained."
    raise RuntimeError(msg)


# -------------------------------------------------------------------------------------------------------------- timm


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
    asked: dict[str, Any] = {}
    source = f"{name}@{revision}" if revision else name
    if repo is None:
        _known_to_timm(name, weights)
        repo = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
    if weights is not None:
        local = _local(weights, "", one_file=not name.startswith("hf-hub:"))
        if local.is_file():
            asked["pretrained_cfg_overlay"] = {"file": str(local)}
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
        logger.info("encoder %r does not say at which scale it was trained: taking 0.5 µm per pixel (mpp=)", name)
    bare = None if repo is None else repo.partition("@")[0]  # timm takes a revision in the name, too
    with explained(spec, repo=bare, weights=weights, takes_weights=True):
        model: Any = timm.create_model(source, pretrained=True, num_classes=0, **asked).eval()
    data = resolve_model_data_config(model)
    _, height, width = data["input_size"]
    if height != width:
        msg = f"encoder {name!r} takes images of {height} x {width} px; histosge cuts square tiles only."
        raise ValueError(msg)
    spec = replace(
        spec,
        tile_px=int(height),
        embed_dim=int(getattr(model, "head_hidden_size", None) or model.num_features),  # what num_classes=0 gives
        mean=data["mean"],
        std=data["std"],
        licence=str(model.pretrained_cfg.get("license") or "unknown"),
        token_px=patch_px(model, int(height)),
        revision=commit(repo, revision) if weights is None and repo is not None else None,
    )
    return TileEncoder(spec, model, model, dense=None if spec.token_px is None else of_timm(model))


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
        msg = f"encoder='timm:{name}', but weights={str(folder)!r} holds {found!r}. Name that one, or pass another folder."
        raise ValueError(msg)


def _local(weights: str | Path, filename: str, *, one_file: bool) -> Path:
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
