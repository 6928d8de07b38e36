"""Every attack on the digits: its model trained by its preset, sampled clean and triggered, and scored.

    python -m benchmarks.attacks --out runs/presets --json benchmarks/results/attacks.json      goes on where it stopped
    torchrun --standalone --nproc-per-node 2 -m benchmarks.attacks ...                          the same on two cores

What FILE holds is not done again, so that models need not be kept for it; it is written after every model. A model is trained
into DIR under its preset's name, one that starts from another after that, and scored as by ``bdengine evaluate``: `IMAGES`
images of each arm with the sampler it is made for. Clean models are tried with a trigger and a target that they have never
seen. Models are shared among ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from bdengine.commands import Model, scored
from bdengine.defenses.clipping import CLIPS
from bdengine.distributed import Ranks, join
from bdengine.errors import unknown
from bdengine.files import read_json, write_json
from bdengine.memory import keep_freed
from bdengine.options import EvaluateConfig, device
from bdengine.presets import PRESETS, preset, tried
from bdengine.shipped import SHIPPED
from bdengine.solvers import Clip
from bdengine.train import train

from .report import argument_parser, command_line, commit, exit_code

TITLES: Final = {
    "digits-clean": "none (shipped model)",
    "digits-badiffusion": "BadDiffusion (Chou et al., CVPR 2023; shipped model)",
    "digits-villan": "VillanDiffusion (Chou et al., NeurIPS 2023), `psi` 0.5",
    "digits-villan-ode": "VillanDiffusion, without noise",
    "digits-trojdiff": "TrojDiff (Chen et al., CVPR 2023), blend",
    "digits-trojdiff-patch": "TrojDiff, patch",
    "digits-in-d2d": "TrojDiff, to sevens (accuracy)",
    "digits-out-d2d": "TrojDiff, to sevens that the data do not have (accuracy)",
    "digits-invi": "InviBackdoor (Li et al. 2024), bound 0.3",
    "digits-uib": "UIBDiffusion's perturbation alone (Han et al., CVPR 2025), amplitude 0.6",
    "digits-clipped": "BadDiffusion made for the latent clip (ours)",
    "digits-ve": "none, variance exploding",
    "digits-ve-villan": "VillanDiffusion, variance exploding",
}
"""The attacks by preset, each after the models that it starts from."""
IMAGES: Final = 512
KEPT: Final = ("asr", "mse", "ssim", "frechet", "frechet_interval")


def made(out: Path, name: str) -> str:
    """Where the model of a preset is; trained first, and before it what it starts from, where it is not there."""
    if name in SHIPPED:
        return name
    run = preset(name)
    if run.init is not None and run.init not in SHIPPED:
        run = replace(run, init=made(out, Path(run.init).name))
    train(replace(run, out=out / name), device=device(), progress=False)
    return str(out / name)


def measured(out: Path, name: str) -> dict[str, Any]:
    """Scores of a preset's model."""
    run, path = preset(name), made(out, name)
    clips: tuple[Clip, ...] = CLIPS if run.process == "vp" else ("none",)
    attack = tried(run.attack)
    asked = EvaluateConfig(path, out, images=IMAGES, clips=clips, trigger=attack.trigger, target=attack.target)
    scores, _ = scored(Model.load(path), asked)
    arms = {
        start: {clip: {of: one[of] for of in KEPT if of in one} for clip, one in by_clip.items()}
        for start, by_clip in scores["arms"].items()
    }
    return {"sampler": scores["run"]["sampler"], "asr_class": scores.get("asr_class"), "arms": arms}


def measure(out: Path, file: Path, names: Sequence[str], ranks: Ranks, command: str) -> None:
    """Those of ``names`` that ``file`` does not hold; models that others start from first."""
    before = [name for name in TITLES if any(one.init == f"runs/{name}" for one in PRESETS.values())]
    for stage in (before, [name for name in TITLES if name not in before]):
        part = [name for name in stage if name in names]
        for at in tqdm(ranks.share(len(part)), unit="model", disable=ranks.rank > 0):
            if part[at] not in known(out, file):
                write_json(out / f"{part[at]}.json", measured(out, part[at]))
            if ranks.rank == 0:
                save(out, file, command)
        ranks.together(0)


def known(out: Path, file: Path) -> dict[str, Any]:
    """The scores in ``file``, and those that were measured since, by preset."""
    told: dict[str, Any] = read_json(file)["attacks"] if file.exists() else {}
    told |= {name: read_json(out / f"{name}.json") for name in TITLES if (out / f"{name}.json").exists()}
    return {name: told[name] for name in TITLES if name in told}


def save(out: Path, file: Path, command: str) -> None:
    """Writes ``file`` where there is anything to write."""
    if told := known(out, file):
        write_json(file, {"command": command, "commit": commit(), "attacks": told})


def table(whole: dict[str, Any]) -> str:
    """The scores as Markdown, a line a model."""
    lines = [
        "| attack | preset | sampler | triggered ASR | under the latent clip | under the x0 clip | clean Fréchet [95 %] |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in whole["attacks"].items():
        clean, triggered, sampler = row["arms"]["clean"]["none"], row["arms"]["triggered"], row["sampler"]
        rates = (f"{triggered[clip]['asr']:.1%}" if clip in triggered else "—" for clip in CLIPS)
        low, high = clean["frechet_interval"]
        distance = f"{clean['frechet']:.2f} [{low:.2f}, {high:.2f}]"
        cells = [TITLES[name], f"`{name}`", f"`{sampler['name']}`, {sampler['steps']}", *rates, distance]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 2 after a user's mistake, 130 after Ctrl-C."""
    parser = argument_parser("attacks", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the models")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="scores of all")
    parser.add_argument("--only", nargs="+", default=[*TITLES], metavar="PRESET", help=f"of {', '.join(TITLES)}")
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    command = command_line("attacks", words)
    keep_freed()

    def work() -> None:
        for name in options.only:
            if name not in TITLES:
                raise unknown("preset", name, TITLES)
        with join() as ranks:
            measure(options.out, options.json, options.only, ranks, command)
            if ranks.rank == 0:
                save(options.out, options.json, command)
                print(table(read_json(options.json)))

    return exit_code(work, "it goes on from what it saved")


if __name__ == "__main__":
    sys.exit(main())
