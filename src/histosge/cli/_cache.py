"""``histosge cache``: embeddings on disk."""

from __future__ import annotations

import click

from histosge.cli._shared import JSON, Command, as_json, as_table, readable_size


@click.group()
def cache() -> None:
    """List or remove embeddings on disk, which a second run reuses.

    \b
    Examples:
      histosge cache list
      histosge cache clear --encoder uni2
      HISTOSGE_CACHE=/scratch/histosge histosge cache list
    """  # noqa: D301


@cache.command("list", cls=Command)
@JSON
def cache_list(*, as_json_: bool) -> str:
    """List the embeddings on disk: folder, encoders and sizes.

    \b
    Examples:
      histosge cache list
      histosge cache list --json
    """  # noqa: D301
    from histosge._embedding import EmbeddingCache

    kept = EmbeddingCache.from_settings()
    groups = kept.groups()
    n_bytes = sum(group.n_bytes for group in groups)
    if as_json_:
        rows = [
            {
                "encoder": group.encoder,
                "n_blocks": group.n_blocks,
                "n_bytes": group.n_bytes,
                "last_used": group.last_used.isoformat(timespec="seconds"),
                "config": group.config,
            }
            for group in groups
        ]
        return as_json({"folder": kept.root, "limit_bytes": kept.limit_bytes, "n_bytes": n_bytes, "groups": rows})
    summary = f"{readable_size(n_bytes)} of at most {readable_size(kept.limit_bytes)} in {kept.root}"
    if not groups:
        return summary
    names = ("encoder", "mpp", "tile_um", "dense", "blocks", "size", "last used")
    lines = [
        (
            group.encoder,
            *(group.value(name) for name in ("mpp", "tile_um", "dense")),
            group.n_blocks,
            readable_size(group.n_bytes),
            f"{group.last_used.astimezone():%Y-%m-%d %H:%M}",
        )
        for group in groups
    ]
    return f"{as_table(names, lines)}\n{summary}"


@cache.command("clear", cls=Command)
@click.option("--encoder", help="Only embeddings by this encoder; see `histosge cache list`.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def cache_clear(*, encoder: str | None, yes: bool) -> str:
    """Remove embeddings on disk; other files in the folder stay.

    \b
    Examples:
      histosge cache clear
      histosge cache clear --encoder uni2 --yes
    """  # noqa: D301
    from histosge._embedding import EmbeddingCache

    kept = EmbeddingCache.from_settings()
    groups = kept.groups(encoder=encoder)
    size = readable_size(sum(group.n_bytes for group in groups))
    if groups and not yes:
        whose = "all encoders" if encoder is None else repr(encoder)
        click.confirm(f"Remove the embeddings by {whose}, {size}, from {kept.root}?", abort=True, err=True)
    return f"freed {readable_size(kept.clear(encoder=encoder))} in {kept.root}"
