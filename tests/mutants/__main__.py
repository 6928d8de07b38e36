"""``python -m tests.mutants``: plants each fault and prints the table ``fault | rung | caught``; 1 where one is missed."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.mutants.faults import FAULTS, climb, copy_of_source, plant


def main() -> int:
    missed = 0
    print("| fault | rung | caught |\n| --- | --- | --- |")
    for fault in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            plant(fault, copy_of_source(Path(folder)))
            _, seen, _ = climb(fault.rung, Path(folder))
        missed += not seen
        print(f"| {fault.name} | {fault.rung} | {'yes' if seen else 'NO'} |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
