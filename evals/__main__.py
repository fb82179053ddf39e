"""The evidence, by command.

    python -m evals run --scale nano --data ../shared/data                  every program
    python -m evals run max_retrieval --scale nano --data ../shared/data    one of them
    python -m evals page                                                    README.md from the results at hand

DATA is a folder with models/ and text/. A run goes on where it stopped: finished cells are under runs/evals/.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evals import claim, page


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run programs and write their result files")
    running.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(claim.PROGRAMS)}; all if none")
    running.add_argument("--scale", default="nano")
    running.add_argument("--data", type=Path, required=True)
    commands.add_parser("page", help="write README.md from the result files")
    options = parser.parse_args()
    if options.command == "page":
        print(f"wrote {page.write()}")
        return 0
    if not (options.data / "text").is_dir():
        parser.error(f"--data {options.data}: no folder text/ in it")
    for name in options.names or claim.PROGRAMS:
        try:
            path = claim.run(
                name, options.scale, options.data, say=lambda line, name=name: print(name, line, flush=True)
            )
        except claim.Unavailable as lack:
            print(f"{name} skipped: {lack}", flush=True)
        else:
            print(f"wrote {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
