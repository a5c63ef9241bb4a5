"""Images as microscopes and programs write them: shown as their files say, or refused with the reason."""

from __future__ import annotations

import io
import pickle
import struct

import dask.array as da
import imagecodecs
import numpy as np
import pytest
import skimage.data
import tifffile
import xarray as xr
from PIL import Image, ImageOps, PngImagePlugin
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from tests import spaceranger as sr

import histosge as sge
from histosge._readers import Turn, image_size, names_other_image, open_pixels, orientation, parse_image
from histosge._section import lazy_image

HIGH, WIDE = 203, 301


def stained():
    """(y, x, 3): smooth tissue of pink and purple on a bright slide, without any symmetry."""
    y, x = np.mgrid[:HIGH, :WIDE]
    eosin = np.exp(-(((x - 120) / 70) ** 2) - ((y - 80) / 50) ** 2)
    haematoxylin = np.exp(-(((x - 90) / 25) ** 2) - ((y - 60) / 40) ** 2)
    density = eosin[..., None] * [0.08, 0.45, 0.15] + haematoxylin[..., None] * [0.5, 0.55, 0.2]
    return np.rint(245 * 10**-density).astype(np.uint8)


PIXELS = stained()
PLANES = np.moveaxis(PIXELS, -1, 0)
LIGHTS = np.rint(np.clip(245.0 - PIXELS, 0, 255) * [0.2, 1, 0.6]).astype(np.uint8)  # light on black
ROUNDED = 3
"""Y, Cb and Cr, cut to whole values by pillow: 1 + 1.772 of blue, at most"""
YCC = np.asarray(Image.fromarray(PIXELS).convert("YCbCr"))


def read(path, **options):
    return np.moveaxis(np.asarray(open_pixels(path, **options)), 0, -1)


def same(found, wanted=PIXELS, *, atol=0):
    assert found.dtype == np.uint8
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted).max() <= atol


def refuses(path, match):
    """The message says what the file holds, and what to do."""
    with pytest.raises(ValueError, match=match) as caught:
        open_pixels(path)
    assert str(path) in str(caught.value)
    assert any(word in str(caught.value) for word in ("RGB TIFF", "OME-TIFF", "rescale", "Export the one"))


def element(pixels, names=None, *, step=100):
    coords = {} if names is None else {"c": list(names)}
    return xr.DataArray(da.from_array(pixels, chunks=(-1, step, step)), dims=("c", "y", "x"), coords=coords)


def seen(image):
    return np.moveaxis(image.read(0, 0, image.width_px, image.height_px), 0, -1)


# ------------------------------------------------------------------------------------------------- colour spaces


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "zstd", "packbits"])
@pytest.mark.parametrize("layout", [{"tile": (64, 64)}, {"rowsperstrip": 16}, {}])
def test_ycbcr_without_jpeg_becomes_rgb(tmp_path, compression, layout):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, YCC, photometric="ycbcr", subsampling=(1, 1), compression=compression, **layout)
    same(read(path), atol=ROUNDED)
    if compression not in (None, "zstd"):  # older Pillow takes the first as RGB; libtiff of some builds lacks the other
        theirs = np.asarray(Image.open(path).convert("RGB"))
        same(read(path), theirs, atol=1)


@pytest.mark.parametrize(
    "tags",
    [
        [(529, "2I", 3, (2126, 10000, 7152, 10000, 722, 10000), True)],
        [(532, "2I", 6, (16, 1, 235, 1, 128, 1, 240, 1, 128, 1, 240, 1), True)],
    ],
    ids=["coefficients", "reference values"],
)
def test_coefficients_of_the_file_are_used(tmp_path, tags):
    """Against libtiff, which rounds its tables to whole values."""
    path = tmp_path / "a.tif"
    extra = [(code, 5, count, value, True) for code, _, count, value, _ in tags]
    tifffile.imwrite(
        path, YCC, photometric="ycbcr", subsampling=(1, 1), compression="lzw", extratags=extra, metadata=None
    )
    theirs = np.asarray(Image.open(path).convert("RGB"))
    assert np.abs(theirs.astype(int) - PIXELS).max() > 5  # the tags matter
    same(read(path), theirs, atol=3)


@pytest.mark.parametrize(
    "how", ["tifffile, RGB", "tifffile, YCbCr", "pillow", "JFIF", "Adobe", "unmarked", "Adobe, RGB"]
)
def test_jpegs_in_a_tiff(tmp_path, how):
    """What the JPEG says of its colours holds, and where it says nothing, what the TIFF says."""
    path = tmp_path / "a.tif"
    options = {"tile": (64, 64), "compression": "jpeg", "compressionargs": {"level": 97}, "metadata": None}
    if how == "tifffile, RGB":
        options["compressionargs"] |= {"outcolorspace": "rgb"}
        tifffile.imwrite(path, PIXELS, photometric="rgb", **options)
    elif how == "tifffile, YCbCr":
        tifffile.imwrite(path, PIXELS, photometric="rgb", subsampling=(2, 2), **options)
    elif how == "pillow":
        Image.fromarray(PIXELS).save(path, compression="jpeg", quality=97)
    else:
        jpegs = iter([whole_jpeg(tile, how=how) for tile in tiles(64)])
        del options["compressionargs"]
        tifffile.imwrite(path, jpegs, shape=PIXELS.shape, dtype=np.uint8, photometric="ycbcr", **options)
        with tifffile.TiffFile(path, mode="r+") as file:
            file.pages[0].tags[262].overwrite(6 if how == "Adobe, RGB" else 2)  # the wrong one
    found = read(path)
    assert np.abs(found.astype(int) - PIXELS).mean() < 2
    assert np.abs(found.astype(int) - PIXELS).mean((0, 1)).max() < 3  # in each colour


def tiles(side):
    """Tiles by rows, as a TIFF stores them."""
    high, wide = -(-HIGH // side), -(-WIDE // side)
    whole = np.pad(PIXELS, ((0, high * side - HIGH), (0, wide * side - WIDE), (0, 0)), mode="edge")
    return [whole[y : y + side, x : x + side] for y in range(0, high * side, side) for x in range(0, wide * side, side)]


def whole_jpeg(tile, *, how):
    """A JPEG file whose colours are told by JFIF, by Adobe's marker, or by their subsampling alone."""
    buffer = io.BytesIO()
    Image.fromarray(tile).save(
        buffer, "JPEG", quality=97, **({"keep_rgb": True} if "RGB" in how else {"subsampling": 2})
    )
    jpeg = buffer.getvalue()
    if how == "Adobe, RGB":
        assert jpeg[6:11] == b"Adobe"
        return jpeg
    assert jpeg[6:10] == b"JFIF"
    rest = jpeg[4 + struct.unpack(">H", jpeg[4:6])[0] :]
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01"
    return jpeg if how == "JFIF" else jpeg[:2] + (adobe if how == "Adobe" else b"") + rest


def codestream(planes, *, step_x=1, step_y=1):
    """JPEG 2000 of three components as they are, the second and third subsampled: one packet each, put side by side."""
    heads, body = [], b""
    for plane in planes:
        stream = imagecodecs.jpeg2k_encode(plane, codecformat="j2k", reversible=True, resolutions=1, mct=False, level=0)
        stream = bytes(stream)
        sot, sod = stream.index(b"\xff\x90"), stream.index(b"\xff\x93")
        heads.append(stream[2:sot])
        body += stream[sod + 2 : sot + struct.unpack(">I", stream[sot + 6 : sot + 10])[0]]
    out, head = b"\xff\x4f", heads[0]
    while head:
        size = struct.unpack(">H", head[2:4])[0]
        segment, head = head[: 2 + size], head[2 + size :]
        if segment[:2] == b"\xff\x51":  # sizes: three components
            inner = segment[4:38] + struct.pack(">H", 3) + b"\x07\x01\x01" + bytes((7, step_x, step_y)) * 2
            segment = segment[:2] + struct.pack(">H", len(inner) + 2) + inner
        out += segment
    sot = b"\xff\x90" + struct.pack(">HHIBB", 10, 0, 14 + len(body), 0, 1)
    return out + sot + b"\xff\x93" + body + b"\xff\xd9"


@pytest.mark.parametrize("compression", [33003, 33005, 34712])
@pytest.mark.parametrize("transformed", [True, False])
def test_jpeg_2000_of_rgb(tmp_path, compression, transformed):
    """33003 means YCbCr, unless the codestream has a transform of its own, which decoders undo."""
    path = tmp_path / "a.svs"
    ycbcr = compression == 33003 and not transformed
    options = {"mct": transformed, "reversible": True}
    tifffile.imwrite(
        path,
        YCC if ycbcr else PIXELS,
        photometric="rgb",
        compression=compression,
        tile=(64, 64),
        compressionargs=options,
    )
    same(read(path), atol=ROUNDED if ycbcr else 0)


@pytest.mark.parametrize("compression", [33003, 34712])
@pytest.mark.parametrize(("step_x", "step_y"), [(1, 1), (2, 1), (2, 2)])
def test_jpeg_2000_of_ycbcr(tmp_path, compression, step_x, step_y):
    path = tmp_path / "a.svs"
    streams = []
    for tile in tiles(64):
        y, cb, cr = np.moveaxis(np.asarray(Image.fromarray(tile).convert("YCbCr")), -1, 0)
        small = [np.ascontiguousarray(plane[::step_y, ::step_x]) for plane in (cb, cr)]
        streams.append(codestream([np.ascontiguousarray(y), *small], step_x=step_x, step_y=step_y))
    photometric = "rgb" if compression == 33003 else "ycbcr"
    tifffile.imwrite(
        path, iter(streams), shape=PIXELS.shape, dtype=np.uint8, photometric=photometric, tile=(64, 64),
        compression=compression, **({} if photometric == "rgb" else {"subsampling": (step_x, step_y)}),
    )  # fmt: skip
    found = read(path)
    assert np.abs(found.astype(int) - PIXELS).mean((0, 1)).max() < 2
    same(found, atol=ROUNDED if step_x == 1 else 40)  # where colours change within two pixels


def test_planes_of_ycbcr(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif", np.moveaxis(YCC, -1, 0), photometric="ycbcr", planarconfig="separate", subsampling=(1, 1)
    )
    refuses(tmp_path / "a.tif", "has planes of Y, Cb and Cr")


def test_subsampled_without_jpeg(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", YCC, photometric="ycbcr", subsampling=(1, 1), compression="lzw")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        file.pages[0].tags[530].overwrite((2, 2))
    refuses(tmp_path / "a.tif", "has YCbCr of uint8, subsampled by 2x2: without JPEG only uint8 of 1x1")


OTHER_SPACES = {
    "miniswhite": (PIXELS, {"photometric": "miniswhite", "planarconfig": "contig"}, "3 channels of MINISWHITE"),
    "grey": (PIXELS[..., 0], {"photometric": "minisblack"}, r"has axes YX of .* \(photometric MINISBLACK\)"),
    "cmyk": (np.dstack([PIXELS, PIXELS[..., 0]]), {"photometric": "separated"}, "4 channels of SEPARATED, uint8"),
    "cielab": (PIXELS, {"photometric": "cielab"}, "3 channels of CIELAB, uint8"),
    "icclab": (PIXELS, {"photometric": 9}, "3 channels of ICCLAB, uint8"),
    "logluv": (PIXELS.astype(np.int16), {"photometric": 32845}, "3 channels of LOGLUV, int16"),
    "signed": (PIXELS.astype(np.int8), {"photometric": "rgb"}, "3 channels of RGB, int8"),
    "large": (PIXELS.astype(np.uint32), {"photometric": "rgb"}, "3 channels of RGB, uint32"),
    "stack": (np.stack([PIXELS, PIXELS]), {"photometric": "rgb"}, r"has axes QYXS of .* \(several pages"),
    "bits": (PIXELS > 100, {"photometric": "rgb"}, "3 channels of RGB, bool"),
    "deep ycbcr": (YCC.astype(np.uint16) * 257, {"photometric": "ycbcr", "subsampling": (1, 1)}, "has YCbCr of uint16"),
    "five": (
        PIXELS[..., :1].repeat(5, -1),
        {"photometric": "rgb", "extrasamples": [0, 0]},
        r"YXS of .* \(photometric RGB",
    ),
    "two": (PIXELS[..., :2], {"photometric": "minisblack", "planarconfig": "contig"}, "has axes YXS of"),
}


@pytest.mark.parametrize("kind", OTHER_SPACES)
def test_other_colour_spaces_are_refused(tmp_path, kind):
    pixels, options, match = OTHER_SPACES[kind]
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    refuses(tmp_path / "a.tif", match)


def test_palette(tmp_path):
    few = Image.fromarray(PIXELS).quantize(64)
    few.save(tmp_path / "a.tif")
    refuses(tmp_path / "a.tif", r"has axes YX .*photometric PALETTE")
    few.save(tmp_path / "a.png")
    same(read(tmp_path / "a.png"), np.asarray(few.convert("RGB")))


# -------------------------------------------------------------------------------------------------- transparency


def with_alpha(*, beneath=0):
    """The upper third is transparent, with black beneath it, and the next half so."""
    alpha = np.full((HIGH, WIDE), 255, np.uint8)
    alpha[:60], alpha[60:120] = 0, 128
    colours = PIXELS.copy()
    colours[:60] = beneath
    share = alpha[..., None] / 255
    return np.dstack([colours, alpha]), np.rint(PIXELS * share + 255 * (1 - share)).astype(np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "planes.tif", "premultiplied.tif", "deep.tif", "deep.png"])
def test_what_is_transparent_shows_the_slide(tmp_path, name):
    rgba, wanted = with_alpha()
    path, extra = tmp_path / name, {"photometric": "rgb", "extrasamples": ["unassalpha"]}
    if name == "a.png":
        Image.fromarray(rgba).save(path)
    elif name == "deep.png":
        path.write_bytes(imagecodecs.png_encode(rgba.astype(np.uint16) * 257))
    elif name == "premultiplied.tif":
        share = rgba[..., 3:] / 255
        rgba[..., :3] = np.rint(rgba[..., :3] * share)
        tifffile.imwrite(path, rgba, photometric="rgb", extrasamples=["assocalpha"])
    elif name == "deep.tif":
        tifffile.imwrite(
            path, np.dstack([rgba[..., :3].astype(np.uint16) * 16, rgba[..., 3].astype(np.uint16) * 257]), **extra
        )
    elif name == "planes.tif":
        tifffile.imwrite(path, np.moveaxis(rgba, -1, 0), planarconfig="separate", **extra)
    else:
        tifffile.imwrite(path, rgba, tile=(64, 64), compression="zlib", **extra)
    found = read(path)
    same(found, wanted, atol=1)
    assert (found[:60] == 255).all()


def test_a_colour_that_means_transparent(tmp_path):
    pixels = PIXELS.copy()
    pixels[:60] = (0, 255, 0)
    info = PngImagePlugin.PngInfo()
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=(0, 255, 0), pnginfo=info)
    few = Image.fromarray(pixels).quantize(32)
    few.save(tmp_path / "few.png", transparency=few.getpixel((5, 5)))
    for name in ("a.png", "few.png"):
        assert (read(tmp_path / name)[:60] == 255).all()
        assert np.abs(read(tmp_path / name)[60:].astype(int) - PIXELS[60:]).mean() < 8


def test_transparent_everywhere(tmp_path):
    Image.fromarray(np.dstack([PIXELS, np.zeros((HIGH, WIDE), np.uint8)])).save(tmp_path / "a.png")
    refuses(tmp_path / "a.png", "is transparent everywhere")


def test_a_fourth_channel_that_is_no_opacity(tmp_path, log):
    pixels = np.dstack([PIXELS, PIXELS[..., 0] // 9])
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unspecified"])
    same(read(tmp_path / "a.tif"))
    assert "the fourth channel is left out, since the file does not state that it is opacity" in log.text


# ------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "LA", "I;16"])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_pictures_that_are_not_rgb(tmp_path, mode, suffix):
    if mode == "I;16":
        picture = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 200)
    else:
        picture = Image.fromarray(PIXELS).convert(mode)
    path = tmp_path / f"a.{suffix}"
    try:
        picture.save(path, "JPEG" if suffix == "jpg" else "PNG")
    except OSError:
        pytest.skip("there are no such files")
    refuses(path, "is of mode")


def test_jpegs_of_rgb_and_of_ycbcr(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", quality=97)
    Image.fromarray(PIXELS).save(tmp_path / "b.jpg", quality=97, keep_rgb=True)
    for name in ("a.jpg", "b.jpg"):
        assert np.abs(read(tmp_path / name).astype(int) - PIXELS).mean() < 2


def test_animation(tmp_path):
    frames = [Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1])]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    refuses(tmp_path / "a.png", "is an animation of 2 images")


# --------------------------------------------------------------------------------------------- channels and names

RGB, BGR, GBR = ["Red", "Green", "Blue"], ["Blue", "Green", "Red"], ["g", "b", "r"]
ORDERS = {"RGB": (RGB, [0, 1, 2]), "BGR": (BGR, [2, 1, 0]), "GBR": (GBR, [1, 2, 0])}


def write_planes(path, planes, names, *, by):
    if by == "OME":
        channel = {} if names is None else {"Channel": {"Name": names}}
        tifffile.imwrite(path, planes, ome=True, photometric="minisblack", metadata={"axes": "CYX", **channel})
    elif by == "ImageJ":
        labels = {} if names is None else {"Labels": names}
        tifffile.imwrite(path, planes, imagej=True, photometric="minisblack", metadata={"axes": "CYX", **labels})
    else:
        channel = {} if names is None else {"Channel": {"Name": names}}
        tifffile.imwrite(path, planes, photometric="minisblack", metadata={"axes": "CYX", **channel})


@pytest.mark.parametrize("by", ["OME", "ImageJ", "tifffile"])
@pytest.mark.parametrize("order", ORDERS)
def test_planes_go_by_name(tmp_path, by, order):
    names, where = ORDERS[order]
    write_planes(tmp_path / "a.tif", PLANES[where], names, by=by)
    same(read(tmp_path / "a.tif"))


@pytest.mark.parametrize("by", ["OME", "ImageJ", "tifffile"])
@pytest.mark.parametrize("names", [["DAPI", "GFP", "RFP"], ["r", "g", "DAPI"], ["Red", "Red", "Blue"], ["DAPI"] * 3])
def test_planes_of_other_names_are_refused(tmp_path, by, names):
    write_planes(tmp_path / "a.tif", PLANES, names, by=by)
    refuses(tmp_path / "a.tif", r"has channels \['.*'\], which are not red, green and blue")


@pytest.mark.parametrize("by", ["OME", "ImageJ", "tifffile"])
@pytest.mark.parametrize("names", [None, ["Channel:0:0", "Channel:0:1", "Channel:0:2"], ["ch1", "ch2", "ch3"]])
def test_planes_without_names_are_told_by_their_brightness(tmp_path, log, by, names):
    write_planes(tmp_path / "a.tif", PLANES, names, by=by)
    same(read(tmp_path / "a.tif"))
    assert "three channels without names, bright as stained tissue: taken as red, green and blue" in log.text
    write_planes(tmp_path / "b.tif", np.moveaxis(LIGHTS, -1, 0), names, by=by)
    refuses(tmp_path / "b.tif", r"three channels without a colour \(photometric MINISBLACK\) that are dark")


def test_planes_by_colours_of_ome(tmp_path):
    """Bio-Formats often writes colours, and no names."""
    names = ["x0", "x1", "x2"]
    write_planes(tmp_path / "a.ome.tif", PLANES[[2, 1, 0]], names, by="OME")
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as file:
        text = file.ome_metadata
    for name, colour in zip(names, (0x0000FFFF, 0x00FF00FF, 0xFF0000FF - 2**32), strict=True):
        text = text.replace(f'Name="{name}"', f'Color="{colour}"')
    tifffile.tiffcomment(tmp_path / "a.ome.tif", text)
    same(read(tmp_path / "a.ome.tif"))


@pytest.mark.parametrize(
    "labels", [["c:1/3 - Red", "c:2/3 - Green", "c:3/3 - Blue"], [f"c:{i}/3 - a.tif" for i in (1, 2, 3)]]
)
def test_labels_of_imagej(tmp_path, labels):
    write_planes(tmp_path / "a.tif", PLANES, labels, by="ImageJ")
    same(read(tmp_path / "a.tif"))


def test_planes_that_are_slices(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", PLANES, imagej=True, photometric="minisblack", metadata={"axes": "ZYX"})
    refuses(tmp_path / "a.tif", r"has axes ZYX of \(3, 203, 301\)")


def test_samples_that_nothing_calls_colours(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, photometric="minisblack", planarconfig="contig")
    same(read(tmp_path / "a.tif"))
    tifffile.imwrite(tmp_path / "b.tif", LIGHTS, photometric="minisblack", planarconfig="contig")
    refuses(tmp_path / "b.tif", "that are dark, as of fluorescence")


def test_fluorescence_drawn_in_colours_is_warned_of(tmp_path, log):
    Image.fromarray(LIGHTS).save(tmp_path / "a.png")
    lazy_image(parse_image(tmp_path / "a.png", "a"), "if")
    assert "image 'if' is dark where H&E is bright: is it fluorescence?" in log.text


# ------------------------------------------------------------------------------------------------------ bit depth


@pytest.mark.parametrize("n_bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_depth_by_the_largest_value(tmp_path, log, n_bits, compression):
    white = 2**n_bits - 1
    deep = np.rint(PIXELS * (white / 255)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb", compression=compression)
    same(read(tmp_path / "a.tif"), atol=1)
    assert f"taken as {n_bits} bit: its largest values are {deep.max()}" in log.text
    image = lazy_image(parse_image(tmp_path / "a.tif", "a"), "he")
    same(seen(image), atol=1)


@pytest.mark.parametrize("where", ["one bright corner", "big-endian", "png"])
def test_depth_is_of_the_whole_image(tmp_path, where):
    deep = PIXELS.astype(np.uint16) * 4
    if where == "one bright corner":  # a coarse grid would miss it
        deep, wanted = deep // 2, PIXELS // 8
        deep[-40:, -40:], wanted[-40:, -40:] = 4095, 255
        tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb", tile=(64, 64), compression="zlib")
        same(read(tmp_path / "a.tif"), wanted, atol=1)
    elif where == "big-endian":
        tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb", byteorder=">")
        same(read(tmp_path / "a.tif"), atol=1)
    else:
        (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(deep))
        same(read(tmp_path / "a.png"), atol=1)


def test_a_scale_bar_and_broken_pixels_are_not_white(tmp_path):
    deep = np.rint(PIXELS * (4095 / 255)).astype(np.uint16)
    deep[5, 10:60], deep[100, 100] = 65535, 60000
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb")
    same(read(tmp_path / "a.tif")[10:99], PIXELS[10:99], atol=1)
    same(seen(lazy_image(element(np.moveaxis(deep, -1, 0), "rgb"), "he"))[10:99], PIXELS[10:99], atol=1)


@pytest.mark.parametrize("tag", ["SignificantBits", "MaxSampleValue"])
def test_depth_by_tag(tmp_path, log, tag):
    """A dim image of 14 bits, which the largest value would take for one of fewer."""
    deep = np.rint(PIXELS * (16383 / 255) / 4).astype(np.uint16)
    if tag == "SignificantBits":
        options = {"ome": True, "metadata": {"axes": "YXS", "SignificantBits": 14}}
    else:
        options = {"extratags": [(281, "H", 3, (16383,) * 3, True)]}
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb", **options)
    same(read(tmp_path / "a.tif"), np.rint(PIXELS / 4), atol=1)
    assert f"taken as 14 bit, by {tag} of the file" in log.text


def test_tags_that_cannot_be_right_are_not_believed(tmp_path, log):
    deep = np.rint(PIXELS * (4095 / 255)).astype(np.uint16)
    for n_bits in (10, 16):
        options = {"ome": True, "metadata": {"axes": "YXS", "SignificantBits": n_bits}}
        tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb", **options)
        same(read(tmp_path / "a.tif"), atol=1)
    assert log.text.count("taken as 12 bit: its largest values") == 2


@pytest.mark.parametrize("n_bits", [4, 10, 12])
def test_packed_bits(tmp_path, n_bits):
    """Values of 4, 10 or 12 bits one behind the other, as cameras write them."""
    values = PIXELS.astype(np.uint32) * (2**n_bits - 1) // 255
    flat = np.pad(values.reshape(HIGH, -1), ((0, 0), (0, (-WIDE * 3) % 8)))
    digits = (flat[..., None] >> np.arange(n_bits - 1, -1, -1)) & 1
    row_bytes = -(-WIDE * 3 * n_bits // 8)
    packed = np.packbits(digits.reshape(HIGH, -1).astype(np.uint8), axis=1)[:, :row_bytes]
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((HIGH, WIDE, 3), np.uint16), photometric="rgb", metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        page = file.pages[0]
        page.tags[258].overwrite((n_bits,) * 3)
        page.tags[279].overwrite(packed.size)
        file.filehandle.seek(page.dataoffsets[0])
        file.filehandle.write(packed.tobytes())
    same(read(tmp_path / "a.tif"), np.rint(values * (255 / (2**n_bits - 1))), atol=1)


FLOATS = {
    "to 1": (PIXELS / 255, None),
    "to 1, overshooting": (np.where(PIXELS > 240, 1.04, PIXELS / 255), None),
    "to 255": (PIXELS.astype(float), None),
    "to 65535": (PIXELS * 257.0, r"values from .* to .*; a float image goes from 0 to 1 or from 0 to 255: rescale"),
    "to 15": (PIXELS / 17, "a float image goes from 0 to 1 or"),
    "negative": (PIXELS / 255 - 0.5, "values from -0.*a float image"),
    "not a number": (np.where(PIXELS > 240, np.nan, PIXELS / 255), "a float image goes"),
}


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats(tmp_path, kind, dtype):
    pixels, match = FLOATS[kind]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels.astype(dtype), photometric="rgb")
    planes = np.moveaxis(pixels, -1, 0).astype(dtype)
    if match:
        refuses(path, match)
        with pytest.raises(ValueError, match=f"image 'he' has .*{match}"):
            lazy_image(element(planes, "rgb"), "he")
        return
    wanted = np.where(PIXELS > 240, 255, PIXELS) if "over" in kind else PIXELS
    same(read(path), wanted, atol=1)
    same(seen(lazy_image(element(planes, "rgb"), "he")), wanted, atol=1)


# ---------------------------------------------------------------------------------------------------- orientation


def upright(number):
    """By pillow."""
    picture = Image.fromarray(PIXELS)
    picture.getexif()[274] = number
    return np.asarray(ImageOps.exif_transpose(picture))


def write_turned(path, number):
    exif = Image.Exif()
    exif[274] = number
    if path.suffix == ".tif":
        layout = {"plain": {}, "tiles": {"tile": (64, 48), "compression": "zlib"}, "whole": {"compression": "zlib"}}[
            path.stem
        ]
        tifffile.imwrite(path, PIXELS, photometric="rgb", extratags=[(274, 3, 1, number, True)], **layout)
    else:
        Image.fromarray(PIXELS).save(path, exif=exif, **({"quality": 97} if path.suffix == ".jpg" else {}))


@pytest.mark.parametrize("name", ["plain.tif", "tiles.tif", "whole.tif", "a.png", "a.jpg"])
@pytest.mark.parametrize("number", range(1, 9))
def test_orientation(tmp_path, log, name, number):
    path = tmp_path / name
    options = {"largest_piece": 1000} if name == "whole.tif" else {}
    write_turned(path, number)
    wanted, atol = upright(number), 12 if name == "a.jpg" else 0
    lazy = open_pixels(path, **options)
    same(np.moveaxis(np.asarray(lazy), 0, -1), wanted, atol=atol)
    part = pickle.loads(pickle.dumps(lazy))[:, 17:90, 40:133]
    same(np.moveaxis(np.asarray(part), 0, -1), wanted[17:90, 40:133], atol=atol)
    assert image_size(path) == lazy.shape[:0:-1] == wanted.shape[1::-1]
    assert orientation(path) == number
    assert ("read upright" in log.text) == (number != 1)
    log.clear()
    same(read(path, oriented=False, **options), atol=atol)
    assert "upright" not in log.text


def test_orientation_behind_the_pixels(tmp_path):
    """A PNG may say it last; without it, nothing is decoded for a size."""
    write_turned(tmp_path / "a.png", 6)
    png = (tmp_path / "a.png").read_bytes()
    start = png.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", png[start : start + 4])[0]
    (tmp_path / "b.png").write_bytes(png[:start] + png[end:-12] + png[start:end] + png[-12:])
    assert image_size(tmp_path / "b.png") == (HIGH, WIDE)
    same(read(tmp_path / "b.png"), upright(6))
    plain = png[:start] + png[end:]
    pixels = plain.index(b"IDAT") + 4
    (tmp_path / "c.png").write_bytes(plain[:pixels] + bytes(500) + plain[pixels + 500 :])  # which cannot be decoded
    with pytest.raises(OSError, match="broken"):
        Image.open(tmp_path / "c.png").load()
    assert image_size(tmp_path / "c.png") == (WIDE, HIGH)


def test_turned_images_with_a_pyramid(tmp_path):
    """Chunks of what is shown are read from elsewhere in the file; levels are the means of what is shown."""
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(90, 250, (130, 230, 3)), np.ones((10, 10, 1))).astype(np.uint8)
    tifffile.imwrite(
        tmp_path / "a.tif", pixels, photometric="rgb", tile=(256, 256), compression="zlib",
        extratags=[(274, 3, 1, 7, True)],
    )  # fmt: skip
    image = lazy_image(parse_image(tmp_path / "a.tif", "a"), "he")
    same(seen(image), np.moveaxis(Turn(7).apply(np.moveaxis(pixels, -1, 0)), 0, -1))
    assert [factor for _, factor in image.coarser] == [2, 4]


# ------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("name", "start", "kind"),
    [
        ("a.czi", b"ZISRAWFILE", "Zeiss"),
        ("a.dcm", bytes(128) + b"DICM", "DICOM"),
        ("a.mrxs", b"\xff\xd8\xff", "3DHISTECH"),
        ("a.vsi", b"II*\0", "Olympus"),
        ("a.scn", b"II+\0", "Leica"),
        ("a.nd2", b"\xda\xce\xbe\x0a", "Nikon"),
        ("A.JP2", b"", "JPEG 2000"),
        ("a.lif", b"", "Leica"),
        ("a.tif", b"ZISRAWFILE", "Zeiss"),
        ("a.tiff", bytes(128) + b"DICM", "DICOM"),
        ("a.jpg", b"RIFF\0\0\0\0WEBPVP8 ", "WebP"),
        ("a.png", b"GIF89a", "GIF"),
        ("a.svs", b"\xff\x4f\xff\x51", "JPEG 2000"),
    ],
)
def test_other_formats(tmp_path, name, start, kind):
    path = tmp_path / name
    path.write_bytes(start + bytes(200))
    message = rf"is a file of {kind}, which is not read. What can be read: TIFF \(\.tif, .*\.qptiff; OME-TIFF, too\), JPEG and PNG"
    refuses(path, message)
    assert names_other_image(path) == (path.suffix not in (".tif", ".tiff", ".jpg", ".png", ".svs"))
    for function in (image_size, orientation):
        with pytest.raises(ValueError, match=message):
            function(path)


def test_other_formats_as_image_of_a_section(tmp_path, sdata):
    written = sr.write_h5ad(tmp_path / "beside", sdata)
    (tmp_path / "a.czi").write_bytes(b"ZISRAWFILE")
    with pytest.raises(ValueError, match="is a file of Zeiss, which is not read. What can be read: TIFF"):
        sge.io.read(written.source, image=tmp_path / "a.czi")


@pytest.mark.parametrize("name", ["a.tif", "a.jpg", "a.png", "image"])
@pytest.mark.parametrize("kind", ["TIFF", "JPEG", "PNG"])
def test_files_go_by_what_they_hold(tmp_path, name, kind):
    Image.fromarray(PIXELS).save(tmp_path / name, kind)
    assert image_size(tmp_path / name) == (WIDE, HIGH)
    assert np.abs(read(tmp_path / name).astype(int) - PIXELS).mean() < 3


@pytest.mark.parametrize("ome", [True, False])
def test_labels_and_overviews_give_way(tmp_path, log, ome):
    path = tmp_path / ("a.ome.tif" if ome else "a.tif")
    with tifffile.TiffWriter(path, ome=ome) as file:
        for pixels in (PIXELS[:90, :90], PIXELS, PIXELS[:40, :50]):
            file.write(pixels, photometric="rgb", compression="zlib", tile=(32, 32), metadata={"axes": "YXS"})
        file.write(np.zeros((2 * HIGH, WIDE), bool), photometric="minisblack")  # a mask
    assert image_size(path) == (WIDE, HIGH)
    same(read(path))
    assert f"holds 4 images: the largest is read, {WIDE} x {HIGH} px" in log.text


@pytest.mark.parametrize(
    ("vendor", "text"), [("Ventana", "level=0 mag=40 quality=90"), ("Leica", '<?xml version="1.0"?><scn></scn>')]
)
def test_tiffs_of_other_scanners(tmp_path, vendor, text):
    """Tiles of Ventana overlap, areas of Leica lie apart."""
    xmp = [(700, 1, 20, b"<iScan></iScan>     ", True)] if vendor == "Ventana" else []
    software = "ScanOutputManager 1.1" if vendor == "Ventana" else None
    tifffile.imwrite(
        tmp_path / "a.tif", PIXELS, photometric="rgb", description=text, metadata=None, extratags=xmp, software=software
    )
    refuses(tmp_path / "a.tif", f"is a slide of {vendor}, .*is not read")


def test_two_slides_in_a_file(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        for pixels in (PIXELS, PIXELS[:180]):
            file.write(pixels, photometric="rgb", metadata={"axes": "YXS"})
    refuses(tmp_path / "a.ome.tif", r"holds 2 images of about one size \(301 x 203, 301 x 180 px\)")


@pytest.mark.parametrize("options", [{"bigtiff": True}, {"byteorder": ">"}, {"predictor": True, "compression": "lzw"}])
def test_layouts_of_tiffs(tmp_path, options):
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, photometric="rgb", **options)
    same(read(tmp_path / "a.tif"))


def test_tiles_that_are_left_out_are_background(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, photometric="rgb", tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        page = file.pages[0]
        page.tags[325].overwrite([0, *page.databytecounts[1:]])
        page.tags[324].overwrite([0, *page.dataoffsets[1:]])
    found = read(tmp_path / "a.tif")
    assert (found[:64, :64] == 255).all()
    same(found[64:], PIXELS[64:])


def test_a_compression_that_nothing_decodes(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, photometric="rgb", compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        file.pages[0].tags[259].overwrite(34661)  # JBIG
    refuses(tmp_path / "a.tif", "cannot be read as an image .*34661|JBIG")


# ------------------------------------------------------------------------------------------- images of SpatialData


@pytest.mark.parametrize(
    ("names", "where"),
    [
        (None, [0, 1, 2]),
        (("0", "1", "2"), [0, 1, 2]),
        (("Channel:0:0", "Channel:0:1", "Channel:0:2"), [0, 1, 2]),
        (("R", "G", "B"), [0, 1, 2]),
        (("b", "g", "r"), [2, 1, 0]),
        (("Blue", "Red", "Green"), [2, 0, 1]),
    ],
)
def test_channels_of_an_element(names, where):
    same(seen(lazy_image(element(PLANES[where], names), "he")))


@pytest.mark.parametrize(
    "names", [("DAPI", "GFP", "RFP"), ("2", "1", "0"), ("0", "0", "1"), ("r", "r", "b"), ("0", "g", "r")]
)
def test_channels_that_are_no_colours(names):
    with pytest.raises(ValueError, match=r"image 'he' has channels \[.*\], which are not red, green and blue"):
        lazy_image(element(PLANES, names), "he")


def test_dark_elements(log):
    dark = np.moveaxis(LIGHTS, -1, 0)
    with pytest.raises(ValueError, match="dark where H&E is bright, as of fluorescence, and nothing says"):
        lazy_image(element(dark), "he")
    lazy_image(element(dark, "rgb"), "he")
    assert "is it fluorescence?" in log.text
    grey = np.broadcast_to(dark[1] // 5, (3, HIGH, WIDE))
    with pytest.raises(ValueError, match=r"dark where H&E is bright.*rename its channels to r, g, b"):
        lazy_image(element(grey), "he")
    with pytest.raises(ValueError, match="dark where H&E is bright"):
        lazy_image(element(np.zeros((3, HIGH, WIDE), np.uint8)), "he")


def test_colours_of_another_space():
    """As other readers give a slide of Aperio's 33003, or any YCbCr."""
    for names in ("rgb", None):
        with pytest.raises(ValueError, match=r"background of \(245, 12[78], 12[78]\): it is YCbCr that was read as if"):
            lazy_image(element(np.moveaxis(YCC, -1, 0), names), "he")


def test_no_colour(log):
    lazy_image(element(np.broadcast_to(PLANES[1], PLANES.shape), "rgb"), "he")
    assert "image 'he' has no colour" in log.text


def test_stained_tissue_raises_no_word(log):
    """Sections under a microscope, with much and with no background; a photograph of stars is dark."""
    tissue = np.asarray(skimage.data.immunohistochemistry())
    for part in (tissue, tissue[:200, :200], tissue[150:250, 250:350]):
        lazy_image(element(np.moveaxis(part, -1, 0)), "he")
    assert log.text == ""
    with pytest.raises(ValueError, match="dark where H&E is bright"):
        lazy_image(element(np.moveaxis(np.asarray(skimage.data.hubble_deep_field()), -1, 0)), "he")


def test_black_around_a_scan_is_no_fluorescence(log):
    around = np.zeros((3, 4 * HIGH, 4 * WIDE), np.uint8)
    around[:, 300 : 300 + HIGH, 450 : 450 + WIDE] = PLANES
    lazy_image(element(around), "he")
    assert "fluorescence" not in log.text


def test_four_channels_without_names():
    opaque = np.full((1, HIGH, WIDE), 255, np.uint8)
    same(seen(lazy_image(element(np.concatenate([PLANES, opaque])), "he")))
    with pytest.raises(ValueError, match="4 channels without names, and the fourth is no opacity"):
        lazy_image(element(np.concatenate([PLANES, PLANES[:1]])), "he")


@pytest.mark.parametrize("n_bits", [8, 10, 12, 14, 16])
def test_depth_of_an_element(log, n_bits):
    deep = np.rint(PLANES * ((2**n_bits - 1) / 255)).astype(np.uint16)
    opaque = np.full((1, HIGH, WIDE), 65535, np.uint16)
    same(seen(lazy_image(element(deep, "rgb"), "he")), atol=1)
    assert f"image 'he': uint16 taken as {n_bits} bit (white = {2**n_bits - 1})" in log.text
    same(seen(lazy_image(element(np.concatenate([deep, opaque]), "rgba"), "he")), atol=1)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint32, bool])
def test_types_that_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"image 'he' has dtype {np.dtype(dtype)}; pass an RGB image of dtype"):
        lazy_image(element(PLANES.astype(dtype), "rgb"), "he")


# ---------------------------------------------------------------------------------------------------- as a whole


def test_a_section_of_such_an_image(tmp_path):
    tifffile.imwrite(
        tmp_path / "slide.tif", YCC, photometric="ycbcr", subsampling=(1, 1), compression="lzw", tile=(64, 64),
        extratags=[(274, 3, 1, 6, True)],
    )  # fmt: skip
    section = sge.io.read(tmp_path / "slide.tif")
    assert isinstance(section, SpatialData)
    (image,) = section.images.values()
    assert list(image.coords["c"].values) == ["r", "g", "b"]
    same(seen(lazy_image(image, "slide")), upright(6), atol=ROUNDED)
    section.write(tmp_path / "out.zarr")
    Image2DModel().validate(image)


def test_only_the_pieces_that_are_needed_are_read(tmp_path):
    """All tiles but the first are destroyed after the file was opened."""
    path, pixels = tmp_path / "a.tif", np.tile(YCC, (8, 8, 1))
    tifffile.imwrite(path, pixels, photometric="ycbcr", subsampling=(1, 1), compression="zlib", tile=(256, 256))
    lazy = open_pixels(path)
    wanted = lazy[:, :10, :10].compute()
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        others = list(zip(page.dataoffsets, page.databytecounts, strict=True))[1:]
    with path.open("r+b") as file:
        for offset, size in others:
            file.seek(offset)
            file.write(bytes(size))
    np.testing.assert_array_equal(lazy[:, :10, :10].compute(), wanted)
    with pytest.raises(Exception, match=r"."):
        lazy[:, -10:, -10:].compute()
