"""The seeds of a run as ranges, never as a list: a billion of them take no more memory than one."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Final, overload

from .errors import UserError

MOST_SEEDS: Final = 1_000_000_000
"""Of one run."""
_END: Final = 2**63


class Seeds(Sequence[int]):
    """Seeds in the order of their ranges; a slice is `Seeds` again.

    Args:
        ranges: Of step 1; empty ones are dropped.

    Raises:
        UserError: No seed, more than `MOST_SEEDS`, one that does not fit 64 bits with its sign, or one that is there twice.
    """

    def __init__(self, ranges: Iterable[range]) -> None:
        self.ranges = tuple(one for one in ranges if one.stop > one.start)
        for one in self.ranges:
            if one.start < -_END or one.stop > _END:
                raise UserError(f"seed {one.stop - 1} is not a seed: expected an integer of 64 bits")
        count = sum(one.stop - one.start for one in self.ranges)
        if not 1 <= count <= MOST_SEEDS:
            many = "no seed" if count == 0 else f"{count:,} seeds"
            raise UserError(f"the seeds name {many}: expected 1 to {MOST_SEEDS:,} of them, as in 0-63")
        for one, other in itertools.pairwise(sorted(self.ranges, key=lambda r: r.start)):
            if other.start < one.stop:
                raise UserError(f"the seeds name {other.start} twice: expected each once")
        self._ends = list(itertools.accumulate(map(len, self.ranges)))

    @classmethod
    def parse(cls, text: str) -> Seeds:
        """``"0-63"``, ``"7"`` or ``"1,5,8-11"``.

        Raises:
            UserError: Anything else, or as the class.
        """
        ranges = []
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                raise UserError(f"seeds {text!r} is not a list of seeds: expected something like 0-63 or 1,5,8-11")
            ranges.append(range(int(first), int(last or first) + 1))
        return cls(ranges)

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> Seeds: ...
    def __getitem__(self, at: int | slice) -> int | Seeds:
        places = range(len(self))[at]
        if isinstance(places, int):
            one = bisect_right(self._ends, places)
            return self.ranges[one][places - self._ends[one]]
        if places.step != 1:
            raise ValueError(f"a slice of seeds with step {places.step}: expected 1")
        begins = (end - len(one) for one, end in zip(self.ranges, self._ends, strict=True))
        return Seeds(
            one[max(places.start - begin, 0) : max(places.stop - begin, 0)]
            for one, begin in zip(self.ranges, begins, strict=True)
        )

    def __contains__(self, seed: object) -> bool:
        return any(seed in one for one in self.ranges)

    def place(self, seed: int) -> int:
        """Where ``seed`` stands.

        Raises:
            UserError: It is not there.
        """
        one, end = self._around(seed)
        return end - len(one) + one.index(seed)

    def require(self, seeds: Seeds) -> None:
        """Refuse seeds that are not all among these.

        Raises:
            UserError: As said, naming the first.
        """
        for one in seeds.ranges:
            seed = one.start
            while seed < one.stop:
                seed = self._around(seed)[0].stop

    def _around(self, seed: int) -> tuple[range, int]:
        for one, end in zip(self.ranges, self._ends, strict=True):
            if seed in one:
                return one, end
        raise UserError(f"seed {seed} is not among them: expected some of {self}")

    def __str__(self) -> str:
        return ",".join(str(one.start) if len(one) == 1 else f"{one.start}-{one.stop - 1}" for one in self.ranges)


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse an empty sequence and anything that is not a 64-bit integer.

    Raises:
        UserError: As said.
    """
    if isinstance(seeds, Seeds):
        return
    if len(seeds) == 0:
        raise UserError("0 images were asked for: expected at least 1 seed")
    for seed in (seeds[0], seeds[-1]) if isinstance(seeds, range) else seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not -_END <= seed < _END:
            raise UserError(f"seed {seed!r} is not a seed: expected an integer of 64 bits")
