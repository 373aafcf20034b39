"""Atomic writes: what is written beside its target and then moved there is complete or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def cache_folder() -> Path:
    """Return this user's cache folder for atom_fast, which may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atom_fast"


def lock(file: IO | int, *, wait: bool) -> bool:
    """Lock an open file or folder for this process until it is closed; return False if another process holds it.

    Windows has no such locks: there nobody is kept out.

    Args:
        file: an open file, or a descriptor.
        wait: until no other process holds it; the result is then True.

    Raises:
        OSError: the file system has no locks, such as some network file systems.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock file ``path``; yield False if another process holds it and this one is not to wait.

    Where the file system has no locks nobody is kept out.
    """
    with open(path, "w") as file:
        held = True
        with contextlib.suppress(OSError):
            held = lock(file, wait=wait)
        yield held


def write_atomically(path: str | os.PathLike, content: bytes | str) -> Path:
    """Write ``content`` to ``path``; an earlier file stays intact until the new one is on the disk.

    Args:
        path: file to write, or a link to it; missing parent folders are made.
        content: bytes, or a string, which is encoded as UTF-8.

    Returns:
        ``path``.

    Raises:
        OSError: the file could not be written (full disk, no permission, the path is a folder or a device). The message
            names the path; an earlier file is unchanged.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    temporary = unfinished_path(target)
    try:
        if target.exists() and not target.is_file():  # moving a file onto a device would remove the device
            raise OSError(errno.EINVAL, "it is not a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        kept = "; the earlier file is unchanged" if os.path.isfile(path) else ""
        raise type(error)(error.errno, f"cannot write {path}: {error.strerror or error}{kept}") from error
    _sync_folder(target.parent)
    return path


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, which becomes ``path`` at the end of the context; nothing stays of a failure.

    Raises:
        FileExistsError: ``path`` exists and is not an empty folder.
        OSError: it could not be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder; give a new one")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    content = temporary / "content"  # mkdir gives the usual permissions; the folder from mkdtemp is private
    try:
        content.mkdir()
        yield content
        if path.exists():
            path.rmdir()
        os.replace(content, path)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unfinished_path(target: Path) -> Path:
    """Return a unique hidden path beside ``target``, to write to before moving the file to ``target``."""
    # The process id alone is not unique: two containers that share a folder may use the same one.
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


def _sync_folder(folder: Path) -> None:
    # The new name survives a power failure only if the folder is synced too; some file systems refuse to sync folders.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
