"""The README's Python runs as it stands there, and the files it names exist."""

import re
from pathlib import Path

import pytest

from bdengine.errors import UserError
from benchmarks import tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_code_blocks_run(index: int) -> None:
    exec(compile(BLOCKS[index], f"README block {index}", "exec"), {})


def test_there_are_blocks_and_linked_files_exist() -> None:
    assert len(BLOCKS) == 4
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_tables_are_what_their_results_make() -> None:
    assert README.count("<!-- results: ") == 7
    assert tables.filled(README) == README, "stale: run python -m benchmarks.tables"
    assert tables.filled(README.replace("| **0.42** |", "| **0.24** |")) == README
    with pytest.raises(UserError, match="no-such"):
        tables.filled("<!-- results: no-such.json -->\n<!-- end -->")
