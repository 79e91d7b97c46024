"""docs/extending.md applied to a copy of the project: every block fits in, runs, and prints what the page says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SCRIPTS = [text for kind, path, text in BLOCKS if kind == "python" and not path]
OUTPUTS = [text for kind, _, text in BLOCKS if kind == "text"]
SUBJECTS = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)


def _apply(text: str, change: str) -> str:
    """Returns a file's text with the `+` lines of each hunk after the line above them, or before the line below them.

    `@@` separates hunks; a line of context is the beginning of a line.
    """
    lines = text.splitlines()
    for hunk in change.split("@@\n"):
        rows = hunk.splitlines()
        context = next(row[1:] for row in rows if not row.startswith("+"))
        index = _find(lines, context) + (not rows[0].startswith("+"))
        added = [row[1:] for row in rows if row.startswith("+")]
        if rows[0].startswith("+"):  # what follows the line of context goes after it
            before = rows.index(f" {context}")
            lines[index + 1 : index + 1] = added[before:]
            added = added[:before]
        lines[index:index] = added
    return "\n".join(lines) + "\n"


def _find(lines: list[str], start: str) -> int:
    found = [index for index, line in enumerate(lines) if line.startswith(start)]
    assert len(found) == 1, f"{start!r} begins {len(found)} lines"
    return found[0]


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with everything on the page."""
    copy = tmp_path_factory.mktemp("extended")
    for folder in ("platform", "ingest", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for kind, path, text in BLOCKS:
        if kind == "python" and path:
            assert not (copy / path).exists()
            (copy / path).write_text(text)
        elif kind == "diff":
            (copy / path).write_text(_apply((copy / path).read_text(), text))
    return copy


def _run(extended: Path, script: str, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": f"{extended / 'platform'}:{extended}:{extended / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("script", "output"), list(zip(SCRIPTS, OUTPUTS, strict=True)), ids=SUBJECTS)
def test_each_section_of_the_page_runs_as_it_is(extended: Path, script: str, output: str, tmp_path: Path) -> None:
    assert _run(extended, script, tmp_path) == output


@pytest.mark.slow
def test_a_new_reader_is_known_to_the_sample_sheet(extended: Path, tmp_path: Path) -> None:
    for name in ("S1.csv", "S1.tif"):
        (tmp_path / name).touch()
    (tmp_path / "samples.csv").write_text(
        "section_id,patient_id,image,format,expression\nS1,P,S1.tif,csv,S1.csv\nS2,P,S1.tif,csv,\n"
    )
    script = (
        "from ingest.readers import READERS; from mclstexp.data.sheet import read_sheet\n"
        "try: read_sheet('samples.csv', READERS)\nexcept Exception as error: print(error)"
    )
    printed = _run(extended, script, tmp_path)
    assert "has 1 fault(s)" in printed
    assert "row 3: format csv needs expression" in printed


@pytest.mark.slow
def test_a_new_score_is_in_the_verdicts_and_a_new_file_is_published(extended: Path, tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; import pandas as pd; from staged_slides import INFO, stage\n"
        "from mclstexp.evaluation.scores import SCORES; from mclstexp.prediction.publish import publish_slide\n"
        "slide = stage(Path('.'), 'S9', 5, 4)\n"
        "publish_slide(str(slide.staging), str(Path('out').absolute()), INFO)\n"
        "print(len(pd.read_csv('out/positions/S9.csv')), sorted(path.name for path in Path('out').iterdir()))\n"
        "print([score.name for score in SCORES if score.compared][0])"
    )
    assert _run(extended, script, tmp_path).splitlines() == [
        "20 ['S9.h5ad', 'S9.parquet', 'positions', 'previews']",
        "spearman",
    ]
