"""lm-eval runs a modified checkpoint as it is, with BOS where the modifications need it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from evals import harness
from evals.claim import Unavailable

DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
PROTOCOL = harness.PROTOCOL["nano"] | {"questions": 4}


def test_without_lm_eval_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"pip install 'ropemods\[eval\]'"):
        harness.run("nano", DATA, None)


def test_the_harness_sees_the_modified_model_and_its_bos() -> None:
    pytest.importorskip("lm_eval", reason=harness.MISSING)
    if not DATA.is_dir():
        pytest.skip(f"needs the trained models in {DATA.name}/")
    logging.disable(logging.WARNING)
    try:
        stock, modified = (harness.one(DATA, PROTOCOL, modified=m) for m in (False, True))
    finally:
        logging.disable(logging.NOTSET)
    for found in (stock, modified):
        assert found["rows"] == found["rows_with_one_bos_in_front"] == 4 * 4
        assert found["largest_difference_to_the_model"] <= harness.ROUNDING
    assert stock["log_likelihoods"] != modified["log_likelihoods"]
    assert modified["without_bos"].startswith("refused") and "BOS" in modified["without_bos"]
