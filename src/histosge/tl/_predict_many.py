"""Predict a list of sections, each into a store of its own, with a summary of all."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any

import numpy as np

from histosge import _keys
from histosge._embedding import EmbeddingConfig, load_of_model, resolve_device
from histosge._encoders import load_encoder
from histosge._heads import default_head, head_digest
from histosge._model import check_arguments
from histosge._readers import Source, name_of, opened, path_of
from histosge._remote import Remote, located, shown
from histosge._section import read_provenance
from histosge._settings import logger, progress_bar
from histosge.tl._summary import COLUMNS, Summary

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd

    from histosge._section import StoredProvenance

_OF_A_SECTION = (ValueError, KeyError, OSError, RuntimeError, MemoryError, ImportError)
"""Errors that do not stop the other sections. Other errors are bugs, or wrong arguments."""
_NOT_COMPARED = ("device", "batch_size", "encoder")
"""Arguments that do not change the result; encoders are compared by what they are."""


class _OtherRunError(ValueError):
    """A finished store of another run, which keeps its row in the summary."""


@dataclass(frozen=True)
class _Cohort:
    """The sections, where each is written, and what all have in common."""

    sections: dict[str, Source]
    folder: Path | Remote
    key: str
    params: dict[str, Any]
    """Arguments as a store records them"""
    encoder: dict[str, Any]
    """Provenance of the encoder"""
    head_digest: str | None
    """Of a head that is an object, which ``params`` only names"""
    summary: Summary

    def path(self, name: str) -> Path | Remote:
        return self.folder / f"{name}.zarr"

    def finished(self, name: str) -> dict[str, Any] | None:
        """Row of a section whose store is finished, ``None`` where there is none; raise where it is of another run."""
        path = self.path(name)
        if not path.exists():
            return None
        try:
            found = read_provenance(path, self.key)
        except (KeyError, ValueError, OSError) as err:
            msg = (
                f"{str(path)!r} exists, and is no store of an earlier run with key_added={self.key!r}. Move it away, "
                "or choose another store=."
            )
            raise _OtherRunError(msg) from err
        row = self.summary.row(name)
        self._refuse_other_run(found, name, source=None if row is None else row["source"])
        if row is None or row["error"] is not None:
            return self.row(name, found)
        return row | {"store": str(path)}  # the folder may have been moved

    def row(self, name: str, found: StoredProvenance, **more: Any) -> dict[str, Any]:
        """Row of a finished store."""
        about = found.uns
        measured = "spots" in about
        pcc = about["held_out"][about["head"]]["pcc"]
        return dict.fromkeys(COLUMNS) | {
            "section": name,
            "store": str(self.path(name)),
            "n_targets": found.n_targets,
            "n_genes": found.n_genes,
            "scores": "held-out" if measured else "image only",
            "held_out_pcc": float(pcc) if measured else None,
            **more,
        }

    def _refuse_other_run(self, found: StoredProvenance, name: str, *, source: str | None) -> None:
        """Raise where the store was made by another model, with other arguments, or from another section."""
        old, new = _compared(found.uns.get("params", {})), _compared(self.params)
        was, now = found.uns["encoder"], self.encoder
        pairs = {key: (old.get(key), new.get(key)) for key in sorted(old | new)}
        pairs["encoder"] = (_encoder(was), _encoder(now))
        pairs["head_digest"] = (found.uns.get("head_digest"), self.head_digest)
        here = path_of(self.sections[name])
        pairs["source"] = (source or here, here or source)
        differs = [f"{key} is {_text(b)}, was {_text(a)}" for key, (a, b) in pairs.items() if not _equal(a, b)]
        if differs:
            msg = (
                f"{str(self.path(name))!r} was made by another run ({'; '.join(differs)}). Remove it to predict the "
                "section anew, or choose another store=, or another name: {name: section}."
            )
            raise _OtherRunError(msg)


def predict_many(
    sections: Iterable[Source] | Mapping[str, Source],
    *,
    predict: Callable[..., Any],
    params: dict[str, Any],
    arguments: dict[str, Any],
) -> pd.DataFrame:
    """Predict each section that has no finished store; see *Notes* of :func:`histosge.tl.predict`.

    Parameters
    ----------
    sections
        The sections, or their paths.
    predict
        Predicts one section.
    params
        The arguments as a store records them.
    arguments
        The arguments of the call.
    """
    options = dict(arguments["options"])
    folder = _check(arguments)
    named = _named(sections, folder)
    model = arguments["model"]
    if model is not None:
        encoder = load_of_model(None, options["encoder"], model.config)
        about = model.config.to_uns()
    else:
        encoder = load_encoder(options["encoder"])
        about = EmbeddingConfig.of(encoder, tile_um=options["tile_um"]).to_uns()
    head = arguments["head"]
    digest = head_digest(head) if model is None and head is not None and not isinstance(head, str | type) else None
    summary = Summary(folder / "summary.csv")
    cohort = _Cohort(named, folder, arguments["key_added"], params, about["encoder"], digest, summary)
    given = {k: v for k, v in arguments.items() if k not in ("sdata", "store", "inplace", "options")}
    given |= {"params": params, "inplace": True, "options": options | {"encoder": encoder, "progress": False}}
    rows = []
    with progress_bar(desc="sections", total=len(named), unit="section", show=options["progress"]) as bar:
        for number, name in enumerate(named, 1):
            logger.info("section %d of %d: %s", number, len(named), name)
            rows.append(_row(cohort, name, predict=predict, given=given))
            bar.update()
    found = Summary.frame(rows)
    failed = list(found["section"][found["error"].notna()])
    if failed:
        logger.warning(
            "%d of %d sections failed: %s. Column error says why; the same call again predicts what is missing.",
            len(failed), len(found), ", ".join(failed[:5]) + (", …" if len(failed) > 5 else ""),
        )  # fmt: skip
    return found


def _row(cohort: _Cohort, name: str, *, predict: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Predict a section, unless its store is finished; its row of the summary."""
    start, source = time(), path_of(cohort.sections[name])
    written = True
    try:
        row = cohort.finished(name)
        if row is None:
            predict(opened(cohort.sections[name]), store=cohort.path(name), **given)
            found = read_provenance(cohort.path(name), cohort.key)
            row = cohort.row(name, found, seconds=round(time() - start, 1), source=source)
        else:
            logger.info("    finished by an earlier run")
    except _OF_A_SECTION as err:
        text = err.args[0] if isinstance(err, KeyError) and err.args else err  # str() puts its message in quotes
        text = " ".join(str(text).split()) or type(err).__name__
        logger.warning("section %s failed: %s", name, text)
        row = dict.fromkeys(COLUMNS) | {"section": name, "store": str(cohort.path(name))}
        row |= {"seconds": round(time() - start, 1), "error": text, "source": source}
        written = not isinstance(err, _OtherRunError)
        del err
    gc.collect()  # a section has circles of references, and may take gigabytes
    if written:
        cohort.summary.add(row)
    return row


def _check(arguments: dict[str, Any]) -> Path | Remote:
    """Raise where arguments are wrong for all sections; return the folder of the stores."""
    store, options = arguments["store"], arguments["options"]
    if store is None:
        msg = "store=None, but a list of sections is written to a folder, a store each: pass it, store='results'."
        raise ValueError(msg)
    if not arguments["inplace"]:
        msg = "inplace=False is for one section: the stores of a list are on disk. Leave inplace= out."
        raise ValueError(msg)
    if isinstance(options["rng"], np.random.Generator):
        msg = (
            "rng= is a generator: its numbers for a section would depend on the sections before it. Pass a seed, "
            "which each section starts from."
        )
        raise ValueError(msg)
    place = located(store)
    if isinstance(place, Path):
        _keys.check_output("store", str(store))
    folder = place if isinstance(place, Remote) else place.absolute()
    taken = (folder / "zarr.json").exists() or (isinstance(folder, Path) and folder.exists() and not folder.is_dir())
    if folder.suffix == ".zarr" or taken:
        msg = f"store={shown(store)!r} is the folder of the stores of a list, {{store}}/{{name}}.zarr: name a folder."
        raise ValueError(msg)
    resolve_device(options["device"])
    if arguments["model"] is None:
        head = default_head(dense=bool(arguments["dense"])) if arguments["head"] is None else arguments["head"]
        learn = {name: options[name] for name in ("genes", "n_folds")}
        check_arguments(head=head, head_options=arguments["head_options"], sections=[], **learn)
    return folder


def _named(sections: Iterable[Source] | Mapping[str, Source], folder: Path | Remote) -> dict[str, Source]:
    """Sections by name. Raise where names are missing, used twice, or no names of files."""
    if isinstance(sections, Mapping):
        pairs = list(sections.items())
    else:
        pairs = [(name_of(source), source) for source in sections]
    if not pairs:
        msg = "sdata is an empty list: pass at least one section."
        raise ValueError(msg)
    found: dict[str, Source] = {}
    for i, (name, source) in enumerate(pairs):
        here = path_of(source)  # raise where it is no section
        if name is None:
            msg = f"sdata[{i}] is only in memory and has no name for its store: pass {{name: section}}."
            raise ValueError(msg)
        _keys.check("sdata: the name of a section", name)
        same = next(
            (other for other in found if other.casefold() == name.casefold()), None
        )  # of one file on some disks
        if same is not None:
            where = " and ".join(str(path_of(each) or "a section in memory") for each in (found[same], source))
            msg = f"sdata has two sections of the name {name!r}: {where}. Name them, {{name: section}}, or rename one."
            raise ValueError(msg)
        if here == str(folder / f"{name}.zarr"):
            msg = f"sdata: {here!r} would be overwritten by its own result. Choose another store=."
            raise ValueError(msg)
        found[name] = source
    return found


def _compared(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name not in _NOT_COMPARED}


def _encoder(about: Mapping[str, Any]) -> str:
    """Name and digest of the encoders in a provenance."""
    each = about.get("joined", {"": about})
    return "+".join(f"{one['name']} {one['digest'][:12]}" for _, one in sorted(each.items()))


def _plain(value: Any) -> Any:
    """Values as they come back from a file: lists for arrays."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _equal(a: Any, b: Any) -> bool:
    return bool(_plain(a) == _plain(b))


def _text(value: Any) -> str:
    text = "absent" if value is None else repr(_plain(value))
    return text if len(text) <= 80 else f"{text[:30]}...{text[-47:]}"  # of paths, the end tells more
