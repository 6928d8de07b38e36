"""The report of what was found, and the self-check: green on the kernels as they are, red on any that is off by a bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bdkernels import backends, env, native, reference, testing

needs_native = pytest.mark.skipif(not native.available(), reason=native.reason() or "present")


def test_says_what_was_found_and_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert env.main([]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.replace(" tensors run on", "").splitlines())
    assert lines["torch"] == torch.__version__
    assert lines["cpu"].endswith("cpu" if native.available() else "reference")
    assert (lines["cuda"] == "no device") is not torch.cuda.is_available()
    assert lines["native"] == (native.isa() if native.available() else f"missing: {native.reason()}")


def test_self_check_is_green(capsys: pytest.CaptureFixture[str]) -> None:
    assert env.main(["--selfcheck", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["selfcheck"]
    expected = [("reference", "normal", "float32")]
    for name in ("cpu", "triton", "cuda"):
        if not backends.missing(name):
            expected += [(name, op, str(d).removeprefix("torch.")) for op in testing.OPS for d in testing.DTYPES]
    assert [(c["backend"], c["op"], c["dtype"]) for c in checks] == expected
    assert not any(c["error"] for c in checks)


def one_bit_off(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the last element of what it makes moved to the next float."""

    def wrong(*arguments: Any) -> Any:
        result = function(*arguments)
        made = arguments[0] if result is None else result[-1] if isinstance(result, tuple) else result
        if made.numel():
            last = made.select(0, -1).flatten()[-1:]
            made[-1, -1, -1, -1] = torch.nextafter(last, torch.full_like(last, 9.0))[0]
        return result

    return wrong


@needs_native
@pytest.mark.parametrize("op", testing.OPS)
def test_self_check_sees_one_bit(op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(native, op, one_bit_off(getattr(native, op)))
    monkeypatch.setattr(testing, "OPS", (op,))
    assert env.main(["--selfcheck"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert len(failed) == len(testing.DTYPES)
    assert all("differs in 1 of" in line for line in failed)


@needs_native
def test_self_check_sees_a_wrong_loss(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = native.fused_loss

    def wrong(*arguments: Any) -> tuple[Tensor, Tensor]:
        loss, gradient = right(*arguments)
        return loss * (1 + 1e-6), gradient

    monkeypatch.setattr(native, "fused_loss", wrong)
    monkeypatch.setattr(testing, "OPS", ("fused_loss",))
    assert env.main(["--selfcheck"]) == 1
    assert "loss of sample" in capsys.readouterr().out


def test_self_check_sees_wrong_noise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(reference, "normal", one_bit_off(reference.normal))
    monkeypatch.setattr(testing, "OPS", ())
    assert env.main(["--selfcheck"]) == 1
    assert "FAIL  reference      normal" in capsys.readouterr().out


def test_missing_kernels_are_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_reason", "install a compiler")
    assert env.main(["--selfcheck", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["native"] == "missing: install a compiler"
    assert report["cpu tensors run on"] == "reference"
    assert [c["backend"] for c in report["selfcheck"]] == ["reference"]


def test_a_broken_torch_is_reported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: cannot open shared object file')")
    done = subprocess.run(
        [sys.executable, env.__file__, "--selfcheck", "--json"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert report["torch"] == "broken (OSError: libtorch.so: cannot open shared object file)"
    assert report["cores"] >= 1
    assert report["selfcheck"][0]["error"]


def test_same_bits() -> None:
    nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    testing.assert_same_bits("nan", nan[:1], nan[1:])
    testing.assert_same_bits("empty", torch.empty(0, 3), torch.empty(0, 3))
    images = torch.randn(2, 3, 4, 4)
    testing.assert_same_bits("layout", images.to(memory_format=torch.channels_last), images)
    with pytest.raises(AssertionError, match=r"x differs in 1 of 4 elements, first at \(1, 0\): -0.0, expected 0.0"):
        testing.assert_same_bits("x", torch.tensor([[1.0, 2.0], [-0.0, 3.0]]), torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    with pytest.raises(AssertionError, match=r"x has dtype torch\.float16: expected torch\.float32"):
        testing.assert_same_bits("x", torch.zeros(1).half(), torch.zeros(1))
    with pytest.raises(AssertionError, match=r"x has shape torch.Size\(\[2\]\)"):
        testing.assert_same_bits("x", torch.zeros(2), torch.zeros(1))


@pytest.mark.parametrize(("error", "fine"), [(0.0, True), (2e-3, True), (2.1e-3, False), (torch.nan, False)])
def test_at_most_twice_as_wrong(error: float, fine: bool) -> None:
    truth = torch.tensor([1.0, 4.0], dtype=torch.float64)
    peer, got = (truth + torch.tensor([e, 0], dtype=torch.float64) for e in (-1e-3, error))
    assert testing.at_most_twice_as_wrong(got, peer, truth) is fine


def test_at_most_twice_as_wrong_allows_one_rounding() -> None:
    truth = torch.tensor([4.0], dtype=torch.float64)
    assert testing.at_most_twice_as_wrong(torch.tensor([4 + 2**-21]), torch.tensor([4.0]), truth)
    assert not testing.at_most_twice_as_wrong(torch.tensor([4 + 2**-20]), torch.tensor([4.0]), truth)


@pytest.mark.parametrize("op", testing.OPS)
@pytest.mark.parametrize("full", [True, False])
def test_random_cases_are_valid_and_seeded(op: str, full: bool) -> None:
    one, other = (
        testing.random_case(op, torch.Generator().manual_seed(3), (2, 3, 4, 5), torch.float32, full) for _ in range(2)
    )
    for name, value in one.items():
        if isinstance(value, Tensor):
            testing.assert_same_bits(name, value, other[name])
    testing.assert_matches_reference(op, one)
