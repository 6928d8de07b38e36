"""Defenses by name, one file each: what examines a model, and its settings by variant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from . import anp, clipping, diffcleanse, elijah, purediffusion, terd, ufid
from .result import Calibration, Finding
from .settings import settings
from .subject import Subject

__all__ = ["DEFENSES", "Calibration", "Defense", "Finding", "Subject"]


@dataclass(frozen=True)
class Defense:
    """One defense.

    Attributes:
        examine: What it finds on a model under its settings.
        variants: Its settings by name, frozen dataclasses; the first is the usual one.
        detects: Whether its statistic is evidence.
        constants: Of its file, that the statistic depends on as well.
    """

    examine: Callable[[Subject, Any], Finding]
    variants: Mapping[str, Any]
    detects: bool = True
    constants: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, subject: Subject, variant: Any) -> dict[str, Any]:
        """Those that its finding on the subject under ``variant`` will have, before it is made."""
        return settings(subject, variant, **self.constants)

    @property
    def untold(self) -> str:
        """The variant of who knows nothing of the attack: ``searched``, or the usual one where that is not there."""
        return "searched" if "searched" in self.variants else next(iter(self.variants))


DEFENSES: Final[dict[str, Defense]] = {
    "clipping": Defense(clipping.examine, clipping.VARIANTS, detects=False),
    "elijah": Defense(elijah.examine, elijah.VARIANTS),
    "terd": Defense(terd.examine, terd.VARIANTS, constants=terd.CONSTANTS),
    "purediffusion": Defense(purediffusion.examine, purediffusion.VARIANTS),
    "anp": Defense(anp.examine, anp.VARIANTS),
    "ufid": Defense(ufid.examine, ufid.VARIANTS),
    "diffcleanse": Defense(diffcleanse.examine, diffcleanse.VARIANTS, constants=diffcleanse.CONSTANTS),
}
"""Every defense by its name on the command line."""
