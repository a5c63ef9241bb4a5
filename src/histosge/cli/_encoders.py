"""``histosge encoders``."""

from __future__ import annotations

import click

from histosge.cli._shared import JSON, Command, as_json, as_table


@click.command(cls=Command)
@JSON
def encoders(*, as_json_: bool) -> str:
    """List the encoders: scale, size, licence, access.

    \b
    Examples:
      histosge encoders
      histosge encoders | grep Apache
      histosge encoders --json
    """  # noqa: D301
    import histosge as sge

    frame = sge.encoders()
    if as_json_:
        return as_json(frame.reset_index().to_dict(orient="records"))
    shown = frame.drop(columns=["tile_px", "source", "url"]).reset_index()
    return as_table(shown, shown.astype(object).to_numpy().tolist())
