"""A certified classifier on tabular data: scikit-learn's breast-cancer dataset, with one radius per feature.

    python examples/tabular_mlp.py

Each feature has its own measurement error, here a tenth of its standard deviation. A certificate guarantees that errors
of that size, in all 30 features at once, cannot change the network's diagnosis.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

import lirpa_fastwarmup as fw

EPOCHS, RAMP, BATCH = 40, 25, 32


def load(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return training and test samples in the features' own units (mm, mm² and ratios)."""
    table = load_breast_cancer()
    x, y = torch.tensor(table.data, dtype=torch.float32), torch.tensor(table.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:430], order[430:]
    return (x[train], y[train]), (x[test], y[test])


def main(seed: int = 0) -> None:
    """Train and certify."""
    torch.manual_seed(seed)
    (x, y), (x_test, y_test) = load(seed)
    mean, std = x.mean(0), x.std(0)
    eps = 0.1 * std  # One radius per feature, in its units.

    # Normalisation is part of the network, so eps stays in the features' units.
    normalize = fw.models.Normalize(mean.tolist(), std.tolist())
    net = nn.Sequential(normalize, nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    fw.insert_batchnorm(net, x[:2])
    bounded = fw.BoundedModule(net, x[:2])
    fw.ibp_init_(bounded)

    steps = len(x) // BATCH
    schedule = fw.SmoothedEpsilon(eps, start=1, length=RAMP, steps_per_epoch=steps)
    warmup = fw.ShortWarmup(bounded, schedule, input_range=None)  # Measurements have no valid range.
    optimizer = torch.optim.Adam(warmup.parameters(), lr=1e-3)
    for epoch in range(1, EPOCHS + 1):
        warmup.train()
        for batch in torch.randperm(len(x))[: steps * BATCH].split(BATCH):
            out = warmup(x[batch], y[batch])
            out.loss.backward()
            nn.utils.clip_grad_norm_(warmup.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
            warmup.step()
        if epoch % 10 == 0:
            print(f"epoch {epoch}  loss {out.loss.item():.4f}")

    found = fw.verify(bounded.eval(), (x_test, y_test), eps, input_range=None, restarts=2)
    print(f"standard error  {found.standard_error}")
    print(f"PGD error       {found.pgd_error}")
    print(f"verified error  {found.verified_error}")
    for finding in fw.inspect(bounded, x_test, eps, input_range=None).findings:
        print(finding)


if __name__ == "__main__":
    main()
