"""Answers of servers, files that others left, and archives: a file is whole and right, or refused by its name."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from histosge.datasets import DownloadError, RemoteFile, fetch_files

BODY = bytes(range(256)) * 20
SHA = hashlib.sha256(BODY).hexdigest()
OTHER = "0" * 64


@dataclass(frozen=True)
class Answer:
    """What a server sends."""

    status: int = 200
    body: bytes = BODY
    length: str | None = "right"
    headers: dict[str, str] = field(default_factory=dict)
    chunked: bool = False


ANSWERS = {
    "right": Answer(),
    "chunked": Answer(length=None, chunked=True),
    "no length": Answer(length=None),
    "no length, cut": Answer(length=None, body=BODY[:99]),
    "chunked, cut": Answer(length=None, chunked=True, body=BODY[:99], headers={"X-Cut": "1"}),
    "short": Answer(body=BODY[:99], length=str(len(BODY))),
    "long": Answer(length=str(len(BODY) - 99)),
    "empty": Answer(body=b""),
    "empty, no length": Answer(body=b"", length=None),
    "empty, chunked": Answer(body=b"", length=None, chunked=True),
    "empty, length": Answer(body=b"", length=str(len(BODY))),
    "length no number": Answer(length="many"),
    "length below 0": Answer(length="-1"),
    "length of two": Answer(length=f"{len(BODY)}, {len(BODY)}"),
    "part from 0": Answer(206, headers={"Content-Range": f"bytes 0-{len(BODY) - 1}/{len(BODY)}"}),
    "part from 99": Answer(206, BODY[99:], headers={"Content-Range": f"bytes 99-{len(BODY) - 1}/{len(BODY)}"}),
    "part, no range": Answer(206, BODY[99:]),
    "other bytes": Answer(body=b"x" * len(BODY)),
    "page": Answer(headers={"Content-Type": "text/html"}),
    "packed": Answer(headers={"Content-Encoding": "gzip"}),
    **{f"status {status}": Answer(status) for status in (201, 202, 203, 204, 205, 300, 302, 304, 400, 401, 403, 404, 410,
                                                        416, 429, 500, 502, 503, 504)},
}  # fmt: skip
RECORDS = {
    "none": None, "right": f"{SHA}  a.h5\n", "upper case": f"{SHA.upper()}  a.h5\n", "empty": "", "blank": "\n\n",
    "short": f"{SHA[:63]}  a.h5\n", "long": f"{SHA}0  a.h5\n", "words": "not a hash  a.h5\n", "bytes": b"\xff\xfe\x00",
    "other": f"{OTHER}  a.h5\n", "no name": SHA, "sign": f"*{SHA}", "page": "<html>", "null": "\x00" * 64,
}  # fmt: skip


@contextmanager
def serving(answer):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(answer.status)
            self.send_header("Connection", "close")
            if answer.length is not None:
                length = str(len(answer.body)) if answer.length == "right" else answer.length
                self.send_header("Content-Length", length)
            if answer.chunked:
                self.send_header("Transfer-Encoding", "chunked")
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if answer.chunked:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(answer.body), answer.body) if answer.body else b"")
                self.wfile.write(b"" if "X-Cut" in answer.headers else b"0\r\n\r\n")
            else:
                self.wfile.write(answer.body)
            self.close_connection = True

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def outcome(folder, file):
    """Fetch; ``right``, ``refused``, or what is wrong."""
    try:
        fetch_files(folder, [file], retries=0)
    except DownloadError as err:
        found = "refused" if file.path in str(err) or file.url in str(err) else f"refused without a name: {err}"
    except Exception as err:  # noqa: BLE001  counted
        return f"raw error {err!r}"
    else:
        found = "right"
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    extra = names - {file.path, f"{file.path}.sha256", file.unpack}
    return f"left {extra}" if extra else found


@pytest.mark.parametrize("known", [None, SHA])
@pytest.mark.parametrize("name", ANSWERS)
def test_answers(tmp_path, tally, name, known):
    with serving(ANSWERS[name]) as url:
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "tmpabcd_123").write_text("of a process that was killed")
        found = outcome(tmp_path / "d", RemoteFile(f"{url}/a.h5", "a.h5", sha256=known))
    there = tmp_path / "d" / "a.h5"
    if found == "right" and name not in ("other bytes", "long"):  # where no hash is published, nothing tells
        found = "right" if there.read_bytes() == BODY else "wrong bytes kept"
    elif found == "right":
        found = "cannot be known" if known is None else "wrong bytes kept"
    elif there.exists():
        found = f"kept, but {found}"
    tally("answers of servers")[found] += 1
    assert found in ("right", "refused", "cannot be known")
    if name in ("right", "chunked"):
        assert found == "right"


@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize("name", RECORDS)
def test_records(tmp_path, tally, name, present):
    """Hashes that were recorded, with and without the file."""
    record = RECORDS[name]
    if record is not None:
        (tmp_path / "a.h5.sha256").write_bytes(record if isinstance(record, bytes) else record.encode())
    if present:
        (tmp_path / "a.h5").write_bytes(BODY)
    with serving(Answer()) as url:
        found = outcome(tmp_path, RemoteFile(f"{url}/a.h5", "a.h5"))
    tally("recorded hashes")[found] += 1
    assert found == ("right" if name in ("none", "right", "upper case", "no name") else "refused")


def packed(*members, cut=None):
    room = io.BytesIO()
    with tarfile.open(fileobj=room, mode="w:gz") as tar:
        for name, kind, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, 3 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"abc"))
    return room.getvalue()[:cut]


ONE = ("spatial/a.csv", tarfile.REGTYPE, "")
ARCHIVES = {
    "right": packed(ONE),
    "cut": packed(ONE, cut=-40),
    "cut in its head": packed(ONE, cut=20),
    "nothing": packed(),
    "text": b"hello",
    "parent": packed(ONE, ("../evil", tarfile.REGTYPE, "")),
    "root": packed(ONE, ("/tmp/histosge-evil", tarfile.REGTYPE, "")),
    "link out": packed(ONE, ("spatial/l", tarfile.SYMTYPE, "/etc/passwd")),
    "hard link out": packed(ONE, ("spatial/l", tarfile.LNKTYPE, "../../etc/passwd")),
    "device": packed(ONE, ("spatial/d", tarfile.CHRTYPE, "")),
    "pipe": packed(ONE, ("spatial/p", tarfile.FIFOTYPE, "")),
    "file of that name": packed(("spatial", tarfile.REGTYPE, "")),
    "damaged": packed(ONE)[:40] + b"\0" * 8 + packed(ONE)[48:],
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(tmp_path, tally, name):
    with serving(Answer(body=ARCHIVES[name])) as url:
        found = outcome(tmp_path / "d", RemoteFile(f"{url}/s.tar.gz", "s.tar.gz", unpack="spatial"))
    tally("archives")[found] += 1
    assert found in ("right", "refused")
    assert sorted(path.name for path in tmp_path.iterdir()) in (["d"], ["d", "d.lock"])
    inside = sorted(str(p.relative_to(tmp_path / "d")) for p in (tmp_path / "d").rglob("*") if p.is_file())
    assert {"spatial/a.csv"} >= {n for n in inside if not n.startswith("s.tar.gz")}
