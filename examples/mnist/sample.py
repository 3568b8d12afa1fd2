"""Sample MNIST digits with and without caching, and print speed-ups and quality.

python examples/mnist/sample.py
python examples/mnist/sample.py --recipe moeca --recipe fora-forecast --sampler ddpm --json figures.json
torchrun --nproc-per-node 2 examples/mnist/sample.py    # the images are divided over two processes
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root instead of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.mnist.testbed import MNIST
from examples.testbed.sample import main

if __name__ == "__main__":
    sys.exit(main(MNIST, text=__doc__))
