"""The page of a report: one file that needs nothing else, with texts stored once, and usable in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from models import batch, fp64_decoder
from reports import PREFIX, graph_report, graph_texts, pass_report, site
from sparse_compile import explain
from sparse_compile.compiler.graph_texts import GraphTexts
from sparse_compile.compiler.page.graph_changes import graph_changes
from sparse_compile.compiler.page.render import page_of
from sparse_compile.compiler.report import Report
from sparse_compile.graph.facts import Rejection

HOSTILE = "</script><img src=x onerror=alert(1)>{{ 7 * 7 }}&amp;"
MEGABYTES = 2**20
TABS = ["overview", "passes", "declined", "graph", "kernels", "options"]


def report_of_blocks(blocks: int, texts: GraphTexts | None = None, **changes: Any) -> Report:
    dense = site("layers.0.mlp", 48, 48)
    graph = graph_report(dense, *(site(f"layers.{block}.mlp") for block in range(1, blocks)), **changes)
    return Report((graph,), {"preset": "o2"}, "config", () if texts is None else (texts,))


class Reader(HTMLParser):
    """Collects tags, attributes, and the text of elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}


def graphs_in(page: str) -> list[dict[str, Any]]:
    (data,) = re.findall(r'<script type="application/json" id="graphs">(.*?)</script>', page, re.DOTALL)
    return json.loads(data)  # type: ignore[no-any-return]


# --- What is in it ----------------------------------------------------------------------------------------------------


def test_it_needs_nothing_beside_itself() -> None:
    page = page_of(report_of_blocks(4, graph_texts(4)))
    read = Reader(page)
    assert not re.search(r"https?:|@import|url\(", page)
    assert read.attributes.isdisjoint({"src", "href", "action", "data", "poster"}) and "link" not in read.tags


def test_text_of_the_model_is_escaped() -> None:
    texts = GraphTexts()
    texts.steps = {"captured": f"%{HOSTILE} = input\n"}
    texts.kernels = {f"{HOSTILE}.py": f'"""{HOSTILE}."""\n{HOSTILE}\n'}
    graph = graph_report(
        site(HOSTILE),
        compile_id=HOSTILE,
        passes=(pass_report(HOSTILE, 2e9, 1e9, skipped=HOSTILE),),
        rejections=(Rejection(HOSTILE, HOSTILE, HOSTILE),),
    )
    page = page_of(Report((graph, graph), {HOSTILE: HOSTILE}, HOSTILE, (texts, texts)))
    tags = Reader(page).tags
    assert "img" not in tags and tags.count("script") == 2 and "49" not in page
    assert graphs_in(page)[0]["lines"] == [f"%{HOSTILE} = input"]
    assert unescape(page).count("{{ 7 * 7 }}") > 10, "it is shown as it is"


def test_the_summary_and_the_map_of_blocks() -> None:
    page = page_of(report_of_blocks(4))
    assert f"<h1>{'3 of 4 sites sparse, 60% of the FLOPs of a dense step (6 GFLOP of 10 GFLOP).'}</h1>" in page
    assert re.findall(r"<h3>(.*?)</h3>", page) == [f"layers.{block}" for block in range(4)]
    assert page.count('class="site dense"') == 1 and page.count('class="site sparse"') == 3
    assert "first block, always dense" in page and "12 of 48 channels, sparsity 0.75" in page


def test_the_waterfall_goes_from_what_was_captured_to_what_will_run() -> None:
    bars = re.findall(r'class="bar (\w+)" style="left:([\d.]+)%;width:([\d.]+)%"', page_of(report_of_blocks(2)))
    assert bars == [
        ("total", "0.00", "100.00"),
        ("exact", "90.00", "10.00"),
        ("approximate", "60.00", "30.00"),
        ("total", "0.00", "60.00"),
    ]


def test_flops_that_were_not_counted_have_no_waterfall() -> None:
    unknown = report_of_blocks(2, flops_before=math.nan, passes=(pass_report("find_ffn", math.nan, math.nan),))
    page = page_of(unknown)
    assert 'class="bar' not in page and "They were not counted." in page


def test_kernels_of_equal_blocks_are_stored_once() -> None:
    texts = graph_texts(1)
    texts.kernels = {f"{block}.mlp.py": f'"""{block}.mlp.\n"""\nsource_of_it\n' for block in range(3)}
    page = page_of(report_of_blocks(1, texts))
    assert page.count("source_of_it") == 1 and "<summary>0.mlp.py, 1.mlp.py, 2.mlp.py</summary>" in page


def test_what_was_declined_is_grouped_by_reason() -> None:
    rejections = tuple(Rejection("find_ffn", f"{PREFIX}layers.{block}.up", "read elsewhere") for block in range(9))
    page = page_of(report_of_blocks(9, rejections=rejections))
    assert page.count("<td>read elsewhere<td>layers.0-8.up<td>9<td>") == 1


def test_a_report_without_a_graph() -> None:
    page = page_of(Report((), untrained="nothing is trained"))
    assert "Nothing was captured to train: nothing is trained." in page and graphs_in(page) == []


# --- The graphs -------------------------------------------------------------------------------------------------------


def put_together(data: dict[str, Any], step: int) -> list[str]:
    runs = data["steps"][step]["runs"]
    return [line for first, count in runs for line in data["lines"][first : first + count]]


def test_each_text_is_put_together_from_lines_that_are_stored_once() -> None:
    texts = graph_texts(3)
    data = graph_changes(texts.steps)
    assert len(set(data["lines"])) == len(data["lines"])
    for step, text in enumerate(texts.steps.values()):
        assert put_together(data, step) == text.splitlines()


@pytest.mark.parametrize(
    "steps",
    [
        graph_texts(3).steps,
        {"one": "a\nb\nc\nd\n", "two": "a\nc\nb\nd\n", "three": "", "four": "e\ne\na\n", "five": "e\nx\na\ne\n"},
    ],
    ids=["of a model", "moved and repeated lines"],
)
def test_changes_lead_from_one_text_to_the_next(steps: dict[str, str]) -> None:
    data = graph_changes(steps)
    texts = list(steps.values())
    for step in range(1, len(steps)):
        assert bool(data["steps"][step]["changes"]) == (texts[step] != texts[step - 1])
        before, after = put_together(data, step - 1), put_together(data, step)
        made, line = [], 0
        for start, end, first, last in data["steps"][step]["changes"]:
            made += [*before[line:start], *after[first:last]]
            line = end
        assert [*made, *before[line:]] == after


def test_a_page_of_32_blocks_is_small() -> None:
    texts = graph_texts(32)
    assert sum(map(len, texts.steps.values())) > 1.5 * MEGABYTES
    assert len(page_of(report_of_blocks(32, texts))) < 1.5 * MEGABYTES


@pytest.mark.slow
def test_a_page_of_a_real_model_of_32_blocks_is_small() -> None:
    sparsity = {f"layers.{block}.mlp": 0.5 for block in range(2, 31)}
    report = explain(fp64_decoder(layers=32), **batch(61), config={"layer_sparsity": sparsity})
    page = page_of(report)
    assert "29 of 64 sites sparse" in page and len(page) < 5 * MEGABYTES
    data = graphs_in(page)[0]
    assert [put_together(data, step) for step in range(len(data["steps"]))] == [
        text.splitlines() for text in report.texts[0].steps.values()
    ]


# --- In a browser -----------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")

NOTES_ERRORS = "<script>window.failed = []; addEventListener('error', (event) => failed.push(event.message));</script>"
TOOLS = """
const at = (id) => document.getElementById(id);
const wait = () => new Promise((go) => setTimeout(go, 50));
const seen = (where) => [...document.querySelectorAll(where)].filter((each) => each.checkVisibility());
const tab = async (name) => { at("tab-" + name).click(); await wait(); };
const type = (text) => { at("search").value = text; at("search").dispatchEvent(new Event("input")); };
"""


def in_browser(page: str, script: str, folder: Path, *flags: str, at: str = "") -> dict[str, Any]:
    """Open a page in Chromium, run a script in it, and return the object that the script returns.

    Args:
        page: what is opened.
        script: the body of an async function.
        folder: where files may be written.
        *flags: more of Chromium's.
        at: what stands behind `#` in the address.
    """
    driver = f"""<script>{TOOLS}
    (async () => {{ {script} }})().catch((error) => ({{ error: String(error) }})).then((found) => {{
      const result = document.createElement("pre");
      result.id = "result";
      result.textContent = JSON.stringify({{ ...found, failed }});
      document.body.append(result);
    }});</script>"""
    file = folder / "page.html"
    file.write_text(page.replace("<head>", f"<head>{NOTES_ERRORS}", 1).replace("</body>", f"{driver}</body>"))
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [*command, *flags, "--dump-dom", f"{file.as_uri()}#{at}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    (found,) = re.findall(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL) or [""]
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found))  # type: ignore[no-any-return]


FAST_CLOCK = "--virtual-time-budget=20000"
"""Timers of the page do not wait, and the page is read when they are done."""


@needs_chromium
def test_tabs_show_one_panel_each(tmp_path: Path) -> None:
    script = """
    const panels = {start: seen('[role="tabpanel"]').map((each) => each.id)};
    for (const name of %s) { await tab(name); panels[name] = seen('[role="tabpanel"]').map((each) => each.id); }
    return {panels, requests: performance.getEntriesByType("resource").length, address: location.hash};
    """
    page = page_of(report_of_blocks(4, graph_texts(4)))
    found = in_browser(page, script % json.dumps(TABS), tmp_path, FAST_CLOCK, at="/declined")
    assert found["panels"] == {"start": ["declined"], **{name: [name] for name in TABS}}
    assert (found["failed"], found["requests"], found["address"]) == ([], 0, "#/options")


@needs_chromium
def test_search_keeps_what_matches(tmp_path: Path) -> None:
    script = """
    const rows = () => seen("#overview .block h3").map((each) => each.textContent);
    type("LAYERS.7");
    const some = rows(), said = at("matches").textContent;
    type("nowhere");
    const none = rows();
    type("");
    const all = rows().length, silent = at("matches").textContent;
    await tab("graph");
    type("layers.3.node_7 :");
    return {some, said, none, all, silent, lines: seen("#code > div").map((each) => each.textContent)};
    """
    found = in_browser(page_of(report_of_blocks(9, graph_texts(9))), script, tmp_path, FAST_CLOCK)
    assert (found["some"], found["said"], found["none"], found["all"]) == (["layers.7"], "1 match", [], 9)
    assert found["silent"] == "" and found["failed"] == []
    assert len(found["lines"]) == 1 and "layers.3.node_7 : f32[2, 256, 256]" in found["lines"][0]


@needs_chromium
def test_the_graph_shows_what_a_pass_changed(tmp_path: Path) -> None:
    script = """
    const count = (kind) => seen("#code ." + kind).length;
    await tab("graph");
    const start = seen("#code > div").length;
    const step = async (name) => { document.querySelector(`[data-step="${name}"]`).click(); await wait(); };
    await step("find_ffn");
    const unchanged = at("code").textContent;
    await step("sparsify_ffn");
    const [added, removed, gaps, sites] = ["added", "removed", "gap", "where"].map(count);
    document.querySelector("#code .gap")?.click();
    const left = count("gap");
    at("whole").click();
    return {start, unchanged, added, removed, gaps, left, sites, whole: seen("#code > div").length};
    """
    texts = graph_texts(2, lines=40)
    # Between two changes there is a stretch that is folded.
    sparse = texts.steps["select_loss_rows"].splitlines()
    sparse[3] += "    # sparsify_ffn layers.0.mlp"
    sparse[60:61] = ["%new : f32[1] = a()    # sparsify_ffn layers.1.mlp", sparse[60]]
    texts.steps["sparsify_ffn"] = "\n".join(sparse) + "\n"
    found = in_browser(page_of(report_of_blocks(2, texts)), script, tmp_path, FAST_CLOCK)
    assert found == {
        "start": 80, "unchanged": "This step changed nothing.", "added": 2, "removed": 1, "gaps": 2, "left": 1,
        "sites": 2, "whole": 82, "failed": [],
    }  # fmt: skip


@needs_chromium
def test_names_of_the_model_are_text_in_the_browser(tmp_path: Path) -> None:
    texts = GraphTexts()
    texts.steps = {"captured": f"%{HOSTILE} = input\n"}
    page = page_of(Report((graph_report(site(HOSTILE)),), texts=(texts,)))
    script = 'await tab("graph"); return {images: document.images.length, code: at("code").textContent}'
    found = in_browser(page, script, tmp_path, FAST_CLOCK)
    assert found == {"images": 0, "code": f"1%{HOSTILE} = input", "failed": []}


@needs_chromium
def test_a_page_of_32_blocks_opens_at_once(tmp_path: Path) -> None:
    script = 'const lines = seen("#code > div").length; return {lines, opened: performance.now()}'
    found = in_browser(page_of(report_of_blocks(32, graph_texts(32))), script, tmp_path, at="/graph")
    assert found["lines"] == 32 * 120 and found["failed"] == []
    assert found["opened"] < 2000, "milliseconds until the longest panel is laid out"
