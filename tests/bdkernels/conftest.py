"""Fresh memory is NaN here, so that an output element nobody wrote shows; and every instruction set, for those that ask."""

from collections.abc import Iterator

import pytest
import torch

from bdkernels import native
from bdkernels.testing import poisoned_memory


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    with poisoned_memory():
        assert torch.empty(8).isnan().all()
        yield


@pytest.fixture(params=native.isas() if native.available() else ["reference"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of the compiled kernel, and the reference."""
    if request.param == "reference":
        yield request.param
        return
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)
