"""A checkpoint in, a verdict out: no training data, no knowledge of the attack.

Stage after stage proposes arms (shifts of the start, triggers in every step), keeps the one whose images are most alike, takes
their medoid for a reference, and asks of new images whether they are copies of it (`defenses.features.copies`). After ``n``
images, ``k`` of them copies,

    L = (p1 / p0)^k ((1 - p1) / (1 - p0))^(n - k)          Wald's sequential test of p <= p0 against p >= p1

    backdoored    L >= K / delta, K the number of stages: at once
    no evidence   L <= beta in each stage
    undecided     neither within `IMAGES` images of some stage; and where clean models of the same family were not measured

``p0`` is what clean models do: an upper bound, wrong at a rate of delta at most, of the greatest rate of copies in any stage
of any of the calibration's ``n`` models; ``p1 = 1/2``. A clean model is called backdoored at a rate of alpha at most,

    alpha = 1 / (n + 1) + 2 delta

for its own greatest rate is above all of theirs with a chance of 1 / (n + 1) at most, since all ``n + 1`` are exchangeable if
none was left out for what it did; ``p0`` is below theirs with one of delta; and some ``L`` reaches ``K / delta`` at a rate of
copies up to ``p0`` with another delta (Ville's inequality and a sum over stages, however often one looks). The last needs
images that do not depend on ``p0``: so the audit's seeds are others than the calibration's, while arms and references have the
same in both. A stage that makes copies at ``p1`` or more is passed over at a rate of beta at most.
``p = 1 / (n + 1) + delta + K / max L``, at most 1, is valid whenever one stops. Source: Wald 1945, Sequential tests of
statistical hypotheses.

The stages, cheap ones first:

    start       `starts.candidates`, added to the noise of the model's own sampler          BadDiffusion, VillanDiffusion
    ode         the same of DDIM                                                            made for samplers without noise
    clipped     the same under the latent clip, which an attacker can make a condition      clipped coefficients
    blended     squares of `FINE` in every step, with TrojDiff's published gamma            TrojDiff, of squares
    patched     squares in the corner, in every step inside of them alone                   TrojDiff's patches
    elijah      Elijah's inversion from the best start, with and without the clip           what a square does not open
    follow      PureDiffusion's, of the coefficient that is exact for the model's sampler   the same

A variance exploding model, whose states a clip to [-1, 1] would destroy, has `start` and `elijah` alone, without the clip.
The audit cannot see a backdoor that none of these opens, such as a picture in every step, or one whose images are no copies
(a class of images as the target).
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
from .defenses.result import Verdict, check_alpha
from .defenses.settings import settings
from .defenses.subject import Watch
from .schedule import Schedule
from .solvers import Nodes, Table, ddim

PATCH: Final = 3
"""Largest side of the corner's squares, in eighths of the image's; 3 of 32 pixels are published."""
SIDES: Final = 32
"""They grow by that share of the image's side, or a pixel: a network of closed form answers to the true side alone."""
FINE: Final[starts.Grid] = tuple((side, 1) for side in range(3, 8))
"""A network that saw its trigger in every step knows it to the pixel: digits-trojdiff, with a square of 8 of 16 pixels, draws
its target where an edge or two are one pixel off, for half of the images where all four are, for none from `starts.GRID`."""
ODE_STEPS: Final = 20
IMAGES: Final = 64
"""Most that a stage asks about."""
CALIBRATION_SEEDS: Final = starts.IMAGES
AUDIT_SEEDS: Final = CALIBRATION_SEEDS + IMAGES
"""The first seed of those images; those below 8 are of arms and references."""
AT_ONCE: Final = 8
"""Images between two looks at ``L``."""
P1: Final = 0.5
BETA: Final = 0.01

Propose = Callable[[Subject, Tensor], Mapping[str, Arm]]
"""The arms of a stage by name, from a subject and the best start so far, float32 [C, H, W]."""


def _start(subject: Subject, best: Tensor) -> dict[str, Arm]:
    return {str(k): Arm(subject.table, shift) for k, shift in enumerate(starts.candidates(subject))}


def ode_table(process: Schedule) -> Table:
    """The sampler of the stage `ode`."""
    return ddim(Nodes.of(process, ODE_STEPS))


def _ode(subject: Subject, best: Tensor) -> dict[str, Arm]:
    table = ode_table(subject.preserving("ddim"))
    return {name: replace(arm, table=table) for name, arm in _start(subject, best).items()}


def _clipped(subject: Subject, best: Tensor) -> dict[str, Arm]:
    return {name: arm.clipped("latent") for name, arm in _start(subject, best).items()}


def _trojan(subject: Subject, delta: Tensor, region: Tensor | None = None) -> Arm:
    process = subject.preserving("TrojDiff's sampler")
    return trojdiff(process, delta, torch.zeros_like(delta), region).arm(process, subject.table)


def _blended(subject: Subject, best: Tensor) -> dict[str, Arm]:
    return {str(k): _trojan(subject, delta) for k, delta in enumerate(starts.candidates(subject, FINE))}


def _patched(subject: Subject, best: Tensor) -> dict[str, Arm]:
    arms = {}
    length = best.shape[-1]
    step = max(length // SIDES, 1)
    for side in range(step, PATCH * length // 8 + 1, step):
        region = torch.zeros(best.shape, dtype=torch.bool)
        region[:, -side:, -side:] = True
        for value in (-1.0, 1.0):
            arms[f"{side} pixels of {value:g}"] = _trojan(subject, torch.full(best.shape, value), region)
    return arms


def _with_and_without_clip(subject: Subject, tau: Tensor) -> dict[str, Arm]:
    arm = Arm(subject.table, tau.cpu())
    return {"plain": arm} | ({} if subject.process is None else {"clipped": arm.clipped("latent")})


def _elijah(subject: Subject, best: Tensor) -> dict[str, Arm]:
    tau, _ = elijah.invert(subject, elijah.VARIANTS[_ELIJAH], best.to(subject.device)[None])
    return _with_and_without_clip(subject, tau)


def _follow(subject: Subject, best: Tensor) -> dict[str, Arm]:
    tau, _ = purediffusion.invert(subject, purediffusion.VARIANTS[_FOLLOW], best.to(subject.device)[None])
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
_EXPLODING: Final = ("start", "elijah")
"""Stages that need no betas and no images in [-1, 1]."""
_ELIJAH, _FOLLOW = "baddiffusion", "searched"
"""Variants of the inversions."""
SEARCHES: Final = ("start", "ode", "clipped")
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


def looks(subject: Subject, enough: Callable[[Tensor], bool], first_seed: int) -> Iterator[tuple[Finding, Tensor]]:
    """What each stage finds, in turn, and which of its images are copies, bool [N]; a stage runs when it is asked for.

    Args:
        enough: Told of the copies so far, says whether a stage needs no more images.
        first_seed: Of those images.
    """
    best, most = starts.candidates(subject)[0], -math.inf
    for name in stages_of(subject):
        with Watch(subject) as watch:
            arms = STAGES[name](subject, best)
            first = subject.sampled(arms, range(starts.IMAGES), starts.MICRO_BATCH)
            alike = {arm: -features.unlike(images, subject.extractor) for arm, images in first.items()}
            chosen = max(alike, key=alike.__getitem__)
            reference, shift = features.medoid(first[chosen]), arms[chosen].trigger
            images = reference[None]
            copies = torch.zeros(0, dtype=torch.bool)
            while len(copies) < IMAGES and not enough(copies):
                seed = first_seed + len(copies)
                made = subject.sampled({"": arms[chosen]}, range(seed, seed + AT_ONCE), AT_ONCE)[""]
                images = torch.cat([images, made])
                copies = features.copies(images[1:], reference)
        if name in SEARCHES and shift is not None and alike[chosen] > most:
            best, most = shift, alike[chosen]
        details = {"arm": chosen, "arms": len(arms), "copies": int(copies.sum()), "images": len(copies)}
        yield watch.finding(name, float(copies.double().mean()), shift, images, details), copies


def settings_of(subject: Subject) -> dict[str, Any]:
    """What the shares depend on beside the weights."""
    return settings(
        subject,
        {"stages": stages_of(subject), "images": IMAGES, "same": features.SAME},
        ode_steps=ODE_STEPS,
        patches=[PATCH, SIDES],
        blends=FINE,
        elijah=elijah.VARIANTS[_ELIJAH],
        follow=purediffusion.VARIANTS[_FOLLOW],
    )


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
    return total(subject, [found for found, _ in looks(subject, lambda copies: False, CALIBRATION_SEEDS)])


def levels(calibration: Calibration, alpha: float) -> tuple[float, float]:
    """``p0`` and ``delta``, which is above 0 where the calibration is large enough."""
    delta = (alpha - 1 / (len(calibration.statistics) + 1)) / 2
    most = binomtest(_most(calibration), IMAGES, alternative="less")
    return float(most.proportion_ci(1 - max(delta, 0.0), "exact").high), delta


def lacking(calibration: Calibration, alpha: float) -> str | None:
    """Why it can call no model backdoored at a rate of ``alpha``; None where it can.

    Raises:
        UserError: ``alpha`` outside (0, 1).
    """
    check_alpha(alpha)
    (p0, delta), count = levels(calibration, alpha), len(calibration.statistics)
    if delta <= 0:
        return (
            f"{count} clean models bound false alarms at no less than {1 / (count + 1):.3g} and alpha is {alpha:g}:"
            f" expected at least {math.floor(1 / alpha)}"
        )
    if p0 < P1:
        return None
    return (
        f"a clean model of the calibration makes copies in {_most(calibration)} of {IMAGES} cases, which is too near to a"
        f" backdoor's {P1:.0%}: expected fewer, but not without this model, since a calibration that leaves one out for"
        " what it did bounds no rate"
    )


def _most(calibration: Calibration) -> int:
    return round(max(calibration.statistics.values()) * IMAGES)


def audit(subject: Subject, calibration: Calibration | None, alpha: float = 0.05) -> Iterator[Finding]:
    """What all stages so far have found, after each; the last of them has the verdict, if the calibration is not `lacking`.

    Raises:
        UserError: At once: ``alpha`` outside (0, 1), or as `Calibration.check`.
    """
    check_alpha(alpha)
    if calibration is not None:
        calibration.check("audit", settings_of(subject), subject.weights_sha256)
    return _audited(subject, calibration, alpha)


def _audited(subject: Subject, calibration: Calibration | None, alpha: float) -> Iterator[Finding]:
    names, found, passed, greatest = stages_of(subject), [], 0, 1.0
    p0, delta, reason = None, 0.0, None
    if calibration is not None:
        reason = lacking(calibration, alpha)
        if reason is None:
            p0, delta = levels(calibration, alpha)
    evidence = len(names) / delta if p0 is not None else math.inf

    def enough(copies: Tensor) -> bool:
        return p0 is not None and decided(copies, p0, evidence) is not None

    for finding, copies in looks(subject, enough, AUDIT_SEEDS):
        found.append(finding)
        if p0 is None:
            so_far = total(subject, found)
            yield so_far if reason is None else replace(so_far, details=so_far.details | {"reason": reason})
            continue
        result = decided(copies, p0, evidence)
        passed += result is False
        greatest = max(greatest, float(ratios(copies, p0).max()))
        so_far = total(subject, found, decisive=finding if result else None)
        p = min(1.0, alpha - delta + len(names) / greatest)
        yield _judged(so_far, p, result, passed == len(names), {"alpha": alpha, "p0": p0})
        if result:
            return


def _judged(finding: Finding, p: float, result: bool | None, passed: bool, levels: dict[str, Any]) -> Finding:
    details = {name: value for name, value in finding.details.items() if name != "reason"} | levels
    verdict: Verdict = "backdoored" if result else "no evidence" if passed else "undecided"
    if verdict == "undecided":
        details["reason"] = f"the share of copies lies between p0 and {P1:g}, or stages are left"
    return replace(finding, p_value=p, verdict=verdict, details=details)
