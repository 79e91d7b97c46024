"""The report's page in a real browser: Debian's headless Chromium, driven over a pipe by its DevTools protocol.

No driver package is needed: commands and events are JSON texts with a zero byte behind each
(https://chromedevtools.github.io/devtools-protocol/).
"""

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import matplotlib
import numpy as np
import pytest
import report as job

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to open the report in; apt-get install chromium"),
]
ANSWER_S = 60.0
OPTIONS = (
    "--headless",
    "--no-sandbox",  # its sandbox refuses to run as root, as in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--window-size=1366,900",
    "--remote-debugging-pipe",
)


class _Browser:
    """One page of a browser: runs commands and keeps what the page complained of."""

    def __init__(self, profile: Path) -> None:
        reads, self._out = _high_pipe()
        self._in, writes = _high_pipe()
        script = 'exec "$@" 3<&$READS 4>&$WRITES'  # where Chromium looks for its pipe
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", str(CHROMIUM), *OPTIONS, f"--user-data-dir={profile}"],
            env=os.environ | {"READS": str(reads), "WRITES": str(writes)},
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self._buffer, self._last, self._session = b"", 0, {}
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: object) -> dict[str, Any]:
        """Returns a command's result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params} | self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._until(lambda answer: answer.get("id") == self._last)["result"]

    def open(self, path: Path) -> None:
        self.send("Page.navigate", url=path.as_uri())
        if not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._until(lambda event: event.get("method") == "Page.loadEventFired")

    def run(self, script: str) -> Any:
        """Returns what a script says after the page had time to draw."""
        wrapped = f"(async () => {{ {script} }})()"
        answer = self.send("Runtime.evaluate", expression=wrapped, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        return [event for event in self.events if _is_complaint(event)]

    def requested(self) -> list[str]:
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def close(self) -> None:
        os.write(self._out, b'{"id": 0, "method": "Browser.close"}\0')
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            os.close(self._out)
            os.close(self._in)

    def _until(self, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + ANSWER_S
        while True:
            text, zero, rest = self._buffer.partition(b"\0")
            if not zero:
                ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
                data = os.read(self._in, 2**20) if ready else b""
                assert data, "Chromium does not answer"
                self._buffer += data
                continue
            self._buffer, message = rest, json.loads(text)
            if "method" in message:
                self.events.append(message)
            if is_it(message):
                return message


def _high_pipe() -> tuple[int, int]:
    """Returns a pipe's ends above those that Chromium's are put on."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in ends)
    for end in ends:
        os.close(end)
    return high


def _is_complaint(event: dict[str, Any]) -> bool:
    method, params = event["method"], event.get("params", {})
    return (
        method == "Runtime.exceptionThrown"
        or (method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"))
        or (method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"))
    )


@pytest.fixture(scope="module")
def run(make_result: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result folder with its report; S-2 does not measure ENSG4."""
    folder = make_result(tmp_path_factory.mktemp("result"), unmeasured={"S-2": [3]})
    (folder / "mine.yaml").write_text("tiny: {one: [ENSG5]}")
    arguments = ["--run", folder, "--cohort", "tiny", "--markers", folder / "mine.yaml"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        job.main()
    return folder


@pytest.fixture(scope="module")
def _browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Browser]:
    browser = _Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(_browser: _Browser, run: Path) -> _Browser:
    """The report, freshly opened."""
    _browser.events.clear()
    _browser.open(run / "report" / "report.html")
    return _browser


def _choose(browser: _Browser, element: str, value: str) -> None:
    kind = "change" if element in ("section", "gene") else "input"
    browser.run(
        f"const element = document.getElementById({json.dumps(element)}); element.value = {json.dumps(value)};"
        f"element.dispatchEvent(new Event('{kind}', {{ bubbles: true }})); await new Promise(requestAnimationFrame);"
    )


def _maps(browser: _Browser) -> list[str]:
    return browser.run("return ['measured', 'predicted'].map((id) => document.getElementById(id).toDataURL())")


def _title(browser: _Browser) -> str:
    return browser.run("return document.getElementById('map-title').textContent")


def _colours(browser: _Browser, canvas: str, places: np.ndarray) -> np.ndarray:
    """Returns the colours of a map at places in thumbnail pixels, (N, 3)."""
    pixels = browser.run(
        f"const canvas = document.getElementById('{canvas}');"
        "const [left, top, right] = JSON.parse(document.getElementById('section-0').textContent).window;"
        "const scale = canvas.width / (right - left), context = canvas.getContext('2d');"
        f"return {json.dumps(places.tolist())}.map(([x, y]) =>"
        "  [...context.getImageData(scale * (x - left), scale * (y - top), 1, 1).data.slice(0, 3)]);"
    )
    return np.array(pixels)


def _pcc(run: Path, section: str, gene_id: str) -> str:
    stored = anndata.read_h5ad(run / "sections" / f"{section}.h5ad")[:, gene_id]
    return f"PCC {np.corrcoef(stored.X[:, 0], stored.layers['measured'][:, 0])[0, 1]:.3f}"


def _rows(browser: _Browser) -> list[list[str]]:
    """Returns the visible rows of the gene table."""
    return browser.run(
        "return [...document.querySelectorAll('#gene-table tbody tr')].filter((row) => row.offsetParent)"
        ".map((row) => [...row.cells].map((cell) => cell.textContent.trim()))"
    )


def test_the_page_opens_without_an_error_or_a_request(browser: _Browser, run: Path) -> None:
    assert browser.complaints() == []
    outside = [url for url in browser.requested() if not url.startswith("data:")]
    assert outside == [(run / "report" / "report.html").as_uri()]
    browser.run(
        "console.error('seen'); setTimeout(() => { throw new Error('seen too') }); await new Promise(setTimeout)"
    )
    browser.run("await new Promise((done) => setTimeout(done, 50))")
    assert len(browser.complaints()) == 2, "complaints must be seen"


def test_maps_have_the_colours_of_their_values(browser: _Browser, run: Path) -> None:
    stored = anndata.read_h5ad(run / "sections" / "S1.h5ad")
    _choose(browser, "gene", "GNAS")
    _choose(browser, "opacity", "100")
    values = {"measured": stored.layers["measured"][:, 0], "predicted": stored.X[:, 0]}
    low, high = np.percentile(np.stack(list(values.values())), [1, 99])
    for canvas, shades in values.items():
        expected = 255 * matplotlib.colormaps["viridis"](np.clip((shades - low) / (high - low), 0, 1))[:, :3]
        np.testing.assert_allclose(_colours(browser, canvas, stored.obsm["spatial"] / 10), expected, atol=4)
    _choose(browser, "opacity", "0")
    np.testing.assert_allclose(
        _colours(browser, "measured", stored.obsm["spatial"] / 10), [[230, 200, 220]] * 56, atol=4
    )


def test_another_gene_is_another_map_and_another_correlation(browser: _Browser, run: Path) -> None:
    assert _title(browser) == f"TWICE (ENSG5) in section S1: {_pcc(run, 'S1', 'ENSG5')}"
    before = _maps(browser)
    _choose(browser, "gene", "</script><b>bold")
    assert _title(browser) == f"</script><b>bold in section S1: {_pcc(run, 'S1', 'ENSG2')}"
    assert all(old != new for old, new in zip(before, _maps(browser), strict=True))
    _choose(browser, "gene", "FLAT")
    assert "PCC undefined" in _title(browser)
    assert browser.complaints() == []


def test_another_section_is_another_map_and_another_correlation(browser: _Browser, run: Path) -> None:
    before = _maps(browser)
    _choose(browser, "section", "1")
    assert _title(browser) == f"TWICE (ENSG5) in section S-2: {_pcc(run, 'S-2', 'ENSG5')}"
    assert all(old != new for old, new in zip(before, _maps(browser), strict=True))
    _choose(browser, "gene", "ONLY-S1")
    assert "not in the panel of this section's model" in _title(browser)
    assert browser.complaints() == []


@pytest.mark.odd
def test_a_gene_that_the_section_does_not_measure_has_a_predicted_map_alone(browser: _Browser, run: Path) -> None:
    stored = anndata.read_h5ad(run / "sections" / "S-2.h5ad")
    _choose(browser, "section", "1")
    _choose(browser, "gene", "ENSG4")
    _choose(browser, "opacity", "100")
    assert _title(browser) == "ENSG4 in section S-2: this section does not measure it"
    assert browser.complaints() == []
    places, shades = stored.obsm["spatial"] / 10, stored.X[:, 3]
    np.testing.assert_allclose(_colours(browser, "measured", places), [[230, 200, 220]] * 56, atol=4)
    low, high = np.percentile(shades, [1, 99])
    expected = 255 * matplotlib.colormaps["viridis"](np.clip((shades - low) / (high - low), 0, 1))[:, :3]
    np.testing.assert_allclose(_colours(browser, "predicted", places), expected, atol=4)


def test_genes_are_searched(browser: _Browser) -> None:
    listed = "return [...document.getElementById('gene').options].map((option) => option.value)"
    assert browser.run(listed)[0] == "TWICE (ENSG5)"
    assert len(browser.run(listed)) == 1 + 8
    _choose(browser, "gene-search", "only")
    assert browser.run(listed) == ["ONLY-S1"]
    assert _title(browser).startswith("ONLY-S1 in section S1")
    _choose(browser, "gene-search", "no such gene")
    assert browser.run(listed) == []
    _choose(browser, "opacity", "50")
    assert browser.complaints() == []


def test_the_gene_table_filters(browser: _Browser) -> None:
    everything = len(_rows(browser))
    _choose(browser, "gene-filter", "QUOTED")
    assert [row[0] for row in _rows(browser)] == ["a \"quoted\" & 'odd' <name>"]
    assert browser.run("return document.getElementById('gene-count').textContent") == f"1 of {everything} genes"
    _choose(browser, "gene-filter", "")
    assert len(_rows(browser)) == everything


def test_the_gene_table_sorts(browser: _Browser) -> None:
    def click(heading: str) -> list[str]:
        browser.run(
            "[...document.querySelectorAll('#gene-table th')]"
            f".find((each) => each.textContent === {json.dumps(heading)}).click()"
        )
        return [row[0 if heading == "gene" else 2] for row in _rows(browser)]

    names = click("gene")
    assert names.index("FLAT") < names.index("GNAS") < names.index("ONLY-S1")
    assert click("gene") == names[::-1]
    for order, sign in (("highest first", -1), ("lowest first", 1)):
        cells = click("model")
        assert cells[-1] == "–", "missing values come last"
        values = [float(cell.replace("−", "-")) for cell in cells[:-1]]
        assert values == sorted(values, key=lambda value: sign * value), order
    assert len(set(values)) > 3


@pytest.mark.parametrize(("gene", "gene_id"), [("GNAS", "ENSG1"), ("TWICE (ENSG6)", "ENSG6")])
def test_a_gene_of_the_table_is_shown_as_map(browser: _Browser, run: Path, gene: str, gene_id: str) -> None:
    browser.run(f"document.querySelector('#gene-table a[data-gene=\"{gene}\"]').click()")
    assert _title(browser) == f"{gene} in section S1: {_pcc(run, 'S1', gene_id)}"
    assert browser.run("return document.getElementById('gene').value") == gene
