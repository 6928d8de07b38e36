"""``python -m bdengine``, as ``torchrun -m bdengine`` starts it."""

import sys

from .cli import main

sys.exit(main())
