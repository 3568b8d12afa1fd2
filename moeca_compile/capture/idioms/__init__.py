"""The idioms of MoE dispatch that capture knows, in the order in which they are tried.

docs/extending/idiom.md tells how to write one. Nothing registers itself:
an idiom is in use once it stands here.
"""

from moeca_compile.capture.idioms import (
    bank,
    dense,
    expert_choice,
    expert_loop,
    gathered_weights,
    grouped_matmul,
    mask_loop,
    sorted_segments,
)
from moeca_compile.capture.idioms.base import Idiom

IDIOMS: tuple[Idiom, ...] = (
    sorted_segments.IDIOM,
    mask_loop.IDIOM,
    grouped_matmul.IDIOM,
    gathered_weights.IDIOM,
    dense.IDIOM,
    expert_choice.IDIOM,
    expert_loop.IDIOM,
    bank.IDIOM,
)
