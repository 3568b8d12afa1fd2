"""Capture: a model whose MoE dispatch breaks Dynamo's graph becomes one graph with marker ops.

    install.py    wraps the methods that an idiom recognizes (idioms/: one file an idiom)
    gate.py       is this trace for our backend?
    trust.py      is the equivalent right for this layer? checked with numbers
    refusals.py   what was left as it was, and why
    suspects.py   what looks like dispatch but matches no idiom
    wrapping.py   what stands for a method: in which order idioms and running are tried
    running/      layers whose code no idiom reads are run, and captured by what they computed

The methods' code is read by source.py and dataflow.py; site.py and pair_site.py find the dispatch in it, and
rewriting.py, expert_code.py and turns.py replace it. No model's code is edited: eager and every other
backend run it as it is.
"""

from moeca_compile.capture.install import install, uninstall
from moeca_compile.capture.refusals import CaptureWarning, Refusal, refusals

__all__ = ["CaptureWarning", "Refusal", "install", "refusals", "uninstall"]
