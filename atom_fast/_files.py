"""Files that are either complete or not there: written beside their place, then moved onto it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_atomically(path: str | os.PathLike, content: bytes | str) -> Path:
    """Write ``content`` to ``path``; whatever stood there before stays intact until the new file is on the disk.

    Args:
        path: file to write; missing parent folders are made.
        content: bytes, or text, which is written as UTF-8.

    Returns:
        The path written.

    Raises:
        OSError: the file could not be written (a full disk, no permission, the path is a folder). The message names
            the path, and an earlier file at the path is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        kept = "; the earlier file is unchanged" if path.is_file() else ""
        raise type(error)(error.errno, f"cannot write {path}: {error.strerror or error}{kept}") from error
    _sync_folder(path.parent)
    return path


def _sync_folder(folder: Path) -> None:
    # The new name survives a power cut only once the folder is on the disk too; some file systems refuse to sync one.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
