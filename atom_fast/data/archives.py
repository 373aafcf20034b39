"""Download a zip file and unpack it; neither the server nor the archive is trusted."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from atom_fast._files import unfinished_path

_BLOCK = 1 << 20  # bytes per read
_TIMEOUT = 60  # seconds without a byte before the download fails


def download_file(url: str, target: Path, *, md5: str, progress: bool = True) -> None:
    """Download ``url`` to ``target``. The file appears there only when it is complete and its MD5 sum matches.

    Args:
        url: address to fetch.
        target: file to write; missing parent folders are made.
        md5: expected MD5 sum, hexadecimal.
        progress: show a progress bar on standard error.

    Raises:
        RuntimeError: the download failed or has another MD5 sum; no partial file remains.
    """
    from tqdm import tqdm

    target.parent.mkdir(parents=True, exist_ok=True)
    part = unfinished_path(target)
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, part.open("wb") as file:
            size = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(total=size, desc=target.name, unit="B", unit_scale=True, disable=not progress) as bar:
                while block := response.read(_BLOCK):
                    file.write(block)
                    digest.update(block)
                    bar.update(len(block))
        if digest.hexdigest() != md5:
            raise RuntimeError(f"the file has the MD5 sum {digest.hexdigest()}, not {md5}: truncated or changed")
        os.replace(part, target)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"could not download {url} to {target}: {error}; try again, or fetch it by other means and put it there"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def unpack_zip(archive: Path, folder: str, *, progress: bool = True) -> Path:
    """Unpack ``folder`` of a zip file beside the file. The folder appears only when all of it is unpacked.

    Args:
        archive: the zip file.
        folder: top-level folder that the archive must contain.
        progress: show a progress bar with the remaining time on standard error.

    Returns:
        The unpacked folder, ``archive.parent / folder``.

    Raises:
        ValueError: the file is truncated or not a zip file, lacks the folder, or contains a symbolic link or a path
            outside the folder; nothing remains on the disk.
        OSError: the disk has too little free space, or the folder already exists.
    """
    from tqdm import tqdm

    target = archive.parent / folder
    if target.exists():
        raise FileExistsError(f"{target} exists but is not complete; remove it so that {archive} can be unpacked")
    with _broken_zip_named(archive), zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            _refuse_unsafe(archive, member)
        if not any(member.filename.startswith(folder + "/") for member in members):
            raise ValueError(f"{archive} holds no folder {folder}/")
        _check_room(archive, sum(member.file_size for member in members))
        with tempfile.TemporaryDirectory(prefix=f".{folder}-", dir=archive.parent) as scratch:
            for member in tqdm(members, desc=f"unpacking {archive.name}", unit="file", disable=not progress):
                file.extract(member, scratch)
            os.replace(Path(scratch) / folder, target)
    return target


def _refuse_unsafe(archive: Path, member: zipfile.ZipInfo) -> None:
    """Raise ValueError for symbolic links, and for paths that are outside the folder on any operating system."""
    name = member.orig_filename
    if not member.filename:
        raise zipfile.BadZipFile("a member has no name")
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.drive or windows.root or ".." in (*posix.parts, *windows.parts):
        raise ValueError(f"{archive} holds {name!r}, a path that leads out of its folder; nothing was unpacked")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise ValueError(f"{archive} holds {name!r}, a symbolic link; nothing was unpacked")


def _check_room(archive: Path, needed: int) -> None:
    free = shutil.disk_usage(archive.parent).free
    if needed > free:
        raise OSError(f"unpacking {archive} needs {needed / 1e6:.0f} MB, but its disk has {free / 1e6:.0f} MB free")


@contextlib.contextmanager
def _broken_zip_named(archive: Path) -> Iterator[None]:
    try:
        yield
    # zipfile raises RuntimeError for a member that needs a password.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, UnicodeError) as error:
        raise ValueError(f"{archive} is not a complete zip file ({error}); delete it and download it again") from error
