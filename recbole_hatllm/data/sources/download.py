"""Fetches a file over HTTP: streamed, resumed, checked, and never mistaken for whole before it is.

<file>         whole, and as its sidecar says
<file>.json    the sidecar: url, size, sha256 and date of the download
<file>.part    what has arrived so far, with <file>.part.json saying of what
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock
from tqdm import tqdm

from recbole_hatllm.errors import DataError
from recbole_hatllm.files import publish

logger = logging.getLogger(__name__)

TIMEOUT = 6.0  # seconds without an answer or a byte
PAUSES = (1.0, 3.0)  # seconds before the second and third try of a connection that brings nothing new
_BLOCK = 1 << 18
_MAGIC = {".gz": b"\x1f\x8b", ".zip": b"PK"}


class DownloadError(DataError):
    """No address gave the file.

    Args:
        name: of the file. reasons: why, by address. offline: whether no server could be reached at all.
    """

    def __init__(self, name: str, reasons: dict[str, str], offline: bool):
        self.name, self.reasons, self.offline = name, reasons, offline
        tried = "; ".join(f"{url} ({reason})" for url, reason in reasons.items())
        super().__init__(f"{name} could not be downloaded: {tried}.")


class _Failed(Exception):
    """One try failed: why, whether the same address may do better, and whether a server answered."""

    def __init__(self, reason: str, again: bool = False, reached: bool = True):
        super().__init__(reason)
        self.again, self.reached = again, reached


def fetch(
    urls: Sequence[str],
    target: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    show_progress: bool = True,
) -> Path:
    """Downloads `target`, or finds it downloaded and unchanged. Other processes that want it wait.

    Args:
        urls: of the same file, tried in order. size, sha256: what the file must have, in bytes and hexadecimal.

    Raises:
        DownloadError: no url gave the file. DataError: it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        if not _is_whole(target, size, sha256):
            _fetch_from_any(urls, target, size, sha256, show_progress)
    finally:
        lock.release()
    return target


def sha256_of(file: Path) -> str:
    """The sha256 of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    for block in _blocks(file):
        digest.update(block)
    return digest.hexdigest()


def record(file: Path) -> dict:
    """What the sidecar of a downloaded file says: url, size, sha256, date; empty where there is none."""
    return _read_json(_beside(file, ".json"))


def _is_whole(target: Path, size: int | None, sha256: str | None) -> bool:
    if not target.is_file():
        return False
    known = record(target)
    same = target.stat().st_size == known.get("size") and sha256_of(target) == known.get("sha256")
    if not same:
        logger.info("%s is not as it was downloaded: fetching it again.", target)
    return same and size in (None, known["size"]) and sha256 in (None, known["sha256"])


def _fetch_from_any(urls: Sequence[str], target: Path, size, sha256, show_progress: bool) -> None:
    reasons: dict[str, str] = {}
    reached, dead = False, set()
    for url in urls:
        host = urlsplit(url).netloc
        if host in dead:
            reasons[url] = "cannot be reached"
            continue
        try:
            _fetch_from(url, target, size, sha256, show_progress)
            return
        except _Failed as failed:
            reasons[url] = str(failed)
            reached |= failed.reached
            if not failed.reached:
                dead.add(host)
    raise DownloadError(target.name, reasons, offline=not reached)


def _fetch_from(url: str, target: Path, size, sha256, show_progress: bool) -> None:
    """Tries one address for as long as each try brings something new."""
    part, fruitless, most = _beside(target, ".part"), 0, 0
    while True:
        try:
            found = _download(url, target, size, show_progress)
            break
        except _Failed as failed:
            have = part.stat().st_size if part.is_file() else 0
            fruitless = 0 if have > most else fruitless + 1
            most = max(most, have)
            if not failed.again or fruitless > len(PAUSES):
                raise
            logger.info("%s: %s; trying again.", url, failed)
            time.sleep(PAUSES[max(0, fruitless - 1)])
    if sha256 and found != sha256:
        _forget(part)
        raise _Failed(f"its sha256 is {found} and not {sha256}")
    note = {"url": url, "size": part.stat().st_size, "sha256": found, "date": _now()}
    # The sidecar first: a file without the right one counts as not there.
    _write_json(_beside(target, ".json"), note)
    os.replace(part, target)
    _beside(part, ".json").unlink(missing_ok=True)


def _download(url: str, target: Path, size: int | None, show_progress: bool) -> str:
    """One connection, which completes the part file.

    Returns:
        the sha256 of the whole.
    """
    part = _beside(target, ".part")
    memory = _read_json(_beside(part, ".json"))
    have = part.stat().st_size if part.is_file() and memory.get("url") == url and memory.get("validator") else 0
    if have and have == memory.get("size"):  # stopped just before it was given its name
        return sha256_of(part)
    request = urllib.request.Request(url, headers={"User-Agent": "recbole_hatllm", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", memory["validator"])
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            _forget(part)
            raise _Failed(f"it has changed, or ends at byte {have:,} and announced more", again=True) from None
        raise _Failed(
            f"HTTP {error.code} {error.reason}", again=error.code in (408, 429) or error.code >= 500
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _unreachable(error) from error
    with response:
        begin, whole = _range(response)
        if begin != have or (have and (whole != memory.get("size") or _validator(response) != memory["validator"])):
            if response.status == 206:  # a piece of another version: never glue it to what is here
                _forget(part)
                raise _Failed("the remote file has changed", again=True)
            begin = 0
        if size is not None and whole not in (None, size):
            raise _Failed(f"it has {whole:,} bytes and not {size:,}")
        return _receive(response, part, begin, whole if whole is not None else size, url, target.name, show_progress)


def _receive(response, part: Path, begin: int, whole: int | None, url: str, name: str, show_progress: bool) -> str:
    digest, arriving = hashlib.sha256(), _arriving(response)
    if begin:
        for block in _blocks(part):
            digest.update(block)
    else:
        first = next(arriving, b"")
        if not _plausible(name, first):  # before it replaces what may be half of the file
            raise _Failed("it answers with something else than the file")
        arriving = chain([first], arriving)
        part.unlink(missing_ok=True)  # never beside a note that is not its own
        _write_json(_beside(part, ".json"), {"url": url, "size": whole, "validator": _validator(response)})
    have = begin
    with (
        _open(part, "ab" if begin else "wb") as file,
        tqdm(total=whole, initial=begin, unit="B", unit_scale=True, desc=name, disable=not show_progress) as bar,
    ):
        for block in arriving:
            try:
                file.write(block)
                file.flush()
            except OSError as error:
                raise _unwritable(part, error) from error
            digest.update(block)
            have += len(block)
            bar.update(len(block))
    if whole is not None and have != whole:
        if have > whole:
            _forget(part)
        raise _Failed(f"the connection ended at {have:,} of {whole:,} bytes", again=True)
    return digest.hexdigest()


def _arriving(response) -> Iterator[bytes]:
    while True:
        try:
            block = response.read1(_BLOCK)  # what is there, without waiting for a full block
        except (OSError, http.client.HTTPException) as error:
            raise _Failed(f"the connection was cut: {_reason(error)}", again=True) from error
        if not block:
            return
        yield block


def _range(response) -> tuple[int, int | None]:
    """Where the answer begins in the file, and how long the whole file is, if the server says so."""
    if response.status == 206:
        span, _, whole = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        begin = span.partition("-")[0]
        return int(begin) if begin.isdigit() else -1, int(whole) if whole.isdigit() else None
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _validator(response) -> str:
    """What stands for the version of a remote file; a weak ETag does not promise equal bytes."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _plausible(name: str, first: bytes) -> bool:
    """Whether a file may begin like this: a login page or an error page does not."""
    magic = _MAGIC.get(Path(name).suffix)
    return first.startswith(magic[: len(first)]) if magic else not first.lstrip().startswith(b"<")


def _unreachable(error: Exception) -> _Failed:
    """No answer at all. Where there is no connection, another second brings none; a slow server may yet answer."""
    connected = not isinstance(error, (urllib.error.URLError, ValueError))
    return _Failed(_reason(error), again=connected, reached=connected)


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    if isinstance(cause, socket.gaierror):
        return "the host name is not known here"
    if isinstance(cause, TimeoutError):
        return f"no answer within {TIMEOUT:g} s"
    return str(getattr(cause, "strerror", None) or cause or type(cause).__name__)


# --- Small files beside the large one


def _beside(file: Path, ending: str) -> Path:
    return file.with_name(file.name + ending)


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _beside(part, ".json").unlink(missing_ok=True)


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(file: Path, content: dict) -> None:
    publish(file, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as content:
        while block := content.read(1 << 22):
            yield block


def _open(file: Path, mode: str):
    try:
        return file.open(mode)
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: Path, error: OSError) -> DataError:
    return DataError(
        f"{file} could not be written ({error.strerror or error}): free some disk space, or set RECBOLE_HATLLM_CACHE "
        "to another folder."
    )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
