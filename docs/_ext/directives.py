"""What the pages take from the code when they are built: the list of encoders and the help of the shell."""

import math
from typing import ClassVar

import click
import pandas as pd
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import histosge as sge
from histosge.cli import main


class Encoders(SphinxDirective):
    """All encoders, or those that a query of pandas finds; with ``:names:`` a line of names instead of a table."""

    optional_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar = {"names": directives.flag}
    columns = (
        "encoder",
        "licence",
        "access",
        "code",
        "commercial",
        "µm/px",
        "tile µm",
        "token µm",
        "numbers",
        "parameters",
    )

    def run(self) -> list[nodes.Node]:
        """Write Markdown and parse it."""
        table = sge.encoders()
        if self.arguments:
            table = table.query(self.arguments[0])
        if table.empty:
            msg = f"no encoder is {self.arguments}"
            raise self.error(msg)
        if "names" in self.options:
            lines = [", ".join(f"`{name}`" for name in table.index) + "."]
        else:
            rows = [self.columns, ["---"] * len(self.columns), *(self.row(str(n), one) for n, one in table.iterrows())]
            lines = [f"| {' | '.join(row)} |" for row in rows]
        box = nodes.container(classes=["encoders"])
        self.state.nested_parse(StringList(lines, self.env.doc2path(self.env.docname)), self.content_offset, box)
        return [box]

    @staticmethod
    def row(name: str, one: pd.Series) -> list[str]:
        """Cells of an encoder."""
        access = "built in" if one["source"] == "built-in" else "gated" if one["gated"] else "open"
        return [
            f"[{name}]({one['url']})" if one["url"] else f"`{name}`",
            one["licence"],
            access,
            "remote" if one["remote_code"] else "–",
            "yes" if one["commercial"] else "no",
            f"{one['mpp']:.3g}{'*' if one['mpp_source'] == 'convention' else ''}",
            f"{one['tile_um']:.3g}",
            "–" if math.isnan(one["token_um"]) else f"{one['token_um']:.3g}",
            str(one["embed_dim"]),
            one["parameters"] or "–",
        ]


class ShellHelp(SphinxDirective):
    """``--help`` of every command, as it reads in a terminal."""

    def run(self) -> list[nodes.Node]:
        """Write a heading and a block for each."""
        found: list[nodes.Node] = []
        for name, text in helps(main, "histosge").items():
            found += [nodes.rubric(text=name), nodes.literal_block(text, text, language="none")]
        return found


def helps(command: click.Command, name: str) -> dict[str, str]:
    """Help of a command and of all below it, by what is typed."""
    context = click.Context(command, info_name=name, max_content_width=84, terminal_width=84)
    found = {name: command.get_help(context)}
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found |= helps(command.get_command(context, below), f"{name} {below}")  # type: ignore[arg-type]
    return found


def setup(app: Sphinx) -> dict[str, bool]:
    """Add them."""
    app.add_directive("encoders", Encoders)
    app.add_directive("shell-help", ShellHelp)
    return {"parallel_read_safe": True}
