"""The command line as a user meets it: help, results on disk, and one sentence for each mistake."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from bdengine import cli
from bdengine.checkpoint import load_unet
from bdengine.cli import COMMANDS, main
from bdengine.files import read_json, write_json


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "env"])
def test_help_shows_a_working_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(command, "--help")
    assert exit_.value.code == 0
    assert f"bdengine {command} " in " ".join(capsys.readouterr().out.split())


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


def test_sample_writes_a_png_a_seed_and_keeps_those_there(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ("--sampler", "ddim", "--steps", 3, "--trigger", "BOX_4", "--clip", "latent")
    assert run("sample", tiny_checkpoint, "--out", out, "--seeds", "2-4", *options) == 0
    first = (out / "000003.png").read_bytes()
    assert Image.open(out / "000003.png").size == (16, 16)
    assert Image.open(out / "grid.png").width > 16
    assert json.loads((out / "run.json").read_text())["sampler"]["steps"] == 3
    (out / "000002.png").unlink()
    assert run("sample", tiny_checkpoint, "--out", out, "--seeds", "2-5", *options) == 0
    assert "wrote 2 images" in capsys.readouterr().out
    assert (out / "000003.png").read_bytes() == first
    assert run("sample", tiny_checkpoint, "--out", out, "--steps", 4) == 2
    assert "holds another run, whose sampler.name is 'ddim' and not 'ddpm'" in capsys.readouterr().err


def test_sample_tells_the_weights_apart(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, copy)
    assert run("sample", tiny_checkpoint, "--out", out, "--seeds", 1, "--steps", 2) == 0
    assert run("sample", copy, "--out", out, "--seeds", 2, "--steps", 2, "--micro-batch", 16) == 0
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, weights)
    assert run("sample", copy, "--out", out, "--seeds", 3, "--steps", 2) == 2
    assert "holds another run, whose weights_sha256 is" in capsys.readouterr().err


def test_evaluate_scores_every_arm(tmp_path: Path, tiny_checkpoint: Path) -> None:
    attack = ("--trigger", "BOX_4", "--target", "DRAWN_HAT")
    assert run("evaluate", tiny_checkpoint, "--out", tmp_path, "--images", 40, "--steps", 3, *attack) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    for start in ("clean", "triggered"):
        for clip in ("none", "latent", "x0"):
            arm = scores["arms"][start][clip]
            assert arm["images"] == 40
            assert 0 <= arm["asr"] <= 1
            assert arm["frechet_interval"][0] <= arm["frechet"] <= arm["frechet_interval"][1]
            assert 0 <= arm["precision"] <= 1
            assert arm["perceptual"] > 0
            assert arm["extractor"].startswith("digits-")
    assert Image.open(tmp_path / "arms.png").width > 100


def test_train_and_convert(tmp_path: Path, tiny_checkpoint: Path) -> None:
    options = ("--size", 16, "--init", tiny_checkpoint, "--images", 64, "--batch", 32, "--attack.name", "baddiffusion")
    attack = ("--attack.trigger", "BOX_4", "--attack.target", "DRAWN_HAT", "--attack.rate", 0.5)
    assert run("train", "--out", tmp_path / "run", *options, *attack) == 0
    made_by = json.loads((tmp_path / "run" / "checkpoint" / "bdengine.json").read_text())
    assert made_by["train"]["attack"]["trigger"] == "BOX_4"
    assert run("evaluate", tmp_path / "run", "--out", tmp_path / "s", "--images", 2, "--steps", 2) == 0
    assert json.loads((tmp_path / "s" / "scores.json").read_text())["run"]["trigger"] == "BOX_4"
    load_unet(tmp_path / "run" / "checkpoint")


MISTAKES = {
    "command": (("trian",), "unknown command 'trian'.*nearest is 'train'"),
    "preset": (("train", "--preset", "digits-cleen"), "unknown preset 'digits-cleen'.*nearest is 'digits-clean'"),
    "preset, with =": (("train", "--preset=digits-cleen"), "unknown preset 'digits-cleen'"),
    "no preset": (("train", "--preset"), "--preset has no name"),
    "no checkpoint": (("sample", "no/such/place", "--out", "{tmp}/o"), "no/such/place.*digits-clean"),
    "no such name": (("sample", "digits-cleen", "--out", "{tmp}/o"), "digits-cleen: expected a folder.*digits-clean"),
    "eta": (("sample", "{tiny}", "--eta", "0.5", "--out", "{tmp}/o"), "eta is 0.5 with ddpm: expected ddim"),
    "threshold": (("evaluate", "{tiny}", "--threshold", "9", "--out", "{tmp}/o"), "success threshold of 9.0"),
    "learning rate": (("train", "--lr", "inf", "--out", "{tmp}/o"), "learning rate is inf: expected a finite number"),
    "gradient norm": (("train", "--grad-clip", "0", "--out", "{tmp}/o"), "largest gradient norm is 0.0"),
    "warm-up": (("train", "--warmup", "-1", "--out", "{tmp}/o"), "warm-up is -1 images"),
    "channels": (("train", "--channels", "2", "--out", "{tmp}/o"), r"channels is 2: expected 1 \(grey\) or 3"),
    "data": (("train", "--data", "/no/folder", "--out", "{tmp}/o"), "there is no folder '/no/folder'"),
    "trigger": (("sample", "{tiny}", "--trigger", "BOX_41", "--out", "{tmp}/o"), "unknown trigger 'BOX_41'.*'BOX_4'"),
    "steps": (("sample", "{tiny}", "--steps", "0", "--out", "{tmp}/o"), "steps is 0: expected 1 to 1000"),
    "seeds": (("sample", "{tiny}", "--seeds", "9-1", "--out", "{tmp}/o"), "name no seed"),
    "too many files": (
        ("sample", "{tiny}", "--seeds", "0-10000000", "--out", "{tmp}/o"),
        "10,000,001 images as png: exp",
    ),
    "format": (
        ("sample", "{tiny}", "--frechet", "digits", "--out", "{tmp}/o"),
        "with --format png: expected --format npy",
    ),
    "shard": (
        ("sample", "{tiny}", "--format", "npy", "--shard", "0", "--out", "{tmp}/o"),
        "a shard of 0 images: expected 1 to 8,",
    ),
    "few images": (
        ("sample", "{tiny}", "--format", "npy", "--frechet", "digits", "--seeds", "0-31", "--out", "{tmp}/o"),
        "distance of 32 images with 32 features: expected at least 33 images",
    ),
    "no shards": (("export", "{tmp}", "--out", "{tmp}/o"), "has no index.json: expected the folder of a finished run"),
    "images": (("evaluate", "{tiny}", "--images", "0", "--out", "{tmp}/o"), "0 images were asked for"),
    "attack": (("evaluate", "{tiny}", "--out", "{tmp}/o"), "does not say how it was attacked"),
    "rate": (
        (
            "train",
            "--out",
            "{tmp}/o",
            "--attack.name",
            "baddiffusion",
            "--attack.trigger",
            "BOX_4",
            "--attack.rate",
            "1.5",
        ),
        "the poison rate is 1.5: expected 0 to 1",
    ),
    "demo": (("demo", "--out", "{tmp}/o", "--samples", "0"), "0 images were asked for"),
    "not a folder": (("train", "--out", "{tmp}/o", "--data", "{tmp}/missing"), "missing"),
    "full disk": (("sample", "{tiny}", "--steps", "2", "--out", "/proc/no-such-folder"), "/proc/no-such-folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_one_sentence_and_leave_nothing(
    name: str, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = MISTAKES[name]
    assert run(*(a.format(tmp=tmp_path, tiny=tiny_checkpoint) for a in arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bdengine: ")
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


def test_pickles_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.bin").write_bytes(b"\x80\x04.")
    assert run("sample", tmp_path / "old.bin", "--out", tmp_path / "o") == 2
    assert "bdengine convert" in capsys.readouterr().err


def test_an_error_that_nobody_foresaw_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python would exit with 1, which of an audit means backdoored."""

    def broken(arguments: Sequence[str]) -> int:
        raise RuntimeError("no memory")

    monkeypatch.setitem(cli.COMMANDS, "audit", (broken, ""))
    assert cli.main(["audit"]) == cli.FAULT == 70
    assert "RuntimeError: no memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("bdengine.json", "train", None),
        ("bdengine.json", "train", []),
        ("bdengine.json", "train", {"sampler": None}),
        ("bdengine.json", "train", {"sampler": {"name": 5}}),
        ("bdengine.json", "train", {"sampler": {"steps": "many"}}),
        ("bdengine.json", "train", {"attack": {"rate": "much"}}),
        ("bdengine.json", "train", {"attack": []}),
        ("scheduler/scheduler_config.json", "beta_schedule", None),
        ("scheduler/scheduler_config.json", "prediction_type", None),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "1000"),
        ("scheduler/scheduler_config.json", "beta_start", None),
        ("scheduler/scheduler_config.json", "trained_betas", "x"),
        ("scheduler/scheduler_config.json", "trained_betas", [None]),
    ],
)
def test_a_strangers_values_get_a_sentence(
    file: str, key: str, value: object, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    path = tmp_path / "model" / file
    write_json(path, (read_json(path) if path.exists() else {}) | {key: value})
    out = ["--trigger", "BOX_4", "--target", "CORNER", "--images", "4", "--out", str(tmp_path / "out")]
    assert cli.main(["evaluate", str(tmp_path / "model"), "--steps", "2", *out]) == 2
    said = capsys.readouterr().err
    assert said.startswith("bdengine: ")
    assert said.count("\n") == 1


def test_what_cannot_be_scored_is_refused_before_it_is_sampled(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three real images have no manifold."""
    monkeypatch.setattr("bdengine.commands.sample_arms", None)
    (tmp_path / "data").mkdir()
    for k in range(3):
        Image.new("L", (16, 16), 80 * k).save(tmp_path / "data" / f"{k}.png")
    words = [
        "evaluate",
        str(tiny_checkpoint),
        "--trigger",
        "BOX_4",
        "--target",
        "CORNER",
        "--data",
        str(tmp_path / "data"),
    ]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "3 images" in capsys.readouterr().err
