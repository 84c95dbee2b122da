"""The command ``lirpa-fastwarmup``. Only the module of the command that is asked for is imported."""

import argparse
import importlib
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lirpa_fastwarmup.experiments.training.interrupt import TrainingInterrupted
from lirpa_fastwarmup.version import __version__

_PROGRAM = "lirpa-fastwarmup"
_COMMANDS = {
    "train": "train and evaluate a network, or resume a run",
    "inspect": "bounds, ReLU states and weights of a network, layer by layer",
    "verify": "certify and attack the test samples of a trained network",
    "report": "a page over one or several runs, with pictures",
    "export": "write ONNX, VNN-LIB properties and the YAML for α,β-CROWN",
    "compare": "a table over finished runs, mean ± standard deviation over their seeds",
    "info": "versions, active patches, and a quick check of the engine's bounds",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    rank = os.environ.get("RANK")
    level = logging.WARNING if rank in (None, "0") else logging.ERROR  # Rank 0 prints what all ranks would.
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level, stream=sys.stderr)
    if level == logging.WARNING:
        compiling = "lirpa_fastwarmup.recipe.compiled", "lirpa_fastwarmup.experiments.training.choices"
        for name in (__name__, *compiling):  # It takes a minute, without other output.
            logging.getLogger(name).setLevel(logging.INFO)
    try:
        options = _parser(arguments).parse_args(arguments)
        run: Callable[[argparse.Namespace], Any] = options.command
        if rank is not None:  # torchrun reports the error of the process that failed first.
            from torch.distributed.elastic.multiprocessing.errors import record

            run = record(run)
        return int(run(options))
    except TrainingInterrupted as stopped:
        named = ":" in (options.model or "") + (options.dataset or "")
        trust = ["--trust"] if options.trust or named else []
        command = shlex.join([_PROGRAM, "train", "--resume", "--out", str(stopped.out), *trust])
        print(f"{_PROGRAM}: {stopped}. To resume it:\n    {command}", file=sys.stderr)
        return 128 + stopped.signal_number  # As a shell reports it.
    except KeyboardInterrupt as interrupted:
        detail = f"; {interrupted}" if str(interrupted) else ""
        print(f"{_PROGRAM}: interrupted{detail}", file=sys.stderr)
        return 130
    except Exception as error:
        # Errors of this package, and Python's for wrong input, are shown in one line, without a traceback.
        own = any(kind.__module__.partition(".")[0] == "lirpa_fastwarmup" for kind in type(error).__mro__)
        expected = own or isinstance(error, ValueError | TypeError | OSError | ImportError | NotImplementedError)
        if "--traceback" in arguments or not expected:
            raise
        print(f"{_PROGRAM}{'' if rank is None else f', rank {rank}'}: error: {error}", file=sys.stderr)
        return 1


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands; only the one that ``arguments`` ask for has its options."""
    text = "Fast certified robust training with short warmup, on auto_LiRPA."
    parser = argparse.ArgumentParser(prog=_PROGRAM, description=text)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    asked_for = next((word for word in arguments if not word.startswith("-")), None)
    for name, about in _COMMANDS.items():
        command = commands.add_parser(name, help=about)
        if name == asked_for:
            importlib.import_module(f"{__name__}.{name}").add_to(command)
    return parser
