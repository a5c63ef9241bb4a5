"""Work on the workers of dask: the same results as in this process, and errors that say which worker lacks what."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import spatialdata
import torch

import histosge as sge
from histosge import _cluster
from histosge._cluster import _tasks
from histosge._embedding import Embedder, EmbedderPlan
from histosge._section import read_section

ENCODER = "stain-texture"
FIT = {"encoder": ENCODER, "genes": 10, "n_folds": 2}
distributed = pytest.importorskip("distributed")


@pytest.fixture(autouse=True)
def exchange(tmp_path):
    """Each test has a folder for what travels; at the end nothing is left in it."""
    folder = tmp_path / "exchange"
    with sge.settings.override(exchange_dir=folder, cache_gb=0):
        yield folder
    assert not folder.exists() or not list(folder.iterdir())


@pytest.fixture
def client():
    """Two workers of one thread in this process: messages are packed as between machines."""
    options = {
        "n_workers": 2,
        "threads_per_worker": 1,
        "processes": False,
        "dashboard_address": None,
        "protocol": "tcp",
    }
    with warnings.catch_warnings(action="ignore"):
        cluster = distributed.LocalCluster(**options)
        found = distributed.Client(cluster)
    yield found
    with warnings.catch_warnings(action="ignore"):  # of tornado, about its sockets
        found.close()
        cluster.close()
        gc.collect()


@pytest.fixture
def on_disk(sdata, tmp_path):
    """The small section, with its image on disk."""
    path = tmp_path / "section.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sdata.write(path)
        return spatialdata.read_zarr(path)


def here(function, *args, **options):
    """Call in this process."""
    with sge.settings.override(dask=False):
        return function(*args, **options)


def there(function, *args, **options):
    """Call with the active Client."""
    return function(*args, **options)


def same_tables(a, b, *, layers=()):
    np.testing.assert_allclose(np.asarray(a.X), np.asarray(b.X), rtol=0, atol=1e-4)
    for name in layers:
        np.testing.assert_allclose(np.asarray(a.layers[name]), np.asarray(b.layers[name]), rtol=1e-4, atol=1e-4)
    assert a.obs.equals(b.obs)
    assert a.var_names.equals(b.var_names)


# ------------------------------------------------------------------------------------------------------- the same results


def test_embeddings_are_the_same(on_disk, client):
    found, wanted = (call(sge.tl.embed, on_disk, encoder=ENCODER, inplace=False) for call in (there, here))
    np.testing.assert_array_equal(found.obsm["X_stain-texture"], wanted.obsm["X_stain-texture"])
    assert found.uns["histosge"]["precision"] == wanted.uns["histosge"]["precision"]


@pytest.mark.parametrize("head", ["in-context+kriging", "ridge"])
def test_models_are_the_same(on_disk, client, head):
    """Each fit has its own seed and one core, wherever it runs."""
    found, wanted = sge.tl.fit(on_disk, head=head, **FIT), here(sge.tl.fit, on_disk, head=head, **FIT)
    assert found.fingerprint() == wanted.fingerprint()
    assert found.held_out == wanted.held_out


def test_heads_of_the_user(on_disk, client):
    class Median(sge.Head):
        name = "median"

        def __init__(self, median=None):
            self.median = median

        def fit(self, spots, *, rng, progress=None):
            self.median = spots.expression.median(dim=0).values
            return self

        def predict(self, queries, *, context):
            return self.median.expand(len(queries), -1)

        def state(self):
            return {}, {"median": self.median}

        @classmethod
        def from_state(cls, config, weights):
            return cls(weights["median"])

    found, wanted = sge.tl.fit(on_disk, head=Median, **FIT), here(sge.tl.fit, on_disk, head=Median, **FIT)
    assert found.held_out == wanted.held_out


def test_scores_are_the_same(on_disk, client):
    how = {**FIT, "heads": ["ridge", "nearest"], "n_splits": 2}
    assert sge.tl.evaluate(on_disk, **how).equals(here(sge.tl.evaluate, on_disk, **how))


@pytest.mark.parametrize("how", [{"upsample": 4}, {"bin_um": 25, "conserve": True, "head": "ridge"}])
def test_stores_are_the_same(on_disk, client, tmp_path, how):
    with sge.settings.override(part_rows=500):
        found = sge.tl.predict(on_disk, store=tmp_path / "there.zarr", inplace=False, **FIT, **how)
        wanted = here(sge.tl.predict, on_disk, store=tmp_path / "here.zarr", inplace=False, **FIT, **how)
    same_tables(found, wanted, layers=["conserved"] if "conserve" in how else [])
    assert not list(tmp_path.glob("*.partial"))


def test_a_model_and_an_image_alone(on_disk, client, tmp_path):
    model = sge.tl.fit(on_disk, head="ridge", **FIT)
    image = spatialdata.SpatialData(images=dict(on_disk.images))
    found, wanted = (
        call(sge.tl.predict, image, model=model, mpp=2.0, store=tmp_path / f"{i}.zarr", inplace=False)
        for i, call in enumerate((there, here))
    )
    same_tables(found, wanted)


def test_genes_of_some_sections(on_disk, client, tmp_path):
    """What a section does not measure is filled in on the workers too, from the spots that the model learnt from."""
    fewer = spatialdata.SpatialData(images=dict(on_disk.images), shapes=dict(on_disk.shapes))
    fewer.tables["table"] = on_disk.tables["table"][:, 3:].copy()
    fewer.write(tmp_path / "fewer.zarr")
    fewer = spatialdata.read_zarr(tmp_path / "fewer.zarr")
    model = here(sge.tl.fit, [on_disk, fewer], encoder=ENCODER, genes="union", n_folds=2)
    assert model.of_some_sections
    how = {"model": model, "bin_um": 50}
    with sge.settings.override(part_rows=200):
        one = here(sge.tl.predict, fewer, store=tmp_path / "here.zarr", inplace=False, **how)
        other = there(sge.tl.predict, fewer, store=tmp_path / "there.zarr", inplace=False, **how)
    same_tables(one, other)


def test_existing_embeddings_are_read_on_the_workers(on_disk, client, tmp_path, log):
    sge.pp.targets(on_disk, upsample=4)
    sge.tl.embed(on_disk, encoder=ENCODER, target_key="histosge_targets")
    sge.tl.embed(on_disk, encoder=ENCODER)
    log.clear()
    found = sge.tl.predict(on_disk, head="ridge", store=tmp_path / "a.zarr", inplace=False, **FIT)
    wanted = here(sge.tl.predict, on_disk, head="ridge", store=tmp_path / "b.zarr", inplace=False, **FIT)
    same_tables(found, wanted)


def test_own_encoders_travel(on_disk, client):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 16, 16), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    spec = sge.EncoderSpec(name="mine", mpp=2.0, tile_px=32, embed_dim=8, coarsest_mpp=4)
    encoder = sge.load_encoder(module, spec=spec)
    found = sge.tl.embed(on_disk, encoder=encoder, inplace=False)
    wanted = here(sge.tl.embed, on_disk, encoder=encoder, inplace=False)
    # half precision, and a batch of another size
    np.testing.assert_allclose(found.obsm["X_mine"], wanted.obsm["X_mine"], rtol=2e-3, atol=1e-4)


def test_parts_do_not_depend_on_the_workers(on_disk, client):
    """One worker or two: bit for bit."""
    two = sge.tl.embed(on_disk, encoder="rgb", inplace=False).obsm["X_rgb"]
    client.retire_workers([next(iter(client.nthreads()))])
    one = sge.tl.embed(on_disk, encoder="rgb", inplace=False).obsm["X_rgb"]
    np.testing.assert_array_equal(one, two)


def test_tasks_have_names(on_disk, client):
    """As the dashboard shows them."""
    sge.tl.fit(on_disk, head="ridge", **FIT)
    names = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.task_prefixes))
    assert {"histosge_embed", "histosge_fit"} <= set(names)


def test_inside_a_task_nothing_is_sent(on_disk, client):
    """A user's own task that calls histosge must not wait for itself."""
    path = str(on_disk.path)

    def task():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sdata = spatialdata.read_zarr(path)
        assert _cluster.active_client() is None
        return sge.tl.embed(sdata, encoder="rgb", inplace=False).n_obs

    assert client.submit(task, pure=False).result(timeout=120) > 0


# ------------------------------------------------------------------------------------------------------------- what travels


def test_arrays_travel_as_zarr_and_come_back(tmp_path):
    big, small = np.arange(300_000, dtype=np.float64).reshape(-1, 3), np.arange(5)
    names = np.array(["a", "b"] * 100_000, dtype=object)
    value = {"big": big, "twice": [big, big], "turned": np.asfortranarray(big), "small": small, "names": names}
    value |= {"tensor": torch.arange(300_000), "half": torch.arange(600_000, dtype=torch.bfloat16)}
    stream, folder = _cluster.pack(value, tmp_path / "here")
    assert len(list((tmp_path / "here").iterdir())) == 3  # big, turned, tensor
    assert len(stream) < 4e6
    back = _cluster.unpack(stream, folder)
    for key in ("big", "turned", "small", "names"):
        np.testing.assert_array_equal(back[key], value[key])
    assert back["big"] is back["twice"][0] is back["twice"][1]
    assert torch.equal(back["tensor"], value["tensor"])
    assert torch.equal(back["half"], value["half"])


def test_images_on_disk_have_no_bytes(on_disk, sdata):
    assert _cluster.n_bytes(read_section(on_disk).image) == 0
    assert _cluster.n_bytes(read_section(sdata).image) > 100_000


def test_left_by_a_killed_process(exchange, on_disk, client):
    gone = exchange / f"{socket.gethostname()}-4194303-job-abc"  # above any number of a process
    other = exchange / "another-host-1-job-abc"
    young = exchange / f"{socket.gethostname()}-4194302-job-abc"
    for folder in (gone, other, young):
        folder.mkdir(parents=True)
    for folder in (gone, other):
        os.utime(folder, (1e9, 1e9))
    sge.tl.embed(on_disk, encoder="rgb", inplace=False)
    assert not gone.exists()
    for folder in (other, young):  # of another host, or of a container with this name
        folder.rmdir()


# ------------------------------------------------------------------------------------------------------------- bad input


def test_image_in_memory(sdata, client, tmp_path):
    for call in (
        lambda: sge.tl.embed(sdata, encoder=ENCODER),
        lambda: sge.tl.fit(sdata, **FIT),
        lambda: sge.tl.evaluate(sdata, n_splits=2, **FIT),
        lambda: sge.tl.predict(sdata, store=tmp_path / "out.zarr", **FIT),
    ):
        with pytest.raises(ValueError, match=r"lies in the memory of this process .*sdata.write\('section.zarr'\)"):
            call()
    assert not list(tmp_path.glob("out*"))


def test_two_clients(on_disk, client):
    other = distributed.Client(client.scheduler.address)
    try:
        with pytest.raises(RuntimeError, match=r"2 Clients of dask are active. Close all but one, or choose one"):
            sge.tl.embed(on_disk, encoder="rgb")
        with other.as_current():
            sge.tl.embed(on_disk, encoder="rgb")
    finally:
        other.close()


def test_a_closed_client(on_disk, client):
    other = distributed.Client(client.scheduler.address, set_as_default=False)
    with other.as_current():
        other.close()
        with pytest.raises(RuntimeError, match=r"Client of dask is 'closed', not running .*settings.dask=False"):
            sge.tl.embed(on_disk, encoder="rgb")
    here(sge.tl.embed, on_disk, encoder="rgb")


def test_file_that_workers_do_not_see(on_disk, client, tmp_path):
    """zarr reads missing chunks as black: the pixels are compared."""
    plan = EmbedderPlan.of(Embedder.open(read_section(on_disk), ENCODER))
    (tmp_path / "section.zarr").rename(tmp_path / "elsewhere.zarr")
    with pytest.raises(RuntimeError, match=r"host .* does not read the pixels of image 'he'.*a disk that they share"):
        client.submit(EmbedderPlan.open, plan).result()


def test_workers_of_two_kinds(on_disk, client):
    """One with a GPU and one without would mix roundings."""
    plan = EmbedderPlan.of(Embedder.open(read_section(on_disk), ENCODER))
    [encoder] = plan.config.encoders
    of_gpu = replace(plan.config, encoders=(replace(encoder, precision="bfloat16"),))
    with pytest.raises(
        RuntimeError, match=r"embeddings in float32 on cpu, and the first worker in bfloat16\. Start all"
    ):
        client.submit(EmbedderPlan.open, replace(plan, config=of_gpu)).result()


def test_worker_without_the_weights(on_disk, client, tmp_path):
    import json

    import timm
    from safetensors.torch import save_file

    model = timm.create_model("resnet10t", pretrained=False, num_classes=0)
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "resnet10t", "num_classes": 0, "pretrained_cfg": {"input_size": [3, 64, 64]}}
    (folder / "config.json").write_text(json.dumps(config))
    encoder = sge.load_encoder("timm:resnet10t", weights=folder)
    section = replace(read_section(on_disk), mpp=1.0)  # else it is too coarse
    plan = EmbedderPlan.of(Embedder.open(section, encoder))
    assert plan.encoders[0]["weights"] == folder
    assert client.submit(lambda p: p.open().config.name, plan).result() == "resnet10t"
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="weights"):
        client.submit(EmbedderPlan.open, plan, pure=False).result()


def _work(client, tmp_path, **changes):
    digest = _cluster.pack_to(tmp_path / "plan", 1)
    shared = {
        "folder": str(tmp_path),
        "token": "t",
        "digest": digest,
        "version": sge.__version__,
        "process": ["", 0],
        "settings": {},
    }
    with sge.settings.override(verbosity=sge.settings.verbosity, progress=sge.settings.progress):
        return client.submit(_tasks._work, max, int, 2, shared | changes, pure=False).result()


def test_folder_that_workers_do_not_see(client, tmp_path):
    _tasks._PLANS.opened.clear()
    with pytest.raises(RuntimeError, match=r"the worker .* cannot see the folder .*settings.exchange_dir"):
        _work(client, tmp_path, folder=str(tmp_path / "nowhere"))


def test_worker_with_another_version(client, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"the worker .* has histosge .* that sends the work 0.0.0. Install the same"
    ):
        _work(client, tmp_path, version="0.0.0")


def test_plan_that_was_changed(client, tmp_path):
    with pytest.raises(RuntimeError, match=r"is not what was put there. Set settings.exchange_dir to a folder of your"):
        _work(client, tmp_path, digest="0")


def test_errors_of_tasks_are_raised_as_they_are(client):
    def fail(_plan, item):
        if item == 1:
            msg = "no space"
            raise OSError(28, msg, "x.zarr")
        return item

    with pytest.raises(OSError, match="no space"):
        list(_cluster.on_workers(fail, [0, 1, 2], client=client, plan=0, opens=int, name="fails"))


@pytest.mark.parametrize(("name", "error"), [("histosge", RuntimeError), ("timm", ModuleNotFoundError)])
def test_worker_without_histosge(client, name, error):
    def fail(_plan, _item):
        msg = f"No module named {name!r}"
        raise ModuleNotFoundError(msg, name=name)

    with pytest.raises(error, match="does not have this histosge .* Install version" if name == "histosge" else "timm"):
        list(_cluster.on_workers(fail, [0], client=client, plan=0, opens=int, name="fails"))


def test_store_that_workers_do_not_see(on_disk, client, tmp_path):
    """Its working folder is gone when a worker writes."""
    from histosge._section import TableStore

    store = TableStore.open(tmp_path / "a.zarr", name="t", params={}, n_rows=2, part_rows=1)
    with store:
        writer = store.writer
        store._claim.folder.rename(tmp_path / "away")
        with pytest.raises(RuntimeError, match="working folder .* is not there. On a worker of dask"):
            writer.write(0, {})
        (tmp_path / "away").rename(store._claim.folder)


def test_device_of_the_workers(on_disk, client):
    with pytest.raises(ValueError, match="device='cuda:99' is not available"):
        sge.tl.embed(on_disk, encoder="rgb", device="cuda:99")


@pytest.mark.parametrize(("name", "value"), [("dask", 1), ("exchange_dir", " ")])
def test_settings(name, value):
    with pytest.raises(ValueError, match=rf"settings.{name}={value!r}"):
        setattr(sge.settings, name, value)


# ---------------------------------------------------------------------------------------------------- workers that vanish


def _in_parts(on_disk, path, *, after_first_part):
    """Predict into a store of many parts, and call once the first is on disk."""
    marks = f"{path.name}.partial/run-*/parts/*.done"
    stop = threading.Event()

    def watch():
        while not stop.wait(0.05):
            if list(path.parent.glob(marks)):
                after_first_part()
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with sge.settings.override(part_rows=60):
            return sge.tl.predict(on_disk, store=path, head="ridge", upsample=16, inplace=False, **FIT)
    finally:
        stop.set()
        watcher.join()


@pytest.mark.slow
def test_a_worker_is_killed(on_disk, tmp_path):
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        pid = next(iter(client.run(os.getpid).values()))
        found = _in_parts(on_disk, tmp_path / "a.zarr", after_first_part=lambda: os.kill(pid, signal.SIGKILL))
        assert pid not in client.run(os.getpid).values()
    with sge.settings.override(part_rows=60):
        wanted = sge.tl.predict(on_disk, store=tmp_path / "b.zarr", head="ridge", upsample=16, inplace=False, **FIT)
    same_tables(found, wanted)


@pytest.mark.slow
def test_a_task_that_kills_its_workers():
    """As one that needs more memory than any has."""
    import dask

    def kill(_plan, _item):
        os.kill(os.getpid(), signal.SIGKILL)

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        pytest.raises(RuntimeError, match=r"1 workers of dask died .* memory ran out.*settings.part_rows"),
    ):
        list(_cluster.on_workers(kill, [0], client=client, plan=0, opens=int, name="kills"))


@pytest.mark.slow
def test_the_scheduler_is_lost(on_disk, tmp_path, log):
    import subprocess
    import sys

    command = [sys.executable, "-W", "ignore", "-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard"]
    scheduler_file = tmp_path / "scheduler.json"
    scheduler = subprocess.Popen([*command, "--scheduler-file", scheduler_file], stderr=subprocess.DEVNULL)
    worker = [sys.executable, "-W", "ignore", "-m", "distributed.cli.dask_worker", "--nthreads", "1"]
    workers = subprocess.Popen(
        [*worker, "--scheduler-file", scheduler_file, "--no-dashboard"], stderr=subprocess.DEVNULL
    )
    try:
        while not scheduler_file.exists():
            time.sleep(0.1)
        with (
            distributed.Client(scheduler_file=str(scheduler_file), timeout=5),
            pytest.raises(RuntimeError, match="connection to the scheduler of dask is lost .* make the same call"),
        ):
            _in_parts(on_disk, tmp_path / "a.zarr", after_first_part=scheduler.kill)
    finally:
        for process in (workers, scheduler):
            process.kill()
            process.wait()
    with sge.settings.override(part_rows=60, dask=False):
        log.clear()
        found = sge.tl.predict(on_disk, store=tmp_path / "a.zarr", head="ridge", upsample=16, inplace=False, **FIT)
        assert "resuming a.zarr" in log.text
        wanted = sge.tl.predict(on_disk, store=tmp_path / "b.zarr", head="ridge", upsample=16, inplace=False, **FIT)
    same_tables(found, wanted)
