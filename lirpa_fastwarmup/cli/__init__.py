"""The command ``lirpa-fastwarmup``."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import record

from lirpa_fastwarmup.cli import compare, export, info, inspect, report, train, verify
from lirpa_fastwarmup.experiments.training import TrainingInterrupted
from lirpa_fastwarmup.recipe.objective import NonFiniteLossError
from lirpa_fastwarmup.verification import OutOfMemoryError, UnsoundBoundError
from lirpa_fastwarmup.version import __version__

_PROGRAM = "lirpa-fastwarmup"
# Mistakes of the user and of the world: told in one line, without a traceback.
_EXPECTED = (
    *(ValueError, TypeError, OSError, ImportError, NotImplementedError),
    *(NonFiniteLossError, OutOfMemoryError, UnsoundBoundError),
)
_BY_SIGNAL = 128  # What a shell adds to the signal's number.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    rank = os.environ.get("RANK")
    # Of several processes the first one tells what all of them would.
    level = logging.WARNING if rank in (None, "0") else logging.ERROR
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level, stream=sys.stderr)
    options = _parser().parse_args(arguments)
    try:
        # torchrun then tells the error of the process that failed first.
        carry_out: Callable[[argparse.Namespace], Any] = options.command if rank is None else record(options.command)
        return int(carry_out(options))
    except TrainingInterrupted as stopped:
        trust = ["--trust"] if options.trust or ":" in (options.model or "") else []
        command = shlex.join([_PROGRAM, "train", "--resume", "--out", str(stopped.out), *trust])
        print(f"{_PROGRAM}: {stopped}. To resume it:\n    {command}", file=sys.stderr)
        return _BY_SIGNAL + stopped.signal_number
    except KeyboardInterrupt as interrupted:
        said = f"; {interrupted}" if str(interrupted) else ""
        print(f"{_PROGRAM}: interrupted{said}", file=sys.stderr)
        return 130
    except _EXPECTED as error:
        if options.traceback:
            raise
        print(f"{_PROGRAM}{'' if rank is None else f', rank {rank}'}: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM, description="Fast certified robust training with short warmup, on auto_LiRPA."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (train, inspect, verify, report, export, compare, info):
        command.add_to(commands)
    return parser
