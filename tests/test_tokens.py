"""Tokens: each patch of a tile has one, at its place, beside the very embedding that the tile has without them."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn

import histosge as sge
from histosge._encoders import TABLE, EncoderSpec, TileEncoder, known_spec, listed_spec, with_tokens, wrap_model


def noise(px, n=1, seed=0):
    return torch.randint(0, 256, (n, 3, px, px), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def spec(**values):
    return EncoderSpec(**({"name": "mine", "mpp": 0.5, "tile_px": 160, "embed_dim": 64} | values))


def normalised(encoder, some):
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.spec.mean, encoder.spec.std))
    return (some.float() / 255 - mean) / std


def at_their_places(encoder):
    """Where a patch of the tile changes, its own token changes most; three places that no flip or turn confuses."""
    px, side = encoder.spec.token_px, encoder.spec.tile_px // encoder.spec.token_px
    places = [(0, 1), (side - 1, 2), (side // 2, side - 1)]
    some = noise(encoder.spec.tile_px).repeat(4, 1, 1, 1)
    for tile, (r, c) in zip(some[1:], places, strict=True):
        patch = tile[:, r * px : (r + 1) * px, c * px : (c + 1) * px]
        patch.copy_(255 - patch)
    tokens, _ = encoder.embed_tokens(some)
    moved = (tokens[1:] - tokens[0]).norm(dim=-1)  # (3, side, side)
    assert [divmod(int(change.argmax()), side) for change in moved] == places
    farther = moved.flatten(1).topk(2).values
    assert (farther[:, 0] > 1.2 * farther[:, 1]).all()
    return tokens


# ---------------------------------------------------------------------------------------------------- the spec


def test_spec_tells_the_size_of_a_token():
    dense = spec(mpp=0.5, tile_px=224, token_px=14)
    assert dense.token_um == 7
    assert dense.to_dict()["token_px"] == 14
    assert spec().token_um is None
    assert "token_px" not in spec().to_dict()
    assert spec(tile_px=32, token_px=32).token_um == 16  # one token a tile


@pytest.mark.parametrize("wrong", [0, -16, 16.0, "16", True])
def test_spec_refuses_what_is_no_size(wrong):
    with pytest.raises(ValueError, match=rf"token_px={wrong!r} must be a whole number above 0"):
        spec(token_px=wrong)


@pytest.mark.parametrize("wrong", [14, 320])
def test_spec_refuses_patches_that_do_not_fill_a_tile(wrong):
    with pytest.raises(ValueError, match=rf"token_px={wrong} does not divide tile_px=160; whole patches must fill"):
        spec(token_px=wrong)


# ---------------------------------------------------------------------------------------------------- the list


@pytest.fixture(scope="module")
def registry():
    from lazyslide_models._model_registry import MODEL_REGISTRY

    return MODEL_REGISTRY


DENSE = [name for name, row in TABLE.items() if row.token_px is not None]


def test_list_tells_the_size_of_a_token():
    frame = sge.encoders()
    assert frame["token_um"].dtype == float
    assert list(frame.index[frame["token_um"].notna()]) == sorted(with_tokens(), key=list(frame.index).index)
    told = frame.loc[["h-optimus-0", "uni", "lunit-dino-s8", "plip", "conch"], "token_um"]
    np.testing.assert_allclose(told, [7, 8, 4, 16, 64 / 7], rtol=1e-5)
    assert frame.loc[["lunit-bt", "ctranspath", "musk"], "token_um"].isna().all()


@pytest.mark.parametrize("name", sorted(TABLE))
def test_row_has_tokens_where_the_library_has(registry, name):
    assert (TABLE[name].token_px is not None) == hasattr(registry[name], "encode_image_dense")


def _number(text):
    return float(text[:-1]) * {"M": 1e6, "G": 1e9, "B": 1e9}[text[-1]]


def _as_written(name, model):
    """From ``vit_large_patch16_224``, ``ViT-S/16``, ``patch_size = (14, 14)``, ``B-32``: of its page, or of its class."""
    sources = [inspect.getsource(c) for c in model.__mro__ if c.__module__ == model.__module__]
    for text in (TABLE[name].repo, "\n".join(sources)):
        found = re.findall(r"patch(\d+)_|ViT-[\w*]+/(\d+)|patch_size\D+(\d+)|-B-(\d+)|dinov2_vit\w(\d+)", text)
        if found:
            return {int(number) for numbers in found for number in numbers if number}
    return set()


def _by_cost(name, model):
    """A pass costs two operations a parameter and token, and some for attention: so many patches are 224 px wide."""
    if model.flops is None or name.startswith("conch"):  # whose parameters include those of the text
        return set()
    across = math.sqrt(_number(model.flops) / 2 / _number(model.param_size))
    return {min((8, 14, 16, 32), key=lambda px: abs(224 / px - across))}


def test_size_of_a_patch_is_what_library_and_cost_say(registry):
    said = {name: _as_written(name, registry[name]) | _by_cost(name, registry[name]) for name in DENSE}
    assert {name for name, sizes in said.items() if not sizes} == {"h-optimus-0", "gigapath"}  # their pages do
    assert {name: sizes for name, sizes in said.items() if sizes} == {
        name: {TABLE[name].token_px} for name, sizes in said.items() if sizes
    }


# ---------------------------------------------------------------------------------------------------- timm

VITS = {
    "class token": ("test_vit", 160, {}),
    "mean of patches": ("test_vit4", 160, {"class_token": True}),
    "mean, no class token": ("test_vit", 160, {"class_token": False, "global_pool": "avg"}),
    "attention pool": ("test_vit3", 160, {}),
    "registers": ("vit_tiny_patch16_224", 224, {"depth": 2, "reg_tokens": 4}),
    "patches of 14 px, registers": ("vit_small_patch14_reg4_dinov2", 112, {"depth": 1, "img_size": 112}),
    "registers, no class token": ("test_vit", 160, {"class_token": False, "reg_tokens": 3, "global_pool": "avg"}),
    "other input": ("test_vit", 96, {"img_size": 96}),
    "any input": ("test_vit", 96, {"dynamic_img_size": True}),
    "two class tokens": ("deit_tiny_distilled_patch16_224", 224, {"depth": 1}),
    "relative positions": ("vit_relpos_small_patch16_224", 224, {"depth": 2, "embed_dim": 48, "num_heads": 3}),
    "rotary positions": ("vit_small_patch16_dinov3", 128, {"depth": 1, "img_size": 128}),
    "beit": ("beit_base_patch16_224", 224, {"depth": 1, "embed_dim": 48, "num_heads": 3}),
}


@pytest.fixture(scope="module", params=VITS)
def vit(request):
    name, px, options = VITS[request.param]
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, num_classes=0, **options)
    for part_name, part in network.named_parameters():
        if "gamma" in part_name or "norm" in part_name:  # ones and nearly zeros at the start, which would hide a norm
            nn.init.uniform_(part, 0.3, 1)
    return sge.load_encoder(network, spec=spec(tile_px=px, embed_dim=network.num_features)), network


def test_token_is_where_its_patch_is(vit):
    at_their_places(vit[0])


def test_tokens_are_the_networks(vit):
    """Timm's own way to lay them out: of the last block, class tokens and registers taken off."""
    encoder, network = vit
    some = noise(encoder.spec.tile_px, n=2)
    with torch.inference_mode():
        (maps,) = network.forward_intermediates(
            normalised(encoder, some), indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        wanted = maps.permute(0, 2, 3, 1)  # (n, row, col, C)
        if isinstance(network.norm, nn.Identity):
            wanted = network.fc_norm(wanted)
    tokens, _ = encoder.embed_tokens(some)
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, wanted, rtol=1e-3, atol=1e-4)


def test_embedding_is_the_same_with_tokens(vit):
    encoder, network = vit
    some = noise(encoder.spec.tile_px, n=3)
    passes = []
    handle = network.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    tokens, summary = encoder.embed_tokens(some)
    handle.remove()
    assert len(passes) == 1
    torch.testing.assert_close(summary, encoder.embed(some), rtol=0, atol=0)
    assert summary.std(0).min() > 0
    again, _ = encoder.embed_tokens(some.flip(0))
    torch.testing.assert_close(again.flip(0), tokens)  # nothing is remembered from one call to the next


def test_further_tokens_never_come_with_the_patches():
    """Class token and registers are made to stand out a thousandfold; no token of a patch is anything like them."""
    network = timm.create_model("test_vit", pretrained=False, num_classes=0, reg_tokens=4)
    network.blocks, network.norm = nn.Sequential(), nn.Identity()
    nn.init.constant_(network.cls_token, 1e4)
    nn.init.constant_(network.reg_token, -1e4)
    encoder = sge.load_encoder(network, spec=spec())
    tokens, summary = encoder.embed_tokens(noise(160, n=2))
    assert tokens.abs().max() < 100
    assert summary.min() > 1000


def test_token_is_the_mean_colour_of_its_patch():
    """A known truth: a network without blocks whose patches are their mean colours."""
    network = timm.create_model("test_vit", pretrained=False, num_classes=0)
    network.blocks, network.norm = nn.Sequential(), nn.Identity()
    nn.init.zeros_(network.pos_embed)
    nn.init.zeros_(network.patch_embed.proj.bias)
    nn.init.zeros_(network.patch_embed.proj.weight)
    for channel in range(3):
        nn.init.constant_(network.patch_embed.proj.weight[channel, channel], 1 / 256)
    encoder = sge.load_encoder(network, spec=spec(mean=(0, 0, 0), std=(1, 1, 1)))
    some = noise(160, n=2)
    tokens, _ = encoder.embed_tokens(some)
    wanted = (some.numpy() / 255).reshape(2, 3, 10, 16, 10, 16).mean((3, 5)).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(tokens[..., :3], wanted, atol=1e-5)


def test_loaded_from_a_folder(tmp_path):
    from timm.models import save_for_hf

    torch.manual_seed(0)
    save_for_hf(timm.create_model("test_vit", pretrained=False, num_classes=0), tmp_path, safe_serialization=True)
    encoder = sge.load_encoder("timm:test_vit", weights=tmp_path, mpp=0.25)
    assert (encoder.spec.token_px, encoder.spec.token_um) == (16, 4)
    at_their_places(encoder)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_network_without_patches(name):
    network = timm.create_model(name, pretrained=False, num_classes=0)
    encoder = sge.load_encoder(network, spec=spec(embed_dim=network.num_features))
    assert encoder.spec.token_px is None
    with pytest.raises(ValueError, match=r"encoder 'mine' gives no token for each patch") as told:
        encoder.embed_tokens(noise(160))
    for name in ("stain-texture", "h-optimus-0", "virchow2", "timm:vit_..."):
        assert f"'{name}'" in str(told.value)
    assert "'lunit-bt'" not in str(told.value)


def test_patches_that_do_not_fill_a_tile():
    network = timm.create_model(
        "test_vit", pretrained=False, num_classes=0, dynamic_img_size=True, dynamic_img_pad=True
    )
    encoder = sge.load_encoder(network, spec=spec(tile_px=150))
    assert encoder.spec.token_px is None
    assert encoder.embed(noise(150)).shape == (1, 64)


class Own(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def test_own_module_has_none():
    assert sge.load_encoder(Own(), spec=spec(embed_dim=3)).spec.token_px is None
    with pytest.raises(ValueError, match=r"token_px=16 does not fit the module: it is no vision transformer of timm"):
        sge.load_encoder(Own(), spec=spec(embed_dim=3, token_px=16))


def test_own_transformer_of_timm():
    network = timm.create_model("test_vit", pretrained=False, num_classes=3)
    encoder = sge.load_encoder(network, spec=spec(embed_dim=3, token_px=16))
    tokens, summary = encoder.embed_tokens(noise(160, n=2))
    assert (tokens.shape, summary.shape) == ((2, 10, 10, 64), (2, 3))  # its own head is part of what it says of a tile
    torch.testing.assert_close(summary, encoder.embed(noise(160, n=2)), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"token_px=8 does not fit the module: its patches are 16 px\. Leave token_px"):
        sge.load_encoder(network, spec=spec(embed_dim=3, token_px=8))


def test_what_is_done_to_pooling_stays_done():
    """A transformer of timm with a forward of one's own: the embedding is what that gives, in two passes if need be."""

    class Odd(timm.models.VisionTransformer):
        def forward(self, x):
            return self.blocks(self._pos_embed(self.patch_embed(x))).mean(1) * 2

    torch.manual_seed(0)
    encoder = sge.load_encoder(Odd(img_size=160, embed_dim=64, depth=1, num_heads=2), spec=spec())
    some = noise(160, n=2)
    tokens, summary = encoder.embed_tokens(some)
    torch.testing.assert_close(summary, encoder.embed(some), rtol=0, atol=0)
    assert tokens.shape == (2, 10, 10, 64)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return sge.load_encoder(timm.create_model("test_vit", pretrained=False, num_classes=0), spec=spec())


@pytest.mark.parametrize("wrong", [noise(160).float(), noise(144), noise(160)[0]], ids=["float", "small", "one tile"])
def test_tiles_of_another_kind(encoder, wrong):
    with pytest.raises(
        ValueError, match=r"'mine' takes uint8 tiles of shape \(n, 3, 160, 160\), red, green, blue; not"
    ):
        encoder.embed_tokens(wrong)


def test_no_tiles(encoder):
    tokens, summary = encoder.embed_tokens(noise(160)[:0])
    assert (tokens.shape, summary.shape) == ((0, 10, 10, 64), (0, 64))


def test_a_head_can_be_trained_on_tokens(encoder):
    head = nn.Linear(64, 1)
    tokens, _ = encoder.embed_tokens(noise(160))
    assert tokens.is_contiguous()
    head(tokens).sum().backward()
    assert head.weight.grad.abs().sum() > 0


def test_unpooled_network_is_refused():
    network = timm.create_model("test_vit", pretrained=False, num_classes=0, global_pool="")
    with pytest.raises(ValueError, match=r"gave an array of shape \(1, 101, 64\) for 1 tiles.*pool the tokens"):
        sge.load_encoder(network, spec=spec()).embed_tokens(noise(160))


def test_weights_with_other_patches_are_found_out(encoder):
    network = encoder.module
    wrong = TileEncoder(
        spec(token_px=8), network, network, dense=lambda x: (network.forward_features(x)[:, 1:], network(x))
    )
    match = r"gave tokens of shape \(1, 100, 64\) for 1 tiles; its spec says token_px=8, 20 x 20 patches a tile"
    with pytest.raises(ValueError, match=match):
        wrong.embed_tokens(noise(160))


# -------------------------------------------------------------------------------------------- lazyslide-models


def tiny_vit(px, **options):
    torch.manual_seed(0)
    base = {
        "img_size": 128 if px == 32 else 112,
        "patch_size": px,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 0,
    }
    return timm.models.VisionTransformer(**(base | options)).eval()


def tiny_dinov2(px, *, registers=0):
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 112}
    if registers:
        config = Dinov2WithRegistersConfig(**shape, patch_size=px, num_register_tokens=registers)
        return Dinov2WithRegistersModel(config).eval()
    return Dinov2Model(Dinov2Config(**shape, patch_size=px)).eval()


def tiny_phikon(px):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTModel(ViTConfig(**shape, image_size=112, patch_size=px), add_pooling_layer=False).eval()


def tiny_clip(px):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = shape | {"image_size": 128, "patch_size": px, "projection_dim": 32}
    text = shape | {"vocab_size": 10, "projection_dim": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=32)).eval()
    nn.init.uniform_(model.vision_model.post_layernorm.weight, 0.2, 3)
    nn.init.uniform_(model.vision_model.post_layernorm.bias, -1, 1)
    return model


class Waiv(nn.Module):
    """What the remote code of mascaret and phaet says of itself: DINOv2 inside, its class token of length one."""

    def __init__(self, px):
        super().__init__()
        self.inner = tiny_dinov2(px)

    def forward(self, pixel_values):
        hidden = self.inner(pixel_values).last_hidden_state
        return SimpleNamespace(last_hidden_state=hidden, pooler_output=nn.functional.normalize(hidden[:, 0], dim=-1))


class Prepared:
    """In the place of a processor: tiles are normalised already."""

    def __call__(self, images, **_):
        return {"pixel_values": images}


class Dinov2Hub(nn.Module):
    """The interface of facebookresearch/dinov2."""

    def __init__(self, px):
        super().__init__()
        self.vit, self.head = tiny_vit(px, reg_tokens=4), nn.Identity()

    def forward_features(self, x, masks=None):
        out = self.vit.forward_features(x)
        return {"x_norm_clstoken": out[:, 0], "x_norm_regtokens": out[:, 1:5], "x_norm_patchtokens": out[:, 5:]}

    def forward(self, *args, is_training=False, **kwargs):
        out = self.forward_features(*args, **kwargs)
        return out if is_training else self.head(out["x_norm_clstoken"])


class PathFM(nn.Module):
    """The interface of GenBio-PathFM: one colour at a time."""

    def __init__(self, px):
        super().__init__()
        self.vit = tiny_vit(px, reg_tokens=4, in_chans=1)

    def _encode(self, x):
        out = self.vit.forward_features(x)
        return {"x_norm_clstoken": out[:, 0], "x_norm_patchtokens": out[:, 5:]}


class Contrastive(nn.Module):
    """The interface of CONCH and of open_clip: a tower that pools tokens into a space shared with text."""

    def __init__(self, tower):
        super().__init__()
        self.visual = tower

    def encode_image(self, x, normalize=True, proj_contrast=True):
        out = self.visual(x)
        return nn.functional.normalize(out, dim=-1) if normalize else out


class Trunk(nn.Module):
    def __init__(self, px, *, as_conch):
        super().__init__()
        self.trunk, self.head = tiny_vit(px), nn.Linear(32, 32)
        self.as_conch = as_conch
        if as_conch:
            self.trunk.forward = self.trunk.forward_features

    def forward(self, x):
        out = self.trunk(x)
        return self.head(out.mean(1) if self.as_conch else out)


class OpenClip(nn.Module):
    def __init__(self, px):
        super().__init__()
        self.vit, self.proj = tiny_vit(px), nn.Linear(32, 32)
        self.transformer, self.ln_post = self.vit.blocks, self.vit.norm

    def _embeds(self, x):
        return self.vit._pos_embed(self.vit.patch_embed(x))

    def forward(self, x):
        return self.proj(self.ln_post(self.transformer(self._embeds(x)))[:, 0])


def timm_like(**options):
    return lambda px: tiny_vit(px, **options)


GIGAPATH = {"gigapath": timm_like(), "gigapath-flash": timm_like()}
FAMILIES = GIGAPATH | {
    "h-optimus-0": timm_like(reg_tokens=4, init_values=0.5),
    "h-optimus-1": timm_like(reg_tokens=4),
    "h0-mini": timm_like(reg_tokens=4, global_pool=""),
    "uni": timm_like(dynamic_img_size=True),
    "uni2": timm_like(reg_tokens=8, no_embed_class=True, dynamic_img_size=True),
    "virchow": timm_like(global_pool=""),
    "virchow2": timm_like(global_pool="", reg_tokens=4),
    "crisp": timm_like(global_pool="", reg_tokens=4),
    "crown": timm_like(),
    "mstar": timm_like(),
    "gpfm": timm_like(),
    "lunit-dino-s8": timm_like(),
    "lunit-dino-s8-moozy": timm_like(),
    "lunit-dino-s16": timm_like(),
    "phikon": tiny_phikon,
    "phikonv2": tiny_dinov2,
    "midnight": tiny_dinov2,
    "hibou-b": lambda px: tiny_dinov2(px, registers=4),
    "hibou-l": lambda px: tiny_dinov2(px, registers=4),
    "rudolfv2-s": lambda px: tiny_dinov2(px, registers=8),
    "rudolfv2-b": lambda px: tiny_dinov2(px, registers=8),
    "rudolfv2": lambda px: tiny_dinov2(px, registers=8),
    "mascaret": Waiv,
    "phaet": Waiv,
    "open-midnight": Dinov2Hub,
    "genbio-pathfm": PathFM,
    "plip": tiny_clip,
    "conch": lambda px: Contrastive(Trunk(px, as_conch=True)),
    "conch-madeleine": lambda px: Contrastive(Trunk(px, as_conch=True)),
    "quiltnet-b16": lambda px: Contrastive(OpenClip(px)),
    "quiltnet-b32": lambda px: Contrastive(OpenClip(px)),
    "quiltnet-b16-pmb": lambda px: Contrastive(Trunk(px, as_conch=False)),
}
TWO_PASSES = {"conch", "conch-madeleine", "quiltnet-b16", "quiltnet-b32"}
OWN_POOLING = {"h0-mini": 64, "virchow": 64, "virchow2": 64, "crisp": 64, "midnight": 64, "genbio-pathfm": 96}


def test_every_dense_encoder_is_among_the_families():
    assert set(FAMILIES) == set(DENSE)


def first_block(network):
    """First block of whatever transformer of images is inside."""
    return next(
        part
        for part in getattr(network, "vision_model", network).modules()
        if type(part).__name__ in ("Block", "ViTLayer", "Dinov2Layer", "Dinov2WithRegistersLayer", "CLIPEncoderLayer")
    )


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, registry):
    """An encoder of the library with a tiny network of the same make, as ``load_registered`` would dress it."""
    name = request.param
    px = TABLE[name].token_px
    network = FAMILIES[name](px)
    model = registry[name].__new__(registry[name])
    model.model = network
    model.num_prefix_tokens = getattr(network, "num_prefix_tokens", None) or 1 + getattr(
        getattr(network, "config", None), "num_register_tokens", 0
    )
    model.img_processor = model.processor = Prepared()
    own_spec = replace(listed_spec(name), tile_px=128 if px == 32 else 112, embed_dim=OWN_POOLING.get(name, 32))
    return wrap_model(model, own_spec), model


def test_family_has_tokens_at_their_places(family):
    tokens = at_their_places(family[0])
    side = family[0].spec.tile_px // family[0].spec.token_px
    assert tokens.shape == (4, side, side, 96 if family[0].spec.name == "genbio-pathfm" else 32)


def test_family_embeds_as_without_tokens(family):
    encoder, model = family
    some = noise(encoder.spec.tile_px, n=3)
    passes = []
    handle = first_block(model.model).register_forward_hook(lambda *_: passes.append(1))
    _, summary = encoder.embed_tokens(some)
    handle.remove()
    assert len(passes) == 1 + (encoder.spec.name in TWO_PASSES)
    torch.testing.assert_close(summary, encoder.embed(some), rtol=0, atol=0)
    torch.testing.assert_close(summary, model.encode_image(normalised(encoder, some)), rtol=1e-4, atol=1e-4)
    assert summary.std(0).max() > 0


def test_family_has_the_tokens_of_its_library(family):
    encoder, model = family
    if encoder.spec.name == "plip":  # see below
        return
    some = noise(encoder.spec.tile_px, n=2)
    tokens, _ = encoder.embed_tokens(some)
    wanted = model.encode_image_dense(normalised(encoder, some)).patch_tokens
    torch.testing.assert_close(tokens.flatten(1, 2), wanted, rtol=1e-4, atol=1e-4)
    if encoder.spec.embed_dim == 2 * tokens.shape[-1]:  # class token beside the mean of the patches
        torch.testing.assert_close(tokens.mean((1, 2)), encoder.embed(some)[:, 32:], rtol=1e-4, atol=1e-4)


def test_clip_has_its_last_norm_on_every_token(registry):
    """transformers applies it to the class token alone: the tokens lazyslide-models gives are still without."""
    model = registry["plip"].__new__(registry["plip"])
    model.model, model.processor = tiny_clip(32), Prepared()
    encoder = wrap_model(model, replace(listed_spec("plip"), tile_px=128, embed_dim=32))
    some = noise(128, n=2)
    vision = model.model.vision_model
    with torch.inference_mode():
        out = vision(normalised(encoder, some))
        torch.testing.assert_close(vision.post_layernorm(out.last_hidden_state[:, 0]), out.pooler_output)
        wanted = vision.post_layernorm(out.last_hidden_state[:, 1:])
        assert (wanted - out.last_hidden_state[:, 1:]).abs().max() > 0.1
    torch.testing.assert_close(encoder.embed_tokens(some)[0].flatten(1, 2), wanted, rtol=1e-4, atol=1e-4)


def test_registered_encoder_from_a_folder(tmp_path):
    from timm.models import save_for_hf

    torch.manual_seed(0)
    options = {"depth": 1}
    network = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0, **options)
    save_for_hf(network, tmp_path, model_args=options, safe_serialization=True)
    encoder = sge.load_encoder("lunit-dino-s16", weights=tmp_path)
    at_their_places(encoder)
    some = noise(224, n=2)
    tokens, summary = encoder.embed_tokens(some)
    assert tokens.shape == (2, 14, 14, 384)
    torch.testing.assert_close(summary, encoder.embed(some), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"token_px=8, 28 x 28 patches a tile\. Are the weights those of another"):
        sge.load_encoder("lunit-dino-s8", weights=tmp_path).embed_tokens(some)


def test_exported_encoder_has_none():
    told = listed_spec("ctranspath")
    assert told.token_um is None
    with pytest.raises(ValueError, match="'ctranspath' gives no token for each patch"):
        TileEncoder(told, Own(), Own()).embed_tokens(noise(224))


def test_encoders_without_tokens_are_known_before_they_are_loaded():
    assert known_spec("lunit-bt").token_px is None
    assert known_spec("1aurent/resnet50.lunit_bt").token_px is None
    assert known_spec("H-Optimus-0").token_px == 14
    assert known_spec("stain-texture").token_px == 4
    assert known_spec("timm:resnet18") is None  # only its network says
