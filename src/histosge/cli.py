"""``histosge`` from a shell: the same names and defaults as in Python."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from time import time

import click

from histosge import __version__
from histosge._settings import logger, settings


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="histosge")
@click.option("-q", "--quiet", is_flag=True, help="Say warnings and errors only.")
def main(*, quiet: bool) -> None:
    """Super-resolved spatial transcriptomics from H&E images and Visium-like spots."""
    settings.verbosity = 1 if quiet else 2
    # about a default of zarr's to come, once for every array: nothing that whoever types this could do
    warnings.filterwarnings("ignore", message="zarr v3 autosharding")


def _fail(err: Exception) -> None:
    """End with the message a user can act on, without a traceback."""
    # a KeyError would print its message in quotes; an error of the system has its number first
    click.echo(f"histosge: {err.args[0] if isinstance(err, KeyError) and err.args else err}", err=True)
    sys.exit(1)


def _refuse_foreign(path: Path, *, overwrite: bool, marks: tuple[str, ...]) -> None:
    """Refuse to write where something is; with ``overwrite``, where that does not look like results of ours."""
    if not path.exists():
        return
    if not overwrite or not any((path / mark).exists() for mark in marks):
        hint = "pass --overwrite to replace it" if not overwrite else "it does not look like results of histosge"
        msg = f"{path} exists already: {hint}, or choose another name."
        raise FileExistsError(msg)


def _level(_context: click.Context, _option: click.Parameter, value: str) -> float | None:
    """Read a share, or ``none``."""
    if value.lower() == "none":
        return None
    try:
        return float(value)
    except ValueError:
        msg = f"{value!r} is neither a number between 0 and 1, such as 0.9, nor 'none'."
        raise click.BadParameter(msg) from None


@main.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder.")
@click.option("--seed", default=0, show_default=True, help="Seed of the section and of the training.")
def demo(*, out: Path, seed: int) -> None:
    """Run everything on a synthetic section with known truth: offline, in about a minute.

    Writes OUT/section.zarr (SpatialData), OUT/predicted.h5ad and OUT/expression.png.
    """
    import matplotlib as mpl

    mpl.use("agg")
    import numpy as np
    import scanpy as sc

    import histosge as sge
    from histosge._metrics import correlation

    start = time()
    try:
        _refuse_foreign(out, overwrite=True, marks=("section.zarr", "expression.png"))
    except FileExistsError as err:
        _fail(err)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    sdata = sge.datasets.synthetic(rng=seed)
    click.echo("1. a synthetic section: H&E image, Visium-like spots, Poisson counts, truth known everywhere")
    click.echo("2. sge.tl.predict(sdata, encoder='stain-texture')")
    sge.tl.predict(sdata, encoder="stain-texture", rng=seed)
    table = sdata.tables["histosge"]
    click.echo("3. sc.pp.pca → sc.pp.neighbors → sc.tl.leiden")
    sc.pp.pca(table, n_comps=min(15, table.n_vars - 1))
    sc.pp.neighbors(table)
    sc.tl.leiden(table, flavor="igraph", n_iterations=2, resolution=0.5, random_state=seed)
    sdata.write(out / "section.zarr")
    table.write_h5ad(out / "predicted.h5ad")
    best = table.var["held_out_pcc"].sort_values(ascending=False).index[:2]
    axes = sge.pl.expression(sdata, list(best), obs="leiden")
    axes[0, 0].figure.savefig(out / "expression.png", dpi=110)

    held_out = table.uns["histosge"]["held_out"]
    between = ~table.obs["is_spot"].to_numpy()
    truth = sge.datasets.synthetic_truth(sdata, target_key="histosge_targets")[table.var_names].to_numpy()
    against_truth = correlation(np.asarray(table.X)[between], truth[between]).mean()
    click.echo("")
    click.echo(f"{table.n_obs} places ({int(between.sum())} between spots) x {table.n_vars} genes, ", nl=False)
    click.echo(f"{table.obs['leiden'].nunique()} domains, {time() - start:.0f} s")
    click.echo("Correlation with the measurement on held-out spots, mean over genes:")
    for name, scores in sorted(held_out.items(), key=lambda item: -item[1]["pcc"]):
        click.echo(f"  {name:<12} {scores['pcc']:.3f}   (mean squared error {scores['mse']:.3f})")
    click.echo(f"Correlation with the known truth between the spots: {against_truth:.3f}")
    click.echo(f"Wrote {out}/section.zarr, {out}/predicted.h5ad and {out}/expression.png")


@main.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="IN.zarr")
@click.argument("target", type=click.Path(path_type=Path), metavar="OUT.zarr")
@click.option("--encoder", default="h-optimus-0", show_default=True, help="Encoder; see `histosge encoders`.")
@click.option("--weights", type=click.Path(exists=True), help="Local weights, for machines without network.")
@click.option("--head", help="Head; by default in-context+kriging, or aggregate+kriging for bins.")
@click.option(
    "--level",
    default="0.9",
    show_default=True,
    callback=_level,
    help="Share of measurements that the error bars hold, or 'none' for no error bars.",
)
@click.option("--genes", default="1000", show_default=True, help="Number of genes, 'all', or names with commas.")
@click.option("--upsample", type=int, help="Places per spot: 2, 4, 8 or 16 (the default is 4).")
@click.option("--bin-um", type=float, help="Edge of square bins in µm.")
@click.option("--target-key", help="Shapes to predict at.")
@click.option("--conserve", is_flag=True, help="Bins that average to their spot, freed of noise, too.")
@click.option("--image-key", help="H&E image.")
@click.option("--spots-key", help="Measured spots.")
@click.option("--table-key", help="Table with the counts.")
@click.option("--layer", help="Layer with the counts.")
@click.option("--coordinate-system", help="Coordinate system that aligns image and spots.")
@click.option("--mpp", type=float, help="µm per pixel of the image.")
@click.option("--pitch-um", type=float, help="Distance of neighbouring spots in µm.")
@click.option("--key-added", default="histosge", show_default=True, help="Name of the table.")
@click.option("--device", help="cpu, cuda, cuda:1, mps.")
@click.option("--batch-size", default=64, show_default=True, help="Tiles per forward pass.")
@click.option("--no-cache", is_flag=True, help="Neither read nor keep embeddings; see `histosge cache`.")
@click.option("--seed", default=0, show_default=True, help="Seed.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.zarr.")
def predict(
    *,
    source: Path,
    target: Path,
    weights: str | None,
    genes: str,
    no_cache: bool,
    seed: int,
    overwrite: bool,
    **options: object,
) -> None:
    """Predict expression for the section IN.zarr and write everything to OUT.zarr.

    \b
    Examples:
      histosge predict section.zarr predicted.zarr
      histosge predict section.zarr predicted.zarr --encoder uni2 --upsample 16
      histosge predict section.zarr predicted.zarr --encoder stain-texture --genes EPCAM,VIM
    """  # noqa: D301  click's own mark for a paragraph that is not to be wrapped
    import spatialdata as sd

    import histosge as sge

    wanted: int | str | list[str] = int(genes) if genes.isdigit() else genes if genes == "all" else genes.split(",")
    try:
        if source.resolve().is_relative_to(target.resolve()):
            msg = f"OUT.zarr is or holds IN.zarr ({target}): choose another name, nothing of the input is overwritten."
            raise ValueError(msg)
        _refuse_foreign(target, overwrite=overwrite, marks=("zarr.json", ".zgroup", ".zattrs"))
        sdata = sd.read_zarr(source)
        if weights is not None:
            options["encoder"] = sge.load_encoder(options["encoder"], weights=weights)
        with sge.settings.override(**({"cache_gb": 0} if no_cache else {})):
            sge.tl.predict(sdata, genes=wanted, rng=seed, **options)  # type: ignore[arg-type]
        fresh = target.with_name(f".{target.name}.part")  # what was there stays until there is something better
        shutil.rmtree(fresh, ignore_errors=True)
        sdata.write(fresh)
        if target.exists():
            shutil.rmtree(target)
        fresh.rename(target)
    except (ValueError, KeyError, RuntimeError, OSError, ImportError, MemoryError) as err:
        _fail(err)
    logger.info("wrote %s", target)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def encoders(*, as_json: bool) -> None:
    """List the encoders: scale, licence, access."""
    import histosge as sge

    frame = sge.encoders()
    if as_json:
        click.echo(json.dumps(json.loads(frame.reset_index().to_json(orient="records")), indent=1))
        return
    click.echo(frame.drop(columns=["url"], errors="ignore").to_string())


@main.group()
def cache() -> None:
    """List or remove embeddings that are kept on disk, so that a second run does not compute them again.

    \b
    Examples:
      histosge cache list
      histosge cache clear --encoder uni2
      HISTOSGE_CACHE=/scratch/histosge histosge cache list
    """  # noqa: D301


@cache.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON, with all that the embeddings depend on.")
def cache_list(*, as_json: bool) -> None:
    """Say where embeddings are kept, of which encoders, and how large they are.

    \b
    Examples:
      histosge cache list
      histosge cache list --json
    """  # noqa: D301
    from histosge._cache import EmbeddingCache

    try:
        kept = EmbeddingCache.from_settings()
        shelves = kept.shelves()
    except (ValueError, OSError) as err:
        _fail(err)
    n_bytes = sum(shelf.n_bytes for shelf in shelves)
    if as_json:
        rows = [
            {
                "encoder": shelf.encoder,
                "n_blocks": shelf.n_blocks,
                "n_bytes": shelf.n_bytes,
                "last_used": shelf.last_used.isoformat(timespec="seconds"),
                "recipe": shelf.recipe,
            }
            for shelf in shelves
        ]
        told = {"folder": str(kept.root), "limit_bytes": kept.limit_bytes, "n_bytes": n_bytes, "shelves": rows}
        click.echo(json.dumps(told, indent=1))
        return
    if shelves:
        table = [("encoder", "mpp", "tile_um", "dense", "blocks", "size", "last used")]
        for shelf in shelves:
            recipe = [_cell(shelf.value(name)) for name in ("mpp", "tile_um", "dense")]
            last_used = f"{shelf.last_used.astimezone():%Y-%m-%d %H:%M}"
            table.append((_cell(shelf.encoder), *recipe, str(shelf.n_blocks), _size(shelf.n_bytes), last_used))  # type: ignore[arg-type]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            name, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            click.echo("  ".join([name.strip().ljust(widths[0]), *others]))
    click.echo(f"{_size(n_bytes)} of at most {_size(kept.limit_bytes)} in {kept.root}")


@cache.command("clear")
@click.option("--encoder", help="Only embeddings by this encoder; see `histosge cache list`.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def cache_clear(*, encoder: str | None, yes: bool) -> None:
    """Remove embeddings that are kept; nothing else in the folder is touched.

    \b
    Examples:
      histosge cache clear
      histosge cache clear --encoder uni2 --yes
    """  # noqa: D301
    from histosge._cache import EmbeddingCache

    try:
        kept = EmbeddingCache.from_settings()
        shelves = kept.shelves(encoder=encoder)
        size = _size(sum(shelf.n_bytes for shelf in shelves))
        if shelves and not yes:
            whose = "all encoders" if encoder is None else repr(encoder)
            click.confirm(f"Remove the embeddings by {whose}, {size}, from {kept.root}?", abort=True, err=True)
        freed = kept.clear(encoder=encoder)
    except (ValueError, OSError) as err:
        _fail(err)
    click.echo(f"freed {_size(freed)} in {kept.root}")


def _cell(value: object) -> str:
    """Write a value of a recipe, or a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _size(n_bytes: float) -> str:
    """Write a number of bytes with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"
