"""Every Python block of the documentation runs, and the tests that the pages show pass.

The blocks of a page make one program, in their order. What a page needs and does not show stands in a comment:
`<!-- setup`, Python, `-->`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^<!-- setup\n(.*?)^-->$|^```python[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def program(text: str) -> str:
    """The Python of a page, each line at its place in the page, so that errors name it."""
    lines = [""] * len(text.splitlines())
    for found in BLOCK.finditer(text):
        group = 1 if found[1] is not None else 2
        first = text[: found.start(group)].count("\n")
        code = found[group].splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines) + "\n"


def run(folder: Path, pages: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    """Run pages, given by name and text, as pytest runs test files."""
    files = [folder / f"{name}.py" for name in pages]
    for file, text in zip(files, pages.values(), strict=True):
        file.write_text(program(text))
    as_tests = ["-c", "pyproject.toml", "--rootdir", ".", "-p", "no:cacheprovider", "-q"]
    command = [sys.executable, "-m", "pytest", *as_tests, *options, *map(str, files)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_page_runs_and_its_tests_pass(tmp_path):
    texts = {str(page.relative_to(ROOT)).replace("/", "_"): page.read_text() for page in PAGES}
    with_code = {name: text for name, text in texts.items() if program(text).strip()}
    assert {"README.md", "docs_extending_idiom.md", "docs_extending_kernel.md"} <= set(with_code)
    done = run(tmp_path, with_code, "-p", "tests.conftest")
    assert done.returncode == 0, done.stdout + done.stderr


WRONG_LINE = """
A line of text.

```python
one = 1
```

```python
two = one + three
```
"""
FAILING_TEST = """
<!-- setup
one = 2
-->

```python
def test_one():
    assert one == 1
```
"""


def test_a_wrong_line_and_a_failing_test_are_found(tmp_path):
    done = run(tmp_path, {"wrong": WRONG_LINE, "failing": FAILING_TEST}, "--continue-on-collection-errors")
    assert done.returncode == 1
    assert "wrong.py:9: in <module>" in done.stdout
    assert "1 failed" in done.stdout and "1 error" in done.stdout
