"""The notebook runs from first cell to last, as Jupyter runs it, and is kept without what a run leaves in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ropemods.training import smollm2
from ropemods.training.small_models import Architecture, train_tokenizer, write_untrained
from tests.recipes import tiny

TOUR = Path(__file__).resolve().parents[2] / "recipes" / "tour.ipynb"


def test_the_notebook_is_kept_as_it_was_written() -> None:
    text = TOUR.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"  # as Jupyter writes it
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    for cell in notebook["cells"]:
        assert not cell["metadata"] and not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_tells_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    tokenizer = train_tokenizer(tiny.documents(), vocab_size=tiny.VOCABULARY)
    shape = Architecture(vocab_size=tiny.VOCABULARY, hidden_size=64, num_hidden_layers=2, intermediate_size=128)
    write_untrained(shape, tokenizer, tmp_path / "tiny", length=256, seed=0)
    monkeypatch.setenv(smollm2.ELSEWHERE, str(tmp_path / "tiny"))
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    shutil.copy(TOUR, recipes)
    notebook = nbformat.read(recipes / TOUR.name, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(recipes)}}).execute()

    def shown(cell: str) -> dict[str, Any]:
        (outputs,) = (each.outputs for each in notebook.cells if each.id == cell)
        return {kind: text for output in outputs if "data" in output for kind, text in output.data.items()}

    for cell in ("before", "suggestion", "comparison"):
        assert 'class="ropemods"' in shown(cell)["text/html"], cell
        assert "application/vnd.jupyter.widget-view+json" in shown(cell), f"{cell} has a bar, drawn by the notebook"
    for cell in ("heads", "by_query"):
        assert shown(cell)["image/svg+xml"].startswith("<svg") and "<svg" in shown(cell)["text/html"], cell
    for cell in ("worst", "changes"):
        assert "dataframe" in shown(cell)["text/html"], cell
    assert "strength 0 " in shown("applied")["text/html"] and "strength 1 " in shown("modified")["text/html"]
    assert shown("kept")["text/html"] == shown("modified")["text/html"]
    assert (tmp_path / "runs" / "tour" / "comparison.html").is_file()
