"""A step of CTRAIN's Shi-IBP training (PyPI: CTRAIN), through its own training loop.

CTRAIN needs packages that its metadata does not all name, and a newer auto_LiRPA than that of PyPI; where it cannot
be imported, the benchmark goes on without.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import measure
import numpy as np
import torch
from torch import Tensor

from lirpa_fastwarmup.engine.compat import engine


class _Loader:
    """One batch an epoch, with what CTRAIN reads of a loader."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._batch = x, y
        channels = x.shape[1]
        self.mean, self.std = torch.zeros(channels), torch.ones(channels)
        self.min, self.max = torch.zeros(channels, 1, 1), torch.ones(channels, 1, 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self._batch

    def __len__(self) -> int:
        return 1


class _NoStep(torch.optim.SGD):
    """An optimiser that only clears gradients: what is compared is forward and backward."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Nothing."""


def ctrain_step(setup: measure.Setup) -> measure.Step:
    """An epoch of one batch, in the middle of the ramp.

    Raises:
        ImportError: CTRAIN, or something it needs, is not there.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        from CTRAIN.train.certified.shi_ibp import shi_train_model
    x, y = setup.batch_of_noise()
    model = setup.network()
    with contextlib.redirect_stdout(io.StringIO()):
        bounded = engine.BoundedModule(model, x[:2], bound_opts={"conv_mode": "patches", "relu": "adaptive"})
    bounded.train()
    optimizer = _NoStep(model.parameters(), lr=1.0)
    loader = _Loader(x, y)

    def step() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            shi_train_model(
                model,
                bounded,
                loader,
                start_epoch=10,
                end_epoch=11,
                num_epochs=20,
                eps=8 / 255,
                eps_std=np.float32(8 / 255),
                eps_schedule=(1, 18),
                optimizer=optimizer,
                l1_regularisation_weight=None,
                shi_regularisation_weight=0.5,
                checkpoint_save_interval=1000,
                device=setup.device,
            )

    return step
