"""Importing costs next to nothing until something is used."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.slow
def test_import_adds_at_most_a_tenth_of_a_second_to_transformers() -> None:
    program = (
        "import json, time; start = time.perf_counter(); import transformers; middle = time.perf_counter();"
        "import ropemods; print(json.dumps(time.perf_counter() - middle))"
    )
    assert statistics.median(json.loads(run(program)) for _ in range(5)) <= 0.1


def test_import_brings_in_no_heavy_package() -> None:
    program = (
        "import sys, ropemods, ropemods.settings.options, ropemods.cli;"
        "print(sorted({'torch', 'transformers', 'peft', 'deepspeed', 'datasets', 'accelerate'} & set(sys.modules)))"
    )
    assert run(program).strip() == "[]"


@pytest.mark.slow
def test_using_the_library_does_not_import_what_only_training_needs() -> None:
    program = (
        "import sys, ropemods; ropemods.apply, ropemods.from_pretrained, ropemods.TruncatedRoPE;"
        "print([name for name in ('peft', 'deepspeed', 'datasets') if name in sys.modules])"
    )
    assert run(program).strip() == "[]"


def test_help_and_mistakes_answer_without_torch() -> None:
    program = (
        "import sys; from ropemods.cli import main;"
        "lines = ['--help', '--version', 'show --help', 'apply --strenght 1'];"
        "codes = [main(line.split()) for line in lines];"
        "print(codes, 'torch' in sys.modules)"
    )
    assert run(program).strip().splitlines()[-1] == "[0, 0, 0, 2] False"


def test_every_public_name_is_where_it_is_said_to_be() -> None:
    import ropemods

    assert all(getattr(ropemods, name).__name__ == name for name in ropemods.__all__)


def test_no_module_has_the_name_of_a_public_function() -> None:
    """Importing ropemods.x sets the attribute x of the package, and a function of that name would be gone."""
    import pkgutil

    import ropemods

    assert not {module.name for module in pkgutil.iter_modules(ropemods.__path__)} & set(ropemods.__all__)


@pytest.mark.slow
def test_asking_whether_peft_is_installed_does_not_lose_the_record_of_an_adapter(tmp_path: Path) -> None:
    """transformers asks so whenever it likes, between `apply` and the first import of peft."""
    program = (
        "import importlib.util, os, sys; import ropemods as rm; from tests import zoo;"
        "model = rm.apply(zoo.build(), rm.TruncatedRoPE(0.5)); assert 'peft' not in sys.modules;"
        "importlib.util.find_spec('peft');"
        "from peft import LoraConfig, get_peft_model;"
        f"get_peft_model(model, LoraConfig(target_modules=['q_proj'])).save_pretrained({str(tmp_path)!r});"
        f"print(os.path.exists(os.path.join({str(tmp_path)!r}, 'ropemods.json')))"
    )
    assert run(program).strip() == "True"
