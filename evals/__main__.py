"""The evidence, by command.

    python -m evals run --scale nano --data ../shared/data                  every program
    python -m evals run max_retrieval --scale nano --data ../shared/data    one of them
    python -m evals page                                                    README.md from the results at hand
    python -m evals gpu --minutes 8 --out FOLDER                            what only a GPU can show

DATA is a folder with models/ and text/. A run goes on where it stopped: finished cells are under runs/evals/. With
--workers 2, two processes share the cells of each program, and what measures time is run after them, alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
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
    running.add_argument("--workers", type=int, default=1, help="processes that share the work (default: 1)")
    commands.add_parser("page", help="write README.md from the result files")
    commands.add_parser("gpu", help="what only a GPU can show; see python -m evals gpu --help", add_help=False)
    options, rest = parser.parse_known_args()
    if options.command == "gpu":
        import torch

        if not torch.cuda.is_available():  # a rehearsal; read when the kernels are imported
            os.environ.setdefault("TRITON_INTERPRET", "1")
        from evals.gpu import main as gpu

        return gpu(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "page":
        print(f"wrote {page.write()}")
        return 0
    if not (options.data / "text").is_dir():
        parser.error(f"--data {options.data}: no folder text/ in it")
    names = options.names or list(claim.PROGRAMS)
    if options.workers > 1:
        shared = [name for name in names if not claim.alone(name)]
        if shared and not together(shared, options):
            return 1
        names = [name for name in names if name not in shared]
    for name in names:
        try:
            path = claim.run(
                name, options.scale, options.data, say=lambda line, name=name: print(name, line, flush=True)
            )
        except claim.Unavailable as lack:
            print(f"{name} skipped: {lack}", flush=True)
        else:
            print(f"wrote {path}", flush=True)
    return 0


def together(names: list[str], options: argparse.Namespace) -> bool:
    """Whether all of several processes, each with its share of the cores, ran these programs to the end."""
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.workers))}
    command = [sys.executable, "-m", "evals", "run", *names, "--scale", options.scale, "--data", str(options.data)]
    workers = [subprocess.Popen(command, env=environment) for _ in range(options.workers)]
    return all([worker.wait() == 0 for worker in workers])


if __name__ == "__main__":
    sys.exit(main())
