"""The wheel and the sdist: built, complete, and importable where nothing of the checkout is."""

from __future__ import annotations

import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    # The sdist first and the wheel from it, as an index would be served.
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def modules():
    return {str(path.relative_to(ROOT)) for path in (ROOT / "lirpa_fastwarmup").rglob("*.py")}


def test_wheel_holds_every_module_and_the_marker_of_types(built):
    wheel, _ = built
    names = set(zipfile.ZipFile(wheel).namelist())
    assert modules() | {"lirpa_fastwarmup/py.typed", "lirpa_fastwarmup/experiments/report/report.html.jinja"} <= names
    assert not any(name.startswith(("tests", "benchmarks", "examples")) for name in names)


def test_metadata(built):
    wheel, _ = built
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = archive.read(name).decode()
    for line in ("Name: lirpa_fastwarmup", "Requires-Python: >=3.11", "License-Expression: BSD-3-Clause"):
        assert line in metadata
    required = {
        line.removeprefix("Requires-Dist: ").split(">")[0]
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    }
    # What the package and both engines import; the engine itself cannot be required.
    assert required == {"torch", "numpy", "appdirs", "tqdm", "graphviz", "packaging"}
    # No index accepts a package that requires another one by its address, in an extra either.
    assert " @ " not in metadata.partition("\n\n")[0]
    assert 'Requires-Dist: auto_LiRPA>=0.7; extra == "engine"' in metadata
    for extra in ("demo", "plots", "docs", "dev", "engine"):
        assert f"Provides-Extra: {extra}" in metadata


def test_sdist_holds_what_the_wheel_is_built_from(built):
    _, sdist = built
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert modules() | {"setup.cfg", "setup.py", "LICENSE", "README.md"} <= names


def test_wheel_imports_from_an_empty_environment(built, tmp_path):
    wheel, _ = built
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"

    def run(*command):
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})

    installed = run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    assert installed.returncode == 0, installed.stderr
    bare = run(python, "-c", "from lirpa_fastwarmup import BoundedModule")
    assert "No module named 'torch'" in bare.stderr  # Nothing but the wheel is there.
    # Lend it the dependencies of this environment, behind its own packages, and none of the checkout.
    packages = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    lent = [path for path in site.getsitepackages() if Path(path).is_dir()]
    (packages / "lent.pth").write_text("".join(f"import sys; sys.path.append({path!r})\n" for path in lent))
    where = run(python, "-c", "import lirpa_fastwarmup; print(lirpa_fastwarmup.__file__)")
    assert where.stdout.strip().startswith(str(packages)), where.stderr
    info = run(tmp_path / "env" / "bin" / "lirpa-fastwarmup", "info")
    assert info.returncode == 0, info.stderr
    assert "contain all outputs found" in info.stdout
