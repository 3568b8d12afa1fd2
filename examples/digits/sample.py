"""Sample digits with and without caching, and print speed-ups and quality.

python examples/digits/sample.py
python examples/digits/sample.py --recipe moeca --recipe fora-forecast --sampler ddpm --json figures.json
torchrun --nproc-per-node 2 examples/digits/sample.py    # the images are divided over two processes
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root instead of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.digits.testbed import DIGITS
from examples.testbed.sample import main

if __name__ == "__main__":
    sys.exit(main(DIGITS, text=__doc__))
