"""Notebooks and example scripts: run to their ends, quietly, and committed as they ran."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.usefixtures("digits_for_processes")
EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
# Run before the first cell: on all digits the notebooks take minutes, and some are enough to run every cell.
FEWER_DIGITS = """
from lirpa_fastwarmup.experiments import data as _data
_read = _data.LOADERS["mnist5k"]
def _fewer_digits(folder):
    import dataclasses
    digits = _read(folder)
    return dataclasses.replace(digits, train=_data.spread(digits.train, 256), test=_data.spread(digits.test, 100))
_data.LOADERS["mnist5k"] = _fewer_digits
"""


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def written(cell):
    """All that a cell gave as text."""
    parts = []
    for output in cell.outputs:
        parts.append(output.get("text", ""))
        parts += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(parts)


def assert_clean(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert all(output.output_type != "error" for output in cell.outputs)
        assert all(output.get("name") != "stderr" for output in cell.outputs), written(cell)
        assert "Warning" not in written(cell)
        assert not re.search(r"/(work|home|root|tmp|usr)/", written(cell))


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.name)
def notebook_path(request):
    return request.param


def test_there_are_six_notebooks():
    assert len(NOTEBOOKS) == 6


def test_notebook_is_committed_as_it_ran(notebook_path):
    assert_clean(nbformat.read(notebook_path, as_version=4))


def test_notebook_runs(notebook_path, tmp_path):
    notebook = nbformat.read(notebook_path, as_version=4)
    before = [bool(cell.outputs) for cell in code_cells(notebook)]
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    NotebookClient(
        notebook,
        timeout=600,
        resources={"metadata": {"path": str(tmp_path)}},
        extra_arguments=[f"--IPKernelApp.exec_lines={FEWER_DIGITS}"],
    ).execute()
    assert_clean(notebook)
    assert [bool(cell.outputs) for cell in code_cells(notebook)] == before


def run(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=EXAMPLES, check=False, env=environment
    )


def test_tabular_example():
    done = run("tabular_mlp.py")
    assert done.returncode == 0, done.stderr
    errors = {name: float(value) for name, value in re.findall(r"(\w+) error +([\d.]+)%", done.stdout)}
    assert errors["standard"] <= errors["PGD"] <= errors["verified"] < 15


def test_lightning_example_over_two_processes():
    done = run("lightning_module.py", "--devices", "2", "--strategy", "ddp", "--epochs", "2", "--ramp", "1")
    assert done.returncode == 0, done.stderr
    (verified,) = re.findall(r"verified error +([\d.]+)%", done.stdout)  # Told once.
    assert float(verified) < 90


def test_lightning_example():
    code = (
        "import lightning_module\n"
        "trainer = lightning_module.main(epochs=3, ramp=2)\n"
        "objective = trainer.lightning_module.objective\n"
        "assert objective.steps_done == trainer.global_step == 3 * trainer.num_training_batches\n"
        "assert float(trainer.callback_metrics['eps']) == float(objective.schedule.max_eps) or "
        "abs(float(trainer.callback_metrics['eps']) - 0.1) < 1e-6\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    (verified,) = re.findall(r"verified error +([\d.]+)%", done.stdout)
    assert float(verified) < 60
