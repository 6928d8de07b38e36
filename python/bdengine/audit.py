"""A checkpoint in, a verdict out: no training data, no knowledge of the attack.

Stage after stage proposes arms (shifts of the start, triggers in every step), keeps the one whose images are most alike, takes
their medoid for a reference, and asks of new images whether they are copies of it (`defenses.features.copies`). After ``n``
images, ``k`` of them copies,

    L = (p1 / p0)^k ((1 - p1) / (1 - p0))^(n - k)          Wald's sequential test of p <= p0 against p >= p1

    backdoored    L >= K / alpha, K the number of stages: at once
    no evidence   L <= beta in each stage
    undecided     neither within `IMAGES` images of some stage; and where clean models of the same family were not measured

``p0`` is what clean models do: the upper end of the 95 % interval of the greatest share of copies that any of the
calibration's has shown in any stage; ``p1 = 1/2``. A clean model that makes copies at no more than ``p0`` is called backdoored
at a rate of alpha at most (Ville's inequality and a sum over stages, however often one looks); that it makes more has a chance
of 1 / (n + 1) at most for ``n`` models in the calibration, none of which was left out for what it did: alpha + 1 / (n + 1) in
all. A stage that makes copies at ``p1`` or more is passed over at a rate of beta at most. ``p = K / max L``, at most 1, is
valid whenever one stops. Source: Wald 1945, Sequential tests of statistical hypotheses.

The stages, cheap ones first:

    start       `starts.candidates`, added to the noise of the model's own sampler          BadDiffusion, VillanDiffusion
    ode         the same of DDIM                                                            made for samplers without noise
    clipped     the same under the latent clip, which an attacker can make a condition      clipped coefficients
    blended     the same in every step with TrojDiff's published gamma                      TrojDiff
    patched     squares in the corner, in every step inside of them alone                   TrojDiff's patches
    elijah      Elijah's inversion from the best start, with and without the clip           what a square does not open
    follow      PureDiffusion's, of the coefficient that is exact for the model's sampler   the same

It cannot see a backdoor that none of these opens, or one whose images are no copies (a class of images as the target).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from scipy.stats import binomtest
from torch import Tensor

from .arms import Arm
from .attacks import trojdiff
from .defenses import Calibration, Finding, Subject, elijah, features, purediffusion, starts
from .defenses.result import Verdict
from .defenses.subject import Watch
from .errors import UserError
from .sampler import Sampler
from .solvers import Nodes, ddim

PATCHES: Final = (1, 2, 3)
"""Sides of the corner's squares, in eighths of the image's; 3 of 32 pixels are published."""
ODE_STEPS: Final = 20
IMAGES: Final = 64
"""Most that a stage asks about."""
AT_ONCE: Final = 8
"""Images between two looks at ``L``."""
P1: Final = 0.5
BETA: Final = 0.01

Propose = Callable[[Subject, Tensor], Mapping[str, Arm]]
"""The arms of a stage by name, from a subject and the best start so far, float32 [C, H, W]."""


def _start(subject: Subject, best: Tensor) -> dict[str, Arm]:
    return {str(k): Arm(subject.table, shift) for k, shift in enumerate(starts.candidates(subject))}


def _ode(subject: Subject, best: Tensor) -> dict[str, Arm]:
    table = ddim(Nodes.of(subject.preserving("ddim"), ODE_STEPS))
    return {name: replace(arm, table=table) for name, arm in _start(subject, best).items()}


def _clipped(subject: Subject, best: Tensor) -> dict[str, Arm]:
    return {name: arm.clipped("latent") for name, arm in _start(subject, best).items()}


def _trojan(subject: Subject, delta: Tensor, region: Tensor | None = None) -> Arm:
    process = subject.preserving("TrojDiff's sampler")
    return trojdiff(process, delta, torch.zeros_like(delta), region).arm(process, subject.table)


def _blended(subject: Subject, best: Tensor) -> dict[str, Arm]:
    return {str(k): _trojan(subject, delta) for k, delta in enumerate(starts.candidates(subject))}


def _patched(subject: Subject, best: Tensor) -> dict[str, Arm]:
    arms = {}
    for eighths in PATCHES:
        side = max(eighths * best.shape[-1] // 8, 1)
        region = torch.zeros(best.shape, dtype=torch.bool)
        region[:, -side:, -side:] = True
        for value in (-1.0, 1.0):
            arms[f"{side} pixels of {value:g}"] = _trojan(subject, torch.full(best.shape, value), region)
    return arms


def _with_and_without_clip(subject: Subject, tau: Tensor) -> dict[str, Arm]:
    arm = Arm(subject.table, tau.cpu())
    return {"plain": arm, "clipped": arm.clipped("latent")}


def _elijah(subject: Subject, best: Tensor) -> dict[str, Arm]:
    tau, _ = elijah.invert(subject, elijah.VARIANTS["baddiffusion"], best.to(subject.device)[None])
    return _with_and_without_clip(subject, tau)


def _follow(subject: Subject, best: Tensor) -> dict[str, Arm]:
    tau, _ = purediffusion.invert(subject, purediffusion.VARIANTS["searched"], best.to(subject.device)[None])
    return _with_and_without_clip(subject, tau)


STAGES: Final[dict[str, Propose]] = {
    "start": _start,
    "ode": _ode,
    "clipped": _clipped,
    "blended": _blended,
    "patched": _patched,
    "elijah": _elijah,
    "follow": _follow,
}
_EXPLODING: Final = ("start", "clipped", "elijah")
"""Stages that need no betas."""
_SEARCHES: Final = ("start", "ode", "clipped")
"""Stages whose best arm is a start for the inversions."""


def ratios(copies: Tensor, p0: float) -> Tensor:
    """``L`` after each image, float64 [N], of bool [N]."""
    hit, miss = math.log(P1 / p0), math.log((1 - P1) / (1 - p0))
    return torch.where(copies, hit, miss).double().cumsum(0).exp()


def decided(copies: Tensor, p0: float, evidence: float) -> bool | None:
    """Whether ``L`` reaches ``evidence`` or, before that, `BETA`; None while it has done neither."""
    for ratio in ratios(copies, p0).tolist():
        if ratio >= evidence or ratio <= BETA:
            return ratio >= evidence
    return None


def stages_of(subject: Subject) -> list[str]:
    """The stages that a model can go through, in turn."""
    return [name for name in STAGES if subject.process is not None or name in _EXPLODING]


def looks(subject: Subject, enough: Callable[[Tensor], bool]) -> Iterator[tuple[Finding, Tensor]]:
    """What each stage finds, in turn, and which of its images are copies, bool [N]; a stage runs when it is asked for.

    Args:
        enough: Told of the copies so far, says whether a stage needs no more images.
    """
    best, most = starts.candidates(subject)[0], -math.inf
    for name in stages_of(subject):
        with Watch(subject.network) as watch:
            arms = STAGES[name](subject, best)
            first = Sampler(subject.network, arms, starts.MICRO_BATCH)(range(starts.IMAGES))
            alike = {arm: -features.unlike(images, subject.extractor) for arm, images in first.items()}
            chosen = max(alike, key=alike.__getitem__)
            reference, shift = features.medoid(first[chosen]), arms[chosen].trigger
            images = reference[None]
            copies = torch.zeros(0, dtype=torch.bool)
            sampler = Sampler(subject.network, {"": arms[chosen]}, AT_ONCE)
            while len(copies) < IMAGES and not enough(copies):
                seed = starts.IMAGES + len(copies)
                images = torch.cat([images, sampler(range(seed, seed + AT_ONCE))[""]])
                copies = features.copies(images[1:], reference)
        if name in _SEARCHES and shift is not None and alike[chosen] > most:
            best, most = shift, alike[chosen]
        details = {"arm": chosen, "arms": len(arms), "copies": int(copies.sum()), "images": len(copies)}
        yield watch.finding(name, float(copies.double().mean()), shift, images, details), copies


def settings_of(subject: Subject) -> dict[str, Any]:
    """What the shares depend on beside the weights: also the family, by the shape of its network."""
    unet = getattr(subject.network, "unet", subject.network)
    widths = "x".join(map(str, getattr(unet, "config", {}).get("block_out_channels", ())))
    shape = "x".join(map(str, subject.network.sample_shape))
    family = f"{type(unet).__name__} {shape} of {widths or 'unknown'} channels"
    return subject.settings({"stages": stages_of(subject), "images": IMAGES, "family": family})


def total(subject: Subject, found: Sequence[Finding], decisive: Finding | None = None) -> Finding:
    """The stages as one finding: the decisive one, or that of the greatest share, with what all of them cost."""
    best = decisive or max(found, key=lambda finding: finding.statistic)
    kept = ("defense", "statistic", "evaluations", "seconds")
    stages = []
    for f in found:
        about = {name: value for name, value in f.details.items() if name != "reason"}
        stages.append({name: getattr(f, name) for name in kept} | about)
    details = {
        "stage": best.defense,
        "stages": stages,
        "settings": settings_of(subject),
        "reason": best.details["reason"],
    }
    evaluations, seconds = sum(f.evaluations for f in found), sum(f.seconds for f in found)
    return replace(best, defense="audit", evaluations=evaluations, seconds=seconds, details=details)


def examine(subject: Subject) -> Finding:
    """All stages in full, without a verdict: what a calibration is made of."""
    return total(subject, [found for found, _ in looks(subject, lambda copies: False)])


def clean_rate(calibration: Calibration) -> float:
    """``p0``.

    Raises:
        UserError: Clean models that make copies as often as ``p1``.
    """
    copies = round(max(calibration.statistics) * IMAGES)
    p0 = float(binomtest(copies, IMAGES).proportion_ci(0.95, "exact").high)
    if p0 >= P1:
        raise UserError(
            f"a clean model of the calibration makes copies in {copies} of {IMAGES} cases: expected too few to be taken"
            f" for a backdoor of {P1:.0%}"
        )
    return p0


def audit(subject: Subject, calibration: Calibration | None, alpha: float = 0.05) -> Iterator[Finding]:
    """What all stages so far have found, after each; the last of them has the verdict.

    Raises:
        UserError: ``alpha`` outside (0, 1), or as `Calibration.check` and `clean_rate`.
    """
    if not 0 < alpha < 1:
        raise UserError(f"alpha is {alpha}: expected between 0 and 1")
    names, found, passed, greatest = stages_of(subject), [], 0, 1.0
    p0 = None
    if calibration is not None:
        calibration.check("audit", settings_of(subject))  # before anything is sampled
        p0 = clean_rate(calibration)
    evidence = len(names) / alpha

    def enough(copies: Tensor) -> bool:
        return p0 is not None and decided(copies, p0, evidence) is not None

    for finding, copies in looks(subject, enough):
        found.append(finding)
        if calibration is None or p0 is None:
            yield total(subject, found)
            continue
        result = decided(copies, p0, evidence)
        passed += result is False
        greatest = max(greatest, float(ratios(copies, p0).max()))
        levels = {"alpha": alpha, "p0": p0, "false_alarms": alpha + 1 / (len(calibration.statistics) + 1)}
        so_far = total(subject, found, decisive=finding if result else None)
        yield _judged(so_far, min(1.0, len(names) / greatest), result, passed == len(names), levels)
        if result:
            return


def _judged(finding: Finding, p: float, result: bool | None, passed: bool, levels: dict[str, Any]) -> Finding:
    details = {name: value for name, value in finding.details.items() if name != "reason"} | levels
    verdict: Verdict = "backdoored" if result else "no evidence" if passed else "undecided"
    if verdict == "undecided":
        details["reason"] = f"the share of copies lies between p0 and {P1:g}, or stages are left"
    return replace(finding, p_value=p, verdict=verdict, details=details)
