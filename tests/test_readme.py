"""Every Python block of the README and the documentation runs, in order, in one namespace for each page."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def run_blocks(text: str) -> dict[str, object]:
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "page", "exec"), namespace)
    return namespace


def test_python_blocks_of_the_readme_run():
    namespace = run_blocks(README)
    assert namespace["out"].loss.isfinite()  # type: ignore[attr-defined]
    assert len(namespace["found"].certificates) == 32  # type: ignore[attr-defined]


def test_python_blocks_of_the_documentation_run():
    pages = [page for page in (ROOT / "docs").glob("*.md") if "```python" in page.read_text()]
    assert pages
    for page in pages:
        run_blocks(page.read_text())


def test_commands_of_the_readme_are_those_of_the_makefile():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z-]+)", README):
        assert f"\n{target}:" in makefile
