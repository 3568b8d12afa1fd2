"""The compiled parts of a model's steps.

A part that equals one at hand is not compiled again, whatever kind of step it is in. One that differs from a known
one in a size alone (lower.sizes), of the batch or of the tokens that a step recomputes, is compiled for all sizes.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from torch import Tensor, fx

from moeca_compile._torch_private import compile_for_sizes, compile_graph
from moeca_compile.disk.keys import digest, modes
from moeca_compile.lower.executor import Compiled
from moeca_compile.lower.sizes import Family, Numbers, examples_at, with_sizes, without_sizes
from moeca_compile.text import first_line

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Code:
    """Code that is there as long as a step that calls it.

    Attributes:
        code: a weak reference to it; it is called with the sizes first.
        family: the graphs that it is for.
        numbers: of the one as which it was compiled.
        holds: whether nothing that it was specialized for excludes these sizes.
    """

    code: Callable[[], Compiled | None]
    family: Family
    numbers: Numbers
    holds: Callable[[Numbers], bool] = lambda sizes: True

    def at(self, numbers: Numbers) -> Compiled | None:
        """The code for a graph with these numbers; None where it is for others, or gone."""
        code, sizes = self.code(), self.family.sizes(numbers)
        if code is None or sizes is None or not self.holds(sizes):
            return None
        return partial(code, *sizes) if sizes else code


@dataclass
class _Alike:
    """What is known of parts of one structure: code, and graphs that have none here."""

    codes: list[_Code] = field(default_factory=list)
    noted: list[Family] = field(default_factory=list)
    refused: list[Family] = field(default_factory=list)
    """Those for which no code could be made."""

    def code(self, numbers: Numbers) -> Compiled | None:
        return next(filter(None, (each.at(numbers) for each in self.codes)), None)

    @property
    def families(self) -> list[Family]:
        """All known, those of the most sizes first."""
        found = [*(each.family for each in self.codes), *self.noted]
        return sorted(found, key=lambda family: -len(family.places))

    def family_for(self, numbers: Numbers) -> Family | None:
        """The family as which a graph with these numbers is compiled for all sizes; None where it cannot be.

        It may be a noted one: another process has compiled that, or will.
        """
        noted = [each for each in self.noted if each.places and each.sizes(numbers) is not None]
        grown = (each.with_another(numbers) for each in self.families)
        return next((each for each in (*noted, *filter(None, grown)) if each not in self.refused), None)


class Part(Protocol):
    """A graph that is compiled."""

    def module(self) -> fx.GraphModule:
        """The graph: (inputs...) -> [outputs]."""

    def examples(self) -> list[Tensor]:
        """Tensors like the inputs, real or fake."""


class Parts:
    """The compiled parts of one model. Call it under Dynamo's lock."""

    def __init__(self) -> None:
        self.compiled = 0
        """How many parts Inductor was asked for."""
        self._known: dict[str, _Alike] = {}

    def code(
        self,
        part: Part,
        random: bool,
        all_sizes: bool,
        on_code: Callable[[str], None] | None = None,
    ) -> Compiled:
        """The code of a part.

        Args:
            random: whether its ops draw the random numbers that they draw in eager mode.
            all_sizes: whether one code may serve several sizes.
            on_code: called with the path of Inductor's code, which is written anew for that.
        """
        if on_code is not None:
            self.compiled += 1
            return compile_graph(part.module(), part.examples(), on_code, random)
        alike, numbers = self._alike(part, random)
        found = alike.code(numbers)
        if found is not None:
            return found
        self.compiled += 1
        family = alike.family_for(numbers) if all_sizes else None
        made = _for_all_sizes(part, numbers, random, family) if family is not None else None
        if made is None:
            alike.refused += [family] if family is not None else []
            code = compile_graph(part.module(), part.examples(), None, random)
            alike.codes.append(_Code(weakref.ref(code), Family.of(numbers), numbers))
            return code
        code, sizes, holds = made
        alike.codes.append(_Code(weakref.ref(code), family or Family.of(numbers), numbers, holds))
        return partial(code, *sizes)

    def joins(self, part: Part, random: bool) -> bool:
        """Whether a part is of a family that is known, or differs from one in a size alone."""
        alike, numbers = self._alike(part, random)
        known = any(each.sizes(numbers) is not None for each in alike.families)
        return known or alike.family_for(numbers) is not None

    def note(self, part: Part, random: bool, families: Sequence[Family] = ()) -> None:
        """Note that this part will be compiled, or those families of its structure."""
        alike, numbers = self._alike(part, random)
        given = families or [alike.family_for(numbers) or Family.of(numbers)]
        alike.noted += [each for each in given if each not in alike.noted]

    def missing(self, parts: Sequence[Part], random: bool) -> list[tuple[Part, list[Family]]]:
        """The parts that are not compiled yet, each with the families that may differ from it in a size alone."""
        found = [(part, *self._alike(part, random)) for part in parts]
        return [(part, alike.families) for part, alike, numbers in found if alike.code(numbers) is None]

    def for_all_sizes(self, code: Compiled | None) -> tuple[Numbers, Any]:
        """For code that serves several sizes, the numbers as which it was compiled, and their terms; else nothing."""
        function = getattr(code, "func", None)
        every = (each for alike in self._known.values() for each in alike.codes if function is not None)
        return next(((each.numbers, each.family) for each in every if each.code() is function), ((), ()))

    def _alike(self, part: Part, random: bool) -> tuple[_Alike, Numbers]:
        """What is known of parts of this structure, and the numbers of this one."""
        structure, numbers = without_sizes(part.module(), part.examples())
        alike = self._known.setdefault(digest(structure, random, modes()), _Alike())
        alike.codes[:] = [each for each in alike.codes if each.code() is not None]
        return alike, numbers


def _for_all_sizes(
    part: Part, numbers: Numbers, random: bool, family: Family
) -> tuple[Compiled, Numbers, Callable[[Numbers], bool]] | None:
    """Code of this part for its whole family; None where there is none.

    Returns the code, which is called with the sizes first, the sizes of this part, and whether it is right for other
    sizes.
    """
    sizes = family.sizes(numbers)
    if sizes is None:
        return None
    examples = partial(examples_at, part.examples(), family)
    try:
        code, holds = compile_for_sizes(with_sizes(part.module(), family), examples, sizes, random)
    except Exception as error:
        _log.debug("a part is compiled for each size: %s", first_line(error), exc_info=True)
        return None
    if not holds(sizes):
        _log.debug("a part is compiled for each size: its code is for one alone")
        return None
    return code, sizes, holds
