"""Files that are either whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

from safetensors import SafetensorError

from recbole_hatllm.errors import DataError


def cache_folder() -> Path:
    """Where downloads and derived tables are kept: `$RECBOLE_HATLLM_CACHE`, else `~/.cache/recbole_hatllm`."""
    return Path(os.environ.get("RECBOLE_HATLLM_CACHE") or Path.home() / ".cache" / "recbole_hatllm")


def sha256(file: Path) -> str:
    """The hash of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def publish(target: Path, write: Callable[[Path], object]) -> Path:
    """Calls `write(temporary)` for a file or folder beside `target` and renames the result to `target`.

    A kill at any moment leaves the old `target` or the new one. A folder replaces an existing folder in two renames.

    Raises:
        DataError: the disk is full or not writable.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if temporary.is_dir() and target.is_dir():
            shutil.rmtree(target)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in an error of its own
        raise _unwritable(target, error) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
    return target


def claim(folder: Path) -> Path:
    """Makes `folder` or, where there is one, the first of `folder`-1, -2, ... that is not: no two processes get the same.

    Raises:
        DataError: the disk is full or not writable.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for number in count():
            free = folder.with_name(f"{folder.name}-{number}") if number else folder
            with suppress(FileExistsError):
                free.mkdir()
                return free
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(target: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or error
    return DataError(f"{target} could not be written ({reason}): free some disk space or name another folder.")
