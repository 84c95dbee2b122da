"""Which hooks work on networks that others wrote: docs/networks.md, one engine per run.

    python benchmarks/architectures.py run --auto-lirpa DIR --abcrown DIR --ctbench DIR --ctrain DIR --out 0.3.json
    PYTHONPATH=CHECKOUT python benchmarks/architectures.py run ... --out 0.7.1.json
    python benchmarks/architectures.py table 0.3.json 0.7.1.json --out docs/networks.md

DIR are checkouts of the four repositories; nothing of them is copied. Networks have the width that their authors' code
allows to set, as small as it goes, random weights, and the input size they were written for.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib
import importlib.util
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.recipe.regularizers import undefined

Builder = Callable[[], nn.Module]
SOURCES = {
    "ctrain": "ADA-research/CTRAIN",
    "ctbench": "eth-sri/CTBench",
    "abcrown": "Verified-Intelligence/alpha-beta-CROWN",
    "auto_lirpa": "Verified-Intelligence/auto_LiRPA",
}
MNIST, CIFAR, IMAGENET = (1, 28, 28), (3, 32, 32), (3, 56, 56)
EPS, BATCH = 2 / 255, 4
LARGE = 1_000_000  # Parameters; larger networks make one step, and bound one sample by CROWN-IBP.
CLEAR = (NotImplementedError, ValueError, TypeError, FloatingPointError)  # What the package refuses with.


def auto_lirpa(root: Path) -> Iterator[tuple[str, Builder, tuple[int, ...]]]:
    """The models of auto_LiRPA's examples/vision."""
    sys.path.insert(0, str(root / "examples" / "vision"))
    models = importlib.import_module("models").Models
    narrow = {"width": 4, "linear_size": 32}
    options: dict[str, dict[str, Any]] = {
        "mlp_2layer": {"in_ch": 1, "in_dim": 28},
        "mlp_3layer": {"in_ch": 1, "in_dim": 28},
        "mlp_5layer": {"in_ch": 1, "in_dim": 28},
        "cnn_4layer": {"in_ch": 1, "in_dim": 28},
        "cnn_6layer": {"in_ch": 3, "in_dim": 32, **narrow},
        "cnn_7layer": narrow,
        "cnn_7layer_bn": narrow,
        "resnet": {"mult": 4},
        "resnet18": {"in_planes": 4},
        "Densenet_cifar_wobn": {"in_dim": 32},
        "wide_resnet_imagenet64": {"in_planes": 4, "widen_factor": 2},
    }
    left_out = "cnn_7layer_bn_imagenet", "wide_resnet_imagenet64_1000class"  # Wider copies of others.
    for name in (name for name in models if name not in left_out):
        shape = MNIST if name.startswith("mlp") or name == "cnn_4layer" else IMAGENET if "imagenet" in name else CIFAR
        yield name, lambda name=name: models[name](**options.get(name, {})), shape


def abcrown(root: Path) -> Iterator[tuple[str, Builder, tuple[int, ...]]]:
    """The models of α,β-CROWN's model_defs.py."""
    models = _module(root / "complete_verifier" / "model_defs.py")
    for name in ("mnist_fc_3_512", "mnist_conv_small", "MadryCNN_tiny", "TradesCNN_no_maxpool", "TradesCNN"):
        yield name, getattr(models, name), MNIST
    for name in ("cifar_conv_small", "cifar_conv_small_sigmoid", "cifar_model_deep", "cnn_4layer_b", "resnet2b"):
        yield name, getattr(models, name), CIFAR
    for name in ("resnet4b", "ResNet18", "cresnet5_16_dense_bn", "cresnet5_16_avg_bn", "cresnet7_8_dense"):
        yield name, getattr(models, name), CIFAR
    for name in ("model_resnet", "crown_ibp_model_g_h_i_j", "resnet2b2_eth", "resnet3b2_no_bn", "resnet9b"):
        yield name, getattr(models, name), CIFAR


def ctbench(root: Path) -> Iterator[tuple[str, Builder, tuple[int, ...]]]:
    """The models of CTBench's networks.py, behind its own normalisation."""
    sys.path.insert(0, str(root))
    models = importlib.import_module("networks")

    def build(name: str) -> nn.Module:
        normalisation = models.Normalization(list(CIFAR), [0.5] * 3, [0.25] * 3)
        model: nn.Module = getattr(models, name)(normalisation, width=4)
        return model

    for name in ("fc_5layer_bn", "DLN_conv_3layer_bn", "cnn_3layer_bn", "ConvMedBig", "cnn_5layer_bn", "cnn_7layer"):
        yield name, lambda name=name: build(name), CIFAR
    for name in ("cnn_7layer_bn", "cnn_11layer_bn", "cnn_13layer_bn"):
        yield name, lambda name=name: build(name), CIFAR


def ctrain(root: Path) -> Iterator[tuple[str, Builder, tuple[int, ...]]]:
    """The models of CTRAIN's model_definitions."""
    shi, gowal, mao = (_module(root / f"CTRAIN/model_definitions/models_{name}.py") for name in ("shi", "gowal", "mao"))
    yield "GowalConvSmall", gowal.GowalConvSmall, MNIST
    yield "GowalConvMed", gowal.GowalConvMed, MNIST
    yield "CNN7_Shi", lambda: shi.CNN7_Shi(CIFAR, width=4, linear_size=32), CIFAR
    for name in ("CNN3_Mao", "CNN5_Mao", "CNN9_Mao", "CNN11_Mao"):
        yield name, lambda name=name: getattr(mao, name)(CIFAR, width=4, linear_size=32), CIFAR


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Trial:
    """The hooks on one network, in the order in which a user calls them."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        self.model, self.x = model, torch.rand(BATCH, *shape)
        self.y = torch.arange(BATCH) % model.eval()(self.x).shape[1]
        self.is_large = sum(parameter.numel() for parameter in model.parameters()) > LARGE
        self.had_batchnorm = any(isinstance(module, _BatchNorm) for module in model.modules())
        self.bounded: Any = None
        model.train()

    def insert_batchnorm(self) -> str:
        if self.had_batchnorm:
            return "has its own"
        fw.insert_batchnorm(self.model, self.x)
        return "yes"

    def bounded_module(self) -> str:
        self.bounded = fw.BoundedModule(self.model, self.x)
        return "yes"

    def ibp_init(self) -> str:
        fw.ibp_init_(self.bounded)
        return "yes"

    def short_warmup(self) -> str:
        """Three steps in the ramp, or one."""
        terms = [name for name in ("tightness", "relu_balance") if not undefined(self.bounded, [name])]
        schedule = fw.SmoothedEpsilon(EPS, start=1, length=1, steps_per_epoch=10)
        warmup = fw.ShortWarmup(self.bounded, schedule, regularizers=tuple(terms))
        optimizer = torch.optim.Adam(self.model.parameters(), 1e-4)
        for _ in range(1 if self.is_large else 3):
            loss = warmup.train()(self.x, self.y).loss
            loss.backward()
            finite = [bool(p.grad.isfinite().all()) for p in self.model.parameters() if p.grad is not None]
            if not (bool(loss.isfinite()) and finite and all(finite)):
                return "ERROR: a loss or gradient is not finite"
            optimizer.step()
            optimizer.zero_grad()
            warmup.step()
        return "yes"

    def verify_ibp(self) -> str:
        return self._verify("IBP", BATCH)

    def verify_crown_ibp(self) -> str:
        return self._verify("CROWN-IBP", 1 if self.is_large else BATCH)

    def _verify(self, method: str, samples: int) -> str:
        self.bounded.eval()
        fw.verify(self.bounded, (self.x[:samples], self.y[:samples]), EPS, (method,), restarts=1)
        return "yes"

    def inspect(self) -> str:
        self.bounded.eval()
        fw.inspect(self.bounded, self.x, EPS)
        return "yes"

    def fold_batchnorm(self) -> str:
        """Only if :meth:`insert_batchnorm` inserted them."""
        if self.had_batchnorm:
            return "-"
        outputs = self.model.eval()(self.x)
        folded = fw.fold_batchnorm(self.model)(self.x)
        close = torch.allclose(folded, outputs, rtol=1e-4, atol=1e-5 * float(1 + outputs.abs().max()))
        return "yes" if close else "ERROR: other outputs"


HOOKS = [name for name, value in vars(Trial).items() if callable(value) and not name.startswith("_")]


def tried(build: Builder, shape: tuple[int, ...]) -> dict[str, str]:
    """What each hook does: "yes", "refused: ..." or "ERROR: ..."; later hooks need the BoundedModule."""
    torch.manual_seed(0)
    found: dict[str, str] = {}
    try:
        trial = Trial(build(), shape)
    except Exception as error:
        return {"BUILD": f"ERROR: {type(error).__name__}: {error}"}
    for hook in HOOKS:
        try:
            skipped = trial.bounded is None and hook not in ("insert_batchnorm", "bounded_module")
            found[hook] = "" if skipped else getattr(trial, hook)()
        except Exception as error:
            verdict = "refused" if isinstance(error, CLEAR) else f"ERROR: {type(error).__name__}"
            found[hook] = f"{verdict}: {error}"
    return found


def run(options: argparse.Namespace) -> None:
    """Try every network of the checkouts with the installed engine."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    commits: dict[str, str] = {}
    rows: dict[str, dict[str, str]] = json.loads(options.out.read_text())["rows"] if options.out.exists() else {}
    for source, repository in SOURCES.items():
        root = getattr(options, source)
        git = ["git", "-C", str(root), "rev-parse", "HEAD"]
        commits[repository] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        for name, build, shape in globals()[source](root):
            if options.only in name and f"{repository} {name}" not in rows:  # Begins where an earlier run ended.
                start = time.monotonic()
                rows[f"{repository} {name}"] = found = tried(build, shape)
                print(f"{source} {name}, {time.monotonic() - start:.0f} s: {found}", file=sys.stderr, flush=True)
                _write(options.out, commits, rows)


def _write(path: Path, commits: dict[str, str], rows: dict[str, dict[str, str]]) -> None:
    about = {"engine": ENGINE_VERSION, "torch": torch.__version__, "date": dt.date.today().isoformat()}
    path.write_text(json.dumps({**about, "commits": commits, "rows": rows}, indent=1, ensure_ascii=False) + "\n")


HEAD = """# Networks that others wrote

Each network was built from its authors' code and passed to the hooks in the order of the columns: three steps of the
warmup in the ramp, certificates of four samples with IBP and with CROWN-IBP, and so on. Weights are random, and widths
are small where the code has an option for it. Networks of more than a million parameters make one step, and bound one
sample by CROWN-IBP. *yes* means that the hook worked with both releases of auto_LiRPA.

"""


def works(found: dict[str, str]) -> bool:
    """Whether the network can be trained and verified."""
    return all(found.get(hook) == "yes" for hook in ("bounded_module", "ibp_init", "short_warmup", "verify_ibp"))


def table(options: argparse.Namespace) -> None:
    """Write the page from the results of two engines."""
    one, other = (json.loads(path.read_text()) for path in options.results)
    reasons: list[str] = []
    lines = ["| network | " + " | ".join(f"`{hook}`" for hook in HOOKS) + " |", "| --- |" + " --- |" * len(HOOKS)]
    for name in one["rows"]:
        pair = one["rows"][name], other["rows"][name]
        cells = [_cell([found.get(hook, "") for found in pair], (one, other), reasons) for hook in HOOKS]
        lines.append(f"| {name.partition('/')[2]} | {' | '.join(cells)} |")
    good = [name for name in one["rows"] if works(one["rows"][name]) or works(other["rows"][name])]
    text = f"{HEAD}{len(good)} of {len(one['rows'])} networks can be trained and verified.\n\n" + "\n".join(lines)
    text += "".join(f"\n\n{number}. {reason}" for number, reason in enumerate(reasons, 1))
    text += f"\n\n## How it was measured\n\n{one['date']}, PyTorch {one['torch'].partition('+')[0]}, commits:\n\n"
    text += "\n".join(f"- {repository} {commit[:12]}" for repository, commit in one["commits"].items())
    usage = [line for line in str(__doc__).splitlines() if line.startswith("    ")]
    text += "\n\n```text\n" + "\n".join(line.strip() for line in usage) + "\n```\n"
    options.out.write_text(text)


def _cell(found: list[str], results: tuple[Any, Any], reasons: list[str]) -> str:
    """The verdicts of both engines, with a number for each reason."""

    def short(text: str, engine: str) -> str:
        verdict, _, reason = text.partition(": ")
        if not reason:
            return verdict
        reason = reason.replace(engine, "").replace("auto_LiRPA ", "auto_LiRPA").split(". ")[0]
        if reason not in reasons:
            reasons.append(reason)
        return f"{verdict} ({reasons.index(reason) + 1})"

    texts = [short(text, result["engine"]) for text, result in zip(found, results, strict=True)]
    if texts[0] == texts[1]:
        return texts[0]
    return "; ".join(f"{result['engine']}: {text or '-'}" for text, result in zip(texts, results, strict=True))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    for source in SOURCES:
        running.add_argument(f"--{source.replace('_', '-')}", type=Path, required=True, metavar="DIR")
    running.add_argument("--only", default="", help="networks whose name contains this")
    running.add_argument("--out", type=Path, required=True)
    running.set_defaults(call=run)
    drawing = commands.add_parser("table")
    drawing.add_argument("results", type=Path, nargs=2)
    drawing.add_argument("--out", type=Path, required=True)
    drawing.set_defaults(call=table)
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
