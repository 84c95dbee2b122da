"""Every code block of the README and the documentation runs, page by page, in an empty folder.

Commands run on small settings and stand-ins for the large data sets; what they print is not the pages'.
"""

from __future__ import annotations

import glob
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from lirpa_fastwarmup import cli, models
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.presets import preset
from lirpa_fastwarmup.experiments.training import train
from lirpa_fastwarmup.verification import write_onnx

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md"))]
SMALL = (
    *("--width", "2", "--hidden", "8", "--epochs", "1", "--ramp-start", "1", "--ramp-length", "1", "--no-compile"),
    *("--data-limit", "32", "--batch-size", "16", "--pgd-steps", "1", "--pgd-restarts", "1"),
)
EXTRA = {
    "train": SMALL,
    "verify": ("--limit", "12", "--pgd-steps", "1", "--pgd-restarts", "1", "--overwrite"),
    "inspect": ("--samples", "16"),
}
FACTORY = """
import torch
from torch import nn

def make_net(in_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_shape[0] * in_shape[1] * in_shape[2], 8), nn.ReLU(),
                         nn.Linear(8, classes))

make = make_net
"""
# Begun outside this package: installers, other programs, and what a person's own machine must have.
FOREIGN = re.compile(r"(pip install|pip wheel|git clone|python abcrown\.py) ")
LAUNCHED = "torchrun --nproc-per-node 2 -m lirpa_fastwarmup "


def blocks_of(page):
    return re.findall(r"^```(\S*)[^\n]*\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    settings = preset("mnist5k").replace(
        width=2, hidden=8, epochs=1, ramp_length=1, data_limit=32, batch_size=16, pgd_steps=1, pgd_restarts=1
    )
    train(settings, out)
    return out


@pytest.fixture
def folder(tmp_path, monkeypatch, small_run):
    """An empty folder, but for what the pages take for granted: a run, and a network from elsewhere."""
    monkeypatch.chdir(tmp_path)
    for name in ("DIR", "runs/mnist5k"):
        shutil.copytree(small_run, tmp_path / name)
    for package, module in (("my_package", "networks"), ("my_package", "my_networks")):
        (tmp_path / package).mkdir(exist_ok=True)
        (tmp_path / package / f"{module}.py").write_text(FACTORY)
    torch.manual_seed(0)
    in_shape = (3, 8, 8)
    net = models.build("cnn7", in_shape, 10, width=2, hidden=8).eval()
    write_onnx(net, in_shape, tmp_path / "network.onnx")
    weights = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(192, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10)
    ).state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    images = torch.randint(0, 256, (140, *in_shape), dtype=torch.uint8)
    labels = torch.arange(140) % 10
    colours = data.Dataset(
        name="noise",
        classes=10,
        train=data.Split(images[:40], labels[:40]),
        test=data.Split(images[40:], labels[40:]),
    )
    monkeypatch.setitem(data.LOADERS, "cifar10", lambda _: colours)
    return tmp_path


def commands_of(block):
    """The commands of a console block, comments and continued lines resolved."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def carry_out(words):
    line = shlex.join(words)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(rf"^[\w -]*\b{words[1]}\b[\w -]*:", makefile, re.MULTILINE), line
    elif words[0] == "lirpa-fastwarmup":
        arguments = [found for word in words[1:] for found in (sorted(glob.glob(word)) or [word])]  # noqa: PTH207
        extra = EXTRA.get(arguments[0], ())
        if "--resume" in arguments or ("--radius" in arguments and arguments[0] != "verify"):
            extra = ()
        assert cli.main([*arguments, *extra]) == 0, line
    elif line.startswith(LAUNCHED):  # Here by one process; tests/test_distributed.py has two.
        carry_out(["lirpa-fastwarmup", *shlex.split(line.removeprefix(LAUNCHED))])
    elif words[0] in ("bash", "python") and words[1].startswith(("benchmarks/", "examples/")):
        assert (ROOT / words[1]).is_file(), line
    else:
        assert FOREIGN.match(f"{' '.join(words)} "), f"nothing runs this command: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run(page, folder):
    namespace: dict[str, object] = {}
    for number, (language, block) in enumerate(blocks_of(page)):
        if language == "python":
            source = folder / f"block_{number}.py"  # Dynamo reads the source of what it records.
            source.write_text(block)
            exec(compile(block, str(source), "exec"), namespace)
        elif language == "console":
            for words in commands_of(block):
                carry_out(words)
        else:  # What the documentation is built with, or what a program printed.
            assert language in ("text", "{toctree}", "{eval-rst}", "{literalinclude}"), language
    if page.name == "README.md":
        assert namespace["loss"].isfinite()  # type: ignore[attr-defined]
        assert namespace["found"].verified_error.value < 0.2  # type: ignore[attr-defined]


def test_measured_commands_are_understood():
    """Those quoted beside measurements are too long to run; the parser knows all their options."""
    quoted = re.findall(r"^    (lirpa-fastwarmup .*)$", (ROOT / "docs" / "results.md").read_text(), re.MULTILINE)
    assert len(quoted) >= 3
    for line in quoted:
        words = shlex.split(line.rstrip("\\"))[1:]
        cli._parser(words).parse_args(words)


def test_targets_in_the_text_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"`make ([a-z0-9-]+)", page.read_text()):
            assert re.search(rf"^[\w -]*\b{target}\b[\w -]*:", makefile, re.MULTILINE), (page, target)
