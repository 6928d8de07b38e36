"""Imports go one way: kernels know nothing of the engine, and the engine uses the kernels' public names only."""

import ast
from pathlib import Path

import pytest

import bdkernels

ROOT = Path(__file__).parent.parent
PUBLIC_MODULES = {"bdkernels", "bdkernels.noise", "bdkernels.env", "bdkernels.testing"}


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every absolute import in a file; the name is empty for ``import module``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found += [(node.module, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "bdkernels").rglob("*.py")), ids=lambda p: p.name)
def test_kernels_know_nothing_above_them(path: Path) -> None:
    above = {"bdengine", "benchmarks", "tests", "mlxtend", "datasets", "safetensors", "tyro"}
    if path.name != "env.py":
        above.add("diffusers")
    assert not {module.split(".")[0] for module, _ in imports(path)} & above


@pytest.mark.parametrize("path", sorted((ROOT / "python").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_engine_uses_public_kernel_names_only(path: Path) -> None:
    for module, name in imports(path):
        assert module.split(".")[0] not in ("benchmarks", "tests")
        if module.split(".")[0] == "bdkernels":
            assert module in PUBLIC_MODULES
            if module == "bdkernels" and name:
                assert name in bdkernels.__all__ or f"bdkernels.{name}" in PUBLIC_MODULES


def test_solvers_attacks_and_the_loop_do_not_know_each_other_backwards() -> None:
    """A sampler's table does not know attacks; the loop knows neither attacks nor defenses."""
    order = {"schedule": 0, "solvers": 1, "triggers": 1, "attacks": 2, "sampler": 2, "defenses": 3}
    engine = ROOT / "python" / "bdengine"
    for path in engine.rglob("*.py"):
        part = path.relative_to(engine).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if part in order and isinstance(node, ast.ImportFrom) and node.module and node.level:
                base = path.parent if node.level == 1 else path.parent.parent
                top = node.module.split(".")[0] if base == engine else part
                if top in order and top != part:
                    assert order[top] < order[part], f"{path} imports {top}"
