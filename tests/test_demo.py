"""What the demo decides itself: who is held out, and which slides are predicted."""

import sys
from pathlib import Path

import demo
import pytest

from ingest.synthetic import CohortSpec, make_cohort
from mclstexp.data.sheet import SectionRow, read_sheet
from mclstexp.errors import UserError


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[SectionRow]:
    return read_sheet(make_cohort(tmp_path_factory.mktemp("demo"), CohortSpec.tiny()))


def test_the_last_measured_patient_is_held_out(rows: list[SectionRow]) -> None:
    assert demo.last_patient(rows) == "P3"


def test_each_choice_of_inputs_has_a_folder_of_its_own(tmp_path: Path) -> None:
    def folder(**inputs: str) -> str:
        return demo.default_folder(demo.DemoArguments(**inputs))

    choices = [{}, {"samples": "a.csv"}, {"samples": "b/a.csv"}, {"samples": "a.csv", "weights": "w.pth"}]
    choices.append({"samples": "a.csv", "test_patient": "B"})
    assert len({folder(**choice) for choice in choices}) == len(choices)
    assert folder() == "demo"
    assert folder(samples="a.csv") == folder(samples=str(Path("a.csv").absolute()))


def test_one_patient_is_too_few(rows: list[SectionRow]) -> None:
    with pytest.raises(UserError, match="1 patient"):
        demo.last_patient([row for row in rows if row.patient_id == "P1"])


def test_slides_without_counts_are_predicted(rows: list[SectionRow], tmp_path: Path) -> None:
    written = read_sheet(demo.write_slide_sheet(tmp_path / "slides.csv", rows, "P3"))
    assert [(row.section_id, row.format, row.mpp) for row in written] == [("P4S1", "slide", 1.0)]


def test_else_the_held_out_slides_are_predicted_without_their_counts(rows: list[SectionRow], tmp_path: Path) -> None:
    measured = [row for row in rows if row.measured]
    written = read_sheet(demo.write_slide_sheet(tmp_path / "slides.csv", measured, "P3"))
    assert [row.section_id for row in written] == ["P3S1", "P3S2"]
    assert not any(row.measured for row in written)


def test_a_dry_run_prints_the_commands_and_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", "--dry-run", "--verbose", "--out", str(tmp_path / "demo")])
    demo.main()
    commands = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("$ python")]
    assert commands[0][commands[0].index("--samples") + 1] == str(tmp_path / "demo" / "cohort" / "samples.csv")
    assert commands[1][commands[1].index("--split.test_patients") + 1] == f"P{CohortSpec.demo().num_patients}"
    assert [command[2] for command in commands] == [
        f"jobs/{job}.py" for job in ("prepare", "train", "evaluate", "report", "predict", "draw")
    ]
    assert list(tmp_path.iterdir()) == []
