"""Encoders: what the list says, what they compute, what happens where weights cannot be had."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from torch import nn

import histosge as sge
from histosge._encoders import (
    ALIASES,
    DEFAULT_ENCODER,
    OPEN,
    TABLE,
    EncoderSpec,
    code_of,
    commit,
    encoder_digest,
    listed_spec,
)

LUNIT_MEAN = (0.70322989, 0.53606487, 0.66096631)  # as the authors of lunit-dino state them
LUNIT_STD = (0.21716536, 0.26081574, 0.20723464)
TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}|[Tt]oken\s*[=:]")


def tiles(n=5, px=160, seed=0):
    """Noise over a gradient: every tile, channel and corner is different."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 120, px)[None, None, None, :] * random.uniform(0.2, 1, (n, 3, 1, 1))
    return torch.from_numpy((ramp + random.uniform(0, 130, (n, 3, px, px))).astype(np.uint8))


def save_weights(folder, *, name, seed=0, model_args=None, **kwargs):
    """Write a random-weight model in the layout of the hub, as `hf download` leaves it."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False, num_classes=0, **(model_args or {}), **kwargs).eval()
    model._model_args = {}  # layers among kwargs cannot be written; their encoders bring them
    save_for_hf(model, folder, model_args=model_args, safe_serialization=True)
    return model


def by_its_library(name, network, some):
    """Embed tiles with the class of lazyslide-models and its own transform."""
    from lazyslide_models import MODEL_REGISTRY

    theirs = MODEL_REGISTRY[name].__new__(MODEL_REGISTRY[name])
    theirs.model, theirs.img_size, theirs.num_prefix_tokens = network, (224, 224), network.num_prefix_tokens
    transform = theirs.get_transform()
    return theirs.encode_image(torch.stack([transform(tile.permute(1, 2, 0).numpy()) for tile in some]))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a ViT with 0.3 M random weights, and the model itself."""
    folder = tmp_path_factory.mktemp("weights") / "test_vit"
    return folder, save_weights(folder, name="test_vit")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folder of a random-weight ViT-S/16: the architecture of lunit-dino-s16."""
    folder = tmp_path_factory.mktemp("weights") / "vit_small"
    return folder, save_weights(folder, name="vit_small_patch16_224")


class Means(nn.Module):
    """Mean of each channel: an encoder of a user's own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x.mean((2, 3)) * self.weight


def own_spec(**values):
    return EncoderSpec(**({"name": "mine", "mpp": 1.0, "tile_px": 32, "embed_dim": 3} | values))


# ---------------------------------------------------------------------------------------------------- the list


def test_list():
    frame = sge.encoders()
    assert list(frame.index[:3]) == ["stain-texture", "rgb", "midnight"]
    assert frame.index.is_unique
    assert set(frame["source"]) == {"built-in", "lazyslide-models"}
    columns = ["mpp", "mpp_source", "tile_px", "tile_um", "token_um", "embed_dim", "parameters", "licence", "gated"]
    assert list(frame.columns) == [*columns, "commercial", "remote_code", "source", "url"]
    assert frame.drop(columns="token_um").notna().all(axis=None)
    np.testing.assert_allclose(frame["tile_um"], frame["mpp"] * frame["tile_px"])
    assert frame["gated"].dtype == bool
    assert frame.loc["midnight", ["gated", "commercial"]].tolist() == [False, True]  # the default: no login, any use
    assert not frame.loc[[*OPEN, "stain-texture", "rgb"], "gated"].any()  # what the errors recommend
    assert set(ALIASES.values()) <= set(frame.index)
    assert not set(ALIASES) & set(frame.index)
    plain = {re.sub(r"[^a-z0-9]", "", name.lower()) for name in frame.index}
    assert len(plain) == len(frame)  # names stay apart without case and marks


def test_scales_are_those_of_the_cut_tiles():
    """CONCH: 512 px at 20x shrunk to 448; for MADELEINE 256 px at 10x shrunk to 224."""
    tile_um = sge.encoders()["tile_um"]
    np.testing.assert_allclose(tile_um[["conch", "conch_v1.5", "conch-madeleine"]], 256, rtol=1e-5)
    np.testing.assert_allclose(tile_um[["uni", "virchow2", "h-optimus-0", "midnight"]], 112)
    np.testing.assert_allclose(tile_um[["ctranspath", "chief"]], 224)


def test_list_agrees_with_the_default_of_the_doors():
    import inspect

    for door in (sge.tl.embed, sge.tl.fit, sge.tl.predict, sge.tl.evaluate):
        assert inspect.signature(door).parameters["encoder"].default == DEFAULT_ENCODER == "midnight"


def test_list_needs_no_model_library():
    code = (
        "import json, sys; import histosge as sge; n = len(sge.encoders()); "
        "print(json.dumps([n, [m for m in ('lazyslide_models', 'timm', 'transformers') if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    n, loaded = json.loads(done.stdout)
    assert n > 30
    assert loaded == []


@pytest.fixture(scope="module")
def registry():
    from lazyslide_models._model_registry import MODEL_REGISTRY

    return MODEL_REGISTRY


def test_list_holds_every_encoder_of_the_registry(registry):
    def tasks(model):
        return [t.value for t in (model.task if isinstance(model.task, list) else [model.task])]

    vision = {name for name, model in registry.items() if "vision" in tasks(model)}
    assert vision <= set(TABLE)
    with_text = {n for n, m in registry.items() if "multimodal" in tasks(m) and hasattr(m, "encode_image")}
    general = {"biomedclip", "conceptclip", "medsiglip"}  # of any medical image, not of pathology
    assert set(TABLE) == vision | with_text - general - {"titan"}  # an alias of conch_v1.5


OTHERWISE_GATED = {"h-optimus-0": True, "midnight": False}  # the registry is out of date: see _registry.py


@pytest.mark.parametrize("name", sorted(TABLE))
def test_row_agrees_with_the_registry(registry, name):
    spec, model = listed_spec(name), registry[name]
    if name not in ("path_orchestra", "omiclip"):  # the registry does not say
        assert spec.embed_dim == model.encode_dim
    licence = model.license if isinstance(model.license, str) else "; ".join(model.license)
    assert spec.licence == licence
    assert spec.gated == OTHERWISE_GATED.get(name, model.is_gated)
    assert spec.commercial == model.commercial
    assert spec.n_parameters == model.param_size
    if model.input_constraint is not None:
        model.input_constraint.validate(spec.tile_px)
    if name == "hibou-l":  # the registry repeats the page of hibou-b
        assert model.hf_url.endswith("hibou-b")
    elif model.hf_url is not None:
        assert spec.url.lower() == model.hf_url.lower()


# ---------------------------------------------------------------------------------------------------- the spec


def test_spec_gives_tile_and_plain_values():
    spec = own_spec(mpp=0.5, tile_px=224)
    assert spec.tile_um == 112
    told = spec.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert None not in told.values()
    assert type(told["mean"]) is list
    with pytest.raises(FrozenInstanceError):
        spec.mpp = 1.0
    assert own_spec(mean=[0, 1, 0]).mean == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"name": ""}, "name='' must be a word"),
        ({"name": None}, "name=None must be a word"),
        ({"mpp": 0}, "mpp=0 is not a number of µm per pixel"),
        ({"mpp": -0.5}, r"mpp=-0\.5 is not"),
        ({"mpp": float("nan")}, "mpp=nan is not"),
        ({"mpp": 1e3}, r"mpp=1000\.0 is not"),
        ({"tile_px": 0}, "tile_px=0 must be a whole number above 0"),
        ({"tile_px": 224.0}, r"tile_px=224\.0 must be a whole number"),
        ({"embed_dim": -1}, "embed_dim=-1 must be a whole number"),
        ({"mean": (0.5, 0.5)}, r"mean=\(0\.5, 0\.5\) must be three numbers"),
        ({"std": (0.5, 0.5, 0.0)}, r"std=.* must be three numbers"),
        ({"mpp": "0.5"}, "mpp='0.5' is not a number"),
        ({"embed_dim": True}, "embed_dim=True must be a whole number"),
        ({"mean": (0.5, 0.5, float("nan"))}, r"mean=.*nan.* must be three numbers"),
        ({"source": "hub"}, "source='hub' must be one of"),
        ({"mpp_source": "guess"}, "mpp_source='guess' must be one of"),
    ],
)
def test_spec_refuses(wrong, match):
    with pytest.raises(ValueError, match=match):
        own_spec(**wrong)


# ---------------------------------------------------------------------------------------------------- by name


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("stain-textur", "stain-texture"),
        ("h-optimus-2", "h-optimus-0"),
        ("Virchow_3", "virchow2"),
        ("unii", "uni"),
        ("gigapth", "gigapath"),
    ],
)
def test_unknown_name_lists_the_closest(name, close):
    with pytest.raises(ValueError, match=rf"encoder='{name}' is unknown\. Did you mean .*'{close}'") as told:
        sge.load_encoder(name)
    assert "histosge.encoders()" in str(told.value)


def test_unknown_name_that_is_like_nothing():
    with pytest.raises(ValueError, match=r"encoder='qqqqqq' is unknown\. List the encoders"):
        sge.load_encoder("qqqqqq")


def test_unknown_name_of_timm_lists_the_closest():
    with pytest.raises(ValueError, match=r"timm:vit_smal_patch16_224.*Did you mean .*vit_small_patch16_224"):
        sge.load_encoder("timm:vit_smal_patch16_224")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("timm:vit_small_patch16_224.none", r"no such trained weights of 'vit_small_patch16_224'; those are .*\.dino'"),
        ("timm:vit_giant_patch14_224", r"no such trained weights of 'vit_giant_patch14_224'; there are none"),
    ],
)
def test_timm_has_no_such_weights(name, match):
    with pytest.raises(ValueError, match=match):
        sge.load_encoder(name)


def test_loaded_encoder_passes_through():
    encoder = sge.load_encoder("stain-texture")
    assert sge.load_encoder(encoder) is encoder
    own = sge.load_encoder(Means(), spec=own_spec())
    assert sge.load_encoder(own) is own


@pytest.mark.parametrize("what", [{"weights": "here"}, {"revision": "main"}, {"mpp": 0.5}])
def test_options_belong_to_names(what):
    with pytest.raises(ValueError, match=rf"{next(iter(what))}= is for encoders that are loaded by name"):
        sge.load_encoder(Means(), spec=own_spec(), **what)


@pytest.mark.parametrize("what", [{"weights": "here"}, {"revision": "main"}, {"mpp": 0.5}])
def test_built_in_takes_nothing(what):
    with pytest.raises(ValueError, match="'stain-texture' is built in: it takes no weights=, revision= or mpp="):
        sge.load_encoder("stain-texture", **what)


def test_spec_belongs_to_an_own_module_only():
    with pytest.raises(ValueError, match=r"spec= describes a module of your own; encoder='uni' is a name"):
        sge.load_encoder("uni", spec=own_spec())


@pytest.mark.parametrize("wrong", [None, 3, np.zeros(3)])
def test_neither_name_nor_module(wrong):
    with pytest.raises(ValueError, match="neither a name, an encoder of `histosge.load_encoder`, nor a torch module"):
        sge.load_encoder(wrong)


# ------------------------------------------------------------------------------------------------- own module


def test_own_module_is_fed_normalised_tiles():
    encoder = sge.load_encoder(Means(), spec=own_spec(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125)))
    some = tiles(4, 32)
    given = some.numpy() / 255
    wanted = (given - np.reshape([0.1, 0.2, 0.3], (1, 3, 1, 1))) / np.reshape([0.5, 0.25, 0.125], (1, 3, 1, 1))
    out = encoder.embed(some)
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out, wanted.mean((2, 3)), atol=1e-4)
    assert repr(encoder) == "TileEncoder('mine', 32 px at 1 µm per pixel)"


def test_own_module_stops_training():
    module = nn.Sequential(Means(), nn.Dropout(0.9)).train()
    encoder = sge.load_encoder(module, spec=own_spec())
    some = tiles(4, 32)
    torch.testing.assert_close(encoder.embed(some), encoder.embed(some), rtol=0, atol=0)


def test_own_module_that_returns_no_array():
    class Output(nn.Module):
        def forward(self, x):
            return {"pooled": x.mean((2, 3))}

    with pytest.raises(ValueError, match=r"'mine' gave a dict, not an array, for 4 tiles; its spec says \(4, 3\)"):
        sge.load_encoder(Output(), spec=own_spec()).embed(tiles(4, 32))


@pytest.mark.parametrize(
    "wrong",
    [tiles(4, 32).float(), tiles(4, 31), tiles(4, 32).permute(0, 2, 3, 1), tiles(4, 32)[:, :1], tiles(1, 32)[0]],
    ids=["float", "small", "channels last", "grey", "one tile"],
)
def test_tiles_of_another_kind(wrong):
    encoder = sge.load_encoder(Means(), spec=own_spec())
    with pytest.raises(ValueError, match=r"'mine' takes uint8 tiles of shape \(n, 3, 32, 32\), red, green, blue; not"):
        encoder.embed(wrong)


def test_no_tiles():
    assert sge.load_encoder(Means(), spec=own_spec()).embed(tiles(0, 32)).shape == (0, 3)


def test_a_head_can_be_trained_on_embeddings():
    head = nn.Linear(3, 1)
    head(sge.load_encoder(Means(), spec=own_spec()).embed(tiles(4, 32))).sum().backward()
    assert head.weight.grad.abs().sum() > 0


def test_own_module_without_spec():
    with pytest.raises(ValueError, match=r"needs spec=: histosge\.EncoderSpec\(name=.*load_encoder\(module, spec="):
        sge.load_encoder(Means())


@pytest.mark.parametrize(
    ("module", "shape"),
    [(Means(), "(4, 3)"), (nn.Identity(), "(4, 3, 32, 32)"), (nn.Flatten(0), "(12288,)")],
    ids=["too narrow", "not pooled", "no rows"],
)
def test_own_module_of_another_shape(module, shape):
    encoder = sge.load_encoder(module, spec=own_spec(embed_dim=7))
    with pytest.raises(ValueError, match=rf"'mine' gave an array of shape {re.escape(shape)} for 4 tiles") as told:
        encoder.embed(tiles(4, 32))
    assert "(4, 7)" in str(told.value)
    assert "embed_dim" in str(told.value)


# ------------------------------------------------------------------------------------------ weights in a folder


def test_timm_model_from_a_folder(tiny):
    folder, model = tiny
    encoder = sge.load_encoder("timm:test_vit", weights=folder)
    spec = encoder.spec
    assert (spec.name, spec.mpp, spec.tile_px, spec.embed_dim, spec.source) == ("test_vit", 0.5, 160, 64, "timm")
    assert (spec.mpp_source, spec.licence) == ("convention", "apache-2.0")
    some = tiles()
    with torch.inference_mode():
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
        wanted = model((some.float() / 255 - mean) / std)
    out = encoder.embed(some)
    assert out.shape == (5, 64)
    torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-4)
    assert wanted.std(0).min() > 1e-4  # else the comparison says nothing


def test_timm_name_needs_no_prefix(tiny):
    folder, _ = tiny
    a, b = (sge.load_encoder(name, weights=str(folder)) for name in ("test_vit", "timm:test_vit"))
    assert a.spec == b.spec
    torch.testing.assert_close(a.embed(tiles()), b.embed(tiles()), rtol=0, atol=0)


def test_timm_model_from_one_file(tiny):
    a, b = (sge.load_encoder("test_vit", weights=path) for path in (tiny[0], tiny[0] / "model.safetensors"))
    torch.testing.assert_close(a.embed(tiles()), b.embed(tiles()), rtol=0, atol=0)


def test_network_whose_embedding_is_not_its_last_map(tmp_path):
    """MobileNet: 288 maps, 1024 numbers."""
    save_weights(tmp_path / "w", name="mobilenetv3_small_050")
    encoder = sge.load_encoder("mobilenetv3_small_050", weights=tmp_path / "w")
    assert encoder.embed(tiles(2, encoder.spec.tile_px)).shape == (2, 1024)
    assert encoder.spec.embed_dim == 1024


def test_unpooled_timm_model_is_refused(tmp_path):
    save_weights(tmp_path / "w", name="test_vit", model_args={"global_pool": ""})
    encoder = sge.load_encoder("hf-hub:org/vit", weights=tmp_path / "w")
    with pytest.raises(ValueError, match=r"gave an array of shape \(2, 101, 64\) for 2 tiles.*pool the tokens"):
        encoder.embed(tiles(2))


def test_other_weights_give_other_embeddings(tiny, tmp_path):
    save_weights(tmp_path / "other", name="test_vit", seed=1)
    a, b = (sge.load_encoder("test_vit", weights=folder).embed(tiles()) for folder in (tiny[0], tmp_path / "other"))
    assert (a - b).abs().max() > 0.1


def test_mpp_is_the_users(tiny):
    spec = sge.load_encoder("test_vit", weights=tiny[0], mpp=1.25).spec
    assert (spec.mpp, spec.mpp_source, spec.tile_um) == (1.25, "given", 200)


def test_colours_come_from_the_folder(tmp_path):
    save_weights(tmp_path / "w", name="test_vit")
    config = json.loads((tmp_path / "w" / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (tmp_path / "w" / "config.json").write_text(json.dumps(config))
    spec = sge.load_encoder("test_vit", weights=tmp_path / "w").spec
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_red_green_and_blue_are_told_apart(tiny):
    encoder = sge.load_encoder("test_vit", weights=tiny[0])
    some = tiles()
    assert (encoder.embed(some) - encoder.embed(some.flip(1))).abs().max() > 0.01


def test_batches_do_not_matter(tiny):
    encoder = sge.load_encoder("test_vit", weights=tiny[0])
    some = tiles(7)
    together = encoder.embed(some)
    close = {"rtol": 1e-4, "atol": 1e-4}  # products of thousands of numbers, layer after layer, in float32
    torch.testing.assert_close(torch.cat([encoder.embed(some[i : i + 1]) for i in range(7)]), together, **close)
    torch.testing.assert_close(encoder.embed(some.flip(0)).flip(0), together, **close)
    torch.testing.assert_close(encoder.embed(some), together, rtol=0, atol=0)
    assert not together.requires_grad


def test_registered_encoder_from_a_folder(small):
    folder, model = small
    encoder = sge.load_encoder("lunit-dino-s16", weights=folder)
    spec = encoder.spec
    assert (spec.name, spec.embed_dim, spec.source) == ("lunit-dino-s16", 384, "lazyslide-models")
    # its own colours, not those that the folder's config.json has from ImageNet
    np.testing.assert_allclose([spec.mean, spec.std], [LUNIT_MEAN, LUNIT_STD], rtol=1e-6)
    some = tiles(3, 224)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (LUNIT_MEAN, LUNIT_STD))
    with torch.inference_mode():
        wanted = model((some.float() / 255 - mean) / std)
    torch.testing.assert_close(encoder.embed(some), wanted, rtol=1e-3, atol=1e-3)


def test_registered_encoder_agrees_with_its_own_library(small):
    """Same tile, same embedding, whether prepared here or by the model's own transform."""
    folder, model = small
    some = tiles(3, 224)
    wanted = by_its_library("lunit-dino-s16", model, some)
    out = sge.load_encoder("lunit-dino-s16", weights=folder).embed(some)
    torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3)
    assert (wanted[0] - wanted[1]).abs().max() > 0.1


def test_pooling_stays_that_of_the_encoder(tmp_path):
    """Virchow2: class token beside the mean of the patches, without its four registers."""
    from timm.layers import SwiGLUPacked

    plain = {"depth": 1, "reg_tokens": 4, "mlp_ratio": 5.3375, "init_values": 1.0, "global_pool": ""}
    model = save_weights(
        tmp_path / "w", name="vit_huge_patch14_224", model_args=plain, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU
    )
    encoder = sge.load_encoder("virchow2", weights=tmp_path / "w")
    some = tiles(2, 224)
    out = encoder.embed(some)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.spec.mean, encoder.spec.std))
    with torch.inference_mode():
        tokens = model((some.float() / 255 - mean) / std)  # (2, 1 + 4 + 256, 1280)
    torch.testing.assert_close(out, torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out, by_its_library("virchow2", model, some), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
def test_registered_encoder_of_one_file(folder, tmp_path):
    """gigapath-flash: a checkpoint that lazyslide-models reads itself."""
    import timm
    from timm.layers import SwiGLUPacked

    options = {"mlp_ratio": 2048 / 384, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "init_values": 1e-5}
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", num_classes=0, **options).eval()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    weights = tmp_path if folder else tmp_path / "pytorch_model.bin"
    encoder = sge.load_encoder("gigapath-flash", weights=weights)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.spec.mean, encoder.spec.std))
    some = tiles(2, 224)
    with torch.inference_mode():
        wanted = model((some.float() / 255 - mean) / std)
    torch.testing.assert_close(encoder.embed(some), wanted, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def phikon(tmp_path_factory):
    """Folder of a one-layer network in the layout of transformers, with a processor of its own colours."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    folder = tmp_path_factory.mktemp("weights") / "phikon"
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(num_hidden_layers=1, intermediate_size=64), add_pooling_layer=False).eval()
    model.save_pretrained(folder)
    colours = {"image_mean": [0.7, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    ViTImageProcessor(size={"height": 224, "width": 224}, **colours).save_pretrained(folder)
    return folder, model


def test_encoder_with_a_processor(phikon):
    """What the processor would do to a tile is done on the device instead."""
    from lazyslide_models import MODEL_REGISTRY
    from transformers import AutoImageProcessor

    folder, model = phikon
    encoder = sge.load_encoder("phikon", weights=folder)
    assert (encoder.spec.mean, encoder.spec.std) == ((0.7, 0.5, 0.6), (0.2, 0.3, 0.25))
    some = tiles(3, 224)
    theirs = MODEL_REGISTRY["phikon"].__new__(MODEL_REGISTRY["phikon"])
    theirs.model, theirs.img_processor = model, AutoImageProcessor.from_pretrained(folder)
    torch.testing.assert_close(encoder.embed(some), theirs.encode_image(some), rtol=1e-3, atol=1e-3)


def test_encoder_of_transformers_keeps_its_pooling(tmp_path):
    """Midnight: class token beside the mean of the patches, and its own half-half colours."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    shape = {"hidden_size": 1536, "num_hidden_layers": 1, "num_attention_heads": 24, "mlp_ratio": 1}
    model = Dinov2Model(Dinov2Config(**shape, image_size=224)).eval()
    model.save_pretrained(tmp_path)
    encoder = sge.load_encoder("midnight", weights=tmp_path)
    assert (encoder.spec.mean, encoder.spec.embed_dim) == ((0.5, 0.5, 0.5), 3072)
    some = tiles(2, 224)
    with torch.inference_mode():
        tokens = model((some.float() / 255 - 0.5) / 0.5).last_hidden_state
    torch.testing.assert_close(
        encoder.embed(some), torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1), rtol=1e-3, atol=1e-3
    )


def test_exported_encoder(tmp_path, hub_client):
    """CTransPath comes as a fixed graph, which knows no modes and no other precision."""

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 768, 32, stride=32)

        def forward(self, x):
            return self.patches(x).mean((2, 3))

    repo = tmp_path / "hub" / "models--RendeiroLab--LazySlide-models-gpl"
    file = repo / "snapshots" / ("a" * 40) / "CTransPath" / "CTransPath_exported.pt2"
    for folder in (repo / "refs", file.parent):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    sizes = ({0: torch.export.Dim("n")},)
    torch.export.save(torch.export.export(Graph(), (torch.zeros(2, 3, 224, 224),), dynamic_shapes=sizes), file)
    encoder = sge.load_encoder("ctranspath", trust_remote_code=True)
    assert (encoder.spec.mpp, encoder.spec.mpp_source) == (1.0, "magnification")
    assert encoder.embed(tiles(5, 224)).std(0).min() > 0


def test_registered_encoder_at_another_scale(small):
    spec = sge.load_encoder("lunit-dino-s16", weights=small[0], mpp=1.0).spec
    assert (spec.tile_um, spec.mpp_source) == (224, "given")


def test_weights_of_another_encoder_are_found_out(tiny, phikon, small):
    with pytest.raises(
        ValueError, match=r"not those of encoder 'lunit-dino-s16': their network is 64 wide.*384 numbers"
    ):
        sge.load_encoder("lunit-dino-s16", weights=tiny[0])
    with pytest.raises(ValueError, match=r"could not be read as those of encoder 'uni' \(\w+\)"):
        sge.load_encoder("uni", weights=tiny[0])
    with pytest.raises(ValueError, match=r"could not be read as those of encoder 'phikon' \(\w+\)"):
        sge.load_encoder("phikon", weights=small[0])
    with pytest.raises(ValueError, match=r"could not be read as those of encoder 'lunit-dino-s16' \(\w+\)"):
        sge.load_encoder("lunit-dino-s16", weights=phikon[0])


def test_weights_of_another_architecture_are_found_out(tiny):
    with pytest.raises(ValueError, match=r"vit_base_patch16_224.*test_vit"):
        sge.load_encoder("vit_base_patch16_224", weights=tiny[0])


def test_broken_weights(tiny, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny[0] / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((tiny[0] / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(
        ValueError, match=r"could not be read as those of encoder 'test_vit' \(\w+\)\. Check .* complete"
    ):
        sge.load_encoder("test_vit", weights=tmp_path)


@pytest.mark.parametrize("name", ["test_vit", "lunit-dino-s16"])
@pytest.mark.parametrize("content", [None, [], ["config.json"], ["model.safetensors"]])
def test_bad_folder(name, content, tmp_path):
    folder = tmp_path / "weights"
    if content is not None:
        folder.mkdir()
        for file in content:
            (folder / file).write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"is not a folder in the hub's layout.*config\.json.*hf download"):
        sge.load_encoder(name, weights=folder)


def test_commit_is_read_from_the_cache(tmp_path, hub_client):
    refs = tmp_path / "hub" / "models--MahmoodLab--uni" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("a" * 40 + "\n")
    assert commit("MahmoodLab/uni", None) == "a" * 40
    assert commit("MahmoodLab/uni", "b" * 40) == "b" * 40
    assert commit("MahmoodLab/uni", "v2") == "v2"
    assert commit("MahmoodLab/UNI2-h", None) is None


@pytest.mark.parametrize("name", ["lunit-dino-s16", "hf-hub:org/vit"])
def test_a_folder_has_no_revision(name, small, tmp_path, hub_client):
    for repo in ("1aurent--vit_small_patch16_224.lunit_dino", "org--vit"):
        refs = tmp_path / "hub" / f"models--{repo}" / "refs"
        refs.mkdir(parents=True)
        (refs / "main").write_text("a" * 40)
    assert sge.load_encoder(name, weights=small[0]).spec.revision is None


@pytest.mark.parametrize(
    ("name", "what", "match"),
    [
        ("test_vit", {"revision": "main"}, r"revision='main': only models named 'hf-hub:ORG/NAME'.*have revisions"),
        ("gpfm", {"revision": "main"}, r"encoder 'gpfm' is loaded by a library that takes no revision=\..*HF_HOME"),
        ("gpfm", {"weights": "x"}, r"encoder 'gpfm' is loaded by a library that takes no weights=\..*HF_HOME"),
        ("chief", {"weights": "x", "revision": "y"}, r"that takes no weights= or revision="),
        ("plip", {"revision": "main"}, r"encoder 'plip' is loaded by a library that takes no revision="),
    ],
)
def test_arguments_that_do_not_go_together(name, what, match):
    with pytest.raises(ValueError, match=match):
        sge.load_encoder(name, **what)


# --------------------------------------------------------------------------------- weights that cannot be had


def hub_error(kind):
    """Make an error as huggingface_hub raises it."""
    from huggingface_hub import errors
    from huggingface_hub.utils import get_session

    request = get_session().build_request("GET", "https://huggingface.co/org/name/resolve/main/config.json")
    response_type = type(get_session())  # the client's module has the matching response
    module = sys.modules[response_type.__module__.split(".")[0]]
    statuses = {"GatedRepoError": 403, "RepositoryNotFoundError": 401, "HfHubHTTPError": 503}
    statuses |= {"RevisionNotFoundError": 404, "RemoteEntryNotFoundError": 404}
    status = statuses.get(kind)
    if status is None:
        return getattr(errors, kind)("Cannot find the requested files in the disk cache.")
    response = module.Response(status, request=request, headers={"x-request-id": "abc"})
    return getattr(errors, kind)(f"{status} Client Error. token=hf_{'x' * 24}", response=response)


KINDS = ["GatedRepoError", "RepositoryNotFoundError", "HfHubHTTPError", "LocalEntryNotFoundError"]


@pytest.fixture
def failing_hub(monkeypatch):
    """Have the loaders of timm and of transformers raise an error, the hub's or another; returns what they are asked."""
    import timm
    import transformers

    def arrange(error):
        asked = []

        def load(source, **options):
            asked.append((source, options))
            raise hub_error(error) if isinstance(error, str) else error

        for owner, name in ((timm, "create_model"), (transformers.AutoModel, "from_pretrained")):
            monkeypatch.setattr(owner, name, load)
        return asked

    return arrange


PAGES = {
    "uni": "https://huggingface.co/MahmoodLab/uni",
    "h-optimus-0": "https://huggingface.co/bioptimus/H-optimus-0",
    "hf-hub:org/name": "https://huggingface.co/org/name",
}


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_hub_says_no(failing_hub, name, kind):
    asked = failing_hub(kind)
    with pytest.raises(RuntimeError) as told:
        sge.load_encoder(name)
    message = str(told.value)
    assert type(told.value).__name__ == "EncoderAccessError"
    assert type(told.value.__cause__).__name__ == kind
    assert repr(name) in message
    assert PAGES[name] in message
    assert "weights=" in message
    assert "'stain-texture'" in message  # an open alternative
    assert not TOKEN.search(message)
    assert len(asked) == 1  # no other encoder instead


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", ["is gated", "Ask for it at", "`hf auth login`", "'midnight', 'phikon', 'lunit-dino-s16'"]),
        ("RepositoryNotFoundError", ["the name is wrong, or it is gated", "`hf auth login`", "'midnight'"]),
        ("HfHubHTTPError", ["HTTP status 503", "Try again later"]),
        ("LocalEntryNotFoundError", ["not in the hub's cache", "cannot be reached", "HF_HOME", "network"]),
        ("OfflineModeIsEnabled", ["not in the hub's cache", "cannot be reached (HF_HUB_OFFLINE is set)"]),
        ("RemoteEntryNotFoundError", ["does not hold what is needed", "config.json"]),
    ],
)
def test_what_to_do(failing_hub, kind, words):
    failing_hub(kind)
    with pytest.raises(RuntimeError) as told:
        sge.load_encoder("uni")
    missing = [w for w in words if w not in str(told.value)]
    assert missing == []


def test_no_encoder_is_its_own_alternative(failing_hub):
    failing_hub("GatedRepoError")
    with pytest.raises(RuntimeError) as told:
        sge.load_encoder("lunit-dino-s16")
    assert str(told.value).count("'lunit-dino-s16'") == 2  # what was asked for, and how to pass its weights


@pytest.mark.parametrize(
    ("kind", "words"), [("GatedRepoError", "is gated"), ("LocalEntryNotFoundError", "cannot be reached")]
)
def test_what_transformers_wraps(failing_hub, kind, words):
    """It says OSError to everything: what the hub said is behind that."""
    error = OSError("You are trying to access a gated repo.")
    error.__cause__ = hub_error(kind)
    failing_hub(error)
    with pytest.raises(RuntimeError, match=rf"'rudolfv2-s'.*{words}"):
        sge.load_encoder("rudolfv2-s", trust_remote_code=True)


def test_what_is_missing_beside_weights_is_said_by_the_library():
    with pytest.raises(ImportError, match="pip install"):
        sge.load_encoder("musk")


def test_other_errors_are_not_swallowed(failing_hub):
    failing_hub(TypeError("of timm's own"))
    with pytest.raises(TypeError, match="of timm's own"):
        sge.load_encoder("uni")


@pytest.mark.parametrize("name", ["h-optimus-0", "lunit-dino-s16", "phikon", "test_vit", "hf-hub:org/name"])
def test_no_network(name, hub_client):
    """Nothing replaced: the hub's own client, offline (see conftest), with an empty cache."""
    with pytest.raises(RuntimeError, match=rf"'{name}' are not in the hub's cache and .* cannot be reached"):
        sge.load_encoder(name)


def test_no_network_names_only_what_works(hub_client):
    with pytest.raises(RuntimeError) as told:
        sge.load_encoder("gpfm")
    assert "weights=FOLDER" not in str(told.value)
    assert "HF_HOME" in str(told.value)


@pytest.mark.parametrize(
    ("name", "asks"), [("hf-hub:org/name", "hf-hub:org/name@v1"), ("uni", "hf-hub:MahmoodLab/uni@v1")]
)
def test_revision_reaches_the_hub(failing_hub, name, asks):
    asked = failing_hub("LocalEntryNotFoundError")
    with pytest.raises(RuntimeError):
        sge.load_encoder(name, revision="v1")
    assert [source for source, _ in asked] == [asks]


def test_revision_reaches_transformers(failing_hub):
    asked = failing_hub("RevisionNotFoundError")
    with pytest.raises(RuntimeError, match=r"has no revision 'v9' of encoder 'midnight'.*kaiko-ai/midnight"):
        sge.load_encoder("midnight", revision="v9")
    options = {"trust_remote_code": False, "revision": "v9", "output_loading_info": True}
    assert asked == [("kaiko-ai/midnight", options)]


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("uni2-h", "uni2"),
        ("UNI2-h", "uni2"),
        ("hoptimus0", "h-optimus-0"),
        ("H_Optimus_0", "h-optimus-0"),
        ("Virchow-2", "virchow2"),
        ("bioptimus/H-optimus-0", "h-optimus-0"),
        ("hf-hub:MahmoodLab/UNI2-h", "uni2"),  # whose architecture its config.json does not hold
        ("hf-hub:1aurent/vit_small_patch8_224.lunit_dino", "lunit-dino-s8"),
    ],
)
def test_alias(failing_hub, alias, name):
    failing_hub("LocalEntryNotFoundError")
    with pytest.raises(RuntimeError, match=f"encoder '{name}'"):
        sge.load_encoder(alias)


# ------------------------------------------------------------------------------------------------------- GPU


def test_identity_is_that_of_the_weights(tiny, tmp_path):
    """By name or by path, the same weights are the same encoder; other weights, another scale or precision are not."""
    cpu = torch.device("cpu")
    same = [
        sge.load_encoder("test_vit", weights=path).identity(cpu) for path in (tiny[0], tiny[0] / "model.safetensors")
    ]
    assert same[0] == same[1]
    assert same[0]["versions"]["timm"]
    save_weights(tmp_path / "other", name="test_vit", seed=1)
    others = [
        sge.load_encoder("test_vit", weights=tmp_path / "other").identity(cpu),
        sge.load_encoder("test_vit", weights=tiny[0], mpp=1.25).identity(cpu),
    ]
    with sge.settings.override(precision="bfloat16"):
        others.append(sge.load_encoder("test_vit", weights=tiny[0]).identity(cpu))
    assert all(other != same[0] for other in others)


def test_own_module_is_known_by_the_revision_it_is_given():
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    spec = sge.EncoderSpec(name="mine", mpp=0.5, tile_px=8, embed_dim=3)
    cpu = torch.device("cpu")
    assert sge.load_encoder(module, spec=spec).identity(cpu) is None
    one, two = (sge.load_encoder(module, spec=replace(spec, revision=r)).identity(cpu) for r in ("1", "2"))
    assert one != two


def test_bfloat16_on_request(tiny):
    """About three digits; what comes out is float32."""
    encoder = sge.load_encoder("test_vit", weights=tiny[0])
    exact = encoder.embed(tiles())
    with sge.settings.override(precision="bfloat16"):
        rough = encoder.embed(tiles())
    assert rough.dtype == torch.float32
    assert (rough != exact).any()
    assert torch.allclose(rough, exact, atol=0.05 * float(exact.abs().max()))


# ------------------------------------------------------------------------------------------------ code of others

RUNS_CODE = re.compile(
    r"trust_remote_code=True|torch\.hub\.load|weights_only(\"\])? ?= ?False|torch\.(export|jit)\.load|pickle\.load|exec\("
)
"""What runs code of others in the library; what it loads with transformers without the first runs none."""


@pytest.mark.parametrize("name", sorted(TABLE))
def test_encoders_that_run_code_of_others_are_known(registry, name):
    import inspect

    ours = [kind for kind in registry[name].__mro__ if kind.__module__.startswith("lazyslide_models")]
    found = [kind.__name__ for kind in ours if RUNS_CODE.search(inspect.getsource(kind))]
    assert bool(found) == sge.encoders().loc[name, "remote_code"], found


@pytest.mark.parametrize("name", sorted(name for name in TABLE if code_of(name)))
def test_code_of_others_needs_trust(name, hub_client):
    with pytest.raises(ValueError, match=rf"^encoder '{name}' runs code of others when it is loaded: ") as told:
        sge.load_encoder(name)
    message = str(told.value)
    assert f"encoder=histosge.load_encoder({name!r}, trust_remote_code=True); in the shell: --trust-rem" in message
    assert f"({listed_spec(name).url} at its newest commit)" in message
    pinned = name not in ("open-midnight", "conch_v1.5", "ctranspath", "chief")
    assert ("revision= pins it" if pinned else "takes no revision=") in message


def test_code_of_others_is_pinned(tmp_path, hub_client):
    """The commit in the hub's cache, or the one that is asked for, is part of the call that the error names."""
    refs = tmp_path / "hub" / "models--histai--hibou-b" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("a" * 40)
    for options, wanted in (({}, "a" * 40), ({"revision": "v1"}, "v1")):
        with pytest.raises(ValueError, match=rf"at revision {wanted}\).*revision='{wanted}', trust_remote_code=True"):
            sge.load_encoder("hibou-b", **options)
    with pytest.raises(ValueError, match=r"its folder 'here', or the repository.*'hibou-b', weights='here', trust_"):
        sge.load_encoder("hibou-b", weights="here")
    with pytest.raises(ValueError, match="encoder 'hibou-b' runs code of others"):
        sge.load_encoder("hibou-b+rgb")


def test_trust_does_nothing_where_no_code_runs(tiny):
    for encoder in ("rgb", "stain-texture+rgb", Means()):
        spec = own_spec() if isinstance(encoder, nn.Module) else None
        assert sge.load_encoder(encoder, spec=spec, trust_remote_code=True)
    assert sge.load_encoder("test_vit", weights=tiny[0], trust_remote_code=True)


# ------------------------------------------------------------------------------------------ weights are whole


def test_weights_that_leave_parts_out(tiny, phikon, tmp_path):
    """By timm, by transformers, and by a library of its own; the errors name what is left out."""
    from safetensors.torch import load_file, save_file

    state = load_file(tiny[0] / "model.safetensors")
    renamed = {f"x.{name}": values for name, values in state.items()}
    save_file(renamed, tmp_path / "renamed.safetensors")
    with pytest.raises(
        ValueError, match=r"not those of encoder 'test_vit': the file lacks '.*', '.*', '.*' and 7"
    ) as told:
        sge.load_encoder("test_vit", weights=tmp_path / "renamed.safetensors")
    assert "the network has no 'x.blocks.0.attn.proj.bias', " in str(told.value)
    assert "pass its own weights" in str(told.value)

    folder = tmp_path / "phikon"
    shutil.copytree(phikon[0], folder)
    state = load_file(folder / "model.safetensors")
    del state["layernorm.bias"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not those of encoder 'phikon': the file lacks 'layernorm\.bias'\. It"):
        sge.load_encoder("phikon", weights=folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tiny, tmp_path, value):
    from safetensors.torch import load_file, save_file

    state = load_file(tiny[0] / "model.safetensors")
    state["norm.bias"][3] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"of encoder 'test_vit' are damaged: 'norm\.bias' has values that are not fi"):
        sge.load_encoder("test_vit", weights=tmp_path / "w.safetensors")


def test_a_classifier_and_wrappings_are_no_other_weights(tiny, tmp_path):
    import timm

    state = timm.create_model("test_vit").state_dict() | tiny[1].state_dict()
    forms = [state, {"state_dict": {f"module.{name}": values for name, values in state.items()}}, {"model": state}]
    for i, form in enumerate(forms):
        torch.save(form, tmp_path / f"{i}.pth")
        encoder = sge.load_encoder("test_vit", weights=tmp_path / f"{i}.pth")
        assert encoder_digest(encoder) == encoder_digest(sge.load_encoder("test_vit", weights=tiny[0]))


def test_loading_leaves_torch_as_it_was(tiny, monkeypatch):
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    monkeypatch.setenv(names[1], "1")
    before, load = [os.environ.get(name) for name in names], nn.Module.load_state_dict
    sge.load_encoder("test_vit", weights=tiny[0])
    with pytest.raises(ValueError, match="could not be read"):
        sge.load_encoder("uni", weights=tiny[0])
    assert [os.environ.get(name) for name in names] == before
    assert nn.Module.load_state_dict is load


# ----------------------------------------------------------------------------------------------------- the digest


def test_digest_is_that_of_the_weights(tiny, tmp_path):
    save_weights(tmp_path / "other", name="test_vit", seed=1)
    one, other = (sge.load_encoder("test_vit", weights=folder) for folder in (tiny[0], tmp_path / "other"))
    assert encoder_digest(one) != encoder_digest(other)
    other.module.load_state_dict(one.module.state_dict())
    assert encoder_digest(one) == encoder_digest(other)


CHANGES = {
    "in place": lambda weight: weight.detach().mul_(2),
    "one value": lambda weight: weight.detach()[1].add_(1),
    "behind torch's back": lambda weight: weight.data.add_(1),
    "replaced": lambda weight: setattr(weight, "data", torch.full((3,), 2.0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_digest_follows_changed_weights(change):
    encoder = sge.load_encoder(Means(), spec=own_spec())
    before = encoder_digest(encoder)
    assert encoder_digest(encoder) == before
    CHANGES[change](encoder.module.weight)
    assert encoder_digest(encoder) != before


def test_digest_stays_where_nothing_changes():
    module = nn.Sequential(Means(), nn.BatchNorm1d(3))
    encoder = sge.load_encoder(module, spec=own_spec())
    before = encoder_digest(encoder)
    encoder.embed(tiles(4, 32))
    assert encoder_digest(encoder.to("cpu")) == before
    again = nn.Sequential(Means(), nn.BatchNorm1d(3))
    assert encoder_digest(sge.load_encoder(again, spec=own_spec())) == before
    with torch.inference_mode():
        inferred = nn.Sequential(Means(), nn.BatchNorm1d(3))
    assert encoder_digest(sge.load_encoder(inferred, spec=own_spec())) == before


@pytest.mark.parametrize(
    "other",
    [{"mean": (0.1, 0.2, 0.3)}, {"std": (1, 1, 1)}, {"tile_px": 16}, {"revision": "2"}],
    ids=lambda v: next(iter(v)),
)
def test_digest_knows_the_input(other):
    one, two = (sge.load_encoder(Means(), spec=own_spec(**values)) for values in ({}, other))
    assert encoder_digest(one) != encoder_digest(two)


def test_digest_of_any_object():
    """Of what has no network, attributes that hold numbers count, and counters do not."""

    class Own:
        def __init__(self, table, network=None):
            self.spec, self.table, self.network, self.n_calls = own_spec(), table, network, 0

    one = Own(np.arange(3.0))
    before = encoder_digest(one)
    one.n_calls += 1
    assert encoder_digest(one) == encoder_digest(Own(np.arange(3.0))) == before
    others = [Own(np.arange(3.0) + 1), Own(torch.arange(3.0)), Own(np.arange(3.0), Means()), Own(None)]
    assert len({before, *map(encoder_digest, others)}) == 5


@pytest.mark.parametrize("name", ["stain-texture", "rgb"])
def test_digest_of_a_built_in_encoder_is_its_version(name, monkeypatch):
    encoder = sge.load_encoder(name)
    before = encoder_digest(encoder)
    assert encoder_digest(sge.load_encoder(name)) == before
    monkeypatch.setattr(type(encoder), "version", -1)
    assert encoder_digest(sge.load_encoder(name)) != before
