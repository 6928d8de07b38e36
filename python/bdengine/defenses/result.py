"""What a defense found, and what makes a verdict of it.

    p = (1 + #{clean models whose statistic >= s}) / (n + 1)          backdoored where p <= alpha

``s`` is the defense's statistic, large where a backdoor is suspected, and the ``n`` clean models are of the examined model's
family, each counted once; neither it nor its relatives in training are among them. If the examined model is clean too, all
``n + 1`` statistics are exchangeable, so ``p <= alpha`` at a rate of ``alpha`` at most, over all ``n + 1`` models and whatever
their law; no longer if a clean model was left out for its statistic. With ``n < 1 / alpha - 1`` it cannot decide. Nothing else
decides: no published threshold carries over to another family of models. Source: Vovk, Gammerman and Shafer 2005, chapter 2
(conformal p-values).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal

from torch import Tensor

from ..config import from_json, to_json
from ..errors import UserError
from ..files import read_json, write_json

Verdict = Literal["backdoored", "no evidence", "undecided"]
EXIT: Final[dict[Verdict, int]] = {"no evidence": 0, "backdoored": 1, "undecided": 3}
"""Exit codes of the commands that decide; 2 is a mistake's."""


PICTURES: Final = ("trigger", "images", "gamma")
"""Of a finding, what is no JSON."""


@dataclass(frozen=True, eq=False)
class Finding:
    """One defense's result on one model.

    Attributes:
        defense: Its name.
        statistic: Large where a backdoor is suspected.
        p_value: Of a clean model to have such a statistic or a larger one; None without a calibration.
        verdict: "undecided" without a calibration that can decide.
        trigger: The inverted shift ``r``, float32 [C, H, W] on the CPU; None where nothing is inverted.
        images: What the defense makes, float32 [N, C, H, W] on the CPU; None where it makes nothing.
        evaluations: Images that went through the network, forwards.
        seconds: Wall-clock time.
        details: Values of JSON types; "settings" is what the statistic depends on, "reason" why nothing was decided.
        weights_sha256: Which model it is.
        gamma: Scale of the noise of a start with the trigger, as the trigger; None where it is not inverted.
    """

    defense: str
    statistic: float
    p_value: float | None
    verdict: Verdict
    trigger: Tensor | None
    images: Tensor | None
    evaluations: int
    seconds: float
    details: dict[str, Any]
    weights_sha256: str
    gamma: Tensor | None = None

    @classmethod
    def load(cls, path: Path) -> Finding:
        """From a file that holds `to_json`, without its pictures.

        Raises:
            UserError: No such file, or another one.
        """
        values = read_json(path)
        needed = [field.name for field in fields(cls) if field.name not in PICTURES]
        for name in needed:
            if name not in values:
                raise UserError(f"{path} is no finding: expected {name} in it, as in what defend or calibrate writes")
        if not isinstance(values["details"], dict) or "settings" not in values["details"]:
            raise UserError(f"{path} is no finding: expected settings in its details")
        _numbers(path, {"statistic": values["statistic"]})
        return cls(**{name: values[name] for name in needed}, trigger=None, images=None)

    def to_json(self) -> dict[str, Any]:
        """All but the images, as JSON types."""
        return {name: to_json(value) for name, value in vars(self).items() if name not in PICTURES}


@dataclass(frozen=True)
class Calibration:
    """One defense's statistic on clean models.

    Attributes:
        defense: Its name.
        settings: What the statistic depends on: the findings' "settings".
        statistics: One a clean model, by the SHA-256 of its weights.
        trained: How they were trained, which is alike in all of them; empty where that is not known.
    """

    defense: str
    settings: dict[str, Any]
    statistics: dict[str, float]
    trained: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, findings: Sequence[Finding], trained: Mapping[str, Any] | None = None) -> Calibration:
        """From findings on clean models, ``trained`` so.

        Raises:
            UserError: None, of different defenses or settings, or two of one model.
        """
        if not findings:
            raise UserError("the calibration has no findings: expected one a clean model")
        one = cls(findings[0].defense, findings[0].details["settings"], {}, dict(trained or {}))
        for finding in findings:
            one.check(finding.defense, finding.details["settings"], finding.weights_sha256)
            one.statistics[finding.weights_sha256] = finding.statistic
        return one

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """From a file that `save` wrote.

        Raises:
            UserError: No such file, or another one.
        """
        values = read_json(path)
        if set(values) != {"defense", "settings", "statistics", "trained"}:
            raise UserError(f"{path} is no calibration: expected defense, settings, statistics and trained in it")
        if not all(isinstance(values[name], dict) for name in ("settings", "statistics", "trained")):
            raise UserError(f"{path} is no calibration: expected settings, statistics and trained by name in it")
        if not values["statistics"]:
            raise UserError(f"{path} has no statistics: expected one a clean model")
        _numbers(path, values["statistics"])
        return from_json(cls, values)

    def save(self, path: Path) -> None:
        """To a JSON file."""
        write_json(path, to_json(self))

    def p_value(self, statistic: float) -> float:
        """The module's ``p``."""
        return (1 + sum(s >= statistic for s in self.statistics.values())) / (len(self.statistics) + 1)

    def judge(self, finding: Finding, alpha: float = 0.05) -> Finding:
        """The finding with its p-value and verdict; undecided where so few clean models could never give ``p <= alpha``.

        Raises:
            UserError: ``alpha`` outside (0, 1), or as `check`.
        """
        self.check(finding.defense, finding.details["settings"], finding.weights_sha256)
        p, reason = self.p_value(finding.statistic), self.lacking(alpha)
        details = {name: value for name, value in finding.details.items() if name != "reason"} | {"alpha": alpha}
        if reason is not None:
            return replace(finding, p_value=p, verdict="undecided", details=details | {"reason": reason})
        return replace(finding, p_value=p, verdict="backdoored" if p <= alpha else "no evidence", details=details)

    def lacking(self, alpha: float) -> str | None:
        """Why it can call no model backdoored at a rate of ``alpha``; None where it can.

        Raises:
            UserError: ``alpha`` outside (0, 1).
        """
        check_alpha(alpha)
        count = len(self.statistics)
        if 1 / (count + 1) <= alpha:
            return None
        return (
            f"{count} clean models give no p-value below {1 / (count + 1):.3g} and alpha is {alpha:g}: expected at least"
            f" {math.ceil(1 / alpha) - 1}"
        )

    def caveat(self, trained: Mapping[str, Any]) -> str | None:
        """Why its rates may not be those of a model ``trained`` so; None where it was trained as the clean models."""
        alike = f"rates are of models trained as its {len(self.statistics)} clean ones"
        if not self.trained or not trained:
            of = "they" if not self.trained else "this model"
            return f"{alike}, and how {of} {'were' if of == 'they' else 'was'} trained is not known"
        names = [name for name in [*trained, *self.trained] if trained.get(name) != self.trained.get(name)]
        told = (f"{name} {trained.get(name)} instead of {self.trained.get(name)}" for name in dict.fromkeys(names))
        return f"{alike}, and this one had {', '.join(told)}" if names else None

    def check(self, defense: str, settings: dict[str, Any], weights_sha256: str) -> None:
        """Refuse a finding that is not to be held against it, before or after it is made.

        Raises:
            UserError: Another defense, other settings, or a model of the calibration itself.
        """
        if defense != self.defense:
            raise UserError(f"the calibration is of {self.defense}: expected one of {defense}")
        for name in [*settings, *self.settings]:
            if settings.get(name) != self.settings.get(name):
                raise UserError(
                    f"the calibration was made with {name} {self.settings.get(name)!r}: expected {settings.get(name)!r},"
                    " as the examined model had"
                )
        if weights_sha256 in self.statistics:
            raise UserError(
                f"the model of weights {weights_sha256[:16]} is in the calibration already: expected another model, under"
                " whatever name"
            )


def check_alpha(alpha: float) -> None:
    """Refuse what is no rate.

    Raises:
        UserError: ``alpha`` outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise UserError(f"alpha is {alpha}: expected between 0 and 1")


def _numbers(path: Path, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if not isinstance(value, float | int) or not math.isfinite(value):
            raise UserError(f"{path} has {value!r} for {name}: expected a number")
