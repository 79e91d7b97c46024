"""HEST-1k folders become sheets; species and organs of slides are compared with those of a model."""

import csv
import io

import pytest

from ingest.datasets import dataset_sheet
from ingest.plan import source_digests
from mclstexp.data.sheet import SectionRow
from mclstexp.errors import SheetError, SourceError
from mclstexp.model.version import TrainingRecord
from mclstexp.prediction.origin import compare_origins

HEADER = (
    "dataset_title,id,image_filename,organ,disease_state,oncotree_code,species,patient,st_technology,inter_spot_dist,"
    "spot_diameter,pixel_size_um_embedded,pixel_size_um_estimated\n"
)
ROWS = (
    '"Prostate, visium",TENX1,TENX1.tif,Prostate,Cancer,PRAD,Homo sapiens,Patient 1,Visium,100.0,55.0,0.2,0.34375\n'
    "Prostate visium,TENX2,TENX2.tif,Prostate,Cancer,PRAD,Homo sapiens,Patient 1,Visium,100.0,55.0,,0.5\n"
    '"Prostate, visium",TENX3,TENX3.tif,Bowel,Healthy,,Mus musculus,Patient 1,Visium,,,,0.4\n'
    '"Prostate, visium",NCBI4,NCBI4.tif,Bowel,Healthy,,Mus musculus,,Xenium,100,55,,nan\n'
    '"Prostate, visium",AWAY,AWAY.tif,Bowel,Healthy,,Mus musculus,,Xenium,100,55,,0.2\n'
)


@pytest.fixture
def hest(tmp_path):
    for name in ("TENX1", "TENX2", "TENX3", "NCBI4"):
        for file in (f"st/{name}.h5ad", f"wsis/{name}.tif"):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
    (tmp_path / "HEST_v1_1_0.csv").write_text(HEADER + ROWS)
    return tmp_path


def rows_of(folder):
    cells = csv.DictReader(io.StringIO(dataset_sheet("hest", str(folder))))
    return {row["section_id"]: SectionRow(**{name: text for name, text in row.items() if text}) for row in cells}


def test_a_folder_gives_what_was_downloaded_with_its_metadata(hest):
    rows = rows_of(hest)
    assert list(rows) == ["TENX1", "TENX2", "TENX3", "NCBI4"]
    first = rows["TENX1"]
    assert (first.image, first.expression) == (f"{hest}/wsis/TENX1.tif", f"{hest}/st/TENX1.h5ad")
    assert (first.mpp, first.spot_diameter_um, first.pitch_um, first.format) == (0.34375, 55, 100, "h5ad")
    assert (first.species, first.organ) == ("homo sapiens", "prostate")
    assert (rows["TENX3"].pitch_um, rows["NCBI4"].mpp) == (None, None)


@pytest.mark.odd
def test_patients_of_two_data_sets_with_one_name_are_two(hest):
    rows = rows_of(hest)
    assert rows["TENX1"].patient_id == rows["TENX3"].patient_id != rows["TENX2"].patient_id
    assert rows["NCBI4"].patient_id == "NCBI4"


@pytest.mark.odd
def test_the_newest_metadata_counts(hest):
    (hest / "HEST_v1_10_0.csv").write_text(HEADER + ROWS.replace("0.34375", "0.7"))
    (hest / "HEST_v1_9_0.csv").write_text(HEADER + ROWS.replace("0.34375", "0.9"))
    assert rows_of(hest)["TENX1"].mpp == 0.7


FAULTS = {
    "no metadata": (lambda folder: (folder / "HEST_v1_1_0.csv").unlink(), r"HEST_v\*\.csv"),
    "half downloaded": (lambda folder: (folder / "wsis/TENX2.tif").unlink(), r"\n  wsis/TENX2\.tif"),
    "no column": (
        lambda folder: (folder / "HEST_v1_1_0.csv").write_text(HEADER.replace("patient", "donor") + ROWS),
        "column patient of the metadata",
    ),
    "nothing": (lambda folder: (folder / "HEST_v1_1_0.csv").write_text(HEADER), "st/ID.h5ad and wsis/ID.tif of any"),
}


@pytest.mark.odd
@pytest.mark.parametrize("name", FAULTS)
def test_what_is_missing_is_named(hest, name):
    spoil, expected = FAULTS[name]
    spoil(hest)
    with pytest.raises(SourceError, match=expected):
        dataset_sheet("hest", str(hest))


def _row(**stated):
    return SectionRow(section_id="S", patient_id="P", image="a.svs", format="slide", **stated)


def _record(**stated):
    return TrainingRecord(
        manifest_digest="", protocol="patient", sections=(), patients=(), validation_sections=(), test_sections=(),
        epochs=1, **stated,
    )  # fmt: skip


@pytest.mark.odd
@pytest.mark.parametrize("species", ["Mouse", "mus musculus", " Mus  musculus", "rat"])
def test_slides_of_another_species_are_refused(species):
    with pytest.raises(SheetError, match=r"trained on homo sapiens, but .*: S \(.*; use a model of that species"):
        compare_origins([_row(species=species)], _record(species=("homo sapiens",)))


@pytest.mark.odd
def test_slides_of_another_organ_are_a_warning():
    (warning,) = compare_origins([_row(organ="Lung")], _record(organs=("breast", "skin")))
    assert warning == "the model was trained on breast, skin, not on the organ of S (lung)"


@pytest.mark.parametrize(("row", "record"), [
    ({"species": "Human", "organ": "Breast"}, {"species": ("homo sapiens",), "organs": ("breast",)}),
    ({}, {"species": ("homo sapiens",), "organs": ("breast",)}),
    ({"species": "mouse", "organ": "lung"}, {}),
])  # fmt: skip
def test_the_same_or_nothing_stated_is_no_fault(row, record):
    assert compare_origins([_row(**row)], _record(**record)) == []


def test_the_columns_leave_the_digests_of_other_rows_alone(tmp_path):
    (tmp_path / "a.svs").write_bytes(b"x")
    row = _row().model_copy(update={"image": str(tmp_path / "a.svs")})
    stated = row.model_copy(update={"organ": "lung"})
    before, after = (source_digests([each], {}).digests["S"] for each in (row, stated))
    assert before != after
    assert "organ" in stated.model_dump(exclude_defaults=True)
    assert "organ" not in row.model_dump(exclude_defaults=True)
