"""Install the wheel in a clean environment, and nothing else, and run the demo from it: ``python recipe/try_wheel.py dist``."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

LARGEST_BYTES = 1_000_000
FILES = {"section.zarr", "predicted.h5ad", "expression.png"}


def main(folder: str) -> None:
    (wheel,) = Path(folder).resolve().glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    foreign = [n for n in names if not n.startswith(("histosge/", f"histosge-{wheel.name.split('-')[1]}.dist-info/"))]
    if wheel.stat().st_size > LARGEST_BYTES or foreign or "histosge/py.typed" not in names:
        sys.exit(f"{wheel.name}: {wheel.stat().st_size} bytes (at most {LARGEST_BYTES}), not of the package: {foreign}")
    with tempfile.TemporaryDirectory() as where:
        venv.create(f"{where}/env", with_pip=True)
        python = Path(where, "env", "Scripts" if sys.platform == "win32" else "bin", "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True)
        command = [python.with_name("histosge"), "demo", "--out", f"{where}/demo"]
        subprocess.run(command, check=True, cwd=where)
        missing = FILES - {p.name for p in Path(where, "demo").iterdir()}
        if missing:
            sys.exit(f"the demo wrote no {sorted(missing)}")
    print(f"{wheel.name}: {wheel.stat().st_size / 1000:.0f} kB, {len(names)} files; the demo runs from it")


if __name__ == "__main__":
    main(*sys.argv[1:])
