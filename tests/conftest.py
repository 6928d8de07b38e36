"""Fixtures shared by the tests."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` run wherever one is found."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained UNet for 16-pixel images, as a diffusers folder."""
    from bdengine.checkpoint import save_pipeline
    from bdengine.networks import unet
    from bdengine.schedule import linear

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_pipeline(path, unet(16, 1, (8, 16), groups=4), linear().to_config())
    return path
