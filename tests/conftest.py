"""Offline, on small models made on the spot."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# DeepSpeed builds an op here. In the user's own folder, a lock that a killed build left would be waited for, for ever.
os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(__file__).parents[1] / "build" / "torch_extensions")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run in its interpreter; it reads this when it is first imported

from hypothesis import HealthCheck, settings

from tests.contract import pytest_generate_tests  # noqa: F401

# A busy machine is no failure of a property.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")
