"""Seeds as ranges: what a list of them would say, in the memory of none."""

from __future__ import annotations

import tracemalloc

import pytest

from bdengine.errors import UserError
from bdengine.seeds import MOST_SEEDS, Seeds


@pytest.mark.parametrize(
    ("text", "listed"),
    [("0-3", [0, 1, 2, 3]), ("1, 5,8-9", [1, 5, 8, 9]), ("7", [7]), ("8-9,5-2,0-1", [8, 9, 0, 1])],
)
def test_seeds_are_those_of_a_list(text: str, listed: list[int]) -> None:
    seeds = Seeds.parse(text)
    assert list(seeds) == listed
    assert len(seeds) == len(listed)
    assert [seeds.place(seed) for seed in listed] == list(range(len(listed)))
    assert [seed in seeds for seed in range(12)] == [seed in listed for seed in range(12)]
    assert seeds[-1] == listed[-1]
    for first in range(len(listed)):
        for last in range(first + 1, len(listed) + 1):
            assert list(seeds[first:last]) == listed[first:last]
    assert list(Seeds.parse(str(seeds))) == listed
    with pytest.raises(IndexError):
        seeds[len(listed)]
    with pytest.raises(UserError, match=r"seed 4 is not among them: expected some of \d"):
        seeds.place(4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected something like 0-63"),
        ("a", "expected something like 0-63"),
        ("3-", "expected something like 0-63"),
        ("1.5", "expected something like 0-63"),
        ("5-2", "name no seed: expected 1 to 1,000,000,000 of them"),
        ("0-99999999999", "name 100,000,000,000 seeds: expected 1 to 1,000,000,000 of them"),
        ("0-9223372036854775808", "seed 9223372036854775808 is not a seed: expected an integer of 64 bits"),
        ("8-11,3,0-3", "name 3 twice: expected each once"),
    ],
)
def test_what_is_no_seeds(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Seeds.parse(text)


def test_a_billion_take_no_memory() -> None:
    tracemalloc.start()
    seeds = Seeds.parse(f"0-{MOST_SEEDS - 1}")
    parts = [seeds[k * 4096 : (k + 1) * 4096] for k in (0, 100_000, 244_140)]
    assert [len(part) for part in parts] == [4096, 4096, 2560]
    assert parts[-1][-1] == seeds.place(MOST_SEEDS - 1) == MOST_SEEDS - 1
    assert tracemalloc.get_traced_memory()[1] < 20_000
    tracemalloc.stop()
