"""``histosge cache``: embeddings that are kept on disk."""

from __future__ import annotations

import click

from histosge.cli._shared import JSON, Command, as_json, as_table, readable_size


@click.group()
def cache() -> None:
    """List or remove embeddings that are kept on disk, so that a second run does not compute them again.

    \b
    Examples:
      histosge cache list
      histosge cache clear --encoder uni2
      HISTOSGE_CACHE=/scratch/histosge histosge cache list
    """  # noqa: D301


@cache.command("list", cls=Command)
@JSON
def cache_list(*, as_json_: bool) -> str:
    """List the embeddings that are kept: folder, encoders and sizes.

    \b
    Examples:
      histosge cache list
      histosge cache list --json
    """  # noqa: D301
    from histosge._embedding import EmbeddingCache

    kept = EmbeddingCache.from_settings()
    shelves = kept.shelves()
    n_bytes = sum(shelf.n_bytes for shelf in shelves)
    if as_json_:
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
        return as_json({"folder": kept.root, "limit_bytes": kept.limit_bytes, "n_bytes": n_bytes, "shelves": rows})
    summary = f"{readable_size(n_bytes)} of at most {readable_size(kept.limit_bytes)} in {kept.root}"
    if not shelves:
        return summary
    names = ("encoder", "mpp", "tile_um", "dense", "blocks", "size", "last used")
    lines = [
        (
            shelf.encoder,
            *(shelf.value(name) for name in ("mpp", "tile_um", "dense")),
            shelf.n_blocks,
            readable_size(shelf.n_bytes),
            f"{shelf.last_used.astimezone():%Y-%m-%d %H:%M}",
        )
        for shelf in shelves
    ]
    return f"{as_table(names, lines)}\n{summary}"


@cache.command("clear", cls=Command)
@click.option("--encoder", help="Only embeddings by this encoder; see `histosge cache list`.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def cache_clear(*, encoder: str | None, yes: bool) -> str:
    """Remove embeddings that are kept; other files in the folder stay.

    \b
    Examples:
      histosge cache clear
      histosge cache clear --encoder uni2 --yes
    """  # noqa: D301
    from histosge._embedding import EmbeddingCache

    kept = EmbeddingCache.from_settings()
    shelves = kept.shelves(encoder=encoder)
    size = readable_size(sum(shelf.n_bytes for shelf in shelves))
    if shelves and not yes:
        whose = "all encoders" if encoder is None else repr(encoder)
        click.confirm(f"Remove the embeddings by {whose}, {size}, from {kept.root}?", abort=True, err=True)
    return f"freed {readable_size(kept.clear(encoder=encoder))} in {kept.root}"
