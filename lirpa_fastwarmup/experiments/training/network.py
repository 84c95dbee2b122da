"""The network of a run, and the file ``model.pt`` that holds it."""

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lirpa_fastwarmup import models, storage
from lirpa_fastwarmup.engine.precision import exact_arithmetic
from lirpa_fastwarmup.engine.tracing import unchanged
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.training.settings import Settings
from lirpa_fastwarmup.recipe.full_batchnorm import insert_batchnorm

_FORMAT, _SAME = 3, 1e-3  # Outputs that differ by less, relative to the largest, are equal.
_ARCHITECTURE = {"model", "in_shape", "classes", "width", "hidden", "batchnorm"}
_DAMAGED = "was not written by lirpa_fastwarmup, or is damaged (truncated?): restore it from a copy, or retrain"


class UntrustedError(ValueError):
    """A file names code to run, and the caller does not trust it."""


def build_network(architecture: Mapping[str, Any]) -> nn.Module:
    """Build a network with freshly drawn weights, and insert the BatchNorm that a user's own network lacks."""
    values = dict(architecture)
    name, in_shape = values.pop("model"), tuple(values.pop("in_shape"))
    model = models.build(name, in_shape, **values)
    if architecture["batchnorm"] and name not in models.MODELS:
        insert_batchnorm(model, torch.zeros(2, *in_shape))
    return model


@torch.no_grad()
def outputs_of(model: nn.Module, architecture: Mapping[str, Any]) -> Tensor | None:
    """The outputs at two fixed inputs of the data's size, in evaluation mode, on the CPU; None if the network fails."""
    own, shape = next(model.parameters(), torch.empty(0)), architecture["in_shape"]
    with suppress(Exception), unchanged(model), exact_arithmetic(own.device):
        mean, std = (torch.tensor(architecture.get(name) or [0.5]) for name in ("mean", "std"))  # By channel.
        wave = torch.arange(2 * math.prod(shape)).sin().view(2, *shape[1:], shape[0])
        return model.eval()((mean + std * wave).movedim(-1, 1).to(own)).float().cpu()
    return None


def require_outputs(model: nn.Module, architecture: Mapping[str, Any], expected: Any, path: Path) -> None:
    """Raise ValueError if the network does not compute the outputs ``expected``, which were stored in ``path``."""
    if not isinstance(expected, Tensor):  # Files of earlier versions have none, nor have networks that fail at them.
        return
    found, size = outputs_of(model, architecture), 1 + float(expected.nan_to_num().abs().max())
    if found is None or found.shape != expected.shape or not torch.allclose(found, expected, 0, _SAME * size, True):
        text = f"the network in {path} computes different outputs than when it was saved, with the same weights: the "
        raise ValueError(f"{text}code of {architecture['model']}, or a value outside its state dict, has changed")


def save_model(path: Path, model: nn.Module, architecture: Mapping[str, Any], settings: Settings, epoch: int) -> None:
    """Write the network, and what :func:`load_model` needs to build it again."""
    content = {"format": _FORMAT, "epoch": epoch, "architecture": dict(architecture), "settings": settings.as_dict()}
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    outputs = outputs_of(model, architecture)
    storage.write_tensors(path, {**content, "state_dict": weights, "outputs": outputs})


def load_model(path: Path | str, *, trust: bool = False, content: Mapping[str, Any] | None = None) -> nn.Module:
    """Load the trained network of a run, in evaluation mode, on the CPU.

    Args:
        path: the run's ``model.pt``.
        trust: import and call the factory that the file names: its code runs, so leave it off for strangers' files.
        content: what :func:`read_model` returned for this file, to avoid reading it again.

    Raises:
        OSError: the file cannot be read.
        UntrustedError: the file names a factory, and ``trust`` is off.
        ValueError: the file is not a model, is damaged, has an unknown format, or does not fit its network now.
    """
    path = Path(path)
    content = content or read_model(path)
    require_trust(path, str(content["architecture"]["model"]), trust=trust)
    unbuildable = TypeError, AttributeError, RuntimeError, MemoryError, OverflowError
    with storage.refused(f"{path} names an architecture that cannot be built", *unbuildable), torch.random.fork_rng([]):
        torch.default_generator.manual_seed(content["settings"].seed)  # The network may keep what it draws.
        model = build_network(content["architecture"])
    load_weights(model, content["state_dict"], path)
    require_outputs(model, content["architecture"], content.get("outputs"), path)
    return model.eval()


def require_trust(path: Path, *names: str, trust: bool) -> None:
    """Raise :class:`UntrustedError` if one of ``names``, read from ``path``, is a factory and ``trust`` is off."""
    for name in names:
        if data.is_factory(name) and not trust:
            known = "If you know where the file is from, trust it: --trust, or trust=True"
            raise UntrustedError(f"{path} names the factory {name!r}, whose code would be imported and run. {known}")


def load_dataset(settings: Settings, path: Path, data_dir: Path | None = None, *, trust: bool = False) -> data.Dataset:
    """The dataset of a run, whose settings were read from ``path``; ``data_dir`` is its new place."""
    require_trust(path, settings.dataset, trust=trust)
    return data.load(settings.dataset, data_dir or settings.data_dir, settings.input_range)


def read_format(path: Path, expected: int, content: Any = None) -> dict[str, Any]:
    """Read a file of tensors to the CPU; raise ValueError if it is damaged or has another format."""
    content = storage.read_tensors(path, _DAMAGED) if content is None else content
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if not isinstance(content, dict) or found != expected:
        problem = f"{path} has format {found}, and this version of lirpa_fastwarmup reads format {expected}"
        raise ValueError(f"{problem}: use the version that wrote it, or retrain")
    if not storage.has_checksum(path):
        raise ValueError(f"{path} {_DAMAGED} (its checksum is missing)")
    return content


def read_model(path: Path, content: Any = None) -> dict[str, Any]:
    """Read ``model.pt``, its settings as :class:`Settings`; ``content`` is what it holds, if it was read before."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no trained network ({path.name}): name a run with a whole epoch")
    content = dict(read_format(path, _FORMAT, content))
    for name in ("architecture", "settings", "state_dict"):
        if not isinstance(content.get(name), dict):
            raise ValueError(f"{path} is not the model of a run: it lacks {name}")
    if missing := _ARCHITECTURE - content["architecture"].keys():
        raise ValueError(f"{path} is not the model of a run: its architecture lacks {', '.join(sorted(missing))}")
    with storage.refused(f"{path} holds no settings of a run", TypeError, KeyError, AttributeError):
        content["settings"] = Settings.from_dict(content["settings"])
    return content


def load_weights(model: nn.Module, state_dict: Mapping[str, Any], path: Path) -> None:
    """Load weights that were read from ``path``; raise ValueError if they belong to another architecture."""
    problem = f"{path} holds the weights of another architecture than {type(model).__name__} has now"
    with storage.refused(problem, RuntimeError, TypeError, AttributeError, advice=". Restore the code of the run"):
        model.load_state_dict(state_dict)
