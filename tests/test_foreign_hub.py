"""The hub that does not answer, or refuses: asked once, said clearly; what is in its cache is loaded all the same."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import histosge as sge
from histosge._encoders import EncoderAccessError

COMMIT = "0123456789abcdef" * 2 + "01234567"
MIDNIGHT = "models--kaiko-ai--midnight"


def write_to_cache(cache, source):
    """Lay files out as the hub's client does: blobs by hash, a snapshot of links to them, a ref that names it."""
    repo = cache / MIDNIGHT
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for i, file in enumerate(sorted(source.iterdir())):
        blob = repo / "blobs" / f"{i:040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)


@pytest.fixture(scope="module")
def midnight(tmp_path_factory):
    """Files of a network of midnight's make and width, one block deep."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    shape = {"hidden_size": 1536, "num_attention_heads": 24, "num_hidden_layers": 1, "mlp_ratio": 1}
    Dinov2Model(Dinov2Config(**shape, image_size=224, use_swiglu_ffn=True)).save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path, hub_client):
    """An empty cache of the hub, and a client that goes online (see conftest)."""
    from huggingface_hub import constants

    hub_client(HF_HUB_OFFLINE=False)
    yield tmp_path / "hub"
    assert constants.HF_HUB_OFFLINE is False  # whatever happened


@pytest.fixture
def lost(monkeypatch):
    """Lose the network; returns the names that are looked up.

    Either no name is known, as on a machine without network, or nobody listens, as behind a firewall that refuses.
    """
    original = socket.getaddrinfo

    def lose(kind="no name"):
        asked = []
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]

        def getaddrinfo(host, _, *args, **kwargs):
            asked.append(host)
            if kind == "no name":
                raise socket.gaierror(-2, "Name or service not known")
            return original("127.0.0.1", port, *args, **kwargs)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        return asked

    return lose


@pytest.fixture
def server(hub_client):
    """Start a hub on this machine, for a ``with`` block.

    It gives one answer to everything, or with ``status=None`` none; yields what was asked.
    """
    from huggingface_hub.utils import close_session

    @contextmanager
    def start(*, status=None, headers=()):
        asked, over = [], threading.Event()

        class Hub(BaseHTTPRequestHandler):
            def do_HEAD(self):
                asked.append((self.command, self.path))
                if status is None:
                    over.wait(30)
                    return
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_HEAD

            def log_message(self, *_):
                pass

        hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{hub.server_address[1]}"
        hub_client(ENDPOINT=url, HUGGINGFACE_CO_URL_TEMPLATE=url + "/{repo_id}/resolve/{revision}/{filename}")
        if status is None:
            hub_client(HF_HUB_ETAG_TIMEOUT=0.2)
        try:
            yield asked
        finally:
            over.set()
            close_session()
            hub.shutdown()
            hub.server_close()
            thread.join()

    return start


UNREACHABLE = (
    r"'midnight' are not in the hub's cache and https://huggingface.co/kaiko-ai/midnight cannot be reached\. Check"
)
ANSWERS = {
    "gated": (403, [("X-Error-Code", "GatedRepo")], r"encoder 'midnight' is gated and this machine has no access"),
    "login": (401, [], r"shows no weights of encoder 'midnight' .* to this machine"),
    "no such repository": (404, [("X-Error-Code", "RepoNotFound")], r"shows no weights of encoder 'midnight'"),
    "too many": (429, [("Retry-After", "60")], r"HTTP status 429 for encoder 'midnight'"),
    "broken": (500, [], r"HTTP status 500 for encoder 'midnight'"),
    "overloaded": (503, [], r"HTTP status 503 for encoder 'midnight'"),
    "does not answer": (None, [], UNREACHABLE),
}


@pytest.mark.parametrize("kind", ["no name", "no listener"])
def test_without_network_the_hub_is_asked_once(cache, lost, kind, capfd):
    asked = lost(kind)
    with pytest.raises(EncoderAccessError, match=UNREACHABLE) as told:
        sge.load_encoder("midnight")
    assert len(asked) == 1
    assert "HF_HUB_OFFLINE" not in str(told.value)  # the user did not set it
    err = capfd.readouterr().err
    assert "Retrying" not in err
    assert "thrown while requesting" not in err


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_hub_that_refuses_is_asked_once(cache, kind, server, capfd):
    status, headers, match = ANSWERS[kind]
    with server(status=status, headers=headers) as asked:
        with pytest.raises(EncoderAccessError, match=match):
            sge.load_encoder("midnight")
        assert asked == [("HEAD", "/kaiko-ai/midnight/resolve/main/config.json")]
    assert "Retrying" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["uni", "gpfm", "ctranspath", "genbio-pathfm", "conch", "hf-hub:org/name@v1"])
def test_every_way_of_loading_asks_once(cache, name, lost):
    asked = lost()
    with pytest.raises(EncoderAccessError, match=rf"'{name}' are not in the hub's cache and .* cannot be reached"):
        sge.load_encoder(name, trust_remote_code=True)
    assert len(asked) == 1


def test_a_repository_without_that_file_is_no_refusal(cache, server):
    """CTransPath's has no config.json: the loader goes on and asks for the file it wants."""
    with (
        server(status=404, headers=[("X-Error-Code", "EntryNotFound")]) as asked,
        pytest.raises(EncoderAccessError, match="does not hold what is needed"),
    ):
        sge.load_encoder("ctranspath", trust_remote_code=True)
    assert any(path.endswith(".pt2") for _, path in asked)


@pytest.mark.parametrize("kind", ["no network", "gated", "overloaded", "does not answer"])
def test_weights_in_the_cache_need_no_hub(cache, midnight, kind, server, lost, log, capfd):
    write_to_cache(cache, midnight)
    if kind == "no network":
        asked = lost()
        encoder = sge.load_encoder("midnight")
    else:
        status, headers, _ = ANSWERS[kind]
        with server(status=status, headers=headers) as asked:
            encoder = sge.load_encoder("midnight")
    assert len(asked) == 1
    assert encoder.spec.revision == COMMIT
    assert "loading from its cache" in log.text
    assert "Retrying" not in capfd.readouterr().err


def test_a_cache_that_is_not_whole_says_why_nothing_is_fetched(cache, midnight, server, lost):
    write_to_cache(cache, midnight)
    (cache / MIDNIGHT / "snapshots" / COMMIT / "config.json").unlink()
    with (
        server(status=403, headers=[("X-Error-Code", "GatedRepo")]),
        pytest.raises(EncoderAccessError, match="is gated"),
    ):
        sge.load_encoder("midnight")
    lost()
    with pytest.raises(EncoderAccessError, match=UNREACHABLE):
        sge.load_encoder("midnight")


def test_another_revision_is_not_taken_from_the_cache(cache, midnight, server):
    write_to_cache(cache, midnight)
    with (
        server(status=404, headers=[("X-Error-Code", "RevisionNotFound")]) as asked,
        pytest.raises(EncoderAccessError, match=r"has no revision 'v9' of encoder 'midnight'"),
    ):
        sge.load_encoder("midnight", revision="v9")
    assert asked == [("HEAD", "/kaiko-ai/midnight/resolve/v9/config.json")]


def test_errors_of_a_loader_are_not_taken_for_the_hubs(cache, midnight, lost):
    write_to_cache(cache, midnight)
    config = cache / MIDNIGHT / "snapshots" / COMMIT / "config.json"
    wrong = json.loads(config.read_text()) | {"num_attention_heads": 7}
    config.unlink()
    config.write_text(json.dumps(wrong))
    lost()
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        sge.load_encoder("midnight")


def test_local_weights_ask_nobody(cache, midnight, lost):
    asked = lost()
    assert sge.load_encoder("midnight", weights=midnight).spec.embed_dim == 3072
    assert asked == []
