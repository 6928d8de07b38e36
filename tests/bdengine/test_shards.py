"""Shards: the images of the PNG files in the same bytes each time, made again where they are damaged, never half written."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bdengine import metrics, pictures
from bdengine.cli import main
from bdengine.data import load, to_float
from bdengine.errors import UserError
from bdengine.extractors import DigitFeatures
from bdengine.seeds import Seeds
from bdengine.shards import Shards
from bdengine.streamed import Streamed
from bdengine.writer import WAITING, Writer

SEEDS = "3-101,200"
COUNT = 100


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def sample(checkpoint: Path, out: Path, *more: object, seeds: str = SEEDS, shard: int = 32) -> int:
    words = ("--seeds", seeds, "--shard", shard, "--micro-batch", 16, "--sampler", "ddim", "--steps", 3, *more)
    return main(["sample", str(checkpoint), "--out", str(out), *map(str, words)])


def files(folder: Path) -> dict[str, bytes]:
    """All but the run's description, which names its folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


@pytest.fixture(scope="module")
def png(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("png")
    assert sample(tiny_checkpoint, folder) == 0
    return folder


@pytest.fixture(scope="module", params=["npy", "tar"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    assert sample(tiny_checkpoint, folder, "--format", request.param) == 0
    return folder


# What is in them


def test_the_index_names_every_shard(made: Path) -> None:
    index = json.loads((made / "index.json").read_text())
    assert index["image"] == [16, 16, 1]
    assert index["images"] == COUNT
    assert index["sampler"]["name"] == "ddim"
    assert [shard["seeds"] for shard in index["shards"]] == ["3-34", "35-66", "67-98", "99-101,200"]
    names = [shard["file"] for shard in index["shards"]]
    assert names == [f"shard-{k:06d}.{index['format']}" for k in range(4)]
    said = [f"{shard['sha256']}  {shard['file']}\n" for shard in index["shards"]]
    assert [(made / f"{name}.sha256").read_text() for name in names] == said
    subprocess.run(
        ["sha256sum", "-c", *(f"{name}.sha256" for name in names)], cwd=made, check=True, capture_output=True
    )
    listed = {"run.json", "index.json", "grid.png", *names, *(f"{name}.sha256" for name in names)}
    assert {path.name for path in made.iterdir()} == listed


def test_shards_hold_the_images_of_the_png_files(made: Path, png: Path, tmp_path: Path) -> None:
    assert main(["export", str(made), "--seeds", "200,3-101", "--out", str(tmp_path)]) == 0
    assert files(tmp_path) == {name: data for name, data in files(png).items() if name != "grid.png"}
    assert len(files(tmp_path)) == COUNT


def test_other_programs_read_them(made: Path, png: Path) -> None:
    seeds = list(Seeds.parse("67-98"))
    expected = np.stack([np.array(Image.open(pictures.path_of(png, seed))) for seed in seeds])[..., None]
    if (file := made / "shard-000002.npy").exists():
        array = np.load(file)
        assert array.dtype == np.uint8
        assert array.flags.c_contiguous
        assert np.array_equal(array, expected)
        return
    with tarfile.open(made / "shard-000002.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == [f"{seed}.png" for seed in seeds]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        pixels = [np.array(Image.open(io.BytesIO(tar.extractfile(m).read()))) for m in members]  # type: ignore[union-attr]
    assert np.array_equal(np.stack(pixels)[..., None], expected)


def test_a_shard_depends_on_nothing_but_its_seeds(made: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    form = json.loads((made / "index.json").read_text())["format"]
    assert sample(tiny_checkpoint, tmp_path, "--format", form, seeds="35-66") == 0
    assert (tmp_path / f"shard-000000.{form}").read_bytes() == (made / f"shard-000001.{form}").read_bytes()


# Going on


def test_what_is_missing_or_damaged_is_made_again(
    made: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form, out = json.loads((made / "index.json").read_text())["format"], tmp_path / "out"
    assert sample(tiny_checkpoint, out, "--format", form) == 0
    damaged = bytearray((out / f"shard-000001.{form}").read_bytes())
    damaged[700] ^= 1
    (out / f"shard-000001.{form}").write_bytes(damaged)
    (out / f"shard-000002.{form}").unlink()
    (out / f"shard-000003.{form}.sha256").unlink()
    (out / f".shard-000003.{form}.0123abcd.tmp").write_bytes(b"half")
    kept = (out / f"shard-000000.{form}").stat().st_mtime_ns
    capsys.readouterr()
    with pytest.raises(UserError, match=r"shard-000001.* does not match its checksum"):
        Shards.open(out).read(1)
    with pytest.raises(UserError, match=r"shard-000002.* is missing: expected all shards"):
        Shards.open(out).read(2)
    assert sample(tiny_checkpoint, out, "--format", form) == 0
    said = capsys.readouterr().out
    assert f"shard-000001.{form} does not match its checksum and is made again" in said
    assert f"wrote 68 images to {out} (32 were there)" in said
    assert files(out) == files(made)
    assert (out / f"shard-000000.{form}").stat().st_mtime_ns == kept


def test_another_runs_folder_is_refused(made: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    form = json.loads((made / "index.json").read_text())["format"]
    before = files(made)
    for words, said in (
        (("--format", form, "--clip", "x0"), "whose clip is 'none' and not 'x0'"),
        (("--format", {"npy": "tar", "tar": "npy"}[form]), f"whose format is '{form}'"),
        (("--format", form, "--micro-batch", 8), "whose micro_batch is 16 and not 8"),
        (("--format", form, "--shard", 16), "whose shard is 32 and not 16"),
        (("--format", form, "--seeds", "3-101"), "whose seeds is '3-101,200' and not '3-101'"),
    ):
        assert sample(tiny_checkpoint, made, *words) == 2
        assert f"{made} holds another run, {said}" in capsys.readouterr().err
    assert files(made) == before


def test_a_seed_that_is_not_there(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(made), "--seeds", "3-5,150", "--out", str(tmp_path)]) == 2
    assert "seed 150 is not among them: expected some of 3-101,200" in capsys.readouterr().err
    assert main(["export", str(made), "--seeds", "99-102", "--out", str(tmp_path)]) == 2
    assert "seed 102 is not among them" in capsys.readouterr().err
    assert files(tmp_path) == {}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond ``size``, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_without_room_is_said_and_leaves_nothing_half_written(
    tiny_checkpoint: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form = json.loads((made / "index.json").read_text())["format"]
    with largest_file(4000):
        assert sample(tiny_checkpoint, tmp_path, "--format", form) == 2
    assert "shard-000000" in (said := capsys.readouterr().err.strip().splitlines()[-1])
    assert said.endswith("File too large; expected a writable folder with room for it")
    assert set(files(tmp_path)) == set()
    assert sample(tiny_checkpoint, tmp_path, "--format", form) == 0
    assert files(tmp_path) == files(made)


# The writer


def test_an_error_in_the_thread_is_raised_outside_and_ends_the_writing() -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError(28, "No space left on device")

    def feed() -> None:
        with Writer() as writer:
            writer.put(lambda: done.append(0))
            writer.put(fail)
            for i in range(1, 1000):
                time.sleep(0.001)
                writer.put(lambda i=i: done.append(i))  # type: ignore[misc]

    with pytest.raises(OSError, match="No space left"):
        feed()
    assert done == [0]
    with pytest.raises(OSError, match="No space left"), Writer() as writer:
        writer.put(fail)


def test_the_queue_is_bounded_and_emptied_at_the_end_also_after_an_error() -> None:
    gate, done, handed = threading.Event(), [], []

    def feed() -> None:
        with Writer() as writer:
            threading.Timer(0.2, gate.set).start()
            writer.put(gate.wait)  # type: ignore[arg-type]
            for i in range(9):
                writer.put(lambda i=i: done.append(i))  # type: ignore[misc]
                handed.append(gate.is_set())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        feed()
    assert done == list(range(9))
    assert handed.count(False) in (WAITING, WAITING - 1)


# Fréchet statistics


@pytest.mark.parametrize("form", ["npy", "tar"])
def test_streamed_statistics_are_those_of_all_images(
    form: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Shards of 50 cut the extractor's chunks of 64 elsewhere than one pass over all images does.
    words = ("--format", form, "--frechet", "digits")
    assert sample(tiny_checkpoint, tmp_path, *words, shard=50) == 0
    score = json.loads((tmp_path / "frechet.json").read_text())
    shards, extractor = Shards.open(tmp_path), DigitFeatures()
    images = to_float(torch.cat([shards.read(k) for k in range(len(shards))]))
    real = extractor(to_float(load("digits", 16, 1).pixels))
    assert score["frechet"] == pytest.approx(metrics.frechet(real, extractor(images)), rel=1e-8)
    assert score == {
        "frechet": score["frechet"],
        "images": COUNT,
        "extractor": extractor.name,
        "data": "digits",
        "data_images": 5000,
    }
    assert f"Fréchet distance {score['frechet']:.6g} of 100 images to 5000 of digits" in capsys.readouterr().out

    # Kept statistics are read and not made again; those of another shard are.
    before = files(tmp_path)
    kept = tmp_path / "shard-000000.frechet.safetensors"
    date = kept.stat().st_mtime_ns
    (tmp_path / "shard-000001.frechet.safetensors").write_bytes(kept.read_bytes())
    (tmp_path / "frechet.json").unlink()
    assert sample(tiny_checkpoint, tmp_path, *words, shard=50) == 0
    assert files(tmp_path) == before
    assert kept.stat().st_mtime_ns == date


def test_statistics_belong_to_an_extractor(made: Path, tmp_path: Path) -> None:
    shards = Shards.open(made)
    for k in range(len(shards)):  # a copy, since they lie beside the shards
        for path in (shards.path(k), made / f"{shards.path(k).name}.sha256"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    shards = Shards(tmp_path, shards.seeds, shards.size, shards.form, shards.shape)

    class Halves:
        name = "halves"

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(2).chunk(2, 2)[0].mean(2).repeat(1, 2)

        def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
            raise NotImplementedError

    digits, halves = (Streamed(shards, extractor, "cpu").total() for extractor in (DigitFeatures(), Halves()))
    assert (len(digits.total), len(halves.total)) == (32, 2)
    pixels = torch.cat([shards.read(k) for k in range(len(shards))])
    assert halves.total[0].item() == pytest.approx(to_float(pixels)[:, 0, :8].mean((1, 2)).double().sum().item())


# Memory

PEAK = """
import resource, sys
from pathlib import Path
import torch
from bdengine.distributed import ALONE
from bdengine.sampler import Arm, Sampler
from bdengine.schedule import linear
from bdengine.seeds import Seeds
from bdengine.shards import Shards
from bdengine.solvers import Nodes, ddim
from bdengine.volume import fill
from tests.bdengine.networks_for_tests import elementwise
torch.set_num_threads(1)
sampler = Sampler(elementwise(64), {"": Arm(ddim(Nodes.of(linear(), 1)))}, 64)
folder = Shards(Path(sys.argv[1]), Seeds([range(int(sys.argv[2]))]), 256, "npy", (1, 64, 64))
assert fill(folder, sampler, ALONE) == (int(sys.argv[2]), 0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        made = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path / str(count)), str(count)],
            check=True,
            capture_output=True,
            text=True,
        )
        return int(made.stdout)

    few, many = peak(2000), peak(20_000)
    # The images that it must not keep: 70 MB of bytes, 280 as float32. Runs of one size differ by up to 5 MB.
    assert many - few < 16, f"{few} MB for 2,000 images and {many} MB for 20,000"
