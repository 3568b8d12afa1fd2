"""What compilation makes of a graph, as files and a page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from moeca_compile._torch_private import compile_graph
from moeca_compile.options import ConfigError
from moeca_compile.passes.dump import Dump, open_dump
from moeca_compile.passes.export import to_functional_aten
from moeca_compile.passes.match.match_regions import match_regions
from moeca_compile.passes.runner import PassResult, normalize
from tests.harness import Captured, captured, exported, placeholders
from tests.models import CappedAttention, make_inputs, make_model

REASON = "its scores are not products of queries and keys with scales, biases and masks only"


@pytest.fixture(scope="module")
def capped() -> Captured:
    """The model of the tests with one attention that cannot be cached."""
    model = make_model()
    model.blocks[2].attn = CappedAttention(32, 4).eval().requires_grad_(False)
    noise, labels = make_inputs(model)
    return captured(model, noise, torch.ones(len(noise)), labels)


def show_stages(graph: Captured, dump: Dump) -> None:
    """The stages up to matching, as compilation shows them."""
    dump.graph("dynamo", graph.gm)
    gm = to_functional_aten(graph.gm, graph.inputs)
    dump.graph("exported", gm)
    normalize(gm.graph, after=dump.after_pass)
    arguments = {node for node, user in zip(placeholders(gm), graph.user_inputs, strict=True) if user}
    dump.regions("regions", gm.graph, match_regions(gm.graph, arguments))


@pytest.fixture(scope="module")
def folder(capped: Captured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dump")
    show_stages(capped, open_dump(folder))
    return folder


class Links(HTMLParser):
    """The links of a page. Fails where tags do not close."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name == "href"]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_each_stage_has_a_file_and_the_page_links_them_in_order(folder: Path):
    page = Links(folder / "graph-1" / "index.html")
    assert page.links == [
        "00-dynamo.txt",
        "01-exported.txt",
        "02-pass-collapse_views.txt",
        "03-pass-split_to_slices.txt",
        "04-pass-reshape_views.txt",
        "05-regions.txt",
    ]
    files = {path.name for path in (folder / "graph-1").iterdir()}
    assert files == {*page.links, "index.html"}
    assert Links(folder / "index.html").links == ["graph-1/index.html"]


def test_the_page_says_what_each_stage_did(folder: Path):
    rows = re.findall("<tr>.*</tr>", (folder / "graph-1" / "index.html").read_text())
    assert re.search("pass collapse_views</a></td><td>407 nodes</td><td>4 rewritten, [0-9.]+ m?s</td>", rows[3])
    assert "<td>396 nodes</td><td>3 attention, 2 experts, 2 shared expert, 2 feedforward, 1 skipped</td>" in rows[6]


def test_what_was_skipped_stands_at_the_top_and_where_it_is(folder: Path):
    text = (folder / "graph-1" / "05-regions.txt").read_text()
    skipped = f"skipped attention blocks.2.attn: {REASON}"
    assert text.startswith("# timestep: l_t_\n")
    assert (
        text.index(f"\n# {skipped}\n") < text.index("\ninput ") < text.index(f"\n#### {skipped}\n# blocks.2.attn.qkv")
    )
    assert text.count(skipped) == 2


def test_stages_are_those_of_the_graph_at_that_time(folder: Path):
    texts = [path.read_text() for path in sorted((folder / "graph-1").glob("*.txt"))]
    assert "torch.nn.functional.silu" in texts[0] and "aten." not in texts[0]
    assert ["aten.split.Tensor" in text for text in texts] == [False, True, True, False, False, False]
    assert ["aten.view.default" in text for text in texts] == [False, True, True, True, False, False]


def test_a_second_graph_gets_a_folder_of_its_own(tmp_path: Path):
    graph = exported(lambda x: x + 1, torch.ones(2)).graph
    for _ in range(11):
        open_dump(tmp_path).graph("first", graph)
    folders = [f"graph-{i}/index.html" for i in range(1, 12)]
    assert Links(tmp_path / "index.html").links == folders
    (tmp_path / "graph-1" / "00-first.txt").write_text("as it was")
    open_dump(tmp_path).graph("first", graph)
    assert (tmp_path / "graph-1" / "00-first.txt").read_text() == "as it was"


def test_the_page_is_complete_after_every_stage(tmp_path: Path):
    dump, graph = open_dump(tmp_path), exported(lambda x: x + 1, torch.ones(2))
    page = tmp_path / "graph-1" / "index.html"
    assert Links(page).links == []
    dump.graph("step cache+attention[16]", graph, "0.1 s")
    assert Links(page).links == ["00-step-cache+attention-16.txt"]
    dump.graph("step cache+attention[16]", graph)
    assert Links(page).links[1:] == ["01-step-cache+attention-16.txt"], "a name may come again"


def test_names_and_notes_are_escaped_and_in_utf_8(tmp_path: Path):
    dump = open_dump(tmp_path)
    dump.graph("<b>../ö", exported(lambda x: x + 1, torch.ones(2)), note="a < b & c — ü")
    page = tmp_path / "graph-1" / "index.html"
    assert Links(page).links == ["00-b.txt"]
    text = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;../ö" in text and "a &lt; b &amp; c — ü" in text


def test_a_pass_that_rewrote_nothing_has_no_file(tmp_path: Path):
    open_dump(tmp_path).after_pass(PassResult("idle", 0, 0.1), exported(lambda x: x + 1, torch.ones(2)).graph)
    assert not list(tmp_path.glob("graph-1/*.txt"))


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capped: Captured):
    monkeypatch.chdir(tmp_path)
    dump = open_dump(None)
    show_stages(capped, dump)
    dump.code("code", "no such file")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_an_error_at_once(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/dump")):
        with pytest.raises(ConfigError, match=f"'dump' = '{place}': allowed is None or a folder that can be made"):
            open_dump(place)


def test_a_folder_is_made_with_those_above_it_and_stays_when_the_working_one_changes(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dump = open_dump("a/b")
    monkeypatch.chdir("/")
    dump.graph("first", exported(lambda x: x + 1, torch.ones(2)))
    assert (tmp_path / "a" / "b" / "graph-1" / "00-first.txt").exists()


def test_inductors_code_is_copied_also_where_it_comes_from_a_cache(tmp_path: Path):
    """AOTAutograd's cache, which would answer for the second of two equal graphs, does not know the file."""
    dump, x = open_dump(tmp_path), torch.randn(4, 4)
    for _ in range(2):
        gm = make_fx(lambda x: ((x.sin() @ x).relu() + 1.5,))(x)
        found = compile_graph(gm, [x], on_code=lambda path: dump.code("inductor full", path))(x)
        torch.testing.assert_close(found[0], (x.sin() @ x).relu() + 1.5)
    first, second = (path.read_text() for path in sorted((tmp_path / "graph-1").glob("*-inductor-full.txt")))
    assert first == second
    path = Path(first.splitlines()[0].removeprefix("# copied from "))
    assert path.suffix == ".py" and path.read_text() == first.partition("\n")[2] and "def call" in first


def without_place(line: str) -> str:
    """A line without the place in a source file, which moves with every edit."""
    return re.sub(r"\w+\.py:\d+: ", "", line)


def test_the_worked_example_of_the_docs_is_what_a_dump_says(folder: Path):
    docs = (Path(__file__).parents[2] / "docs" / "debugging.md").read_text()
    (quoted,) = re.findall("```text\n(# timestep.*?)```", docs, re.DOTALL)
    dumped = [without_place(line) for line in (folder / "graph-1" / "05-regions.txt").read_text().splitlines()]
    lines = [without_place(line) for line in quoted.splitlines() if line not in ("", "...")]
    assert len(lines) > 8
    assert [line for line in lines if line not in dumped] == []
