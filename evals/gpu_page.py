"""What a GPU has shown, as the part of evals/bench.md between its marks."""

from __future__ import annotations

from typing import Any

from ropemods.report.words import markdown_table

MARKS = "<!-- gpu -->", "<!-- end of gpu -->"
CALLS = ("subject", "path", "kind", "T", "D", "time", "min to max", "floor", "memory", "stock")
MEASURED = ("model", "time", "min to max", "memory")
STEPS = ("model", "path", "modification", "time", "min to max", "memory")


def page(found: dict[str, Any]) -> str:
    """`found` is what `gpu.gathered` returns."""
    checks = found["correct"]
    held = {name for name, each in checks.items() if each.get("holds")}
    paths = dict.fromkeys(name.split("/")[1] for name in checks)
    tally = "; ".join(f"`{path}` {_of(path, held)} of {_of(path, checks)}" for path in paths)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    wrong = [(name.removeprefix("correct/"), _excess(each)) for name, each in checks.items() if name not in held]
    calls = [call(row) for rows in found["bench"].values() if isinstance(rows, list) for row in rows]
    steps = [(*name.split("/")[1:], *_ratio(each)) for name, each in found["steps"].items() if "ratio" in each]
    measured = [
        (name.split("/")[1], *_ratio(each)) for name, each in found.get("measure", {}).items() if "ratio" in each
    ]
    return "\n\n".join(
        (
            f"{found['machine']}; {versions}.",
            f"**Correct**: at most twice as far from fp64 as stock attention are {len(held)} of {len(checks)} cases "
            f"({tally}). Those that are not, by their error over stock's in output, dq, dk and dv:",
            markdown_table(("case", "ours / stock's"), wrong),
            "**One call**, bf16, 32 heads on 8, over the fastest stock kernel of the machine:",
            markdown_table(CALLS, calls),
            "**A whole training step**, autocast in bf16, over the stock step:",
            markdown_table(STEPS, steps),
            *(
                ("**Measuring leakage**, over a plain forward of the same tokens:", markdown_table(MEASURED, measured))
                if measured
                else ()
            ),
        )
    )


def _of(path: str, names: Any) -> int:
    return sum(name.split("/")[1] == path for name in names)


def _excess(check: dict[str, Any]) -> str:
    if "failed" in check:
        return check["failed"]
    return " ".join(f"{ours / stock:.2f}" for ours, stock in zip(check["ours"], check["stock"], strict=True))


def call(row: dict[str, Any]) -> tuple[str, ...]:
    shape, floor = row["shape"], row["floor"]
    return (
        *(row["subject"], row["path"], row["kind"], str(shape["length"]), str(shape["head_dim"])),
        *_ratio(row)[:2],
        "–" if floor is None else f"{floor:.2f}",
        _ratio(row)[2],
        f"{row['stock'].removesuffix('_attention')}, {row['ratio']['first_ms']:.2f} ms",
    )


def _ratio(row: dict[str, Any]) -> tuple[str, str, str]:
    ratio = row["ratio"]
    return f"{ratio['median']:.2f}", f"{ratio['low']:.2f} to {ratio['high']:.2f}", f"{row['memory']:.2f}"
