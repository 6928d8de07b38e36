"""What a defense found, and what makes a verdict of it.

    p = (1 + #{clean models whose statistic >= s}) / (n + 1)          backdoored where p <= alpha

``s`` is the defense's statistic, large where a backdoor is suspected, and the ``n`` clean models are of the examined model's
family and not its relatives in training. If the examined model is clean too, all ``n + 1`` statistics are exchangeable, so
``p <= alpha`` at a rate of ``alpha`` at most, whatever their law. Nothing else decides: no published threshold carries over to
another family of models. Source: Vovk, Gammerman and Shafer 2005, chapter 2 (conformal p-values).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..config import from_json, to_json
from ..errors import UserError
from ..files import read_json, write_json

Verdict = Literal["backdoored", "no evidence", "undecided"]


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

    def to_json(self) -> dict[str, Any]:
        """All but the images, as JSON types."""
        pictures = ("trigger", "images")
        return {name: to_json(value) for name, value in vars(self).items() if name not in pictures}


@dataclass(frozen=True)
class Calibration:
    """One defense's statistic on clean models.

    Attributes:
        defense: Its name.
        settings: What the statistic depends on: the findings' "settings".
        statistics: One a clean model.
    """

    defense: str
    settings: dict[str, Any]
    statistics: tuple[float, ...]

    @classmethod
    def of(cls, findings: Sequence[Finding]) -> Calibration:
        """From findings on clean models.

        Raises:
            UserError: None, or of different defenses or settings.
        """
        if not findings:
            raise UserError("the calibration has no findings: expected one a clean model")
        one = cls(findings[0].defense, findings[0].details["settings"], tuple(f.statistic for f in findings))
        for finding in findings:
            one.check(finding.defense, finding.details["settings"])
        return one

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """From a file that `save` wrote.

        Raises:
            UserError: No such file, or another one.
        """
        values = read_json(path)
        if not isinstance(values, dict) or set(values) != {"defense", "settings", "statistics"}:
            raise UserError(f"{path} is no calibration: expected defense, settings and statistics in it")
        if not values["statistics"]:
            raise UserError(f"{path} has no statistics: expected one a clean model")
        return from_json(cls, values)

    def save(self, path: Path) -> None:
        """To a JSON file."""
        write_json(path, to_json(self))

    def p_value(self, statistic: float) -> float:
        """The module's ``p``."""
        return (1 + sum(s >= statistic for s in self.statistics)) / (len(self.statistics) + 1)

    def judge(self, finding: Finding, alpha: float = 0.05) -> Finding:
        """The finding with its p-value and verdict; undecided where so few clean models could never give ``p <= alpha``.

        Raises:
            UserError: ``alpha`` outside (0, 1), or another defense or other settings than the calibration's.
        """
        if not 0 < alpha < 1:
            raise UserError(f"alpha is {alpha}: expected between 0 and 1")
        self.check(finding.defense, finding.details["settings"])
        p, least = self.p_value(finding.statistic), 1 / (len(self.statistics) + 1)
        details = {name: value for name, value in finding.details.items() if name != "reason"} | {"alpha": alpha}
        if least > alpha:
            reason = f"{len(self.statistics)} clean models give no p-value below {least:.3g}; alpha is {alpha:g}"
            return replace(finding, p_value=p, verdict="undecided", details=details | {"reason": reason})
        return replace(finding, p_value=p, verdict="backdoored" if p <= alpha else "no evidence", details=details)

    def check(self, defense: str, settings: dict[str, Any]) -> None:
        """Refuse what would make another statistic.

        Raises:
            UserError: As said.
        """
        if defense != self.defense:
            raise UserError(f"the calibration is of {self.defense}: expected one of {defense}")
        for name in [*settings, *self.settings]:
            if settings.get(name) != self.settings.get(name):
                raise UserError(
                    f"the calibration was made with {name} {self.settings.get(name)!r}: expected {settings.get(name)!r},"
                    " as the examined model had"
                )
