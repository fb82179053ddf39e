"""What the process imports that `tests/forked.py` forks ranks from. Nothing here computes, so a fork of it is fresh."""

import contextlib
import os

import ropemods.training.__main__  # noqa: F401
import tests.zoo  # noqa: F401

with contextlib.suppress(ImportError):  # whatever saves a model imports it where it is installed
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401
