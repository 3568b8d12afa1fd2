"""Write the graph after each stage of compilation to text files, and a page that links them (option `dump`).

    folder/index.html                      the graphs compiled so far
    folder/graph-1/index.html              the stages of one graph at one set of input shapes
    folder/graph-1/00-dynamo.txt, 01-exported.txt, ...

Nothing is overwritten: each graph has a folder of its own. The page is complete after every stage, also when the
next stage fails.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from html import escape
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import fx

from moeca_compile.options import ConfigError
from moeca_compile.passes.graph_text import graph_text, region_marks
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.runner import PassResult
from moeca_compile.text import plural, seconds

log = logging.getLogger(__name__)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px sans-serif; margin: 2em auto; max-width: 60em; }}
td, th {{ padding: 0.2em 1.5em 0.2em 0; text-align: left; vertical-align: top; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


class Dump:
    """Writes nothing: the dump where the option is None."""

    def graph(
        self, stage: str, graph: fx.Graph | fx.GraphModule, note: str = "", inputs: Sequence[str] | None = None
    ) -> None:
        """Show the graph after a stage.

        Args:
            note: what the stage did, for the page.
            inputs: names for the placeholders, in order, where their own say nothing.
        """

    def after_pass(self, result: PassResult, graph: fx.Graph) -> None:
        """Show the graph after a normalizing pass that rewrote something."""

    def regions(self, stage: str, graph: fx.Graph, regions: Regions) -> None:
        """Show the graph with its regions, and what was skipped and why."""

    def code(self, stage: str, path: str | Path) -> None:
        """Show the code that Inductor wrote to a file of its own."""

    def code_of(self, step: str) -> Callable[[str], None] | None:
        """A function to call with the paths of a step's code; None where the code is not dumped."""
        return None


@dataclass(frozen=True)
class _Stage:
    name: str
    file: str
    size: str
    note: str


Shown = TypeVar("Shown", bound=Callable[..., None])


def _never_raises(show: Shown) -> Shown:
    """What cannot be shown, or written to a full disk, must not stop the compilation that it is to explain."""

    @wraps(show)
    def shown(self: FolderDump, stage: str, *args: Any, **kwargs: Any) -> None:
        try:
            show(self, stage, *args, **kwargs)
        except Exception as error:
            log.warning("the dump in %s lacks the stage %r: %s", self.folder, stage, error, exc_info=True)

    return cast(Shown, shown)


class FolderDump(Dump):
    """Writes each stage to a file in `folder`, which must exist, and links it from index.html there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stages: list[_Stage] = []
        self._write_page()

    @_never_raises
    def graph(
        self, stage: str, graph: fx.Graph | fx.GraphModule, note: str = "", inputs: Sequence[str] | None = None
    ) -> None:
        graph = graph.graph if isinstance(graph, fx.GraphModule) else graph
        self._add(stage, graph_text(graph, inputs=inputs), plural(len(graph.nodes), "node"), note)

    def after_pass(self, result: PassResult, graph: fx.Graph) -> None:
        if result.matches:
            self.graph(f"pass {result.name}", graph, f"{result.matches} rewritten, {seconds(result.seconds)}")

    @_never_raises
    def regions(self, stage: str, graph: fx.Graph, regions: Regions) -> None:
        found = [
            f"{len(regions.attentions)} attention",
            f"{len(regions.experts)} experts",
            f"{sum(len(layer.shared) for layer in regions.experts)} shared expert",
            f"{len(regions.feedforwards)} feedforward",
            f"{len(regions.skipped)} skipped",
        ]
        times = ", ".join(node.name for node in regions.timesteps) or "none found"
        head = [f"# timestep: {times}", f"# {', '.join(found)}"]
        head += [f"# skipped {s.kind} {s.name}: {s.reason}" for s in regions.skipped]
        text = "\n".join([*head, "", graph_text(graph, region_marks(graph, regions))])
        self._add(stage, text, plural(len(graph.nodes), "node"), ", ".join(found))

    @_never_raises
    def code(self, stage: str, path: str | Path) -> None:
        code = Path(path).read_text(encoding="utf-8")
        self._add(stage, f"# copied from {path}\n{code}", plural(code.count("\n"), "line"), f"copied from {path}")

    def code_of(self, step: str) -> Callable[[str], None] | None:
        return partial(self.code, f"code {step}")

    def _add(self, name: str, text: str, size: str, note: str) -> None:
        file = f"{len(self.stages):02}-{re.sub('[^a-zA-Z0-9_+]+', '-', name).strip('-')}.txt"
        (self.folder / file).write_text(text, encoding="utf-8")
        self.stages.append(_Stage(name, file, size, note))
        self._write_page()
        log.debug("wrote %s", self.folder / file)

    def _write_page(self) -> None:
        rows = [
            f'<tr><td><a href="{stage.file}">{escape(stage.name)}</a></td><td>{stage.size}</td>'
            f"<td>{escape(stage.note)}</td></tr>"
            for stage in self.stages
        ]
        head = "<tr><th>stage</th><th>size</th><th>what it did</th></tr>"
        _write(self.folder, self.folder.name, "\n".join(["<table>", head, *rows, "</table>"]))


def open_dump(folder: str | Path | None) -> Dump:
    """The dump of one graph: into a new folder inside `folder`, or nowhere where that is None.

    Raises ConfigError where the folder cannot be made or written to. Call it before anything is compiled.
    """
    if folder is None:
        return Dump()
    root = Path(folder).resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
        dump = FolderDump(_new_folder(root))
        graphs = sorted(root.glob("graph-*/"), key=lambda path: (len(path.name), path.name))
        links = [f'<li><a href="{path.name}/index.html">{path.name}</a></li>' for path in graphs]
        _write(root, "Compiled graphs", "\n".join(["<ul>", *links, "</ul>"]))
    except OSError as error:
        reason = f"allowed is None or a folder that can be made and written to ({error.strerror})"
        raise ConfigError("dump", str(folder), reason) from error
    log.debug("graphs are dumped to %s", dump.folder)
    return dump


def _new_folder(root: Path) -> Path:
    for number in count(1):
        folder = root / f"graph-{number}"
        try:
            folder.mkdir()
        except FileExistsError:  # another graph has it, in this process or another
            continue
        return folder
    raise AssertionError("there is always a next number")


def _write(folder: Path, title: str, body: str) -> None:
    (folder / "index.html").write_text(_PAGE.format(title=title, body=body), encoding="utf-8")
