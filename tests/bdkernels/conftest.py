"""Torch's fresh memory is NaN here, so that an output element nobody wrote shows."""

from collections.abc import Iterator

import pytest
import torch

from bdkernels.testing import poisoned_memory


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    with poisoned_memory():
        assert torch.empty(8).isnan().all()
        yield
