"""Settings of every test, those in docstrings included."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# before anything is imported: no test reaches the network, opens a window, or fights for cores with the other workers
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# nor the user's cache
_CACHE = tempfile.mkdtemp(prefix="histosge-tests-")
os.environ["HISTOSGE_CACHE"] = os.path.join(_CACHE, "session")  # noqa: PTH118
os.environ["HISTOSGE_DATA"] = os.path.join(_CACHE, "data")  # noqa: PTH118
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
