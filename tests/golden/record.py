"""Record the golden values of this machine's numerics: `python tests/golden/record.py`.

Values are added under a digest of the numerics, so those of other kinds of CPU stay. Run it in a
work tree of the commit whose values must not change, never to make a failing test pass.
"""

import json
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from tests.exact import numerics
from tests.golden.recipes import ENTRIES, golden_run

VALUES = Path(__file__).parent / "recipes.json"


def main() -> None:
    """Train every recipe, and write what came out."""
    torch.set_num_threads(1)
    known = json.loads(VALUES.read_text()) if VALUES.exists() else {}
    known[numerics()] = {name: golden_run(entry)._asdict() for name, entry in ENTRIES.items()}
    VALUES.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
