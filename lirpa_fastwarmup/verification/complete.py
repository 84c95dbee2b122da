"""Complete verification: runs α,β-CROWN, in processes of its own environment, on samples that other methods leave open.

A sample is certified, falsified with a counterexample that the plain network confirms, timed out, or an error. If a
process crashes, hangs or returns an invalid answer, only its sample is affected.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.storage import write_atomically
from lirpa_fastwarmup.verification import abcrown_worker
from lirpa_fastwarmup.verification.folder import PART, Journal, digest
from lirpa_fastwarmup.verification.handover import handed_over, robustness_property

_START = 300.0  # Seconds within which the process must be ready.
_GRACE = 60.0  # Seconds beyond twice the time limit, which α,β-CROWN reads between its stages: then it hangs.
_OUTCOMES = {"safe": "certified", "verified": "certified", "unsafe": "falsified"}
_OUTCOMES |= dict.fromkeys(("unknown", "timeout"), "timeout")  # By the first word of a status, as in safe-incomplete.


@dataclass(frozen=True)
class ABCrown:
    """α,β-CROWN for :func:`lirpa_fastwarmup.verify`, which runs it as the method "abcrown".

    Attributes:
        checkout: folder of its repository, with auto_LiRPA in it.
        python: the interpreter of its environment, by default this one. It needs neither this package nor its version
            of PyTorch, but must be able to load the network: its classes are imported from where they are here.
        time_limit: seconds for each sample.
        device: "cpu" or "cuda".
        settings: further settings of α,β-CROWN, by section, as in its YAML files.

    Example:
        >>> abcrown = fw.verification.ABCrown("../alpha-beta-CROWN", python="../abcrown-env/bin/python")
        >>> fw.verify(bounded, (x, y), eps=0.1, methods=("IBP", "CROWN-IBP", "abcrown"), abcrown=abcrown)
    """

    checkout: Path | str
    python: Path | str = sys.executable
    time_limit: float = 100.0
    device: str = "cpu"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not Path(self.checkout, "complete_verifier", "api.py").is_file():
            text = f"{self.checkout} is no checkout of alpha-beta-CROWN: it has no complete_verifier/api.py. Clone its "
            raise FileNotFoundError(text + "repository with --recursive (docs/verification.md)")
        if not self.time_limit > 0:
            raise ValueError(f"time_limit, seconds for each sample, must be above 0; found {self.time_limit}")

    def configuration(self) -> dict[str, Any]:
        """Its settings: those of ``settings``, the time limit, the device, and its command line's kind of search."""
        sections = {name: dict(value) for name, value in self.settings.items()}
        # Its API chooses mixed-integer programs, which need a licence, for networks without convolutions.
        sections["general"] = {"device": self.device, "complete_verifier": "bab", **sections.get("general", {})}
        sections["bab"] = {**sections.get("bab", {}), "timeout": self.time_limit}
        return sections


class WorkerError(RuntimeError):
    """A process of α,β-CROWN failed; the message says how."""


class _Process:
    """One worker, which ends once a question fails; raises :class:`WorkerError` if it does not start."""

    def __init__(self, command: list[str], start: dict[str, Any], log: IO[bytes]) -> None:
        self._pipe, other = Pipe()
        with other:
            files: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self._process = subprocess.Popen(
                [*command, str(other.fileno())], pass_fds=[other.fileno()], start_new_session=True, **files
            )
        self.ask(start, _START)

    def ask(self, content: dict[str, Any], limit: float) -> dict[str, Any]:
        """The answer to ``content`` within ``limit`` seconds; raises :class:`WorkerError`."""
        try:
            self._pipe.send(content)
            if self._pipe.poll(limit):
                return self._pipe.recv()
            reason = f"no answer within {limit:.0f} s"
        except (EOFError, OSError, UnpicklingError):
            reason = f"its process ended with status {self._process.wait()}"
        self.close()
        raise WorkerError(reason)

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # With the processes that it began.
        self._process.wait()
        self._pipe.close()


class CompleteVerifier:
    """α,β-CROWN on a plain network, for any number of batches of samples ``like`` these; close it in the end.

    ``journal`` keeps its verdicts, errors excepted, under keys with the network's digest ``key``. Raises WorkerError if
    α,β-CROWN does not start, and ValueError if another process could not import the classes of ``model``.
    """

    def __init__(self, abcrown: ABCrown, model: nn.Module, like: Tensor, journal: Journal | None, key: str) -> None:
        self._abcrown, self._model, self._journal, self._key = abcrown, model, journal, key
        other, _ = handed_over(model, like.shape)
        sources = _sources(other)
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self._log = stack.enter_context((self._folder / "log").open("w+b"))
            # How far above its file the folder is from which a module is imported.
            levels = {name: name.count(".") + file.endswith("__init__.py") for name, file in sources.items()}
            self._start: dict[str, Any] = {
                "checkout": str(Path(abcrown.checkout).resolve()),
                "network": str(self._folder / "network.pt"),
                "paths": sorted({str(Path(file).parents[levels[name]]) for name, file in sources.items()}),
                "sources": sources,
                "settings": abcrown.configuration(),
            }
            torch.save(other, self._folder / "network.pt")
            try:
                self._process: _Process | None = self._started()
            except (WorkerError, OSError) as error:
                text = f"α,β-CROWN does not start with {abcrown.python}: {error}{self._last_words()}. Install what its "
                raise WorkerError(text + "complete_verifier/requirements.txt lists (docs/verification.md)") from error
            self._stack = stack.pop_all()

    def _started(self) -> _Process:
        return _Process([str(self._abcrown.python), abcrown_worker.__file__], self._start, self._log)

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
        self._stack.close()

    def outcome(self, lower: Tensor, upper: Tensor, label: int, classes: int) -> str:
        """The outcome for a box of float32 ends: certified, falsified, timeout, or error with its reason."""
        about = {"network": self._key, "lower": lower, "upper": upper, "label": label}
        key = PART + digest({**about, "settings": str(self._start["settings"])})
        if stored := self._journal.get(key) if self._journal else None:
            return str(stored)
        path = self._folder / "property.vnnlib"
        write_atomically(path, robustness_property(lower, upper, label, classes).encode())
        try:
            self._process = self._process or self._started()
            point = lower.unsqueeze(0)
            task = {"property": str(path), "point": point.tolist(), "logits": self._model(point).tolist()}
            answer = self._process.ask(task, 2 * self._abcrown.time_limit + _GRACE)
        except (WorkerError, OSError) as error:
            self._process = None  # Another one takes the next sample.
            return f"error: {error}{self._last_words()}"
        status = str(answer.get("status"))
        found = _OUTCOMES.get(status.partition("-")[0].partition(" ")[0])
        if found is None:
            return f"error: α,β-CROWN answered {status!r}"
        if found == "falsified" and not self._is_counterexample(answer.get("points") or [], lower, upper, label):
            return f"error: {status}, without a counterexample that holds"
        if self._journal:
            self._journal.put(key, found)
        return found

    @torch.no_grad()
    def _is_counterexample(self, points: Sequence[Any], lower: Tensor, upper: Tensor, label: int) -> bool:
        if not points:
            return False
        found = torch.min(torch.max(torch.tensor(points, dtype=lower.dtype).view(-1, *lower.shape), lower), upper)
        logits = self._model(found[found.flatten(1).isfinite().all(1)])
        return bool(((logits.argmax(1) != label) & logits.isfinite().all(1)).any())

    def _last_words(self) -> str:
        lines = Path(self._log.name).read_text(errors="replace").strip().splitlines()
        return f" ({lines[-1].strip()})" if lines else ""


def _sources(model: nn.Module) -> dict[str, str]:
    names = sorted({type(module).__module__ for module in model.modules()})
    if "__main__" in names:
        text = "α,β-CROWN runs in another process, which cannot import classes of a script or a notebook: define "
        raise ValueError(text + "the network in a module of its own, and import it")
    files = {name: getattr(sys.modules[name], "__file__", None) for name in names if not name.startswith("torch.")}
    return {name: str(Path(file).resolve()) for name, file in files.items() if file is not None}
