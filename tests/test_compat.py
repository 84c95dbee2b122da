"""The installed engine imports, and nothing else in the process notices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from lirpa_fastwarmup.engine import compat
from lirpa_fastwarmup.engine.precision import exact_arithmetic

ROOT = Path(__file__).parent.parent


def run(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_patches_are_those_that_the_engine_lacks():
    gone_since_numpy_2 = set() if hasattr(np.lib, "arraysetops") else {"numpy.lib.arraysetops"}
    needed = gone_since_numpy_2 | {
        "torch.onnx.symbolic_helper._set_opset_version",
        "torch._C.Node.__getitem__",
        "auto_LiRPA.BoundedModule._named_members",
    }
    assert set(compat.ACTIVE_PATCHES) == (needed if compat.ENGINE_VERSION == "0.3" else set())


def test_a_plain_engine_module_works_too(x):
    import auto_LiRPA

    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    bounded = auto_LiRPA.BoundedModule(net, x)
    assert len(list(bounded.parameters())) == 4
    box = auto_LiRPA.BoundedTensor(x, auto_LiRPA.PerturbationLpNorm(eps=0.1))
    lower, upper = bounded.compute_bounds(x=(box,), method="CROWN")
    assert bool((lower <= net(x)).all() and (net(x) <= upper).all())


def test_import_leaves_logging_warnings_and_torch_as_they_were():
    result = run(
        "import logging, warnings, sys\n"
        "import torch.onnx.symbolic_helper as helper\n"
        "import numpy\n"
        "before = (list(logging.root.handlers), 'numpy.lib.arraysetops' in sys.modules, set(vars(helper)))\n"
        "import torch.jit; filters = list(warnings.filters)\n"
        "from lirpa_fastwarmup import BoundedModule\n"
        "assert list(logging.root.handlers) == before[0]\n"
        "assert warnings.filters == filters, warnings.filters\n"
        "assert set(vars(helper)) == before[2]\n"
        "assert ('numpy.lib.arraysetops' in sys.modules) is before[1]\n",
        "-W",
        "error",
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
try:
    from lirpa_fastwarmup import BoundedModule
except ImportError as error:
    print(error)
"""


def test_without_an_engine_the_error_says_how_to_install_one():
    text = run(BLOCK.format(name="auto_LiRPA")).stdout
    assert "pip install --no-deps auto_LiRPA==0.3" in text
    assert "pip install --no-deps git+https" in text


def test_an_engine_that_lacks_a_package_is_reported():
    text = run(BLOCK.format(name="tqdm")).stdout
    assert "auto_LiRPA is installed" in text
    assert "pip install tqdm" in text


def test_conversion_leaves_the_export_settings(x):
    import lirpa_fastwarmup as fw

    settings = compat._exporter_module("_globals").GLOBALS
    before = dict(vars(settings))
    fw.BoundedModule(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)), x)
    assert vars(settings) == before


def test_the_engine_is_patched_wherever_it_is_imported_first():
    code = "import lirpa_fastwarmup, sys; assert 'torch' not in sys.modules; import auto_LiRPA as engine"
    found = run(f"{code}; from lirpa_fastwarmup.engine import compat; assert engine is compat.engine", "-W", "error")
    assert (found.returncode, found.stderr) == (0, "")


def test_exact_arithmetic_is_exact_and_is_restored():
    def settings():
        if hasattr(torch.backends.cudnn, "conv"):  # Since PyTorch 2.9.
            cuda, cudnn, cpu = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
            return [one.fp32_precision for one in (cuda, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn)]
        return [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]

    exact = ["ieee"] * 6 if hasattr(torch.backends.cudnn, "conv") else ["highest", False]
    one, other = torch.randn(128, 256), torch.randn(256, 128)
    product = one @ other
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # On many CPUs, products are then rounded to bfloat16.
    try:
        before = settings()
        with exact_arithmetic(torch.device("cpu")):
            assert settings() == exact
            assert torch.equal(one @ other, product)
        assert settings() == before != exact
    finally:
        torch.set_float32_matmul_precision(precision)
