"""Which model a name stands for, and what is refused before anything runs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bdengine import checkpoint
from bdengine.checkpoint import save_pipeline
from bdengine.commands import Model
from bdengine.errors import UserError
from bdengine.networks import unet
from bdengine.options import EvaluateConfig
from bdengine.presets import PRESETS
from bdengine.schedule import linear
from bdengine.shipped import ASSETS, find
from bdengine.train import train


def test_a_folder_that_holds_a_model_is_that_model(tmp_path: Path) -> None:
    """A backdoored one with a clean one in ``checkpoint``: diffusers loads the first, so that is what is examined."""
    shutil.copytree(ASSETS / "digits-badiffusion", tmp_path / "hub")
    shutil.copytree(ASSETS / "digits-clean", tmp_path / "hub" / "checkpoint")
    named, known = Model.load(str(tmp_path / "hub")), Model.load("digits-badiffusion")
    assert checkpoint.digest(named.network.state_dict()) == checkpoint.digest(known.network.state_dict())
    shutil.copytree(ASSETS / "digits-clean", tmp_path / "run" / "checkpoint")
    assert find(str(tmp_path / "run")) == str(tmp_path / "run" / "checkpoint")
    with pytest.raises(UserError, match="hub holds a checkpoint: expected another folder for the run"):
        train(replace(PRESETS["digits-clean"], out=tmp_path / "hub"))
    assert not (tmp_path / "hub" / "config.json").exists()


def test_the_nearest_name_is_said() -> None:
    with pytest.raises(UserError, match=r"there is no checkpoint digits-clen: .*; the nearest is 'digits-clean'$"):
        find("digits-clen")
    with pytest.raises(UserError, match=r"or one of digits-clean, digits-badiffusion$"):
        find("nothing")


def test_a_sampler_of_the_checkpoints_own_is_among_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown sampler 'onw': .*; the nearest is 'own'"):
        Model.load("digits-clean").table(EvaluateConfig("digits-clean", tmp_path, sampler="onw"))


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    network = unet(8, 1, (8, 16), groups=4)
    with torch.no_grad():
        network.conv_in.bias[3] = float("inf")
    save_pipeline(tmp_path / "broken", network, linear().to_config())
    with pytest.raises(UserError, match=r"broken has weights in conv_in.bias that are not finite: expected numbers"):
        Model.load(str(tmp_path / "broken"))
