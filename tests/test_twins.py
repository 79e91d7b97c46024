"""The same image or counts under two patients are refused; patients whose ids look the same are named."""

import csv
import gzip
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from prepared_tables import CONFIG, copy_of, run, write_sheet
from scipy.sparse import csr_array
from small_table import section_entry
from visium_folders import LAYOUTS, section

from ingest.header import read_header
from ingest.plan import describe, make_plan, source_digests
from ingest.twins import counts_digest, require_own_counts, require_own_files
from mclstexp import storage
from mclstexp.data.folds import make_split, similar_patients
from mclstexp.data.schema import MANIFEST, Manifest
from mclstexp.data.sheet import SectionRow
from mclstexp.errors import SourceError, SplitError
from mclstexp.settings import SplitConfig


def twins(cohort, folder, **changes):
    """The sheet of P1S1 and the same section as T, with other cells where `changes` says so."""
    sheet = copy_of(cohort, folder, ["P1S1"])
    with open(sheet, newline="") as file:
        (row,) = csv.DictReader(file)
    return write_sheet(folder, [row, row | {"section_id": "T"} | changes])


def plan_of(sheet, out):
    return make_plan(sheet, str(out), CONFIG, lambda rows: map(read_header, rows))


def resave(folder, image=False, counts=False):
    """Writes copies with the same content and other bytes; returns their cells in the sheet."""
    if image:
        (folder / "t.tif").write_bytes((folder / "P1S1.tif").read_bytes() + b"\0")
    if counts:
        table = pd.read_csv(folder / "P1S1.tsv.gz", sep="\t", index_col=0)
        moved = table.iloc[::-1, np.random.default_rng(0).permutation(table.shape[1])]
        (folder / "t.tsv.gz").write_bytes(gzip.compress(moved.to_csv(sep="\t").encode()))
    return ({"image": "t.tif"} if image else {}) | ({"expression": "t.tsv.gz"} if counts else {})


@pytest.mark.odd
@pytest.mark.parametrize("copied", ["same files", "copied files"])
@pytest.mark.parametrize(("resaved", "found"), [("", "image,counts"), ("image", "counts"), ("counts", "image")])
def test_one_section_under_two_patients_is_refused_before_cutting(cohort, tmp_path, copied, resaved, found):
    sheet = twins(cohort, tmp_path)
    changes = resave(tmp_path, **({resaved: True} if resaved else {}))
    if copied == "copied files":
        for column, name in {"image": "c.tif", "expression": "c.tsv.gz"}.items():
            shutil.copy(tmp_path / ("P1S1.tif" if column == "image" else "P1S1.tsv.gz"), tmp_path / name)
            changes.setdefault(column, name)
    sheet = twins(cohort, tmp_path, patient_id="OTHER", **changes)
    with pytest.raises(SourceError) as caught:
        plan_of(sheet, tmp_path / "out")
    message = str(caught.value)
    for what in ("image", "counts"):
        assert (f"the same {what}: P1S1 (patient P1, {tmp_path}/P1S1.t" in message) == (what in found.split(","))
    assert "T (patient OTHER, " in message
    assert "give them one patient_id" in message
    assert not (tmp_path / "out").exists()


def test_one_section_twice_under_one_patient_is_prepared(cohort, tmp_path):
    assert len(plan_of(twins(cohort, tmp_path), tmp_path / "out").todo) == 2


@pytest.mark.odd
@pytest.mark.parametrize("make", LAYOUTS)
def test_one_visium_matrix_under_two_patients_is_refused(tmp_path, make):
    rows = []
    for patient in ("A", "B"):
        (tmp_path / patient).mkdir()
        row = section(tmp_path, make(tmp_path / patient), section_id=patient, patient_id=patient)
        (tmp_path / f"{patient}.png").write_bytes(patient.encode())
        rows.append(row.model_copy(update={"image": f"{tmp_path}/{patient}.png"}))
    with pytest.raises(SourceError, match=r"the same counts: A \(patient A, .*\); B \(patient B, .*") as caught:
        require_own_files(rows, source_digests(rows, {}).contents)
    assert "the same image" not in str(caught.value)
    require_own_files(rows[:1], source_digests(rows, {}).contents)


@pytest.mark.odd
@pytest.mark.parametrize(("first", "second", "is_same"), [("L1", "L1", True), ("L1", "L2", False)])
def test_sections_of_one_file_are_told_apart_by_their_names(tmp_path, first, second, is_same):
    (tmp_path / "s.h5ad").write_bytes(b"counts")
    rows = []
    for patient, library in {"A": first, "B": second}.items():
        image = tmp_path / f"{patient}.png"
        image.write_bytes(patient.encode())
        files = {"image": str(image), "expression": f"{tmp_path}/s.h5ad"}
        rows.append(SectionRow(section_id=patient, patient_id=patient, format="h5ad", library_id=library, **files))
    contents = source_digests(rows, {}).contents
    with pytest.raises(SourceError, match="the same counts") if is_same else nullcontext():
        require_own_files(rows, contents)


@pytest.mark.odd
def test_a_slide_without_counts_that_is_another_patients_is_refused(cohort, tmp_path):
    own = {"patient_id": "OTHER", "format": "slide", "expression": "", "positions": "", "labels": ""}
    with pytest.raises(SourceError, match=r"the same image: P1S1 .*; T "):
        plan_of(twins(cohort, tmp_path, **own), tmp_path / "out")


@pytest.mark.odd
@pytest.mark.ray
def test_counts_saved_again_under_another_patient_are_not_published(cohort, tmp_path, ray_session):
    sheet = twins(cohort, tmp_path)
    sheet = twins(cohort, tmp_path, patient_id="OTHER", **resave(tmp_path, image=True, counts=True))
    with pytest.raises(SourceError, match=r"the same counts: P1S1 \(patient P1\); T \(patient OTHER\)"):
        run(sheet, tmp_path / "out")
    assert not storage.exists(f"{tmp_path}/out/{MANIFEST}")


COUNTS = np.random.default_rng(0).poisson(0.8, (30, 20))


@pytest.mark.parametrize(
    "again",
    [
        lambda counts: counts[::-1],
        lambda counts: counts[:, ::-1],
        lambda counts: np.hstack([np.zeros((30, 2), int), counts]),
        lambda counts: np.vstack([counts, np.zeros((2, 20), int)]),
        lambda counts: counts.astype(np.int32),
    ],
    ids=["spots", "genes", "genes that nothing counted", "empty spots", "type"],
)
def test_a_digest_of_counts_is_that_of_their_content(again):
    assert counts_digest(csr_array(again(COUNTS))) == counts_digest(csr_array(COUNTS))


def test_a_digest_of_counts_changes_with_one_count():
    digests = {counts_digest(csr_array(COUNTS))}
    for spot in range(30):
        changed = COUNTS.copy()
        changed[spot, spot % 20] += 1
        digests.add(counts_digest(csr_array(changed)))
    assert len(digests) == 31
    assert counts_digest(csr_array((3, 4), dtype=np.int64)) is None


def _manifest(*entries):
    return Manifest(
        tile_size_px=8,
        mpp=1.0,
        encoding="jpeg",
        jpeg_quality=85,
        sentence_length=2,
        genes_file="",
        genes_sha256="",
        num_genes=1,
        sections=entries,
    )


def _entry(name, patient, digest):
    return section_entry(name, patient).model_copy(update={"counts_digest": digest})


@pytest.mark.odd
@pytest.mark.parametrize(
    "settings",
    [
        {"test_patients": ("B",)},
        {"validation_patients": ("B",)},
        {"test_patients": ("A",), "validation_patients": ("B",)},
        {"test_sections": ("B1",), "protocol": "reference"},
    ],
)
def test_a_split_between_equal_counts_is_refused(settings):
    manifest = _manifest(_entry("A1", "A", "x"), _entry("B1", "B", "x"), _entry("C1", "C", "y"))
    with pytest.raises(SplitError, match=r"sections (A1 and B1|B1 and A1) have the same counts"):
        make_split(manifest, SplitConfig.model_validate(settings))


def test_equal_or_unknown_counts_on_one_side_are_no_leak():
    manifest = _manifest(_entry("A1", "A", "x"), _entry("B1", "A", "x"), *(_entry(f"{p}1", p, None) for p in "CD"))
    assert make_split(manifest, SplitConfig(test_patients=("D",))).test == ("D1",)
    require_own_counts(manifest.sections)


SIMILAR = [("P1", "p1"), ("P1", "P01"), ("P1", "P-1"), ("P1", "P_1"), ("P1", "p.001"), ("1", "01"), ("AB", "A_b")]
SIMILAR += [("patient-7", "Patient07"), ("S1-2", "S01_02"), ("7A", "007-a"), ("BC-0", "BC-00")]
DIFFERENT = [("P1", "P2"), ("P1", "P10"), ("1-12", "11-2"), ("A1", "B1"), ("P1S1", "P1S2"), ("P", "P1"), ("_", "-")]


@pytest.mark.odd
@pytest.mark.parametrize(("first", "second"), SIMILAR)
def test_patients_whose_ids_look_the_same_are_named_with_their_sections(first, second):
    (warning,) = similar_patients({"S2": second, "S1": first, "S3": first, "X": "other"})
    for patient, sections in {first: "S1, S3", second: "S2"}.items():
        assert f"{patient} ({sections})" in warning


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_different_patients_are_not_named(first, second):
    assert similar_patients({"S1": first, "S2": second}) == []


@pytest.mark.odd
def test_prepare_and_training_warn_of_similar_patients(cohort, tmp_path, capsys):
    from _patients import warn_of_similar_patients

    sheet = Path(copy_of(cohort, tmp_path, ["P1S1", "P2S1"]))
    sheet.write_text(sheet.read_text().replace(",P2,", ",p1,"))
    expected = "patients P1 (P1S1) and p1 (P2S1) differ only in case"
    assert f"warning    {expected}" in describe(plan_of(str(sheet), tmp_path / "out"))
    warn_of_similar_patients(_manifest(_entry("P1S1", "P1", None), _entry("P2S1", "p1", None)))
    assert f"warning: {expected}" in capsys.readouterr().err
