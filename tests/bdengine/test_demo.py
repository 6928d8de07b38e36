"""The demo, made short: every file that it promises, the contracted numbers, and that it resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from bdengine.cli import main

SHORT = ("--images", "640", "--samples", "40")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--out", str(out), *SHORT]) == 0
    return out


def test_metrics_hold_what_they_promise(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["source"] in ("live", "shipped")
    assert metrics["arms"] == metrics[metrics["source"]]["arms"]
    for part in (metrics, metrics["live"], metrics["shipped"]):
        for start in ("clean", "triggered"):
            for clip in ("none", "latent", "x0"):
                arm = part["arms"][start][clip]
                assert {"mse", "ssim", "asr", "frechet"} <= set(arm)
                assert arm["images"] == 40
    assert metrics["before"]["frechet"] > 0
    assert metrics["images_per_second"]["sampling"] > 0
    assert metrics["run"]["train"]["attack"]["name"] == "baddiffusion"


def test_the_shipped_model_tells_the_story(folder: Path) -> None:
    """Few samples here; the demo itself measures hundreds."""
    arms = json.loads((folder / "metrics.json").read_text())["shipped"]["arms"]
    assert arms["triggered"]["none"]["asr"] >= 0.8
    assert arms["triggered"]["none"]["ssim"] >= 0.8
    assert arms["triggered"]["latent"]["asr"] <= 0.2
    assert arms["clean"]["none"]["asr"] <= 0.05


def test_files_open(folder: Path) -> None:
    assert Image.open(folder / "arms.png").width > 100
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "<script" not in page
    assert (folder / "live" / "checkpoint" / "model_index.json").exists()


def test_an_interrupted_demo_goes_on(folder: Path, tmp_path: Path) -> None:
    """Ctrl-C in a real process while it trains; the second run ends with the uninterrupted one's weights."""
    made = [sys.executable, "-m", "bdengine.cli", "demo", "--out", str(tmp_path), *SHORT]
    demo = subprocess.Popen(made, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env={**os.environ})
    stats = tmp_path / "live" / "stats.jsonl"
    while demo.poll() is None and not stats.exists():
        time.sleep(0.01)
    demo.send_signal(signal.SIGINT)
    assert demo.stderr is not None
    error = demo.stderr.read().decode()
    assert demo.wait() == 130
    assert "and demo go on from what they saved" in error
    assert (tmp_path / "live" / "state.safetensors").exists()
    assert main(["demo", "--out", str(tmp_path), *SHORT]) == 0
    name = Path("live/checkpoint/unet/diffusion_pytorch_model.safetensors")
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
