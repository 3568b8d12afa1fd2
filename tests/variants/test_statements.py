"""A statement beside a dispatch leaves the layer captured, whichever way its dispatch is found."""

from __future__ import annotations

import pytest

from tests.variants.attention import Attending
from tests.variants.blocks import Blocking, Modelling
from tests.variants.check import check
from tests.variants.dispatch import Layering
from tests.variants.statements import STATEMENTS

DISPATCHES = ("mask_all", "sorted_item", "dense_stack", "choice_stack", "grouped")
"""Asking the host in forward, in another method, nothing at all with ids, nothing with choices, sizes of groups."""


@pytest.mark.sampled(16)
@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("name", STATEMENTS)
def test_a_statement_beside_a_dispatch(dispatch, name):
    layer = Layering(dispatch, beside=(name,))
    outcome = check(Modelling((Blocking(Attending(), layer),)), {"full_every": 3})
    assert outcome.steps > 0 or outcome.close
