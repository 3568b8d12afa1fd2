"""Sample emoji with and without caching, and print speed-ups and quality.

python examples/emoji/sample.py
python examples/emoji/sample.py --recipe moeca --recipe fora-forecast --sampler ddpm --json figures.json
torchrun --nproc-per-node 2 examples/emoji/sample.py    # the images are divided over two processes
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root instead of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.emoji.testbed import EMOJI
from examples.testbed.sample import main

if __name__ == "__main__":
    sys.exit(main(EMOJI, text=__doc__))
