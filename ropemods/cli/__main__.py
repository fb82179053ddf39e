"""`python -m ropemods.cli`, for launchers that start modules."""

from __future__ import annotations

import sys

from ropemods.cli import main

sys.exit(main())
