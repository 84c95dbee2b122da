"""Where a dataset's files are: in the folder that the user names, or downloaded into the user's cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import appdirs

from lirpa_fastwarmup.data.download import Source, download


def cache_folder(dataset: str) -> Path:
    """The folder of ``dataset`` in the user's cache."""
    return Path(appdirs.user_cache_dir("lirpa_fastwarmup")) / dataset


def missing_files(title: str, names: Sequence[str], folder: Path, hint: str = "") -> FileNotFoundError:
    """What to say where the files ``names`` of the dataset ``title`` are not in ``folder``."""
    return FileNotFoundError(
        f"{title} needs {', '.join(names)} in {folder}: put what is missing there, or name the folder that has it with "
        f"--data-dir{hint}"
    )


def fetched(title: str, sources: Sequence[Source], folder: Path) -> None:
    """Download into ``folder`` what it lacks of ``sources``.

    Raises:
        OSError: there is no network, or no room; the text names the files and where to put them.
        CorruptFileError: a download has another checksum than it should have.
    """
    for source in sources:
        try:
            download(source, folder)
        except OSError as error:
            addresses = ", ".join(one.url for one in sources)
            raise type(error)(
                f"{title} could not be downloaded ({error}). Get {addresses} on a machine with a network, and put the "
                f"files into {folder}, or name their folder with --data-dir"
            ) from error
