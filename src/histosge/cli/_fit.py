"""``histosge fit``: a model that predicts other sections."""

from __future__ import annotations

from time import time
from typing import TYPE_CHECKING, Any

import click

from histosge._settings import logger
from histosge.cli._shared import (
    COMPUTE,
    ENCODER,
    JSON,
    KEYS,
    LEARN,
    OUT_PATH,
    OVERWRITE,
    RAW,
    SOURCE_PATH,
    Command,
    as_json,
    cache_setting,
    heads_option,
    held_out_lines,
    loaded_encoder,
    read_sections,
    refuse_input_as_output,
    taking,
    written,
)

if TYPE_CHECKING:
    from pathlib import Path

    from histosge._remote import Remote

_MARKS = ("histosge.safetensors",)
"""A file in every folder of a model."""


@click.command(cls=Command)
@click.argument("sources", nargs=-1, required=True, type=SOURCE_PATH, metavar="IN...")
@click.argument("target", type=OUT_PATH, metavar="MODEL")
@taking(
    *RAW,
    *ENCODER,
    click.option("--dense/--no-dense", default=False, help="Embed areas: for models that predict bins and cells."),
    click.option("--head", help="Head; by default in-context+kriging, or with --dense aggregate+kriging."),
    *LEARN,
    *heads_option("Arguments of the head, as JSON."),
    *KEYS,
    *COMPUTE,
    OVERWRITE,
    JSON,
)
def fit(
    *,
    sources: tuple[Path | Remote, ...],
    target: Path,
    images: tuple[Path, ...],
    bin_size: int | None,
    weights: str | None,
    trust_remote_code: bool,
    no_cache: bool,
    overwrite: bool,
    as_json_: bool,
    encoder: str,
    **options: Any,
) -> str:
    """Train a head on the measured spots of the sections IN and save it to the folder MODEL.

    IN is as for `histosge predict`. The model predicts other sections: `histosge predict --model MODEL`.

    \b
    Examples:
      histosge fit section.zarr model --encoder stain-texture
      histosge fit a/outs b/outs model --image a.tif --image b.tif --encoder uni2
      histosge predict c/outs c.zarr --image c.tif --model model
    """  # noqa: D301
    import histosge as sge

    start = time()
    refuse_input_as_output(sources, target, name="MODEL")
    with written(target, overwrite=overwrite, marks=_MARKS) as (fresh,):
        # paths, so that one section at a time is in memory
        plain = not images and bin_size is None
        sections = list(sources) if plain else read_sections(sources, images=images, bin_size=bin_size)
        how = loaded_encoder(encoder, weights=weights, trust_remote_code=trust_remote_code)
        with sge.settings.override(**cache_setting(no_cache=no_cache)):
            model = sge.tl.fit(sections, encoder=how, **options)
        model.save(fresh)
    logger.info("wrote %s, %.0f s", target, time() - start)
    if as_json_:
        summary = {
            "model": target,
            "head": model.head,
            "encoder": model.config.name,
            "n_genes": len(model.genes),
            "n_predictable": int(model.scores["predictable"].sum()),
            "held_out": model.held_out,
            "seconds": round(time() - start, 1),
        }
        return as_json(summary)
    return "\n".join(["Correlation on held-out spots, mean over genes:", *held_out_lines(model.held_out)])
