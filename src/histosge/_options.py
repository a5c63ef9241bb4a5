"""Arguments that several doors share: type, default and text of each.

A door takes a group of them as ``**options: Unpack[Reading]``, so that type checkers know what callers may pass. Its
docstring names each argument; a name without text gets the text from here. :func:`expand` writes signature and
docstring in full, for ``help()``, Jupyter and Sphinx.
"""

# no "from __future__ import annotations": types and texts are read when a door is made
import difflib
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ForwardRef, TypedDict, TypeVar, get_args

if TYPE_CHECKING:
    import numpy as np

DEFAULT_ENCODER = "midnight"
"""Large, and available without a login: the first call works on a fresh installation."""
MAX_SPOTS = 100_000
"""Spots that heads learn from: docs/benchmarks.md."""
_WIDTH = 112
"""Width of a line of a docstring"""

Door = TypeVar("Door", bound=Callable[..., Any])
Group = TypeVar("Group")


@dataclass(frozen=True)
class Argument:
    """Default and text of an argument."""

    default: Any
    text: str


class Reading(TypedDict, total=False):
    """How a section is read."""

    image_key: Annotated[str | None, Argument(None, "H&E image in ``sdata.images``. ``None`` takes the only one.")]
    spots_key: Annotated[
        str | None,
        Argument(None, "Measured spots in ``sdata.shapes``. ``None`` takes the only ones that a table annotates."),
    ]
    table_key: Annotated[str | None, Argument(None, "Table with the counts of the spots. ``None`` takes the only one.")]
    layer: Annotated[
        str | None,
        Argument(
            None, 'Layer of the table that holds the counts, or ``"raw"``: ``table.raw.X``. ``None`` takes ``X``.'
        ),
    ]
    coordinate_system: Annotated[
        str | None,
        Argument(
            None,
            "Coordinate system that aligns image and spots. ``None`` takes the one that holds both; several must be "
            "equal.",
        ),
    ]
    mpp: Annotated[
        float | None,
        Argument(
            None,
            "µm per pixel of the image. ``None`` takes what the file states, else what follows from the pitch of the "
            "spots.",
        ),
    ]


class Embedding(TypedDict, total=False):
    """How spots and targets are embedded."""

    encoder: Annotated[
        Any,
        Argument(
            DEFAULT_ENCODER,
            'Name of an encoder (see :func:`histosge.encoders`), names joined by ``+`` as in ``"uni+rgb"``, the '
            "paper's, or one that :func:`histosge.load_encoder` made.",
        ),
    ]
    tile_um: Annotated[
        float | None,
        Argument(None, "Edge of a tile in µm. ``None`` takes the encoder's own, at which it was trained."),
    ]


class Learning(TypedDict, total=False):
    """How heads are fitted."""

    genes: Annotated[
        int | Sequence[str] | str,
        Argument(
            1000,
            "Number of genes, chosen by spatial autocorrelation among the training spots; a list of names; "
            '``"all"`` that were seen; or ``"union"``. A number and ``"all"`` take genes that all sections measure, a '
            'list and ``"union"`` those that at least one measures: each is learnt from the sections that measure it.',
        ),
    ]
    n_folds: Annotated[int, Argument(5, "Folds of the training spots, 2 to 20.")]
    max_spots: Annotated[
        int,
        Argument(
            MAX_SPOTS,
            "Most spots (bins) that heads learn from. Of more, blocks are drawn evenly over sections and tissue; all "
            "spots of a section stay context for its prediction.",
        ),
    ]
    merge_um: Annotated[
        float | None,
        Argument(
            None,
            "Edge in µm to which measured bins that touch (Visium HD) are merged before heads learn from and read "
            "them. ``None`` takes 1, 2 or 4 bins, the fewest at which half of the merged bins hold 800 counts. The "
            "edge of a bin merges none.",
        ),
    ]
    rng: Annotated[
        "int | np.random.Generator | None",
        Argument(0, "Seed or generator. The same seed gives the same result on the same machine."),
    ]


class Running(TypedDict, total=False):
    """How a call runs."""

    device: Annotated[
        str | None,
        Argument(
            None,
            'Where to compute, such as ``"cpu"`` or ``"cuda:1"``. ``None`` takes ``settings.device``, else a GPU if '
            "there is one.",
        ),
    ]
    batch_size: Annotated[int, Argument(64, "Tiles per forward pass of the encoder.")]
    progress: Annotated[bool | None, Argument(None, "Show progress bars. ``None`` takes ``settings.progress``.")]


class EmbedOptions(Reading, Embedding, Running, total=False):
    """Arguments of doors that embed."""


class FitOptions(EmbedOptions, Learning, total=False):
    """Arguments of doors that fit heads."""


def arguments(group: type) -> dict[str, tuple[Any, Argument]]:
    """Type and argument of each name in a group."""
    return {name: get_args(hint) for name, hint in group.__annotations__.items()}  # type: ignore[misc]


def pick(options: Mapping[str, Any], group: type[Group]) -> Group:
    """Take the options of one group."""
    return {name: options[name] for name in group.__annotations__}  # type: ignore[return-value]


def expand(group: type) -> Callable[[Door], Door]:
    """Write the options of a group into the signature and the docstring of a function that takes ``**options``.

    The signature has the order of the docstring. The function gets all options of the group: those that the caller does
    not pass have their default.
    """
    shared = arguments(group)
    defaults = {name: argument.default for name, (_, argument) in shared.items()}

    def decorate(door: Door) -> Door:
        plain = inspect.signature(door)
        known = {p.name: p for p in plain.parameters.values() if p.kind is not p.VAR_KEYWORD}
        for name, (hint, argument) in shared.items():
            hint = hint.__forward_arg__ if isinstance(hint, ForwardRef) else hint  # text, as doors have it
            known[name] = inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=argument.default, annotation=hint
            )
        order = list(known)
        if door.__doc__ is not None:  # python -OO removes it
            door.__doc__, order = _documented(inspect.cleandoc(door.__doc__), shared)
        if sorted(order) != sorted(known):
            msg = f"{door.__qualname__}: the docstring has {order}, the signature {list(known)}."
            raise TypeError(msg)
        # of the function itself: Sphinx looks behind the wrapper
        full = plain.replace(parameters=[known[name] for name in order])
        door.__signature__ = full  # type: ignore[attr-defined]
        door.__annotations__ = {name: known[name].annotation for name in order} | {"return": full.return_annotation}

        @functools.wraps(door)
        def call(*args: Any, **given: Any) -> Any:
            for name in given:
                if name not in known:
                    near = difflib.get_close_matches(name, known, n=1)
                    hint = f"Did you mean {near[0]}=?" if near else f"Choose from {', '.join(order)}."
                    msg = f"{door.__name__}() has no argument {name}=. {hint}"
                    raise TypeError(msg)
            return door(*args, **(defaults | given))

        return call  # type: ignore[return-value]

    return decorate


def _documented(doc: str, shared: Mapping[str, tuple[Any, Argument]]) -> tuple[str, list[str]]:
    """Give text to the names in *Parameters* that have none; return the docstring, and all names in their order."""
    before, title, rest = doc.partition("Parameters\n----------\n")
    section, gap, after = rest.partition("\n\n")
    order, entries = [], []
    for entry in re.split(r"\n(?=\S)", section):
        names, _, text = entry.partition("\n")
        for name in names.split(", "):
            order.append(name)
            own = text or textwrap.indent(textwrap.fill(shared[name][1].text, _WIDTH), "    ")
            entries.append(f"{name}\n{own}")
    return before + title + "\n".join(entries) + gap + after, order
