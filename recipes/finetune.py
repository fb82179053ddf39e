"""Fine-tune a model with modifications of its positional encoding, and find out fairly what they did.

    python recipes/finetune.py --config recipes/smoke.yaml
    torchrun --nproc_per_node 2 recipes/finetune.py --config recipes/smoke.yaml
    accelerate launch --config_file recipes/accelerate/deepspeed_zero2.yaml recipes/finetune.py --config RECIPE
    deepspeed --num_gpus 8 recipes/finetune.py --config RECIPE --deepspeed recipes/deepspeed/zero3.json

The YAML file says everything; any key may be overridden by a flag (`--learning_rate 1e-5`, `--schedule.steps 100`,
`--arms control modified`, `--seeds 3`). After a crash, `--resume_from_checkpoint` goes on where it stopped.

What happens (`ropemods/training/__main__.py`, step by step):

1. `session.begin`: the recipe is checked, its modifications are tried on the architecture without weights, the text
   becomes rows of tokens, and documents that never train are set apart.
2. `run_arm`, once an arm and seed: base, untrained, control, modified. Each trained arm is saved, read back, found
   equal to the model in memory, and measured as read back.
3. `write_results`: the table, the comparison of modified with control, the model cards, everything as JSON.

What is left in `output_dir`:

    data/                               the rows, and the documents that never trained
    ARM-SEED/model                      the trained model with its card
    ARM-SEED/report.json, result.json   what was measured of it
    table.md                            the one table
    comparison.md, comparison.html      modified against control, with intervals
    results.json                        all of it with versions, seeds, protocol hash and the command
"""

from __future__ import annotations

import sys

from ropemods.training.__main__ import run

if __name__ == "__main__":
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__)
    run(sys.argv[1:])
