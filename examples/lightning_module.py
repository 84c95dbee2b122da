"""Certified training with Lightning: the objective as the loss of a LightningModule.

    python examples/lightning_module.py
    python examples/lightning_module.py --devices 2 --strategy ddp

Call ``step()`` after each batch to advance ε. In validation, where Lightning puts all modules in evaluation mode, the
objective uses the target ε.
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.experiments import data

EPS, BATCH = 0.1, 64


class Certified(lightning.LightningModule):
    """Train any network with the short warmup.

    Args:
        net: the network, a plain nn.Module.
        example: a batch of two or more inputs.
        eps: target radius.
        ramp: epochs over which ε grows.
        steps_per_epoch: number of batches in an epoch.
    """

    def __init__(self, net: nn.Module, example: Tensor, eps: float, ramp: int, steps_per_epoch: int) -> None:
        super().__init__()
        fw.insert_batchnorm(net, example)
        bounded = fw.BoundedModule(net, example)
        fw.ibp_init_(bounded)
        schedule = fw.SmoothedEpsilon(eps, start=1, length=ramp, steps_per_epoch=steps_per_epoch)
        self.objective = fw.ShortWarmup(bounded, schedule)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Return the loss at the schedule's current ε."""
        out = self.objective(*batch)
        self.log_dict({"eps": out.eps, "loss": out.loss.detach()}, prog_bar=True)
        return out.loss

    def on_train_batch_end(self, *_: object) -> None:
        """Advance ε after the optimiser step."""
        self.objective.step()

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Log the errors at the target ε."""
        out = self.objective(*batch)
        errors = {"standard_error": out.clean_error, "verified_error": out.verified_error}
        self.log_dict(errors, prog_bar=True, sync_dist=True)  # Averaged over all processes.

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use Adam, as in the paper."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main(epochs: int = 6, ramp: int = 4, devices: str = "1", strategy: str = "auto") -> lightning.Trainer:
    """Train on 4,000 digits, with a global batch of ``BATCH``."""
    lightning.seed_everything(0)
    count = int(devices)
    digits = data.load("mnist5k")
    train, test = (TensorDataset(split.inputs, split.labels) for split in (digits.train, digits.test))
    loader = DataLoader(train, BATCH // count, shuffle=True, drop_last=True)
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    module = Certified(net, digits.train.inputs[:2], EPS, ramp, steps_per_epoch=len(loader) // count)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        gradient_clip_val=10.0,  # As in the paper.
        devices=count,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, loader, DataLoader(test, 250))
    for name in ("standard_error", "verified_error") if trainer.is_global_zero else ():
        print(f"{name.replace('_', ' ')}  {float(trainer.callback_metrics[name]):.2%}")
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--ramp", type=int, default=4, help="epochs")
    parser.add_argument("--devices", default="1")
    parser.add_argument("--strategy", default="auto", help="ddp for several devices")
    main(**vars(parser.parse_args()))
