"""Sample sheets of the public data sets, from folders of their published shape."""

import csv
import gzip
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import prepare
import pytest
from PIL import Image

from ingest.datasets import dataset_sheet
from ingest.readers import READERS
from mclstexp import storage
from mclstexp.data.sheet import read_sheet
from mclstexp.errors import ConfigError, SourceError
from mclstexp.slides.slide import open_slide

ROOT = Path(__file__).parents[1]
HER2ST = {"A": 6, "B": 6, "C": 6, "D": 6, "E": 3, "F": 3, "G": 3, "H": 3}
LABELLED = ("A1", "B1", "C1", "D1", "E1", "F1", "G2", "H1", "J1")


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def write_selection(path, px_per_step, chequered=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected"]
    for x, y in ((x, y) for x in range(2, 10) for y in range(2, 8) if not chequered or (x + y) % 2 == 0):
        lines.append(f"{x}\t{y}\t{x}\t{y}\t{x * px_per_step:.2f}\t{y * px_per_step:.2f}\t1")
    text = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


@pytest.fixture
def her2st(tmp_path):
    data = tmp_path / "her2st" / "data"
    for name in (f"{patient}{n}" for patient, times in HER2ST.items() for n in range(1, times + 1)):
        touch(data / "ST-cnts" / f"{name}.tsv.gz")
        touch(data / "ST-imgs" / name[0] / name / f"{name}_BT{name}_HE.jpg")
        write_selection(data / "ST-spotfiles" / f"{name}_selection.tsv", 290.0)
    for name in LABELLED:
        touch(data / "ST-pat/lbl" / f"{name}_labeled_coordinates.tsv")
    return data.parent


@pytest.fixture
def cscc(tmp_path):
    folder = tmp_path / "GSE144240_RAW"
    for i, name in enumerate(f"{patient}_ST_rep{n}" for patient in ("P2", "P5", "P9", "P10") for n in (1, 2, 3)):
        start = f"GSM{4284316 + i}_"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (250, 40 + 15 * i, 200)).save(folder / f"{start}{name}.jpg")
        (folder / f"{start}{name}_stdata.tsv.gz").write_bytes(
            gzip.compress(f"\tGNAS\tFASN\n2x2\t{i + 1}\t2\n".encode())
        )
        write_selection(folder / f"{start}spot_data-selection-{name}.tsv.gz", 176.9, chequered=True)
    touch(folder / "GSM4284322_P4_ST_rep1.jpg")
    return folder


@pytest.fixture
def alex10x(tmp_path):
    folder = tmp_path / "alex"
    names = ["1142243F", "CID4290", "CID4465", "CID44971", "CID4535", "1160920F", "block1", "block2", "FFPE"]
    for name in names:
        matrix = "filtered_feature_bc_matrix" if name in ("block1", "block2", "FFPE") else "filtered_count_matrix"
        features = "genes.tsv" if name == "CID4290" else "features.tsv.gz"
        for file in ("matrix.mtx.gz", features, "barcodes.tsv.gz"):
            touch(folder / name / matrix / file)
        touch(folder / name / "image.tif")
        touch(folder / name / "spatial/tissue_positions_list.csv")
        touch(folder / name / "spatial/scalefactors_json.json")
    return folder


def rows_of(name, source, tmp_path):
    """The sheet as `prepare` reads it, which looks up every file."""
    path = tmp_path / "samples.csv"
    path.write_text(dataset_sheet(name, str(source)))
    return {row.section_id: row for row in read_sheet(str(path), READERS)}


def missing_in(name, source):
    with pytest.raises(SourceError) as caught:
        dataset_sheet(name, str(source))
    return str(caught.value)


@pytest.mark.parametrize("inner", ["", "data"])
def test_her2st_has_the_papers_sections(her2st, tmp_path, inner):
    rows = rows_of("her2st", her2st / inner, tmp_path)
    assert len(rows) == 32
    assert list(rows) == sorted(rows)
    assert {"A2", "G3"} <= rows.keys()
    assert "A1" not in rows
    patients = [row.patient_id for row in rows.values()]
    assert [patients.count(patient) for patient in "ABCDEFGH"] == [5, 6, 6, 6, 3, 3, 3, 0]
    row = rows["C5"]
    data = her2st / "data"
    assert (row.format, row.site, row.spot_diameter_um) == ("legacy_st", "her2st", 100)
    assert row.mpp == pytest.approx(200 / 290, rel=1e-3)
    assert row.files == {
        "image": f"{data}/ST-imgs/C/C5/C5_BTC5_HE.jpg",
        "expression": f"{data}/ST-cnts/C5.tsv.gz",
        "positions": f"{data}/ST-spotfiles/C5_selection.tsv",
    }
    assert {name for name, row in rows.items() if row.labels} == {"B1", "C1", "D1", "E1", "F1", "G2"}


def test_her2st_whole(her2st, tmp_path):
    rows = rows_of("her2st_all", her2st, tmp_path)
    assert len(rows) == 36
    assert {name: row.patient_id for name, row in rows.items()} == {name: name[0] for name in rows}
    assert rows["A1"].labels == f"{her2st}/data/ST-pat/lbl/A1_labeled_coordinates.tsv"


def test_cscc(cscc, tmp_path):
    rows = rows_of("cscc", cscc, tmp_path)
    assert len(rows) == 12
    assert {row.patient_id for row in rows.values()} == {"P2", "P5", "P9", "P10"}
    row = rows["P2_ST_rep1"]
    assert row.files == {
        "image": f"{cscc}/GSM4284316_P2_ST_rep1.jpg",
        "expression": f"{cscc}/GSM4284316_P2_ST_rep1_stdata.tsv.gz",
        "positions": f"{cscc}/GSM4284316_spot_data-selection-P2_ST_rep1.tsv.gz",
    }
    assert row.spot_diameter_um == 110
    assert row.mpp == pytest.approx(150 / (176.9 * np.sqrt(2)), rel=1e-3), "neighbours are a diagonal apart"


def test_alex10x(alex10x, tmp_path):
    rows = rows_of("alex10x", alex10x, tmp_path)
    assert len(rows) == 9
    patients = [row.patient_id for row in rows.values()]
    assert (rows["block1"].patient_id, len(set(patients))) == (rows["block2"].patient_id, 8)
    assert {(row.format, row.mpp) for row in rows.values()} == {("visium", None)}
    assert rows["CID4290"].expression == f"{alex10x}/CID4290"
    assert (rows["FFPE"].site, rows["CID4290"].site) == ("10x", "swarbrick")


def test_everything_that_is_missing_is_listed_at_once(her2st, cscc, alex10x):
    data = her2st / "data"
    (data / "ST-cnts/A2.tsv.gz").unlink()
    (data / "ST-spotfiles/G3_selection.tsv").unlink()
    (data / "ST-imgs/B/B1/B1_BTB1_HE.jpg").unlink()
    touch(data / "ST-imgs/B/B2/another.jpg")
    text = missing_in("her2st", her2st)
    assert f"4 part(s) of the data set her2st are missing in {data}:" in text
    for part in (
        "ST-cnts/A2.tsv.gz",
        "ST-spotfiles/G3_selection.tsv",
        "ST-imgs/B/B1/*.jpg",
        "ST-imgs/B/B2/*.jpg: found",
    ):
        assert f"\n  {part}" in text
    for path in [*cscc.glob("*P10_ST_rep2*"), *cscc.glob("*selection-P9_ST_rep1*")]:
        path.unlink()
    text = missing_in("cscc", cscc)
    assert "4 part(s)" in text
    assert "*_P10_ST_rep2.jpg" in text
    assert "*_spot_data-selection-P9_ST_rep1.tsv.gz" in text
    (alex10x / "FFPE/image.tif").unlink()
    (alex10x / "CID4465/spatial/scalefactors_json.json").unlink()
    text = missing_in("alex10x", alex10x)
    assert "2 part(s)" in text
    assert "FFPE/image.tif" in text
    assert f"{alex10x}/CID4465/spatial has no scalefactors_json.json" in text
    assert "96 part(s)" in missing_in("her2st", alex10x)


def test_images_may_be_packed_as_geo_publishes_them(cscc, tmp_path):
    plain = cscc / "GSM4284316_P2_ST_rep1.jpg"
    packed = plain.with_name(f"{plain.name}.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert rows_of("cscc", cscc, tmp_path)["P2_ST_rep1"].image == str(plain), "beside the plain file it is no matter"
    plain.unlink()
    row = rows_of("cscc", cscc, tmp_path)["P2_ST_rep1"]
    assert row.image == str(packed)
    with open_slide(row.image) as slide:
        assert (slide.width, slide.height) == (64, 64)
    packed.unlink()
    assert "*_P2_ST_rep1.jpg.gz" in missing_in("cscc", cscc)


def test_tables_may_be_unpacked(cscc, tmp_path):
    for path in cscc.glob("*.tsv.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    rows = rows_of("cscc", cscc, tmp_path)
    assert rows["P9_ST_rep3"].expression.endswith("_P9_ST_rep3_stdata.tsv")


def test_a_damaged_positions_file_is_named(her2st):
    (her2st / "data/ST-spotfiles/D4_selection.tsv").write_text("x\ty\tpixel_x\tpixel_y\n1\t2\t3\t?\n")
    with pytest.raises(
        SourceError, match=r"D4_selection\.tsv: column pixel_y: 1 of 1 cells .* such as '\?' \(line 2\)"
    ):
        dataset_sheet("her2st", str(her2st))


def test_a_data_set_in_object_storage(s3, alex10x):
    for path in (path for path in alex10x.rglob("*") if path.is_file()):
        storage.write(f"{s3}/alex/{path.relative_to(alex10x)}", b"")
    rows = list(csv.DictReader(io.StringIO(dataset_sheet("alex10x", f"{s3}/alex/"))))
    assert rows[0]["expression"] == f"{s3}/alex/1142243F"
    assert len(rows) == 9


# ---------------------------------------------------------------- the job


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give either --samples SHEET.csv, or --dataset NAME and --source DIR"),
        (["--samples", "a.csv", "--dataset", "cscc", "--source", "d"], "give either --samples"),
        (["--dataset", "cscc"], "--dataset NAME and --source DIR go together"),
        (["--samples", "a.csv", "--source", "d"], "--dataset NAME and --source DIR go together"),
        (
            ["--dataset", "her2", "--source", "d", "--dry-run"],
            "--dataset her2 is unknown; did you mean her2st?",
        ),
    ],
)
def test_the_job_takes_one_sheet(monkeypatch, tmp_path, given, message):
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--out", str(tmp_path), *given])
    with pytest.raises(ConfigError) as caught:
        prepare.main()
    assert message in str(caught.value)


def test_the_job_plans_a_data_set(cscc, tmp_path):
    command = [sys.executable, str(ROOT / "jobs/prepare.py"), "--dataset", "cscc", "--source", str(cscc)]
    done = subprocess.run([*command, "--out", str(tmp_path / "out"), "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "P2_ST_rep1: patient P2, legacy_st, 0.5996 um/px" in done.stdout
    assert "resolution 0.5996 um/px by the sheet: 12 section(s) (P2_ST_rep1, " in done.stdout
    assert "genes by   symbols: 2 in common of 2 in each of 12 section(s)" in done.stdout
    assert not (tmp_path / "out").exists(), "a dry run writes nothing"
