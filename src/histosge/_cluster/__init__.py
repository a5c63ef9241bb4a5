"""Independent tasks on the workers of an active dask ``Client``, and what travels to them."""

from __future__ import annotations

from histosge._cluster._exchange import n_bytes, pack, pack_to, unpack
from histosge._cluster._tasks import active_client, device_of_workers, on_workers
