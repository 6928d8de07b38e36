"""Checkpoints on a real disk: stock diffusers opens ours, bad files are refused, pickles are converted, not run."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from bdengine.checkpoint import (
    convert,
    load_scheduler_config,
    load_state,
    load_unet,
    read_safetensors,
    save_pipeline,
    save_state,
    write_atomic,
    write_json,
    write_safetensors,
)
from bdengine.checkpoint_convert import state_dict_of
from bdengine.errors import UserError
from bdengine.networks import CIFAR10, unet

SCHEDULER = {"num_train_timesteps": 100, "beta_schedule": "linear", "clip_sample": False}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


class Bomb:
    """Unpickled carelessly, it makes the file ``made``."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.made}",)


@pytest.fixture(scope="module")
def net() -> UNet2DModel:
    torch.manual_seed(0)
    return unet(8, 1, (8, 16), groups=4, attention=2).eval()


@pytest.fixture(scope="module")
def saved(net: UNet2DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save_pipeline(path, net, SCHEDULER, extra={"attack": "none"})
    return path


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# Round trips


def test_stock_pipeline_opens_ours_in_a_fresh_process(net: UNet2DModel, saved: Path, tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from diffusers import DDPMPipeline\n"
        "pipe = DDPMPipeline.from_pretrained(sys.argv[1], use_safetensors=True)\n"
        "assert not any(name.startswith('bdengine') for name in sys.modules)\n"
        "assert pipe.scheduler.config.num_train_timesteps == 100 and not pipe.scheduler.config.clip_sample\n"
        "from safetensors.torch import save_file\n"
        "with torch.no_grad():\n"
        "    out = pipe.unet(torch.ones(2, 1, 8, 8), torch.tensor([3, 90])).sample\n"
        "pipe.set_progress_bar_config(disable=True)\n"
        "images = pipe(batch_size=2, num_inference_steps=2, output_type='np').images\n"
        "assert images.shape == (2, 8, 8, 1)\n"
        "save_file({'out': out.contiguous()}, sys.argv[2])\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, saved, tmp_path / "out"],
        check=True,
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    with torch.no_grad():
        expected = net(torch.ones(2, 1, 8, 8), torch.tensor([3, 90])).sample
    torch.testing.assert_close(read_safetensors(tmp_path / "out")[0]["out"], expected)


def test_reload_is_exact_float32_and_in_evaluation_mode(net: UNet2DModel, model: Path) -> None:
    for path in (model, model / "unet", str(model)):
        loaded = load_unet(path)
        assert same(loaded.state_dict(), net.state_dict())
        assert not loaded.training
    assert load_scheduler_config(model) == {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": json.loads((model / "model_index.json").read_text())["_diffusers_version"],
        **SCHEDULER,
    }
    assert json.loads((model / "bdengine.json").read_text()) == {"attack": "none"}


def test_half_precision_comes_back_as_float32(net: UNet2DModel, tmp_path: Path) -> None:
    half = unet(8, 1, (8, 16), groups=4, attention=2).half()
    save_pipeline(tmp_path / "half", half, {})
    loaded = load_unet(tmp_path / "half")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert same(loaded.half().state_dict(), half.state_dict())


def test_loading_never_unpickles(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    torch_file = model / "unet" / "diffusion_pytorch_model.bin"
    torch_file.write_bytes(b"\x80never opened")
    load_unet(model)
    load_scheduler_config(model)


def test_layout_of_the_published_cifar10_weights(tmp_path: Path) -> None:
    """Everything at the root, and attention layers under their old names."""
    torch.manual_seed(1)
    original = unet(**{**CIFAR10, "size": 8, "widths": (8, 16, 16, 16), "groups": 4})
    new_to_old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = {}
    for name, tensor in original.state_dict().items():
        for new, old in new_to_old.items():
            name = name.replace(new, old)
        tensors[name] = tensor
    assert any(".proj_attn." in name for name in tensors)
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", tensors)
    write_atomic(tmp_path / "config.json", original.to_json_string())
    write_json(tmp_path / "scheduler_config.json", SCHEDULER)
    write_json(tmp_path / "model_index.json", {"_class_name": "DDPMPipeline"})
    assert same(load_unet(tmp_path).state_dict(), original.state_dict())
    assert load_scheduler_config(tmp_path) == SCHEDULER


def test_scheduler_class_must_be_one_diffusers_has(net: UNet2DModel, tmp_path: Path) -> None:
    save_pipeline(tmp_path / "ddim", net, {"_class_name": "DDIMScheduler"})
    index = json.loads((tmp_path / "ddim/model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    with pytest.raises(UserError, match="nearest is 'DDPMScheduler'"):
        save_pipeline(tmp_path / "x", net, {"_class_name": "DDPMSchedular"})
    assert sorted(os.listdir(tmp_path)) == ["ddim"]


def test_state_round_trip(tmp_path: Path) -> None:
    tensors = {
        "weight": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "step": torch.tensor(7),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.empty(0, 5),
    }
    meta = {"images": 12_800, "betas": [0.9, 0.999], "name": "é"}
    save_state(tmp_path / "state.safetensors", tensors, meta)
    back, told = load_state(tmp_path / "state.safetensors")
    assert same(back, tensors)
    assert {name: tensor.dtype for name, tensor in back.items()} == {n: t.dtype for n, t in tensors.items()}
    assert told == meta
    with pytest.raises(TypeError):
        save_state(tmp_path / "state.safetensors", {}, {"bad": object()})
    assert load_state(tmp_path / "state.safetensors")[1] == meta


# Strangers' files


def broken(model: Path, how: str) -> None:
    weights, config = model / WEIGHTS, model / "unet/config.json"
    tensors, _ = read_safetensors(weights)
    values = json.loads(config.read_text())
    match how:
        case "truncated":
            os.truncate(weights, weights.stat().st_size - 1)
        case "empty":
            weights.write_bytes(b"")
        case "zip":
            torch.save({"a": torch.ones(1)}, weights)
        case "pickle":
            weights.write_bytes(pickle.dumps({"a": 1}))
        case "missing":
            del tensors["conv_in.weight"]
            write_safetensors(weights, tensors)
        case "more":
            write_safetensors(weights, {**tensors, "backdoor": torch.ones(1)})
        case "shape":
            write_safetensors(weights, {**tensors, "conv_in.bias": torch.ones(9)})
        case "json":
            config.write_text("{")
        case "deep":
            config.write_text("[" * 100_000)
        case "list":
            config.write_text("[1]")
        case "class":
            write_json(config, {**values, "_class_name": "UNet2DConditionModel"})
        case "values":
            write_json(config, {**values, "block_out_channels": "wide"})
        case "huge":
            write_json(config, {**values, "block_out_channels": [8, 1 << 24]})
        case "no config":
            config.unlink()
        case "no weights":
            weights.unlink()


@pytest.mark.parametrize(
    ("how", "file", "sentence"),
    [
        ("truncated", WEIGHTS, "truncated or no safetensors file"),
        ("empty", WEIGHTS, "truncated or no safetensors file"),
        ("zip", WEIGHTS, "bdengine convert"),
        ("pickle", WEIGHTS, "bdengine convert"),
        ("missing", WEIGHTS, r"lacks conv_in\.weight \(and 0 more\); expected the \d+ tensors"),
        ("more", WEIGHTS, "holds the unknown backdoor"),
        ("shape", WEIGHTS, r"conv_in.bias in shape \[9\]; expected \[8\]"),
        ("json", "unet/config.json", "is not JSON"),
        ("deep", "unet/config.json", "is not JSON"),
        ("list", "unet/config.json", "holds a JSON list; expected an object"),
        ("class", "unet/config.json", "UNet2DConditionModel; expected a UNet2DModel"),
        ("values", "unet/config.json", "no UNet that can be built"),
        ("huge", WEIGHTS, "in shape"),
        ("no config", "unet/config.json", "No such file"),
        ("no weights", "unet", "has no weights; expected diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_bad_checkpoint_is_refused_in_one_sentence(model: Path, how: str, file: str, sentence: str) -> None:
    broken(model, how)
    with pytest.raises(UserError, match=sentence) as refusal:
        load_unet(model)
    assert str(model / file) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"diffusion_pytorch_model{ending}"
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "made")))
    write_json(tmp_path / "config.json", {})
    for path in (file, tmp_path):
        with pytest.raises(UserError, match=f"bdengine convert {path} NEW"):
            load_unet(path)
    assert not (tmp_path / "made").exists()


def test_a_path_that_is_no_checkpoint(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"there is no checkpoint .*; expected a folder"):
        load_unet(tmp_path / "none")
    with pytest.raises(UserError, match="is a file; expected the folder"):
        load_unet(saved / WEIGHTS)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("google/ddpm-cifar10-32", "a--b/c"):
        with pytest.raises(UserError, match=f"{name} is neither a folder here nor to be had from the hub"):
            load_unet(name)


def test_the_hub_is_asked_for_nothing_but_json_and_safetensors(
    net: UNet2DModel, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[str]] = {}

    def snapshot(name: str, *, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert same(load_unet("owner/name").state_dict(), net.state_dict())
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in asked["owner/name"])


def test_a_state_that_is_none_is_refused(tmp_path: Path, saved: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.ones(1000)}, {"step": 1})
    os.truncate(path, 2000)
    with pytest.raises(UserError, match="truncated or no safetensors file"):
        load_state(path)
    with pytest.raises(UserError, match="no training state"):
        load_state(saved / WEIGHTS)
    with pytest.raises(UserError, match="cannot read"):
        load_state(tmp_path / "none")


# Conversion


def test_convert_file(net: UNet2DModel, tmp_path: Path) -> None:
    tied = {**net.state_dict(), "again": net.state_dict()["conv_in.weight"]}
    torch.save({"epoch": 3, "state_dict": tied}, tmp_path / "old.ckpt")
    convert(tmp_path / "old.ckpt", tmp_path / "new.safetensors")
    assert same(read_safetensors(tmp_path / "new.safetensors")[0], tied)
    with pytest.raises(UserError, match="exists already"):
        convert(tmp_path / "old.ckpt", tmp_path / "new.safetensors")
    with pytest.raises(UserError, match=r"expected a name like new\.safetensors"):
        convert(tmp_path / "old.ckpt", tmp_path / "new.bin")
    with pytest.raises(UserError, match="there is no"):
        convert(tmp_path / "none.pt", tmp_path / "x.safetensors")


def test_a_malicious_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1), "x": Bomb(tmp_path / "made")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="nothing in it was run") as refusal:
        convert(tmp_path / "evil.pt", tmp_path / "new.safetensors")
    assert "\n" not in str(refusal.value)
    assert sorted(os.listdir(tmp_path)) == ["evil.pt"]


def test_convert_folder(net: UNet2DModel, model: Path, tmp_path: Path) -> None:
    torch.save(net.state_dict(), (model / WEIGHTS).with_suffix(".bin"))
    with pytest.raises(UserError, match="nothing to convert"):
        convert(model, tmp_path / "new")
    (model / WEIGHTS).unlink()
    (model / "evil.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match=f"bdengine convert {model} NEW"):
        load_unet(model)
    convert(model, tmp_path / "new")
    assert same(load_unet(tmp_path / "new").state_dict(), net.state_dict())
    assert load_scheduler_config(tmp_path / "new") == load_scheduler_config(model)
    assert not [file for file in contents(tmp_path / "new") if not file.endswith((".json", ".safetensors"))]


def test_one_state_dict_or_none() -> None:
    weights = {"w": torch.ones(1)}
    assert state_dict_of(weights, "f") is weights
    assert state_dict_of({"model": weights, "step": 1, "optimizer": {"state": {}}}, "f") is weights
    with pytest.raises(UserError, match="f holds model, ema, of which 2 are state dicts"):
        state_dict_of({"model": weights, "ema": weights}, "f")
    with pytest.raises(UserError, match="f holds step, of which 0 are state dicts"):
        state_dict_of({"step": 1}, "f")
    with pytest.raises(UserError, match="f holds a list"):
        state_dict_of([weights], "f")


# Writing over what is there


def test_a_full_disk_leaves_the_old_checkpoint(net: UNet2DModel, model: Path) -> None:
    before = contents(model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the weights' write fails half way
    try:
        with pytest.raises(UserError, match=f"cannot write {model}: File too large; expected a writable folder"):
            save_pipeline(model, net, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(model) == before
    assert os.listdir(model.parent) == ["model"]


def test_a_new_checkpoint_replaces_the_old_whole(net: UNet2DModel, model: Path) -> None:
    save_pipeline(model, net, {"num_train_timesteps": 7})
    assert load_scheduler_config(model)["num_train_timesteps"] == 7
    assert not (model / "bdengine.json").exists()
    (model / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.tex, which replacing it would delete"):
        save_pipeline(model, net, {})
    assert load_scheduler_config(model)["num_train_timesteps"] == 7


def test_a_place_that_takes_no_files_is_refused(net: UNet2DModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for parent in (Path("/proc/none"), tmp_path / "file"):
        with pytest.raises(UserError, match=f"cannot write {parent}/x"):
            save_pipeline(parent / "x", net, {})
        with pytest.raises(UserError, match=f"cannot write {parent}/x"):
            save_state(parent / "x", {}, {})
    assert contents(tmp_path) == {"file": b"mine"}
