"""Settings of every test, those in docstrings included."""

from __future__ import annotations

import os

# before anything is imported: no test reaches the network, opens a window, or fights for cores with the other workers
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")
