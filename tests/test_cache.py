"""Embeddings kept on disk: the same values back or none, pruned when opened, no foreign file touched."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import histosge as sge
from histosge._embedding import EmbeddingCache, cache_folder, open_cache
from histosge._settings import Settings, logger, settings

RECIPE = {"encoder": {"name": "uni", "mpp": 0.5}, "tile_um": 112.0, "dense": False, "versions": ["torch 2.9"]}
MARKER = "histosge-cache.json"
BLOCK_BYTES = 128 + 8 * 4 * 2 + 4  # head, float16, checksum


@pytest.fixture
def root(cache_folder):
    return cache_folder


@pytest.fixture
def before(monkeypatch):
    """What is called before a file is renamed or deleted, or its times are set: nothing, unless a test adds it here."""
    calls = {}
    for owner, name in ((Path, "rename"), (Path, "unlink"), (os, "utime")):

        def call(path, *args, original=getattr(owner, name), name=name, **options):
            calls.get(name, str)(path)
            return original(path, *args, **options)

        monkeypatch.setattr(owner, name, call)
    return calls


@pytest.fixture
def details():
    with settings.override(verbosity=3):
        yield


def digest(i):
    return hashlib.blake2b(str(i).encode(), digest_size=16).hexdigest()


def values(seed=0, shape=(8, 4), dtype=np.float16):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def small(root, n_blocks):
    """A cache with room for so many blocks of `values()`."""
    return EmbeddingCache(root, n_blocks * BLOCK_BYTES)


def size(root):
    return sum(p.stat().st_size for p in root.rglob("*") if p.is_file() and p.suffix in {".npy", ".part"})


def there(group, n):
    """Which of the first n blocks are kept, without touching them."""
    return [i for i in range(n) if (group.folder / f"{digest(i)}.npy").exists()]


# --------------------------------------------------------------------------------------------------------- get and put


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("shape", [(8, 4), (1, 1536), (0, 7), (120, 3)])
def test_what_was_put_is_got(root, dtype, shape):
    put = values(shape=shape, dtype=dtype)
    put.flat[:2] = [np.nan, -0.0][: put.size]  # nothing is rounded or mended
    open_cache().group(RECIPE).put(digest(0), put)
    got = open_cache().group(dict(reversed(RECIPE.items()))).get(digest(0))
    assert (got.dtype, got.shape) == (put.dtype, put.shape)
    assert got.tobytes() == put.tobytes()
    got[:] = 0  # the caller's own
    assert open_cache().group(RECIPE).get(digest(0)).tobytes() == put.tobytes()


@pytest.mark.parametrize(
    "view", [np.transpose, lambda a: a[::2, 1:], np.asfortranarray], ids=["transposed", "strided", "fortran"]
)
def test_any_order_in_memory(root, view):
    group = open_cache().group(RECIPE)
    group.put(digest(0), view(values()))
    np.testing.assert_array_equal(group.get(digest(0)), view(values()))


def test_numpy_reads_the_files(root):
    group = open_cache().group(RECIPE)
    group.put(digest(0), values())
    np.testing.assert_array_equal(np.load(group.folder / f"{digest(0)}.npy", allow_pickle=False), values())


def test_nothing_is_made_before_something_is_put(root):
    cache = open_cache()
    assert cache.root == root
    assert cache.group(RECIPE).get(digest(0)) is None
    assert cache.groups() == []
    assert cache.clear() == 0
    assert not root.exists()


def test_config_is_kept_to_be_read(root):
    group = open_cache().group(RECIPE)
    group.put(digest(0), values())
    assert json.loads((group.folder / "config.json").read_text()) == RECIPE
    assert re.fullmatch("[0-9a-f]{64}", group.folder.name)
    assert sorted(p.name for p in root.iterdir()) == [group.folder.name, MARKER]


@pytest.mark.parametrize(
    "other",
    [
        {**RECIPE, "encoder": {"name": "uni", "mpp": 0.25}},
        {**RECIPE, "tile_um": 112.00000001},
        {**RECIPE, "dense": True},
        {**RECIPE, "versions": ["torch 2.10"]},
        {**RECIPE, "more": None},
        {"encoder": "uni"},
    ],
)
def test_another_config_or_digest_gets_nothing(root, other):
    cache = open_cache()
    cache.group(RECIPE).put(digest(0), values())
    assert cache.group(other).get(digest(0)) is None
    assert cache.group(RECIPE).get(digest(1)) is None


def _cut(data):
    return data[:-1]


def _flip(data):
    return data[:140] + bytes([data[140] ^ 1]) + data[141:]


@pytest.mark.parametrize(
    "damage",
    [_cut, _flip, lambda d: d[:64], lambda d: b"", lambda d: bytes(len(d)), lambda d: b"x", lambda d: d + b"\0"],
    ids=["cut", "one bit", "half a head", "empty", "zeros", "one byte", "longer"],
)
def test_damaged_blocks_count_as_absent(root, log, details, damage):
    group = open_cache().group(RECIPE)
    group.put(digest(0), values())
    path = group.folder / f"{digest(0)}.npy"
    path.write_bytes(damage(path.read_bytes()))
    assert group.get(digest(0)) is None
    assert not path.exists()
    assert "cannot be read" in log.text
    assert [r.levelno for r in log.records] == [logging.DEBUG]
    group.put(digest(0), values())
    np.testing.assert_array_equal(group.get(digest(0)), values())


def test_block_that_cannot_be_read_nor_removed(root, log, details):
    group = open_cache().group(RECIPE)
    group.put(digest(0), values())
    (group.folder / f"{digest(1)}.npy").mkdir()
    assert group.get(digest(1)) is None
    assert "cannot be read" in log.text


def test_whole_or_not_at_all(root, before):
    """An interruption in the middle of writing leaves nothing that could be taken for a block."""
    group = open_cache().group(RECIPE)
    group.put(digest(0), values())

    def interrupted(path):
        raise KeyboardInterrupt

    before["rename"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        group.put(digest(1), values())
    before.clear()
    assert group.get(digest(1)) is None
    assert there(group, 2) == [0]
    assert not list(root.rglob("*.part"))
    group.put(digest(1), values(1))  # the lock is free again
    np.testing.assert_array_equal(group.get(digest(1)), values(1))


def test_threads_put_the_same(root):
    group = open_cache().group(RECIPE)
    start = threading.Barrier(4)
    got = []

    def work():
        start.wait()
        for i in range(20):
            group.put(digest(i), values(i))
            got.append(np.array_equal(group.get(digest(i)), values(i)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [True] * 80
    assert there(group, 20) == list(range(20))
    assert not list(root.rglob("*.part"))
    assert size(root) == 20 * BLOCK_BYTES


WORKER = """
import sys
from pathlib import Path
import numpy as np
from histosge._embedding import EmbeddingCache

root, limit_bytes, first, clears = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "clears"
cache = EmbeddingCache(root, limit_bytes)
group = cache.group({"encoder": "uni"})
kept = 0
for i in range(60):
    key = i % 15 + first
    group.put(f"{key:016x}", np.full((8, 4), key, np.float16))
    got = group.get(f"{key:016x}")
    kept += got is not None
    assert got is None or (got.shape == (8, 4) and (got == key).all()), got
    if i % 10 == 9:
        cache.clear() if clears else cache.prune()
print(kept)
"""


def test_processes_share_a_folder(root):
    """Three at once, one of which clears and two of which prune repeatedly: no wrong value, no warning."""
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                WORKER,
                str(root),
                str(10 * BLOCK_BYTES),
                str(first),
                "clears" if first == 0 else "-",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for first in range(3)
    ]
    said = [worker.communicate(timeout=600) for worker in workers]
    for worker, (out, err) in zip(workers, said, strict=True):
        assert (worker.returncode, err) == (0, "")
        assert int(out) > 30  # most of what was put is there a moment later
    assert not list(root.rglob("*.part"))
    for group in root.iterdir():
        assert group.name == MARKER or (group / "config.json").exists()


def test_cleared_while_something_is_put(root, before):
    """The group is made again."""
    cache = open_cache()
    group = cache.group(RECIPE)
    group.put(digest(0), values())

    def clear(path):
        before.clear()
        cache.clear()

    before["rename"] = clear
    group.put(digest(1), values(1))
    assert there(group, 2) == [1]
    assert json.loads((group.folder / "config.json").read_text()) == RECIPE


def test_made_by_another_process_and_cleared(root, before):
    """A second process makes the group at the same time, and a third one clears it before the first looks again."""
    cache = open_cache()
    group = cache.group(RECIPE)

    def make_and_clear(path):
        before.clear()
        cache.clear()
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    before["rename"] = make_and_clear
    group.put(digest(0), values())
    assert there(group, 1) == [0]


# ------------------------------------------------------------------------------------------------------------ the limit


def aged(group, *keys):
    """Say that these blocks were last used in this order, long ago."""
    for age, i in enumerate(keys):
        os.utime(group.folder / f"{digest(i)}.npy", (1e9 + age, 1e9 + age))


def test_least_recently_used_go_first(root):
    cache = small(root, 10)
    group = cache.group(RECIPE)
    for i in range(12):
        group.put(digest(i), values(i))
    assert there(group, 12) == list(range(12))  # a run may exceed the limit
    aged(group, 3, 1, 4, 0, 5, 9, 2, 6, 8, 7, 10, 11)
    group.get(digest(3))  # the oldest becomes the newest
    group.put(digest(4), values(4))  # and so does what is put again
    cache.prune()  # 10 % are left free: of 12 blocks nine stay
    assert there(group, 12) == [2, 3, 4, 6, 7, 8, 9, 10, 11]
    cache.prune()
    assert len(there(group, 12)) == 9


def test_pruning_is_over_all_groups(root):
    cache = small(root, 4)
    old, new = cache.group(RECIPE), cache.group({"encoder": "mine"})
    for i in range(2):
        old.put(digest(i), values(i))
    aged(old, 1, 0)
    for i in range(3):
        new.put(digest(i), values(i))
    cache.prune()
    assert there(old, 2) == []
    assert there(new, 3) == [0, 1, 2]


def test_opening_prunes_and_looking_does_not(root):
    group = open_cache().group(RECIPE)
    for i in range(30):
        group.put(digest(i), values(i))
    aged(group, *range(30))
    with settings.override(cache_gb=10.5 * BLOCK_BYTES / 1e9):
        assert len(EmbeddingCache.from_settings().groups()) == 1
        assert size(root) == 30 * BLOCK_BYTES
        open_cache()
        assert there(group, 30) == list(range(21, 30))


def test_what_cannot_be_removed_stays(root, before):
    cache = small(root, 1)
    group = cache.group(RECIPE)
    for i in range(2):
        group.put(digest(i), values(i))

    def held(path):
        raise PermissionError(13, "in use", str(path))

    before["unlink"] = held
    cache.prune()
    assert there(group, 2) == [0, 1]


def test_unfinished_files_of_killed_processes_count_and_go(root):
    cache = small(root, 4)
    group = cache.group(RECIPE)
    left = group.folder / f"{digest(9)}.{'0' * 16}.part"
    half = root / f"{group.folder.name}.{'1' * 16}.part"
    for i in range(4):
        group.put(digest(i), values(i))
    left.write_bytes(bytes(BLOCK_BYTES))
    os.utime(left, (1, 1))
    half.mkdir()
    (half / f"{digest(8)}.npy").write_bytes(bytes(BLOCK_BYTES))
    os.utime(half / f"{digest(8)}.npy", (2, 2))
    cache.prune()
    assert size(root) <= 4 * BLOCK_BYTES
    assert not left.exists()
    assert len(open_cache().groups()) == 1
    open_cache().clear()
    assert [p.name for p in root.iterdir()] == [MARKER]


# --------------------------------------------------------------------------------------------------- groups and clear


@pytest.fixture
def two(root):
    cache = open_cache()
    for i in range(3):
        cache.group(RECIPE).put(digest(i), values(i))
    cache.group({**RECIPE, "dense": True}).put(digest(0), values())
    cache.group({"encoder": "mine"}).put(digest(0), values())
    return cache


def test_groups(two, root):
    old = two.group(RECIPE)
    aged(old, 1, 2, 0)
    found = two.groups()
    assert [info.encoder for info in found[:2]] in (["uni", "mine"], ["mine", "uni"])
    info = found[-1]  # last used first
    assert (info.folder, info.config, info.n_blocks, info.n_bytes) == (old.folder, RECIPE, 3, 3 * BLOCK_BYTES)
    assert info.last_used.timestamp() == 1e9 + 2
    assert sum(info.n_bytes for info in found) == size(root)
    assert (info.value("mpp"), info.value("tile_um"), info.value("nothing")) == (0.5, 112.0, None)
    assert {info.encoder for info in two.groups(encoder="uni")} == {"uni"}


def test_clear_one_encoder(two, root):
    assert two.clear(encoder="uni") == 4 * BLOCK_BYTES
    assert [info.encoder for info in two.groups()] == ["mine"]
    assert two.group(RECIPE).get(digest(0)) is None
    assert two.group({"encoder": "mine"}).get(digest(0)) is not None
    two.group(RECIPE).put(digest(0), values())
    assert size(root) == 2 * BLOCK_BYTES


def test_clear_all(two, root):
    assert two.clear() == 5 * BLOCK_BYTES
    assert [p.name for p in root.iterdir()] == [MARKER]  # the folder stays ours
    assert two.clear() == 0
    assert open_cache().groups() == []


def test_clear_removes_only_what_the_cache_made(two, root, tmp_path):
    mine = [root / "notes.txt", root / ("f" * 63), two.group(RECIPE).folder / "thesis.docx", tmp_path / "a.npy"]
    for path in mine[:3]:
        path.write_text("mine")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / f"{digest(0)}.npy").write_text("mine")
    (root / ("a" * 64)).symlink_to(outside, target_is_directory=True)
    (root / "sub").mkdir()
    (root / "sub" / f"{digest(0)}.npy").write_text("mine")
    two.clear()
    assert len(list(root.rglob("thesis.docx"))) == 1
    assert mine[0].exists()
    assert mine[1].exists()
    assert (outside / f"{digest(0)}.npy").exists()
    assert (root / "sub" / f"{digest(0)}.npy").exists()
    assert two.groups() == []


@pytest.mark.parametrize("config", [None, "{", "[]"])
def test_group_without_its_config(root, config):
    cache = open_cache()
    group = cache.group(RECIPE)
    group.put(digest(0), values())
    (group.folder / "config.json").unlink()
    if config is not None:
        (group.folder / "config.json").write_text(config)
    (info,) = cache.groups()
    assert (info.encoder, info.config, info.n_blocks) == (None, {}, 1)
    assert cache.clear() == BLOCK_BYTES
    assert cache.groups() == []


def test_unknown_encoder(two, root):
    msg = f"encoder='unii': {root} has no embeddings by it; there are 'mine', 'uni'."
    with pytest.raises(ValueError, match=re.escape(msg)):
        two.clear(encoder="unii")
    two.clear()
    with pytest.raises(ValueError, match=r"encoder='uni': .* has no embeddings by it; there is nothing\."):
        two.clear(encoder="uni")


# ------------------------------------------------------------------------------------------------- folders and settings


@pytest.mark.parametrize("name", ["precious.txt", ".hidden", "histosge.json"])
def test_folder_of_somebody_else_is_refused(root, name):
    root.mkdir()
    (root / name).write_text("mine")
    with pytest.raises(
        ValueError,
        match=rf"{root} is set as the folder .* holds something that is not histosge's \(there is no {MARKER} in it\)\. "
        "Set settings.cache_dir or HISTOSGE_CACHE to a new or an empty folder",
    ):
        open_cache()
    assert [p.name for p in root.iterdir()] == [name]
    with settings.override(cache_gb=0):
        assert open_cache() is None


def test_empty_folder_is_taken(root):
    root.mkdir()
    open_cache().group(RECIPE).put(digest(0), values())
    assert open_cache().group(RECIPE).get(digest(0)) is not None


def test_turned_off(root):
    open_cache().group(RECIPE).put(digest(0), values())
    with settings.override(cache_gb=0):
        assert open_cache() is None
        assert len(EmbeddingCache.from_settings().groups()) == 1  # but it can be looked at, and cleared
        EmbeddingCache.from_settings().clear()
    assert open_cache().groups() == []


def test_file_in_the_place_of_the_folder(root, log):
    root.write_text("mine")
    for _ in range(3):
        assert open_cache() is None
    (record,) = log.records  # once
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"embeddings cannot be stored in {root} and are computed again next time (")
    for word in ("Not a directory", "settings.cache_dir", "HISTOSGE_CACHE", "settings.cache_gb=0"):
        assert word in record.getMessage()
    assert root.read_text() == "mine"


def test_folder_that_becomes_unusable(root, log):
    cache = open_cache()
    root.parent.mkdir(exist_ok=True)
    root.write_text("mine")
    group = cache.group(RECIPE)
    for i in range(3):
        group.put(digest(i), values())
        assert group.get(digest(i)) is None
    (record,) = log.records
    assert f"cannot be stored in {root}" in record.getMessage()


@pytest.mark.parametrize("n_before", [0, 2])
def test_full_disk(root, log, before, n_before):
    """The run goes on, says so once, leaves nothing half, and still reads what is there."""
    group = open_cache().group(RECIPE)
    for i in range(n_before):
        group.put(digest(i), values(i))

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    before["rename"] = full
    for i in range(2, 5):
        group.put(digest(i), values(i))
    before.clear()
    assert [r.levelno for r in log.records] == [logging.WARNING]
    assert "No space left on device" in log.text
    assert there(group, 5) == list(range(n_before))
    assert not list(root.rglob("*.part"))
    for i in range(n_before):
        np.testing.assert_array_equal(group.get(digest(i)), values(i))
    group.put(digest(5), values(5))  # space was freed
    np.testing.assert_array_equal(group.get(digest(5)), values(5))
    assert len(log.records) == 1


def test_cache_that_is_only_read(root, before):
    group = open_cache().group(RECIPE)
    group.put(digest(0), values())

    def refused(path):
        raise PermissionError(1, "Operation not permitted")

    before["utime"] = refused
    np.testing.assert_array_equal(group.get(digest(0)), values())


def test_where_it_is(root, monkeypatch, tmp_path):
    assert cache_folder() == root
    with settings.override(cache_dir=tmp_path / "a"):
        assert cache_folder() == open_cache().root == tmp_path / "a"
    with settings.override(cache_dir="~/x"):
        assert cache_folder() == Path.home() / "x"
    with settings.override(cache_dir="x"):
        assert cache_folder() == Path.cwd() / "x"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for empty in (True, False):  # conftest sets it again
        if empty:
            os.environ["HISTOSGE_CACHE"] = ""
        else:
            del os.environ["HISTOSGE_CACHE"]
        assert "histosge" in cache_folder().parts
        if os.name == "posix" and not (Path.home() / "Library").exists():
            assert cache_folder() == tmp_path / "xdg" / "histosge" / "embeddings"


def test_limit_is_in_gigabytes():
    assert open_cache().limit_bytes == 20_000_000_000
    with settings.override(cache_gb=0.5):
        assert open_cache().limit_bytes == 500_000_000


@pytest.mark.parametrize("value", [-1, -0.1, float("nan"), float("inf"), "20", None, True])
def test_wrong_limit(value):
    msg = f"settings.cache_gb={value!r}: choose a number of gigabytes, such as 20, or 0 to turn the cache off."
    with pytest.raises(ValueError, match=re.escape(msg)):
        sge.settings.cache_gb = value
    with pytest.raises(ValueError, match="cache_gb"):
        Settings(cache_gb=value)
    assert sge.settings.cache_gb == 20


@pytest.mark.parametrize("value", ["", " ", 3, True, b"x"])
def test_wrong_folder(value):
    msg = f"settings.cache_dir={value!r} is not a folder. Pass a str or a Path, or None for HISTOSGE_CACHE"
    with pytest.raises(ValueError, match=re.escape(msg)):
        sge.settings.cache_dir = value
    assert sge.settings.cache_dir is None


# -------------------------------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    "name", ["", "abc", "../" + "a" * 20, "A" * 16, "g" * 16, "a" * 129, "a" * 16 + "\n", None, b"a" * 16]
)
def test_wrong_digest(root, name):
    group = open_cache().group(RECIPE)
    for use in (group.get, lambda d: group.put(d, values())):
        with pytest.raises(ValueError, match=f"^{re.escape(f'digest={name!r}: pass 16 to 128 hexadecimal digits')}"):
            use(name)
    assert not root.exists()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (np.zeros((2, 3)), "float64 of shape (2, 3)"),
        (np.zeros(3, np.float32), "float32 of shape (3,)"),
        (np.zeros((2, 3), object), "object of shape (2, 3)"),
        ([[1.0]], "list"),
        (None, "NoneType"),
    ],
)
def test_wrong_values(root, wrong, told):
    msg = f"values is {told}: pass an array of locations x features, float16 or float32."
    with pytest.raises(ValueError, match=re.escape(msg)):
        open_cache().group(RECIPE).put(digest(0), wrong)


@pytest.mark.parametrize("value", [np.float32(1), np.zeros(2), float("nan"), Path("x"), {1, 2}, {"a": b"b"}])
def test_config_that_is_not_json(root, value):
    msg = f"config['mpp']={value!r} cannot be written as JSON ("
    with pytest.raises(TypeError, match=rf"{re.escape(msg)}.*\): pass finite numbers, strings"):
        open_cache().group({"encoder": "uni", "mpp": value})


@pytest.mark.parametrize("config", [{}, {"encoder": None}, {"encoder": ""}, {"encoder": {"mpp": 1}}, {"encoder": 3}])
def test_config_without_encoder(root, config):
    with pytest.raises(ValueError, match=r"config=.* does not name its encoder.*a name or a dict with a 'name'\."):
        open_cache().group(config)


def test_logger_is_back_to_its_level():
    assert logger.level == logging.INFO
