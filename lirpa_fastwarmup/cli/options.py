"""The options of several commands, and those made from the fields of :class:`Settings`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import sys
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from lirpa_fastwarmup.experiments import presets, published
from lirpa_fastwarmup.experiments.training.settings import METHODS, Settings

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_CTBENCH = "ctbench"
_OPTIONS = [field for field in dataclasses.fields(Settings) if "group" in field.metadata]


class Number(float):
    """A number that prints as it was typed, such as 8/255."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)  # In files it is a plain number.


def number(text: str) -> Number:
    """A number, or a fraction such as 8/255."""
    top, slash, bottom = text.partition("/")
    try:
        value = Number(float(top) / float(bottom) if slash else top)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a fraction such as 8/255") from None
    value.text = text
    return value


def device_named(name: str | None) -> torch.device:
    """The device called ``name``, if it works here; by default a GPU if there is one."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def find_factories_here(*names: str | None, trust: bool = False) -> None:
    """Import factories from the current folder too, as ``python -m`` does, if the command names or trusts one."""
    parts = ((name or "").partition(":") for name in names)
    named = any(colon and not module.endswith(".py") for module, colon, _ in parts)
    if (trust or named) and "" not in sys.path:
        # Imported first, so that no file of the current folder takes the place of a module that this package needs.
        importlib.import_module("lirpa_fastwarmup.experiments.training.run")
        sys.path.insert(0, "")


def add_trust(command: argparse.ArgumentParser) -> None:
    """Add the option that lets files name code to be run."""
    command.add_argument("--trust", action="store_true", help="import and call the factories that a run's files name")


def add_settings(command: argparse.ArgumentParser) -> None:
    """Add the device, trust, and an option for each field of :class:`Settings`, for :func:`settings_and_origins`."""
    command.add_argument("--device", help="cpu, cuda, cuda:1 …; by default a GPU if there is one")
    add_trust(command)
    titles = dict.fromkeys(field.metadata["group"] for field in _OPTIONS)
    groups, kinds = {title: command.add_argument_group(title) for title in titles}, get_type_hints(Settings)
    for field in _OPTIONS:
        about = field.metadata
        flag = f"--{(about['flag'] or field.name).replace('_', '-')}"
        text = f"{about['help']}{_default(field.name)}"
        reader = _reader(kinds[field.name], about["metavar"])
        if field.name == "schedule":
            reader["choices"] += (_CTBENCH,)
            text += f"; {_CTBENCH}: with epochs, learning rate and averages of CTBench"
        groups[about["group"]].add_argument(flag, dest=field.name, help=text, **reader)
    text = "the network's own initialisation"
    groups["method"].add_argument("--no-init", dest="init", action="store_const", const="default", help=text)


def _default(name: str) -> str:
    value, *others = {getattr(one, name) for one in presets.PRESETS.values()}
    if others:
        return " (default: the preset's)"
    shown = {True: "on", False: "off"}.get(value) if isinstance(value, bool) else value
    return "" if value is None else f" (default: {shown})"


def _reader(kind: Any, metavar: str | None) -> dict[str, Any]:
    if NoneType in get_args(kind):
        (kind,) = (one for one in get_args(kind) if one is not NoneType)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    count: Any = None
    if get_origin(kind) is tuple:
        kind, *more = get_args(kind)
        count = "*" if more == [...] else 1 + len(more)
    return {"type": number if kind is float else kind, "nargs": count, "metavar": metavar}


def settings_and_origins(options: argparse.Namespace) -> tuple[Settings, dict[str, str]]:
    """The preset's settings with those that the command line gives, and where each comes from; or raise ValueError."""
    if options.preset is None:
        raise ValueError(f"name a preset, one of {', '.join(presets.DESCRIPTIONS)}")
    changes = given_settings(options)
    base = presets.preset(options.preset, **changes)
    origins = dict.fromkeys(vars(base), f"preset {base.preset}")
    method = changes.pop("method", base.method)
    problem = changes.get("dataset", base.dataset), changes.get("eps", base.eps)
    if changes.get("schedule") == _CTBENCH:
        found = published.ctbench_schedule(method, *problem)
        base, changes["schedule"] = base.replace(**found.settings), found.settings["schedule"]
        origins |= dict.fromkeys(found.settings, found.source)
    if changes.get("validation"):
        changes.setdefault("select", "validation")
    scaled = _scaled(base, changes)
    if options.method is None:
        settings = base.replace(**scaled, **changes)
    else:
        settings = base.with_method(method, **scaled, **changes)
        origins |= dict.fromkeys((*METHODS[method], "method"), f"method {method}")
        of_loss = published.loss_settings(method, *problem)
        origins |= dict.fromkeys(of_loss.settings, of_loss.source) if of_loss else {}
    return settings, origins | dict.fromkeys(scaled, "scaled with epochs") | dict.fromkeys(changes, "command line")


def table(settings: Settings, origins: dict[str, str]) -> str:
    """The settings in lines, with what is known of where their values come from."""
    texts = {name: str(value) for name, value in settings.as_dict().items()}
    names, width = max(map(len, texts)), max(map(len, texts.values()))
    lines = (f"{name:<{names}}  {text:<{width}}  {origins.get(name, '')}" for name, text in texts.items())
    return "\n".join(line.rstrip() for line in lines)


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line gives, with the types of their fields."""

    def plain(value: Any) -> Any:
        return float(value) if isinstance(value, Number) else value

    given = {field.name: getattr(options, field.name) for field in _OPTIONS}
    lists = {name: tuple(map(plain, value)) for name, value in given.items() if isinstance(value, list)}
    return {name: plain(value) for name, value in (given | lists).items() if value is not None}


def _scaled(base: Settings, changes: dict[str, Any]) -> dict[str, Any]:
    """The ramp and the milestones in proportion to ``--epochs``, except those that the command line gives."""
    epochs = changes.get("epochs", base.epochs)

    def scaled(value: int) -> int:
        return max(1, (2 * value * epochs + base.epochs) // (2 * base.epochs))  # Rounded, halves up.

    milestones, swa = tuple(map(scaled, base.lr_milestones)), base.swa_start and scaled(base.swa_start)
    every = {"ramp_length": scaled(base.ramp_length), "lr_milestones": milestones, "swa_start": swa}
    new = {name: value for name, value in every.items() if name not in changes and value != getattr(base, name)}
    if new:
        texts = [f"{name} {getattr(base, name)} -> {value}" for name, value in new.items()]
        logger.info("epochs %d -> %d: %s", base.epochs, epochs, ", ".join(texts))
    return new
