"""`python -m ropemods`, the same as `ropemods`."""

from __future__ import annotations

import sys

from ropemods.cli import main

if __name__ == "__main__":
    sys.exit(main())
