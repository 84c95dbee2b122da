"""The files of a verification: certificates.csv, radii.csv and verification.json."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lirpa_fastwarmup.distributed import world
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.storage import file_sum, locked, make_folder, weights_sum, write_csv, write_json
from lirpa_fastwarmup.verification.result import Radius, Verification, radii_entry
from lirpa_fastwarmup.version import __version__

CERTIFICATES, SUMMARY, RADII, JOURNAL = "certificates.csv", "verification.json", "radii.csv", "verification.partial"
WRITTEN = (CERTIFICATES, SUMMARY, RADII)


@contextmanager
def results_folder(folder: Path, *, overwrite: bool) -> Iterator[None]:
    """Make and lock ``folder`` for a verification; raises FileExistsError if it holds one, without ``overwrite``."""
    present = [name for name in WRITTEN if (folder / name).exists()]
    if present and not overwrite:
        raise FileExistsError(
            f"{folder} holds a verification already ({', '.join(present)}); nothing in it was changed. Name another "
            "folder with --out, or replace the verification with --overwrite"
        )
    with make_folder(folder), locked(folder):
        yield


def write_results(
    folder: Path,
    bounded: BoundedModule,
    verifications: Sequence[Verification],
    radii: Sequence[Radius] | None,
    tolerance: float,
    about: Mapping[str, Any],
) -> None:
    """Replace the verification in ``folder``; ``about`` are entries of ``verification.json``, such as the dataset."""
    device, weights = bounded.example[0].device, weights_sum(bounded.wrapped.state_dict())
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)
    content: dict[str, Any] = {
        **about,
        "precision": "float32, eager, without TF32 and autocast; rounding is not bounded",
        "engine": f"auto_LiRPA {ENGINE_VERSION}",
        "torch": torch.__version__,
        "package": __version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "processes": world().size,
        "untested": list(bounded.untested),
        "weights": weights,
    }
    if verifications:
        write_csv(folder / CERTIFICATES, [row for one in verifications for row in one.rows(weights)])
        content["results"] = [one.as_dict() for one in verifications]
    if radii is not None:
        write_csv(folder / RADII, [one.row(weights) for one in radii])
        content["certified_radius"] = radii_entry(radii, tolerance)
    content["files"] = {name: file_sum(folder / name) for name in (CERTIFICATES, RADII) if (folder / name).exists()}
    write_json(folder / SUMMARY, content)
