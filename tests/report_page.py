"""Makes a report by its job and parses its page."""

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report as job
from matplotlib.figure import Figure

NAMES = {
    "ENSG1": "GNAS",
    "ENSG2": "</script><b>bold",
    "ENSG3": "a \"quoted\" & 'odd' <name>",
    "ENSG4": "ENSG4",
    "ENSG5": "TWICE (ENSG5)",
    "ENSG6": "TWICE (ENSG6)",
    "ENSG7": "FLAT",
    "ENSG8": "ONLY-S1",
}
SPOTS = 56


class Page(HTMLParser):
    """A parsed page: every tag, the texts of tables' cells, visible text, and the data in scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.best: list[str] = []
        self.seen: list[str] = []
        self.data: dict[str, Any] = {}
        self._open: list[str] = []
        self._cell: list[str] | None = None
        self._is_best = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell, self._is_best = [], "best" in (dict(attrs).get("class") or "").split()

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append(" ".join("".join(self._cell).split()))
            self.best += self.tables[-1][-1][-1:] if self._is_best else []
            self._cell = None
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script" and self.tags[-1][1].get("type") == "application/json":
            self.data[str(self.tags[-1][1]["id"])] = json.loads(data)
        elif inside not in ("script", "style"):
            self.seen.append(data)
            if self._cell is not None:
                self._cell.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.seen).split())


@dataclass(frozen=True)
class Made:
    """A report and its result."""

    run: Path
    out: Path
    html: str
    page: Page
    printed: str
    headings: list[str]
    """Headings of the pictures."""


def run_job(*argv: object) -> str:
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["report.py", *map(str, argv)])
        job.main()
    return printed.getvalue()


def make_report(run: Path, *argv: object) -> Made:
    headings: list[str] = []
    suptitle = Figure.suptitle
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "suptitle", lambda self, t, **keys: (headings.append(t), suptitle(self, t, **keys))[1])
        printed = run_job("--run", run, "--tracking.uri", f"sqlite:///{run}/mlflow.db", *argv)
    html = (run / "report" / "report.html").read_text()
    return Made(run, run / "report", html, Page(html), printed, headings)


def slides_of(page: Page) -> dict[str, dict[str, Any]]:
    return {value["id"]: value for name, value in page.data.items() if name.startswith("section-")}
