"""Train the emoji DiT (or, with --classifier, the classifier) and write its checkpoint.

python examples/emoji/train.py                # hours on one CPU core
python examples/emoji/train.py --classifier   # minutes
python examples/emoji/train.py --resume       # goes on where a run was stopped; or on, with more --steps
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root instead of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.emoji.testbed import EMOJI
from examples.testbed.train import main

if __name__ == "__main__":
    sys.exit(main(EMOJI, text=__doc__))
