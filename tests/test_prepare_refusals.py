"""What is refused on the way from a sample sheet to a tile table, and what is done all the same."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from prepared_tables import copy_of, edit_counts, read_everything, run

from mclstexp import storage
from mclstexp.data.schema import MANIFEST, load_manifest
from mclstexp.errors import ConfigError, SheetError, SourceError, TableError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def test_a_section_that_fails_does_not_stop_the_others(own_two, tmp_path):
    def spoil(table):
        return table.add(np.where(table.index == "2x3", 0.5, 0.0), axis=0)

    edit_counts(own_two, "P2S1", spoil)
    with pytest.raises(
        SourceError, match=r"1 of 2 section\(s\).*(?s:.*)section P2S1: P2S1.tsv.gz: gene \w+ of spot 2x3"
    ):
        run(own_two, tmp_path / "out")
    assert list(read_everything(str(tmp_path / "out"))) == ["P1S1"]


def test_a_section_that_can_no_longer_be_cut_keeps_its_last_version(own_two, tmp_path):
    run(own_two, tmp_path / "out")
    before = load_manifest(str(tmp_path / "out")).section("P1S1")
    slide = Path(own_two).parent / "P1S1.tif"
    intact = slide.read_bytes()
    tifffile.imwrite(slide, np.full((64, 64, 3), 255, np.uint8))
    with pytest.raises(SourceError, match="P1S1"):
        run(own_two, tmp_path / "out")
    assert load_manifest(str(tmp_path / "out")).section("P1S1") == before
    slide.write_bytes(intact + b"\0")
    assert run(own_two, tmp_path / "out").redone == ("P1S1",)


def test_a_new_section_of_nearly_the_same_resolution_leaves_the_others_alone(cohort, tmp_path):
    sheet = copy_of(cohort, tmp_path / "cohort", ["P1S1", "P1S2"])
    run(sheet, tmp_path / "out")
    new = Path(copy_of(cohort, tmp_path / "new", ["P2S1"], mpp="0.995")).read_text()
    (row,) = csv.DictReader(new.splitlines())
    for column in ("image", "expression", "positions", "labels"):
        shutil.copy(tmp_path / "new" / row[column], tmp_path / "cohort")
    with open(sheet, "a", newline="") as file:
        csv.DictWriter(file, row.keys()).writerow(row)
    assert run(sheet, tmp_path / "out").redone == ("P2S1",)


def test_faults_in_headers_end_the_run_before_any_work(own_two, tmp_path):
    folder = Path(own_two).parent
    (folder / "P1S1.tif").write_bytes((folder / "P1S1.tif").read_bytes()[:300])
    edit_counts(own_two, "P2S1", lambda table: table.set_axis([table.columns[0]] * table.shape[1], axis=1))
    with pytest.raises(
        SourceError, match=r"2 section\(s\)(?s:.*)section P1S1: image P1S1.tif(?s:.*)section P2S1: .*gene"
    ):
        run(own_two, tmp_path / "out")
    assert storage.list_files(str(tmp_path / "out")) == []


def test_sheet_faults_come_before_everything(tmp_path):
    (tmp_path / "samples.csv").write_text("section_id,patient_id,format,image\n../x,P,slide,none.tif\n")
    with pytest.raises(SheetError, match=r"2 fault\(s\)"):
        run(str(tmp_path / "samples.csv"), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "settings", "error", "reason"),
    [
        ({"mpp": "1.2"}, {}, SourceError, r"section P1S1: mpp is 1\.2 in the sheet and 1 in the image"),
        ({}, {"tiles.mpp": 0.5}, ConfigError, "would enlarge P1S1 by 2"),
        ({"spot_diameter_um": "100"}, {}, SourceError, "section P1S1: its spots are 32 um apart"),
    ],
)
def test_resolutions_that_do_not_fit_are_refused(cohort, tmp_path, changes, settings, error, reason):
    sheet = copy_of(cohort, tmp_path / "cohort", ["P1S1"], **changes)
    with pytest.raises(error, match=reason):
        run(sheet, tmp_path / "out", **settings)
    assert not storage.exists(str(tmp_path / "out" / MANIFEST))


def test_upsampling_can_be_allowed_and_mpp_comes_from_the_file(cohort, tmp_path):
    sheet = copy_of(cohort, tmp_path / "cohort", ["P1S1"], mpp="")
    manifest = run(sheet, tmp_path / "out", **{"tiles.mpp": 0.5, "tiles.allow_upsampling": True}).manifest
    assert (manifest.mpp, manifest.sections[0].source_mpp) == (0.5, 1.0)
    read_everything(str(tmp_path / "out"))


def test_no_resolution_anywhere_is_refused(cohort, tmp_path):
    sheet = copy_of(cohort, tmp_path / "cohort", ["P1S1"], mpp="", pitch_um="")
    path = tmp_path / "cohort" / "P1S1.tif"
    tifffile.imwrite(path, tifffile.imread(path, level=0), photometric="rgb", tile=(256, 256))
    with pytest.raises(SourceError, match="section P1S1: no resolution: sheet"):
        run(sheet, tmp_path / "out")


def test_sections_of_different_resolution_need_a_target(cohort, tmp_path):
    sheet = copy_of(cohort, tmp_path / "cohort", ["P1S1", "P2S1"])
    text = Path(sheet).read_text().splitlines()
    Path(sheet).write_text("\n".join([*text[:2], text[2].replace(",1.0,", ",1.04,")]) + "\n")
    with pytest.raises(ConfigError, match=r"tiles\.mpp is empty.*P1S1 has 1 um/px, P2S1 1\.04"):
        run(sheet, tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda t: t.assign(pixel_x=t.pixel_x + 5000), "only 0 of 36 spots are on its image"),
        (lambda t: t.assign(pixel_x=t.pixel_x * 0.1 + 16, pixel_y=t.pixel_y * 0.1 + 16), "10 in the array of spots"),
    ],
)
def test_positions_of_another_image_are_refused(cohort, tmp_path, edit, reason):
    sheet = copy_of(cohort, tmp_path / "cohort", ["P1S1"], spot_diameter_um="")
    path = tmp_path / "cohort" / "P1S1_selection.tsv"
    edit(pd.read_csv(path, sep="\t")).to_csv(path, sep="\t", index=False)
    with pytest.raises(SourceError, match=reason):
        run(sheet, tmp_path / "out")


def test_a_table_of_another_schema_version_is_not_overwritten(two, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST).write_text('{"schema_version": 99}')
    with pytest.raises(TableError, match=r"schema version 99.*or remove"):
        run(two, out)
    assert (out / MANIFEST).read_text() == '{"schema_version": 99}'
