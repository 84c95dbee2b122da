"""``lirpa-fastwarmup train``: one run, from a preset and the options that change it, or resumed."""

import argparse
import math
import os
from collections.abc import Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from lirpa_fastwarmup.cli import options as common
from lirpa_fastwarmup.experiments.presets import DESCRIPTIONS
from lirpa_fastwarmup.experiments.training.settings import Settings


def add_to(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.set_defaults(command=_train)
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    width = max(map(len, DESCRIPTIONS))
    command.epilog = "presets:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in DESCRIPTIONS.items())
    command.add_argument("preset", metavar="PRESET", nargs="?", help="settings to start from; see the list at the end")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder for the results")
    command.add_argument("--resume", action="store_true", help="resume the run in DIR, with its own settings")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier run in DIR")
    command.add_argument("--show", action="store_true", help="print the settings and stop")
    common.add_settings(command)


def _folder(options: argparse.Namespace) -> Path:
    if options.out is None:
        raise ValueError("name the folder for the results with --out DIR")
    return Path(options.out)


def _train(options: argparse.Namespace) -> int:
    common.find_factories_here(options.model, options.dataset, trust=options.trust)
    # After torchrun has restarted the processes, the same command resumes from the last checkpoint.
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and options.preset is not None:
        from lirpa_fastwarmup.experiments.training.checkpoint import CHECKPOINT, SUMMARY

        is_earlier = options.overwrite and (_folder(options) / SUMMARY).is_file()  # A run to be replaced.
        options.resume, options.overwrite = (_folder(options) / CHECKPOINT).is_file() and not is_earlier, True
    settings, origins = (_resumed_settings if options.resume else common.settings_and_origins)(options)
    if options.show:
        print(common.table(settings, origins))
        return 0
    out = _folder(options)
    # Imported here, so that --help and --show answer at once.
    from tqdm.contrib.logging import logging_redirect_tqdm

    from lirpa_fastwarmup.distributed import local_device, process_group
    from lirpa_fastwarmup.memory import keep_freed_memory

    keep_freed_memory()
    device = local_device(common.device_named(options.device))
    with process_group(device) as ranks:
        console = _Console(settings.epochs) if ranks.is_rank_zero else None
        with logging_redirect_tqdm(), closing(console) if console else nullcontext():
            summary = _run(options, settings, out, device=device, progress=console)
        if console:
            print(_table(summary, options.eps))
            print(f"written to {out}")
    return 0


def _run(options: argparse.Namespace, settings: Settings, out: Path, **arguments: Any) -> dict[str, Any]:
    from lirpa_fastwarmup.experiments.data import is_factory
    from lirpa_fastwarmup.experiments.training import resume, train

    if options.resume:
        # The user trusts factories that this command names.
        factories = {name for name in ("model", "dataset") if is_factory(getattr(settings, name))}
        trust = options.trust or factories <= common.given_settings(options).keys()
        return resume(out, data_dir=options.data_dir, trust=trust, **arguments)
    return train(settings, out, overwrite=options.overwrite, **arguments)


def _resumed_settings(options: argparse.Namespace) -> tuple[Settings, dict[str, str]]:
    """The settings of the run to resume, of unknown origins; raise ValueError if the command line gives others."""
    from lirpa_fastwarmup.experiments.training import settings_of_run

    settings = settings_of_run(_folder(options))
    saved, typed = vars(settings), common.given_settings(options)
    given = vars(common.settings_and_origins(options)[0]) if options.preset else saved | typed
    # The run has chosen itself what to compile, and its precision.
    free = {"data_dir", "compiled_phases", *({"compile"} - typed.keys())}
    free |= {"precision"} if given["precision"] == "auto" else set()
    if changed := [name for name in saved if name not in free and given[name] != saved[name]]:
        problem = f"a resumed run keeps its settings, and the command line gives the run in {options.out} others"
        others = ", ".join(f"{name} {saved[name]}, not {given[name]}" for name in changed)
        raise ValueError(f"{problem}: {others}. Leave them out, or start a new run in another folder")
    return settings, {}


class _Console:
    """Shows a progress bar per epoch and prints a line when it is done."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._bar: Any = None

    def close(self) -> None:
        """Close the bar, so that the next output starts on a line of its own."""
        if self._bar is not None:
            self._bar.close()

    def epoch_started(self, epoch: int, batches: int, done: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=batches, initial=done, desc=f"epoch {epoch}/{self._epochs}", leave=False, disable=None)

    def step_done(self, means: Mapping[str, float]) -> None:
        self._bar.update()
        if means:
            shown = ("eps", "loss", "clean_loss", "robust_loss", "clean_error", "verified_error")
            values = {name: f"{means[name]:.4g}" for name in shown if not math.isnan(means[name])}
            self._bar.set_postfix(values, refresh=False)

    def epoch_done(self, row: Mapping[str, float], seconds: float) -> None:
        self.close()
        dead = "" if math.isnan(row["dead"]) else f"dead {row['dead']:5.1%}  "
        errors = f"standard error {row['standard_error']:6.2%}  verified error {row['verified_error']:6.2%}  "
        if math.isnan(row["verified_error"]):  # Computed only at the end of the run.
            errors = ""
        epoch = f"epoch {row['epoch']:>{len(str(self._epochs))}}/{self._epochs}  eps {row['eps']:<6.4g}"
        print(f"{epoch}  loss {row['loss']:7.4f}  {errors}{dead}{seconds:.1f} s", flush=True)


def _table(summary: Mapping[str, Any], eps: float | None) -> str:
    """The results of a run; ``eps`` as the user typed it, if the command line gave it."""
    rows = [
        ("dataset", f"{summary['dataset']}, {summary['test_samples']:,} test samples"),
        ("eps", f"{summary['eps']:.6g}" if eps is None else str(eps)),
        ("standard error", f"{summary['standard_error']:.2%}"),
        ("PGD error (lower bound)", "none" if summary["pgd_error"] is None else f"{summary['pgd_error']:.2%}"),
        ("verified error (IBP)", f"{summary['verified_error']:.2%}"),
        ("training", f"{summary['train_seconds_per_epoch']:.1f} s per epoch"),
        ("total", f"{summary['seconds']:.0f} s"),
    ]
    if summary["settings"]["select"] != "last":
        rows.insert(2, ("weights", f"of epoch {summary['selected_epoch']}, {summary['selected_by']}"))
    width = max(len(name) for name, _ in rows)
    line = "-" * (width + 2 + max(len(value) for _, value in rows))
    return "\n".join([line, *(f"{name:<{width}}  {value}" for name, value in rows), line])
