"""Train the digits DiT (or, with --classifier, the classifier) and write its checkpoint.

python examples/digits/train.py                # about 50 minutes on one CPU core
python examples/digits/train.py --classifier   # under a minute
python examples/digits/train.py --resume       # goes on where a run was stopped
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root instead of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.digits.testbed import DIGITS
from examples.testbed.train import main

if __name__ == "__main__":
    sys.exit(main(DIGITS, text=__doc__))
