"""Where a dataset's files are: in the folder that the user names, or downloaded into the user's cache."""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import appdirs
import numpy as np

from lirpa_fastwarmup.experiments.data.download import CorruptFileError, Source, download
from lirpa_fastwarmup.storage import locked


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
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder, wait=True):  # Another program may be downloading the same.
                download(source, folder)
        except OSError as error:
            addresses = ", ".join(one.url for one in sources)
            raise type(error)(
                f"{title} could not be downloaded ({error}). Get {addresses} on a machine with a network, and put the "
                f"files into {folder}, or name their folder with --data-dir"
            ) from error


def archived_folder(
    title: str, data_dir: Path | None, default: Path, source: Source, inside: str, wanted: Sequence[str]
) -> Path:
    """The folder of a dataset that comes as an archive, downloaded and unpacked as far as that is needed.

    Args:
        title: the dataset, for messages.
        data_dir: the folder, or one with it or with the archive in it; ``None`` for ``default``, into which alone the
            archive is downloaded.
        default: where it is looked for without ``data_dir``.
        source: the archive, a .zip or .tar.gz file.
        inside: the folder that the archive unpacks to.
        wanted: files that must be in it.

    Raises:
        OSError: files are missing, or cannot be downloaded; the text names them and the folder.
        CorruptFileError: the archive is damaged, or does not hold what is wanted.
    """
    folder = default if data_dir is None else Path(data_dir)
    archive = folder / source.name

    def found() -> Path | None:
        places = (folder, folder / inside)
        return next((place for place in places if all((place / name).is_file() for name in wanted)), None)

    if (place := found()) is not None:
        return place
    if data_dir is None:
        fetched(title, [source], folder)
    if not archive.is_file():
        raise missing_files(title, [f"{inside} with {', '.join(wanted)}", f"or the archive {source.name}"], folder)
    with locked(folder, wait=True):
        if (place := found()) is None:
            _unpack(archive, folder)
            place = found()
    if place is None:
        raise CorruptFileError(f"{archive} holds no {inside} with {', '.join(wanted)}: fetch it again")
    return place


def _unpack(archive: Path, folder: Path) -> None:
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as content:
                content.extractall(folder)  # Leaves out "..", and roots of paths.
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, RuntimeError, ValueError) as error:
        raise CorruptFileError(f"{archive} is no intact archive ({error}): remove it, and fetch it again") from error


def read_npz(path: Path, names: Sequence[str], what: str) -> dict[str, np.ndarray]:
    """Arrays of an npz file, by name.

    Args:
        path: the file.
        names: of the arrays.
        what: what it should hold, for the message.

    Raises:
        OSError: it cannot be opened.
        CorruptFileError: it is damaged or encrypted, no npz, holds Python objects, or lacks an array.
    """
    with path.open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as content:
                missing = [name for name in names if name not in content]
                if missing:
                    raise ValueError(f"it has no array {missing[0]!r}; it has {', '.join(content.files) or 'none'}")
                return {name: content[name] for name in names}
        except Exception as error:  # numpy and zipfile fail in many ways on what is damaged.
            hint = "it holds pickled objects, or is no npz" if "allow_pickle" in str(error) else str(error)
            raise CorruptFileError(
                f"{path} is no intact npz file of {what} ({hint}): write plain arrays with numpy.savez"
            ) from error
