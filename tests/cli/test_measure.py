"""`ropemods measure`, `compare` and `suggest`: the words of the library, on files, whole or not at all."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import ropemods as rm
from ropemods.cli import load
from ropemods.cli.measure import Options
from ropemods.leakage.protocol import Protocol
from ropemods.training.recipe_file import from_command_line
from tests import zoo
from tests.cli.program import ENVIRONMENT, PROGRAM, hidden, refused, run, save_tiny, save_tokenizer, start

SMALL = "--sequences 16 --groups 8 --length 32 --early 8 16 --grid_rows 12 --replicates 100"


@pytest.fixture
def texts(here: Path) -> Path:
    """A tiny model in `model`, and documents in `books.jsonl`."""
    draw = random.Random(0)
    rows = (" ".join(f"w{draw.randrange(3, zoo.VOCAB)}" for _ in range(200)) for _ in range(24))
    (here / "books.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return here


def test_measure_prints_the_report_that_the_library_gives_and_writes_it(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(f"measure model --text books.jsonl {SMALL} --output report.json --html report.html --batch_size 4")
    printed = capsys.readouterr().out
    report = rm.Report.from_json("report.json")
    assert report.to_markdown() in printed and "wrote report.json" in printed
    assert report.model.name == "model" and report.text.source == "books.jsonl"
    assert "<html" in Path("report.html").read_text()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    protocol = Protocol(sequences=16, groups=8, length=32, early=(8, 16), grid_rows=12, replicates=100, batch_size=4)
    model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
    same = rm.measure(model, tokenizer, "books.jsonl", protocol, progress=False)
    assert report.terms["residual"].all == same.terms["residual"].all and report.protocol_hash == protocol.hash()


def test_the_flags_of_measure_default_to_the_protocol() -> None:
    assert Options(model="m", text="t").protocol() == Protocol()
    assert Options(model="m", text="t", control_text=True, skip_mask=True).protocol() == Protocol(
        text="unigram", mask_term=False
    )


@pytest.mark.parametrize("what", ["modified", "adapter", "stock adapter"])
def test_measure_reads_modified_checkpoints_and_adapters(texts: Path, adapter: torch.Tensor, what: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if what == "modified":
        run("apply model tuned --mods truncated_rope:keep=0.5")
    elif what == "adapter":
        os.rename("adapter", "tuned")
    else:
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained("model"), config).save_pretrained("tuned")
    run(f"measure tuned --text books.jsonl {SMALL} --output tuned.json --skip_mask")
    report = rm.Report.from_json("tuned.json")
    assert [mod["kind"] for mod in report.model.mods] == ([] if what == "stock adapter" else ["truncated_rope"])
    run(f"measure model --text books.jsonl {SMALL} --output stock.json --skip_mask")
    assert rm.Report.from_json("stock.json").terms["total"].all.value != report.terms["total"].all.value


def test_what_follows_from_other_options_fits_them() -> None:
    asked = Options(model="m", text="t", sequences=48, length=64).protocol()
    assert asked == Protocol(sequences=48, length=64, groups=24, early=(8, 32), grid_rows=56)


def test_a_report_goes_to_standard_output_and_to_nowhere(texts: Path) -> None:
    words = f"measure model --text books.jsonl {SMALL} --skip_mask --output /dev/stdout --html /dev/null".split()
    done = subprocess.run([*PROGRAM, *words], env=ENVIRONMENT, cwd=texts, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report, end = json.JSONDecoder().raw_decode(done.stdout)
    assert report["schema"] and "# Leakage of model" in done.stdout[end:]
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("names", ["zero reference", "zero,reference", "zero, reference"])
def test_interventions_and_controls_run_on_request(texts: Path, capsys: pytest.CaptureFixture[str], names: str) -> None:
    run(f"measure model --text books.jsonl {SMALL} --interventions {names} --reference 3 --controls")
    printed = capsys.readouterr().out
    assert "random token, mean of 3" in printed and "position 0 across prompts" in printed


def test_short_documents_are_joined_when_asked(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(1)
    short = (" ".join(f"w{draw.randrange(3, zoo.VOCAB)}" for _ in range(9)) for _ in range(2000))
    (texts / "short.txt").write_text("\n\n".join(short))
    words = f"measure model --text short.txt --separator blank-line {SMALL}"
    assert "too little text" in refused(words, capsys)
    run(words + " --join")
    assert "were joined" in capsys.readouterr().out


def test_compare_says_what_changed_and_refuses_other_protocols(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("apply model cut --mods truncated_rope:keep=0.5")
    run(f"measure model --text books.jsonl {SMALL} --output before.json")
    run(f"measure cut --text books.jsonl {SMALL} --output after.json")
    capsys.readouterr()
    run("compare before.json after.json --html page.html --output comparison.json")
    assert rm.compare("before.json", "after.json").to_markdown() in capsys.readouterr().out
    assert json.loads(Path("comparison.json").read_text())["kind"] == "comparison"
    run(f"measure cut --text books.jsonl {SMALL} --seed 1 --output other.json")
    assert "seed" in refused("compare before.json other.json", capsys)
    run("compare before.json other.json --allow_different_protocols")
    assert "after.jso" in refused("compare before.json after.jso", capsys)


def test_suggest_prints_bands_and_proposals(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("suggest model --text books.jsonl --length 16 --crop 64 --sequences 8 --max_phase 2 --output s.json")
    assert "wavelength, tokens" in capsys.readouterr().out
    assert json.loads(Path("s.json").read_text())["length"] == 16


@pytest.mark.parametrize("config", ["{", "{}"])
def test_a_config_that_is_no_models_is_told(texts: Path, capsys: pytest.CaptureFixture[str], config: str) -> None:
    Path("model/config.json").write_text(config)
    assert "damaged or no model's" in refused("measure model --text books.jsonl", capsys)


def test_suggest_tries_things_and_ends_in_a_recipe(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ropemods.leakage.tries.menu", lambda: (rm.TruncatedRoPE(0.5), rm.UnrotatedBos()))
    words = "suggest model --text books.jsonl --length 16 --crop 64 --sequences 8"
    assert "add --try" in refused(f"{words} --html page.html", capsys)
    run(f"{words} --try --try_sequences 16 --try_length 64 --html page.html")
    printed = capsys.readouterr().out
    assert "UnrotatedBos()" in printed and "wrote suggested.yaml" in printed
    assert "<html" in Path("page.html").read_text()
    run("train suggested.yaml --print_only")
    assert from_command_line(["--config", "suggested.yaml"]).options.data == "books.jsonl"
    assert "--recipe" in refused(f"{words} --try", capsys)


def test_mistakes_are_answered_before_anything_is_measured(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the folder no does not exist" in refused("measure model --text books.jsonl --output no/report.json", capsys)
    assert "it is a folder" in refused("measure model --text books.jsonl --output model", capsys)
    assert "written over books.jsonl" in refused("measure model --text books.jsonl --output ./books.jsonl", capsys)
    assert "written over books.jsonl" in refused("suggest model --text books.jsonl --output books.jsonl", capsys)
    assert "written over r" in refused("measure model --text books.jsonl --output r --html ./r", capsys)
    assert "nothing that ropemods wrote" in refused(
        "measure model --text books.jsonl --output model/config.json", capsys
    )
    assert "sequences=97" in refused("measure model --text books.jsonl --sequences 97", capsys)
    assert "use 96 or 128" in refused("measure model --text books.jsonl --sequences 100 --groups 32", capsys)
    assert "no intervention 'zeros'" in refused("measure model --text books.jsonl --interventions zeros", capsys)
    assert "no such file" in refused("measure model --text book.jsonl", capsys)
    assert "--text" in refused("measure model", capsys)
    save_tokenizer(save_tiny(texts / "other"), bos=False)
    os.remove("other/tokenizer.json")
    os.remove("other/tokenizer_config.json")
    assert "--tokenizer" in refused("measure other --text books.jsonl", capsys)


def test_an_interrupted_measurement_writes_nothing(texts: Path) -> None:
    words = "measure model --text books.jsonl --sequences 4096 --length 32 --early 8 16 --grid_rows 12 --batch_size 1"
    before = {path.name for path in texts.iterdir()}
    big = " ".join(f"w{n % 58 + 3}" for n in range(400_000))
    (texts / "books.jsonl").write_text(json.dumps({"text": big}) + "\n")
    process = start(*words.split(), "--output", "report.json", cwd=texts)
    time.sleep(9)
    assert process.poll() is None, process.stderr and process.stderr.read()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    assert {path.name for path in texts.iterdir()} == before and not hidden(texts)


@pytest.mark.slow
def test_two_ranks_write_one_report(texts: Path) -> None:
    words = f"measure model --text books.jsonl {SMALL} --interventions none".split()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    two = subprocess.run(
        [*launch, *PROGRAM[1:], *words, "--output", "two.json"],
        env=environment,
        cwd=texts,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert two.returncode == 0, two.stderr[-2000:]
    assert two.stdout.count("# Leakage of model") == 1
    run(f"measure model --text books.jsonl {SMALL} --output one.json")
    one, other = (rm.Report.from_json(f"{name}.json") for name in ("one", "two"))
    for name, term in one.terms.items():
        assert term.all.value == pytest.approx(other.terms[name].all.value, rel=1e-5, abs=1e-9)
        assert term.all.low == pytest.approx(other.terms[name].all.low, rel=1e-5, abs=1e-9)


@pytest.mark.slow
def test_the_examples_in_the_help_texts_run(texts: Path) -> None:
    draw = random.Random(1)
    words = [f"w{n}" for n in range(3, zoo.VOCAB)]
    rows = (" ".join(draw.choices(words, k=2500)) for _ in range(120))
    (texts / "books.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (texts / "HuggingFaceTB").mkdir()
    os.rename("model", "HuggingFaceTB/SmolLM2-135M")
    for name in ("measure", "suggest"):
        for line in textwrap.dedent(load(name).example).strip().splitlines():
            run(line.removeprefix("ropemods "))
    os.link("before.json", "after.json")
    for line in textwrap.dedent(load("compare").example).strip().splitlines():
        run(line.removeprefix("ropemods "))
    assert {"before.json", "before.html", "comparison.html"} <= {path.name for path in texts.iterdir()}
