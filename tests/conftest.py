"""Fixtures shared by the tests."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained UNet for 16-pixel images, as a diffusers folder."""
    from bdengine.checkpoint import save_pipeline
    from bdengine.networks import unet
    from bdengine.schedule import linear
    from bdengine.train import scheduler_config

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_pipeline(path, unet(16, 1, (8, 16), groups=4), scheduler_config(linear()))
    return path
