"""The default encoder, loaded by its real code from the hub's cache, against what its authors state.

Stated on the model card and in the README of the authors' repository, read in November 2026
(https://huggingface.co/kaiko-ai/midnight, https://github.com/kaiko-ai/Midnight, "Usage"): images of 224 x 224 px, of a
PIL image by torchvision's Resize(224), CenterCrop(224), ToTensor and Normalize with means and deviations of 0.5; the
embedding of a tile is the class token beside the mean of the patch tokens, 2 x 1536 numbers; what a patch says is its
token after the class token, in a square grid by row and column (16 x 16 of 14 px).
"""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import histosge as sge

COMMIT = "fedcba9876543210" * 2 + "fedcba98"
WIDTH, SIDE = 1536, 16


@pytest.fixture(scope="module", params=[224, 518], ids=lambda px: f"trained at {px} px")
def loaded(request, tmp_path_factory):
    """The network itself, and the encoder that histosge makes of its files in the hub's cache.

    One block of the architecture's full width instead of 40; positions for tiles of 224 px, or of the 518 px that
    DINOv2 comes with, which the network interpolates.
    """
    from huggingface_hub import constants
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(1)
    shape = {"hidden_size": WIDTH, "num_attention_heads": 24, "num_hidden_layers": 1, "mlp_ratio": 1}
    network = Dinov2Model(Dinov2Config(**shape, image_size=request.param, use_swiglu_ffn=True)).eval()
    with torch.no_grad():  # as far from each other as after training
        network.embeddings.cls_token.normal_()
        for parameter in network.encoder.parameters():
            parameter.mul_(3.0)
    hub = tmp_path_factory.mktemp("home") / "hub"
    repo = hub / "models--kaiko-ai--midnight"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    network.save_pretrained(snapshot)
    for i, file in enumerate(sorted(snapshot.iterdir())):
        blob = repo / "blobs" / f"{i:064x}"
        file.rename(blob)
        file.symlink_to(Path("../../blobs") / blob.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(hub))
        encoder = sge.load_encoder()
    shutil.rmtree(hub)
    return network, encoder


@pytest.fixture(scope="module")
def tiles():
    """Noise over gradients: every tile, channel and corner is different."""
    random = np.random.default_rng(0)
    ramp = np.linspace(0, 120, 224)[:, None, None] * random.uniform(0.2, 1, (2, 1, 1, 3))
    across = np.linspace(0, 60, 224)[None, :, None] * random.uniform(0, 1, (2, 1, 1, 3))
    return (ramp + across + random.uniform(0, 70, (2, 224, 224, 3))).astype(np.uint8)  # (n, row, column, channel)


@pytest.fixture(scope="module")
def stated(loaded, tiles):
    return as_its_authors(loaded[0], tiles)


@pytest.fixture(scope="module")
def found(loaded, tiles):
    """Tokens and embedding as histosge gives them to the dense embedding."""
    tokens, summary = loaded[1].embed_tokens(as_tiles(tiles))
    return tokens.numpy(), summary.numpy()


def as_its_authors(network, tiles):
    """Class token, patch tokens and embedding, from images on."""
    from torchvision.transforms import v2

    prepare = v2.Compose([v2.Resize(224), v2.CenterCrop(224), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    pixels = torch.stack([prepare(Image.fromarray(tile)) for tile in tiles])  # (n, 3, 224, 224), 0 to 1
    np.testing.assert_allclose(pixels.numpy(), tiles.transpose(0, 3, 1, 2) / 255, atol=1e-6)
    with torch.inference_mode():
        hidden = network(pixel_values=(pixels - 0.5) / 0.5).last_hidden_state.numpy()
    cls, patches = hidden[:, 0], hidden[:, 1:]
    return cls, patches, np.concatenate([cls, patches.mean(axis=1)], axis=1)


def as_tiles(tiles):
    return torch.from_numpy(np.ascontiguousarray(tiles.transpose(0, 3, 1, 2)))


# Pixels are prepared in another order of operations: they differ by a few roundings of float32 (2^-23 of a value up to 1),
# which a block of width 1536 and the last norm carry into numbers of size one. A thousand times that is far below every
# mistake that is tried here.
TOLERANCE = 1000 * 2**-23


def test_what_is_known_of_it(loaded):
    spec = loaded[1].spec
    assert (spec.name, spec.tile_px, spec.token_px, spec.mpp) == ("midnight", 224, 14, 0.5)
    assert (spec.mean, spec.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (spec.embed_dim, spec.gated, spec.commercial, spec.licence) == (2 * WIDTH, False, True, "MIT")
    assert spec.revision == COMMIT


def test_embedding_is_that_of_its_authors(loaded, tiles, stated):
    cls, patches, wanted = stated
    out = loaded[1].embed(as_tiles(tiles)).numpy()
    assert out.shape == wanted.shape == (2, 3072)
    np.testing.assert_allclose(out, wanted, atol=TOLERANCE)
    # what the tolerance tells apart: the parts in the other order, a mean with the class token, tiles alike
    swapped = np.concatenate([patches.mean(axis=1), cls], axis=1)
    with_class = np.concatenate([cls, np.concatenate([cls[:, None], patches], axis=1).mean(axis=1)], axis=1)
    for wrong in (swapped, with_class, wanted[::-1]):
        assert np.abs(out - wrong).max() > 10 * TOLERANCE


def test_other_colours_would_be_seen(loaded, tiles, stated):
    from histosge._encoders import IMAGENET_MEAN, IMAGENET_STD

    network, encoder = loaded
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        wrong = network(pixel_values=(as_tiles(tiles[:1]).float() / 255 - mean) / std).last_hidden_state[:, 0].numpy()
    assert np.abs(stated[0][:1] - wrong).max() > 10 * TOLERANCE
    blue_first = encoder.embed(as_tiles(tiles[:1, ..., ::-1])).numpy()
    assert np.abs(blue_first - stated[2][:1]).max() > 10 * TOLERANCE


def test_tokens_are_its_patches_by_row_and_column(found, stated):
    (tokens, summary), (_, patches, wanted) = found, stated
    assert tokens.shape == (2, SIDE, SIDE, WIDTH)
    np.testing.assert_allclose(summary, wanted, atol=TOLERANCE)
    for row in range(SIDE):
        for col in range(SIDE):
            np.testing.assert_allclose(tokens[:, row, col], patches[:, SIDE * row + col], atol=TOLERANCE)
    transposed = tokens.transpose(0, 2, 1, 3).reshape(patches.shape)
    assert np.abs(transposed - patches).max() > 10 * TOLERANCE


def test_a_token_is_where_its_patch_is(loaded, tiles, found):
    """Another colour in one patch of 14 px changes the token of that row and column most."""
    changed = tiles[:1].copy()
    changed[0, 14 * 3 : 14 * 4, 14 * 11 : 14 * 12] = [255, 0, 200]
    tokens = loaded[1].embed_tokens(as_tiles(changed))[0].numpy()
    change = np.linalg.norm(tokens[0] - found[0][0], axis=-1)
    assert divmod(int(change.argmax()), SIDE) == (3, 11)


@pytest.mark.parametrize("door", ["embed", "fit", "predict", "evaluate"])
def test_it_is_the_default_of_every_door(door):
    assert inspect.signature(getattr(sge.tl, door)).parameters["encoder"].default == "midnight"


def test_the_lines_of_the_readme_name_no_encoder():
    """They run as they stand for somebody without a login: so they take the default."""
    readme = Path(__file__).parents[1] / "README.md"
    first = re.search(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL).group(1)
    assert "sge.tl.predict(sdata)" in first
    default = sge.encoders().loc["midnight"]
    assert (default["gated"], default["commercial"], default["licence"]) == (False, True, "MIT")
