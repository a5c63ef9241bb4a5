"""The summary of many sections: a row for each, in a file that every run adds to."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from histosge._atomic import replacing
from histosge._remote import Remote

if TYPE_CHECKING:
    from collections.abc import Sequence

_TYPES = {
    "section": "object",
    "store": "object",
    "n_targets": "Int64",
    "n_genes": "Int64",
    "scores": "object",
    "held_out_pcc": "float64",
    "seconds": "float64",
    "error": "object",
    "source": "object",
}
COLUMNS = tuple(_TYPES)


class Summary:
    """Rows by section, on disk after each section, so that a run that is killed leaves what is true.

    Runs that write into one folder add their rows to one file: it is read again before each row is added.
    """

    def __init__(self, path: Path | Remote) -> None:
        if isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._read()  # raise before the work, not after it

    def row(self, name: str) -> dict[str, Any] | None:
        """Row of a section, if it has one."""
        return self._read().get(name)

    def add(self, row: dict[str, Any]) -> None:
        """Add the row of a section, or replace it."""
        rows = self._read() | {row["section"]: row}
        text = self.frame(list(rows.values())).to_csv(index=False)
        if isinstance(self._path, Remote):
            self._path.write_bytes(text.encode())
            return
        with replacing(self._path) as draft:
            draft.write_text(text, encoding="utf-8")

    @staticmethod
    def frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
        """Rows as a table."""
        frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype(_TYPES)
        text = [name for name, kind in _TYPES.items() if kind == "object"]
        frame[text] = frame[text].where(frame[text].notna(), None)
        return frame

    def _read(self) -> dict[str, dict[str, Any]]:
        there = self._path.read_bytes() if isinstance(self._path, Remote) or self._path.exists() else None
        if there is None:
            return {}
        try:
            frame = pd.read_csv(
                BytesIO(there), dtype=_TYPES, keep_default_na=False, na_values=[""]
            )  # a name may be "NA"
        except (ValueError, TypeError) as err:
            frame = pd.DataFrame()
            error: Exception | None = err
        else:
            error = None
        if list(frame.columns) != list(COLUMNS):
            msg = f"{str(self._path)!r} is no summary of histosge. Move it away, or choose another store=."
            raise ValueError(msg) from error
        rows = self.frame(frame.to_dict(orient="records")).to_dict(orient="records")  # type: ignore[arg-type]
        return {str(row["section"]): {str(k): v for k, v in row.items()} for row in rows}
