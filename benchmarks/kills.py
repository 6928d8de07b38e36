"""What ``kill -9`` does to ``bdengine sample``: killed again and again at random moments, it must end as if never killed.

    python -m benchmarks.kills --kills 200 --images 20000 --json benchmarks/results/kills.json

The same run is made once in peace. Then it is started, killed and started again in another folder; a run that lives to its
end is compared file by file and begun anew, until there were enough kills. After each kill, for every shard with a checksum:

    lost      it had one before the kill and has none now
    changed   its bytes are not those of the run in peace
    doubled   a seed more than once, or more or fewer images than seeds, in a run that ended

The network is a small random UNet at 8x8. Kills are even in the time of a run, its start included, up to `LONGEST`; every
second one then waits until a file is half written, since writes are a small part of that time.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from tqdm import tqdm

from bdengine.checkpoint import save_pipeline
from bdengine.cli import main as bdengine
from bdengine.files import write_json
from bdengine.networks import unet
from bdengine.schedule import linear
from bdengine.shards import Format, Shards

LONGEST: Final = 1.0
"""Seconds a run lives before it is killed, at most."""


def prove(place: Path, kills: int, images: int, form: Format = "npy", seed: int = 0) -> dict[str, Any]:
    """The proof, in an empty folder ``place``.

    Returns:
        ``kills``, ``runs`` that ended, ``lost``, ``changed`` and ``doubled``, and ``moments``: how many kills fell where.
    """
    torch.manual_seed(seed)
    save_pipeline(place / "tiny", unet(8, 1, (8, 16), groups=4), linear().to_config())
    words = [
        "sample", str(place / "tiny"), "--seeds", f"0-{images - 1}", "--format", form, "--shard", "64",
        "--micro-batch", "64", "--sampler", "ddim", "--steps", "1",
    ]  # fmt: skip
    # Children of a server that has imported everything: a run begins in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bdengine.commands", "diffusers.models.unets.unet_2d"])

    def start(folder: Path) -> Any:
        process = context.Process(target=_quietly, args=([*words, "--out", str(folder)],))
        process.start()
        return process

    peace, war = place / "peace", place / "war"
    process = start(peace)
    process.join()
    assert process.exitcode == 0, "the run in peace failed"
    expected = {path.name: path.read_bytes() for path in _results(peace)}
    found: Counter[str] = Counter(lost=0, changed=0, doubled=_doubled(peace))
    moments: Counter[str] = Counter()
    generator, sealed, killed, runs, ended = random.Random(seed), set[str](), 0, 0, False
    bar = tqdm(total=kills, unit="kill")
    while killed < kills or not ended:
        process = start(war)
        process.join(generator.uniform(0, LONGEST) if killed < kills else None)
        while killed % 2 and process.is_alive() and not _writing(war):
            pass
        ended = process.exitcode is not None
        if not ended:
            process.kill()
            process.join()
            killed += 1
            bar.update()
            moments[_moment(war)] += 1
            now = _sealed(war)
            found["lost"] += len(sealed - now)
            found["changed"] += sum((war / name).read_bytes() != expected[name] for name in now)
            sealed = now
            continue
        assert process.exitcode == 0, f"a run ended by itself with {process.exitcode}"
        runs += 1
        got = {path.name: path.read_bytes() for path in _results(war)}
        found["lost"] += len(set(expected) - set(got))
        found["changed"] += sum(got[name] != expected.get(name) for name in got)
        found["doubled"] += _doubled(war)
        sealed = set()
        shutil.rmtree(war)
    bar.close()
    return {"kills": killed, "runs": runs, **found, "moments": dict(moments)}


def _quietly(words: Sequence[str]) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own, of all processes, would stay behind those that are killed
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        code = bdengine(words)
    sys.exit(code)


def _results(folder: Path) -> Iterable[Path]:
    """All that a run leaves but the description of it, which names its folder."""
    return (path for path in folder.iterdir() if path.name != "run.json")


def _writing(folder: Path) -> bool:
    return any(folder.glob(".*.tmp"))


def _sealed(folder: Path) -> set[str]:
    return {path.name.removesuffix(".sha256") for path in folder.glob("shard-*.sha256")}


def _doubled(folder: Path) -> int:
    shards = Shards.open(folder)
    count: Counter[int] = Counter(seed for k in range(len(shards)) for seed in shards.part(k))
    images = sum(len(shards.read(k)) for k in range(len(shards)))
    return sum(n != 1 for n in count.values()) + abs(images - len(count)) + abs(len(count) - len(shards.seeds))


def _moment(folder: Path) -> str:
    if not (folder / "run.json").exists():
        return "before the run was described"
    if _writing(folder):
        return "within a write"
    if {path.name for path in folder.glob("shard-*") if path.suffix != ".sha256"} - _sealed(folder):
        return "between a shard and its checksum"
    return "elsewhere"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the proof; 1 where anything was lost, changed or doubled."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--format", choices=("npy", "tar"), default="npy")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="where the result goes")
    said = parser.parse_args(words)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        proof = prove(Path(place), said.kills, said.images, said.format, said.seed)
    result = {
        "command": f"python -m benchmarks.kills {shlex.join(words)}".rstrip(),
        "images": said.images,
        "format": said.format,
        **proof,
        "seconds": round(time.perf_counter() - begun),
    }
    if said.json:
        write_json(said.json, result)
    print(result)
    return int(any(proof[name] for name in ("lost", "changed", "doubled")))


if __name__ == "__main__":
    sys.exit(main())
