"""Checkpoints in diffusers' folder layout: safetensors and JSON only, and nothing is ever unpickled.

Whoever audits a model opens a stranger's files, so what is read here is checked before it is used, and a pickle is
refused; `convert` makes a safe copy of one in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, device

from bdengine.errors import UserError, unknown
from bdengine.files import json_text, read_json, replace_folder, write_atomic, write_json

if TYPE_CHECKING:
    from diffusers.models import UNet2DModel

__all__ = [
    "convert",
    "digest",
    "holds_model",
    "load_scheduler_config",
    "load_state",
    "load_trigger",
    "load_unet",
    "read_json",
    "read_safetensors",
    "replace_folder",
    "save_pipeline",
    "save_state",
    "write_atomic",
    "write_json",
    "write_safetensors",
]

WEIGHTS = "diffusion_pytorch_model.safetensors"
EXTRA = "bdengine.json"
TRIGGER = "trigger.safetensors"
"""A trigger that was made in training."""
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt"})

_LAYOUT = ("model_index.json", "unet", "scheduler", EXTRA, TRIGGER)
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_HUB_FILES = ["*.json", WEIGHTS, f"unet/{WEIGHTS}", TRIGGER]
_STATE = "bdengine.state"

# Attention layers as diffusers named them before 0.15, which the published CIFAR-10 weights still do.
_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def load_unet(path: str | Path) -> UNet2DModel:
    """The UNet of a checkpoint, float32, in evaluation mode, on the CPU.

    Args:
        path: A diffusers pipeline folder, a folder with ``config.json`` and ``diffusion_pytorch_model.safetensors``,
            or a hub name such as ``google/ddpm-cifar10-32``, of which only JSON and safetensors are downloaded.

    Raises:
        UserError: Nothing there, only pickles there, a broken or foreign file, tensors that do not fit the
            configuration, or a hub that cannot be reached.
    """
    folder = _folder(path)
    if (folder / "unet").is_dir():
        folder /= "unet"
    weights, config = folder / WEIGHTS, folder / "config.json"
    if not weights.is_file():
        if any(file.suffix in PICKLES for file in folder.iterdir()):
            raise _pickled(Path(path))
        raise UserError(f"{folder} has no weights; expected {WEIGHTS} beside its config.json")

    tensors = {_new_name(name): tensor for name, tensor in read_safetensors(weights)[0].items()}
    # Built without memory first: the sizes come from a stranger, and must fit the file before they are allocated.
    _check_fit(weights, tensors, _build(config, "meta").state_dict())
    unet = _build(config, "cpu")
    unet.load_state_dict(tensors)
    return unet.eval()


def holds_model(folder: Path) -> bool:
    """Whether a folder is a checkpoint itself, a pipeline's or a network's."""
    return any((folder / name).exists() for name in ("model_index.json", "unet", WEIGHTS))


def load_trigger(path: str | Path) -> Tensor:
    """The trigger that lies beside a checkpoint, or a finding, float32 [C, H, W].

    Raises:
        UserError: There is none, or it is no such file.
    """
    file = _folder(path) / TRIGGER
    if not file.is_file():
        raise UserError(f"{path} has no {TRIGGER}: expected a checkpoint whose trigger was made in training")
    tensors = read_safetensors(file)[0]
    if set(tensors) - {"gamma"} != {"trigger"} or any(tensor.dim() != 3 for tensor in tensors.values()):
        raise UserError(f"{file} holds {', '.join(tensors) or 'nothing'}: expected a trigger, [C, H, W]")
    return tensors["trigger"].float()


def load_scheduler_config(path: str | Path) -> dict[str, Any]:
    """The scheduler's configuration in a checkpoint: betas, prediction type, class name, as its JSON has them.

    Args:
        path: As in `load_unet`.

    Raises:
        UserError: No checkpoint or no ``scheduler_config.json`` there, or one that is no JSON object.
    """
    folder = _folder(path)
    return read_json((folder / "scheduler" if (folder / "scheduler").is_dir() else folder) / "scheduler_config.json")


def save_pipeline(
    path: Path,
    unet: UNet2DModel,
    scheduler_config: Mapping[str, Any],
    *,
    extra: Mapping[str, Any] | None = None,
    trigger: Tensor | None = None,
) -> None:
    """Writes a folder that stock ``DiffusionPipeline.from_pretrained`` opens; an older checkpoint there is replaced whole.

    Args:
        path: The folder. One that exists may hold nothing but a checkpoint.
        unet: The network, in any dtype and on any device; its dtype is kept.
        scheduler_config: What the scheduler is made from; ``_class_name`` names a diffusers scheduler, by default
            ``DDPMScheduler``.
        extra: What to add as ``bdengine.json``: how the model was made, say.
        trigger: One that was made in training, to add as ``trigger.safetensors``.

    Raises:
        UserError: No such scheduler, other files in the folder, or the system refused a write; an older checkpoint is
            then as it was.
        TypeError: A configuration holds something JSON has no form for; nothing is written.
    """
    import diffusers

    version = {"_diffusers_version": diffusers.__version__}
    scheduler = {"_class_name": "DDPMScheduler", **version, **scheduler_config}
    known = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    if scheduler["_class_name"] not in known:
        raise unknown("diffusers scheduler", scheduler["_class_name"], known)
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", scheduler["_class_name"]]}
    pipeline = "ScoreSdeVePipeline" if scheduler["_class_name"] == "ScoreSdeVeScheduler" else "DDPMPipeline"
    texts = {
        "model_index.json": json_text({"_class_name": pipeline, **version, **parts}),
        "unet/config.json": unet.to_json_string(),
        "scheduler/scheduler_config.json": json_text(scheduler),
    }
    if extra is not None:
        texts[EXTRA] = json_text(extra)
    with replace_folder(path, replaceable=_LAYOUT) as folder:
        for part in parts:
            (folder / part).mkdir()
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "unet" / WEIGHTS).write_bytes(_packed(unet.state_dict(), {"format": "pt"}))
        if trigger is not None:
            (folder / TRIGGER).write_bytes(_packed({"trigger": trigger}, None))


def save_state(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Writes the state of a training (weights, moments, averages, counters) as one safetensors file, atomically.

    Args:
        path: The file.
        tensors: Any names, shapes and dtypes, on any device.
        meta: The rest, anything JSON can hold; it goes into the file's header.

    Raises:
        UserError: The system refused the write; an older file is untouched.
        TypeError: ``meta`` holds something JSON has no form for; nothing is written.
    """
    write_safetensors(path, tensors, {_STATE: json.dumps(meta)})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the ``meta`` that `save_state` wrote.

    Raises:
        UserError: The file is missing, truncated, or not one that `save_state` wrote.
    """
    tensors, header = read_safetensors(path)
    if _STATE not in header:
        raise UserError(f"{path} holds tensors but no training state; expected a file that a training wrote")
    return tensors, json.loads(header[_STATE])


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Writes tensors, of any device and memory format, and a few strings as one safetensors file, atomically.

    Raises:
        UserError: The system refused the write; an older file is untouched.
    """
    write_atomic(path, _packed(tensors, header))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and the strings in its header.

    Raises:
        UserError: The file is missing, truncated, a pickle under a false name, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError as reason:
        raise UserError(f"cannot read {path}: {reason.strerror or reason}; expected a safetensors file") from reason
    except SafetensorError as reason:
        # Only now: a sound file's first byte can be a pickle's too.
        with open(path, "rb") as raw:
            if raw.read(2).startswith((b"PK", b"\x80")):
                raise _pickled(Path(path)) from reason
        raise UserError(f"{path} is truncated or no safetensors file ({reason}); expected a whole one") from reason


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, in hexadecimal: their safetensors bytes, whatever the file they came from."""
    return hashlib.sha256(_packed(dict(sorted(tensors.items())), None)).hexdigest()


def convert(old: Path, new: Path) -> None:
    """Copies pickled weights into safetensors; the pickle is opened, tensors only, in a process of its own.

    Args:
        old: A ``.bin``, ``.pt``, ``.pth`` or ``.ckpt`` file with a state dict, bare or nested under one key, or a
            folder with such files. Of a folder's other files only JSON and safetensors are copied.
        new: The ``.safetensors`` file or the folder to make; it must not exist.

    Raises:
        UserError: ``old`` has no pickled weights or holds more than tensors can say, ``new`` exists or has the wrong
            ending, or the system refused a write. Nothing is left behind.
    """
    old, new = Path(old), Path(new)
    if new.exists():
        raise UserError(f"{new} exists already; expected a name that is still free")
    if old.is_dir():
        _convert_folder(old, new)
    elif not old.is_file():
        raise UserError(f"there is no {old}; expected a file ending in {_endings()}, or a folder that holds one")
    elif new.suffix != ".safetensors":
        raise UserError(f"{new} would hold safetensors; expected a name like {new.with_suffix('.safetensors').name}")
    else:
        _convert_file(old, new)


def _convert_folder(old: Path, new: Path) -> None:
    files = sorted(file for file in old.rglob("*") if file.is_file())
    pickles = [file for file in files if file.suffix in PICKLES and file.with_suffix(".safetensors") not in files]
    if not pickles:
        raise UserError(f"{old} has nothing to convert; expected a file ending in {_endings()}")
    with replace_folder(new) as folder:
        for file in files:
            copy = folder / file.relative_to(old)
            if file in pickles:
                _convert_file(file, copy.with_suffix(".safetensors"))
            elif file.suffix in (".json", ".safetensors"):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


def _convert_file(old: Path, new: Path) -> None:
    command = [sys.executable, "-m", "bdengine.checkpoint_convert", str(old.resolve()), str(new.resolve())]
    # From our own source root, so that a module lying in the user's folder is not taken for one of Python's.
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True)
    if done.returncode == 2:
        raise UserError(done.stderr.strip())
    if done.returncode != 0:
        raise UserError(f"cannot convert {old}: its reader ended with {done.returncode}; expected a plain state dict")


def _endings() -> str:
    return ", ".join(sorted(PICKLES))


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        if folder.suffix in PICKLES:
            raise _pickled(folder)
        raise UserError(f"{folder} is a file; expected the folder that holds {WEIGHTS} and its config.json")
    if not HUB_ID.fullmatch(str(path)):
        raise UserError(
            f"there is no checkpoint {path}; expected a folder, or a hub name such as google/ddpm-cifar10-32"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(path), allow_patterns=_HUB_FILES))
    except (OSError, HFValidationError) as reason:
        raise UserError(
            f"{path} is neither a folder here nor to be had from the hub ({type(reason).__name__}); "
            "expected a checkpoint folder, or, online or in the hub's cache, a name such as google/ddpm-cifar10-32"
        ) from reason


def _pickled(path: Path) -> UserError:
    return UserError(
        f"{path} is pickled, and a pickle can run code when it is opened; "
        f"expected safetensors: make a safe copy with `bdengine convert {path} NEW`"
    )


def _new_name(name: str) -> str:
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _build(config: Path, where: str) -> UNet2DModel:
    from diffusers.models import UNet2DModel

    values = read_json(config)
    kind = values.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise UserError(f"{config} describes a {kind}; expected a UNet2DModel")
    try:
        with device(where):
            return UNet2DModel.from_config(values)
    except Exception as reason:  # whatever building from these values raises, the values are what is wrong
        raise UserError(
            f"{config} describes no UNet that can be built ({reason}); expected UNet2DModel's own"
        ) from reason


def _check_fit(file: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for fault, names in (
        ("lacks", expected.keys() - found.keys()),
        ("holds the unknown", found.keys() - expected.keys()),
    ):
        if names:
            raise UserError(
                f"{file} {fault} {min(names)} (and {len(names) - 1} more); "
                f"expected the {len(expected)} tensors that config.json describes"
            )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise UserError(
                f"{file} has {name} in shape {list(found[name].shape)}; "
                f"expected {list(tensor.shape)}, as config.json describes"
            )


def _packed(tensors: Mapping[str, Tensor], header: Mapping[str, str] | None) -> bytes:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(plain, dict(header or {}))
