"""A network trained by CTRAIN's own loop, with the data and settings of this package's runs, measured by its verifiers.

    PYTHONPATH=CTRAIN_CHECKOUT:AUTO_LIRPA_0.7_CHECKOUT python benchmarks/peer_training.py mtl-ibp --data-dir DIR

MNIST at ε = 0.3, in the short schedule of docs/results.md, with the published settings of the loss, as
``lirpa-fastwarmup train mnist --method mtl-ibp --show`` prints them. CTRAIN's loop has its own initialisation,
schedule, attack, BatchNorm policy, regularisers and L1 term. An interrupted run resumes at the last epoch's end.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import measure
import torch
from torch import Tensor, nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.compat import engine
from lirpa_fastwarmup.experiments.data import load
from lirpa_fastwarmup.experiments.data.dataset import spread_indices
from lirpa_fastwarmup.verification import evaluate

EPS, BATCH = 0.3, 256
SETTINGS: dict[str, dict[str, Any]] = {
    "mtl-ibp": {"alpha": 0.5, "pgd_n_steps": 1, "pgd_step_size": 2.0, "l1_regularisation_weight": 1e-6},
    "sabr": {"subselection_ratio": 0.9, "pgd_steps": 5, "pgd_step_size": 0.2, "l1_regularisation_weight": 2e-6},
}


class Loader:
    """Shuffled batches, without the last incomplete one, and what CTRAIN reads of a loader."""

    mean, std = torch.zeros(1), torch.ones(1)
    min, max = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x))
        for first in range(0, len(self) * BATCH, BATCH):
            chosen = order[first : first + BATCH]
            yield self.x[chosen], self.y[chosen]


def train(method: str, net: nn.Module, loader: Loader, epochs: int, out: Path) -> Any:
    """The engine's BoundedModule of ``net``, trained from the newest of CTRAIN's checkpoints in ``out`` on, if any.

    It has its own running statistics, which CTRAIN evaluates.
    """
    for name in ("CTRAIN.eval", "CTRAIN.eval.eval"):  # It needs verifiers that training does not use.
        sys.modules.setdefault(name, mock.MagicMock())
    from CTRAIN.train.certified.mtl_ibp import mtl_ibp_train_model
    from CTRAIN.train.certified.sabr import sabr_train_model

    options = {"conv_mode": "patches", "relu": "adaptive"}
    bounded = engine.BoundedModule(net.eval(), torch.ones(1, 1, 28, 28), bound_opts=options, device="cpu")
    net.train()
    bounded.train()
    optimizer = torch.optim.Adam(bounded.parameters(), lr=5e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=(9, 11), gamma=0.2)
    first = max((int(path.name.split("_")[0]) for path in out.glob("*_checkpoint.pt")), default=0)
    if first:
        saved = torch.load(out / f"{first}_checkpoint.pt")
        bounded.load_state_dict(saved["model_state_dict"])
        optimizer.load_state_dict(saved["optimizer_state_dict"])
        for _ in range(first):
            scheduler.step()
    run = {"mtl-ibp": mtl_ibp_train_model, "sabr": sabr_train_model}[method]
    run(
        net,
        bounded,
        loader,
        start_epoch=first,
        num_epochs=epochs,
        eps=EPS,
        eps_std=torch.tensor(EPS).reshape(1, 1),
        eps_schedule=(1, epochs // 2),
        optimizer=optimizer,
        lr_scheduler=scheduler,
        gradient_clip=10,
        shi_regularisation_weight=0.5,
        pgd_early_stopping=False,
        pgd_decay_checkpoints=(),
        results_path=str(out),
        checkpoint_save_interval=1,
        device="cpu",
        **SETTINGS[method],
    )
    return bounded


@torch.no_grad()
def normalise_by_attacked(bounded: Any, x: Tensor, y: Tensor) -> None:
    """Replace the running statistics by those of attacked samples, by which CTRAIN's loop normalises bounds."""
    box = (x - EPS).clamp(0, 1), (x + EPS).clamp(0, 1)
    attack = fw.attacks.PGD(steps=1, step_size=2.0)
    bounded.eval()  # As CTRAIN attacks.
    points = attack.points(bounded, y, *box, attack.starts(x))
    bounded.train()
    bounded(points)
    norms = [
        node for node in bounded._modules.values() if isinstance(node, engine.bound_general.BoundBatchNormalization)
    ]
    found = [(node.current_mean, node.current_var) for node in norms]
    for node, statistics in zip(norms, found, strict=True):
        for source, value in zip(node.inputs[3:5], statistics, strict=True):
            source.buffer.copy_(value)
    bounded.eval()


def main() -> None:
    """Train, measure, and write ``summary.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=SETTINGS)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--data-limit", type=int, help="only the first images of both parts, for a trial")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = load("mnist", options.data_dir)
    (images, labels), (x, y) = (
        (part.as_inputs(part.images[: options.data_limit]), part.labels[: options.data_limit])
        for part in (data.train, data.test)
    )
    net = measure.Setup(width=16, hidden=128).network()
    torch.manual_seed(options.seed)
    bounded = train(options.method, net, Loader(images, labels), options.epochs, options.out)
    bounded.eval()
    found = evaluate(bounded, (x, y), EPS, pgd_steps=20, restarts=1)
    few = spread_indices(len(x), 200)
    complete = fw.verify(bounded, (x[few], y[few]), EPS, ("IBP", "CROWN-IBP", "alpha-CROWN"))
    normalise_by_attacked(bounded, images[:1000], labels[:1000])
    attacked = evaluate(bounded, (x, y), EPS, pgd_steps=20, restarts=1)
    print(found, complete, attacked, sep="\n")
    summary = {
        "method": options.method,
        "seed": options.seed,
        "epochs": options.epochs,
        "images": len(images),
        "all": str(found),
        "evenly_spaced": str(complete),
        "by_statistics_of_attacked_samples": str(attacked),
        "machine": measure.machine("cpu"),
    }
    measure.write(options.out / "summary.json", summary)


if __name__ == "__main__":
    main()
