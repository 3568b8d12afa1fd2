"""The page: well formed, complete, alone in the world, and deaf to what names of modules say."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import pytest

from moeca_compile.reporting import Report, svg
from moeca_compile.reporting.page import page_of
from tests.reporting.reports import HOSTILE, make_report

VOID = {"meta", "br", "hr", "img", "input", "link"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Page(HTMLParser):
    """A page as a browser reads it. Raises AssertionError where an element is closed that is not the open one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        for name, value in attrs:
            self.attributes.append((tag, name, value or ""))
            if name == "id":
                self.ids.append(value)
            if name == "aria-labelledby":
                self.references.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))

    def words(self) -> str:
        return " ".join(" ".join(data for tag, data in self.text if tag not in ("style", "script")).split())


def rendered(report: Report) -> str:
    return page_of(json.loads(json.dumps(report.to_dict())))


REPORTS = {
    "full": make_report(),
    "without a trace": make_report(traces=()),
    "empty": Report(),
    "hostile": make_report(HOSTILE),
    "two graphs": make_report(traces=make_report().traces * 2),
    "nothing recognized": Report(graphs=1),
    "one step": make_report(steps=1),
    "long": make_report("transformer_blocks", steps=200, layers=40),
}


@pytest.mark.parametrize("case", REPORTS)
def test_a_page_is_well_formed_and_needs_nothing_else(case):
    text = rendered(REPORTS[case])
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert len(page.ids) == len(set(page.ids)) and set(page.references) <= set(page.ids)
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert not [a for a in page.attributes if a[1] in ("src", "href", "srcset") or a[1].startswith("on")]
    styles = "".join(data for tag, data in page.text if tag == "style")
    assert "url(" not in styles and "@import" not in styles and not re.search(r"https?:|//", text)
    assert "prefers-color-scheme: dark" in styles
    assert ("meta", "name", "viewport") in page.attributes
    assert ("html", "lang", "en") in page.attributes and page.tags["title"] >= 1 and page.tags["h1"] == 1


def test_what_the_report_says_is_on_the_page():
    words = Page(rendered(make_report())).words()
    for wanted in (
        "moeca, cpu, torch.float32",
        "fewer FLOPs than full steps alone 2.00x",
        "✓ cached attention blocks.0.attn blocks.py:30 a remark on blocks",
        "✕ skipped experts blocks.0.mlp because of blocks",
        "blocks.py:12 : blocks is not traced",
        "blocks is unusual",
        "step 1, time 0.9: 2 cache[4], 5 ms",
        "blocks.1.mlp, step 4: 90.0%",
        "blocks.1.mlp, step 4: 75.0%",
        "Recomputed tokens of step 5: 6.2% of all, at most 100.0%",
        "attention blocks.0.attn, step 6: 60.0%",
        "blocks.0.mlp, expert 2: 1.19x",
        "Expert activation by position in the middle layer: blocks.1.mlp",
        "Places of expert 1 in blocks.1.mlp: 25.0% of branches, at most 14 times at a place",
        "expert 1, 25.0%",
        "never 15 times",
        "full 3 4 GFLOP 20 ms 200 GFLOP/s",
        "experts, routing 1 KiB",
        "lower 12.0 s",
        "5 of 6 parts were compiled by another process. Steps that ran before: 2 full, 9 cache",
        "full 1.0e-07",
        "the peak beside the weights was 16 MiB (by hand)",
    ):
        assert " ".join(wanted.split()) in re.sub(r" +", " ", words), wanted


def test_every_cell_of_a_heat_map_has_its_value_as_words():
    text = rendered(make_report())
    cells = re.findall(r'<rect class="s\d" [^>]*?(/>|><title>)', text.split('<p class="legend">')[0])
    assert len(cells) == 5 * 2 and set(cells) == {"><title>"}


def test_values_are_shaded_by_where_they_lie_on_the_scale():
    found = [svg.level(value, 0.0, 2.0) for value in (-1.0, 0.0, 0.19, 0.2, 1.99, 2.0, 5.0)]
    assert found == [0, 0, 0, 1, 9, 9, 9]
    assert svg.level(3.0, 3.0, 3.0) == 0


@pytest.mark.parametrize(("value", "end"), [(0.0, 1.0), (0.003, 0.004), (0.004, 0.004), (0.97, 1.0), (1.4, 2.0)])
def test_an_axis_ends_at_a_round_number(value, end):
    assert svg.round_above(value) == pytest.approx(end)


def test_the_map_of_tokens_has_the_recomputed_one_in_its_place():
    figure = svg.token_map("map", "tokens", [0.0] * 5 + [1.0] + [0.0] * 6, 4, 1.0)
    assert 'viewBox="0 0 4 3"' in figure
    assert re.findall(r'class="s9" d="([^"]*)"', figure) == ["M1 1h1v1h-1z"]
    assert figure.count("h1v1h-1z") == 12


def traced_with(**changes) -> Report:
    return make_report(traces=(dataclasses.replace(make_report().traces[0], **changes),))


def test_experts_have_maps_whose_cells_lie_in_the_rows_of_the_picture():
    counts = tuple(tuple(4 * (place == 11 + expert) for place in range(16)) for expert in range(2))
    text = rendered(traced_with(grid=(2, 8), activation=counts))
    figures = re.findall(r'<svg class="map" role="img" aria-labelledby="trace-0-activation.*?</svg>', text)
    assert len(figures) == 2 and all('viewBox="0 0 8 2"' in figure for figure in figures)
    brightest = [re.findall(r'class="s9" d="([^"]*)"', figure) for figure in figures]
    assert brightest == [["M3 1h1v1h-1z"], ["M4 1h1v1h-1z"]]
    assert all("50.0% of branches, at most 4 times" in figure for figure in figures)


def test_of_many_experts_some_have_maps():
    text = rendered(traced_with(activation=((1,) * 16,) * 128))
    shown = [int(expert) for expert in re.findall(r'id="trace-0-activation-(\d+)-title"', text)]
    assert shown == list(range(0, 128, 3))


def test_where_experts_have_no_maps_it_is_said_why():
    for changes, reason in (
        ({"grid": None, "mapped_layer": "", "activation": ()}, "How tokens lie in the picture is not known"),
        ({"activation": ()}, "The router of this layer has not run"),
    ):
        text = rendered(traced_with(**changes))
        assert reason in text and "trace-0-activation" not in text and reason not in rendered(make_report())


def test_names_are_shortened_in_the_middle():
    assert svg.shortened("blocks.0.attn") == "blocks.0.attn"
    long = svg.shortened("transformer_blocks.17.feed_forward.shared_experts.down_proj")
    assert len(long) == 34 and long.startswith("transformer_bloc") and long.endswith("xperts.down_proj")


def test_hostile_names_stay_words():
    text = rendered(make_report(HOSTILE))
    assert "<script" not in text and "{{ 7 * 7 }}" in text
    page = Page(text)
    assert f"{HOSTILE}.0.attn" in page.words() and f"because of {HOSTILE}" in page.words()
    assert not [a for a in page.attributes if a[1].startswith("on")]


def test_several_traces_are_told_apart():
    words = Page(rendered(REPORTS["two graphs"])).words()
    assert "Trace 1 of 2" in words and "Trace 2 of 2" in words and words.count("Match ratio") >= 2
    assert "Trace 1 of" not in Page(rendered(make_report())).words()


def test_without_a_trace_each_figure_says_how_to_get_it():
    text = rendered(make_report(traces=()))
    assert text.count("with moeca_compile.trace(model):") == 6
    assert "with moeca_compile.trace(model):" not in rendered(make_report())


def test_what_a_recipe_does_not_do_is_said():
    trace = make_report(steps=1).traces[0]
    words = Page(rendered(make_report(traces=(trace,)))).words()
    assert "caches no branches of experts" in words and "recompute no tokens" in words
    assert "Only one full step was traced" in words


def test_it_is_saved_by_its_ending_alone(tmp_path, monkeypatch):
    report = make_report()
    report.save(tmp_path / "report.html")
    Page((tmp_path / "report.html").read_text())
    report.save(str(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    (tmp_path / "folder.html").mkdir()
    monkeypatch.setattr(Report, "to_dict", lambda self: pytest.fail("nothing is done before the name is checked"))
    for name, error, message in (
        ("report.txt", ValueError, r"must end in \.html or \.json"),
        ("report", ValueError, r"must end in"),
        ("nowhere/report.html", FileNotFoundError, "there is no folder .*nowhere"),
        ("folder.html", IsADirectoryError, "is a folder"),
    ):
        with pytest.raises(error, match=message):
            report.save(tmp_path / name)


def test_a_report_is_read_back():
    report = make_report(HOSTILE)
    again = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again.traces == report.traces and again.regions == report.regions and again.flops == report.flops
    assert str(again) == str(report) and again.to_dict() == json.loads(json.dumps(report.to_dict()))


@pytest.mark.parametrize("values", [{}, {"graphs": 1}, [], None, "text", {**Report().to_dict(), "more": 1}], ids=str)
def test_what_is_no_report_is_refused(values):
    with pytest.raises(ValueError, match="not the values of a report"):
        Report.from_dict(values)


def test_a_trace_of_another_version_is_refused():
    values = make_report().to_dict()
    values["traces"][0]["steps"][0]["unknown"] = 1
    with pytest.raises(ValueError, match="not the values of a report"):
        Report.from_dict(values)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("case", ["full", "hostile", "long"])
def test_a_browser_draws_it_and_no_part_is_wider_than_the_screen(case, width, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of these browsers is installed: {', '.join(BROWSERS)}")
    path = tmp_path / "report.html"
    # A page never runs a script; what is measured here is measured by one of the test's.
    measure = "<script>document.title = [innerWidth, document.documentElement.scrollWidth].join(' ')</script>"
    path.write_text(rendered(REPORTS[case]).replace("</body>", f"{measure}</body>"), encoding="utf-8")
    frame = tmp_path / "frame.html"  # a window of a browser has a least width, a frame has none
    frame.write_text(
        f'<iframe src="report.html" width="{width}" height="800"></iframe>'
        "<script>onload = () => document.body.append(document.querySelector('iframe').contentDocument.title)</script>"
    )
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    seen, content = map(int, re.search(r"</iframe>.*?(\d+) (\d+)", done.stdout, re.DOTALL).groups())
    assert seen >= width - 20 and content <= seen, done.stdout[-300:]
