"""The README's Python runs as it stands there, and the files it names exist."""

import re
from pathlib import Path

import pytest

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
