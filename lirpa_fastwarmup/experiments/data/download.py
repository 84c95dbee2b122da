"""Downloads that survive a broken line, and are what they should be when they are there."""

from __future__ import annotations

import hashlib
import http.client
import logging
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_TIMEOUT = 30.0
_RANGE_NOT_SATISFIABLE = 416


class CorruptFileError(ValueError):
    """A data file is not what its format, or its checksum, says."""


@dataclass(frozen=True)
class Source:
    """A file that can be downloaded.

    Attributes:
        name: what it is called in its folder.
        url: where it comes from.
        checksum: algorithm and sum, such as "md5:9fb6…".
    """

    name: str
    url: str
    checksum: str


def download(source: Source, folder: Path, *, attempts: int = 4, pause: float = 1.0) -> Path:
    """Download ``source`` into ``folder``, unless it is there.

    What has arrived is kept under another name until it is whole and its checksum is right, and only then gets its own;
    a download that broke off goes on where it was.

    Args:
        source: what to download.
        folder: where to; made if absent.
        attempts: how often a broken line is taken up again before giving up.
        pause: seconds before the second attempt, doubled before each one after it.

    Returns:
        Its path.

    Raises:
        OSError: it cannot be downloaded or written; what has arrived stays for the next time.
        CorruptFileError: what arrived has another checksum; it is removed.
    """
    path = folder / source.name
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{source.name}.part")
    for attempt in range(attempts):
        try:
            _fetch(source.url, part)
            break
        except (OSError, http.client.HTTPException) as error:
            # An answer such as 404 will be the same next time; a broken line may not.
            refused = isinstance(error, urllib.error.HTTPError) and error.code != _RANGE_NOT_SATISFIABLE
            if refused or attempt == attempts - 1:
                raise OSError(f"{source.url} could not be downloaded: {error}") from error
            logger.warning("the download of %s broke off (%s): trying again", source.url, error)
            time.sleep(pause * 2**attempt)
    found = checksum(part, source.checksum.partition(":")[0])
    if found != source.checksum:
        part.unlink()
        raise CorruptFileError(
            f"{source.url} was downloaded with checksum {found}, and {source.checksum} was expected: it was removed. "
            "Try again, or get the file from another place"
        )
    part.replace(path)
    return path


def _fetch(url: str, part: Path) -> None:
    """Append to ``part`` what it lacks of ``url``; begin anew where the server cannot go on."""
    there = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            goes_on = there > 0 and _range_start(answer) == there
            expected = answer.length
            with part.open("ab" if goes_on else "wb") as file, _bar(url, there if goes_on else 0, expected) as bar:
                arrived = 0
                while chunk := answer.read(_CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
                    arrived += len(chunk)
    except urllib.error.HTTPError as error:
        if error.code == _RANGE_NOT_SATISFIABLE:
            part.unlink()  # More than the server has, or all of it; which of the two, the next attempt tells.
        raise
    if expected is not None and arrived < expected:
        raise ConnectionError(f"the connection ended after {arrived} of {expected} bytes")


def _range_start(answer: Any) -> int | None:
    match = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(match[1]) if answer.status == http.HTTPStatus.PARTIAL_CONTENT and match else None


def _bar(url: str, there: int, expected: int | None) -> Any:
    total = None if expected is None else there + expected
    name = url.rpartition("/")[2]
    return tqdm(total=total, initial=there, desc=name, unit="B", unit_scale=True, leave=False, disable=None)


def checksum(path: Path, algorithm: str) -> str:
    """The checksum of a file, as a :class:`Source` has it."""
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"
