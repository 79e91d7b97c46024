"""Publishing of staged slides, against what was staged: every file is read back by the library that users have."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image
from staged_slides import CONFIDENCE, FACTS, GENES, PANEL, SCANNED_FROM, Slide

from mclstexp import storage
from mclstexp.errors import StorageError
from mclstexp.prediction.draw import redrawn
from mclstexp.prediction.publish import publish_slide
from mclstexp.prediction.writers.table import tile_left
from mclstexp.slides import tiles


@pytest.fixture(scope="module")
def slides(staged: dict[str, Slide]) -> dict[str, Slide]:
    return staged


@pytest.fixture(scope="module")
def out(slides: dict[str, Slide], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    for slide in slides.values():
        publish_slide(str(slide.staging), str(folder), FACTS, GENES)
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _require_equal(found: pd.Series, expected: pd.Series) -> None:
    """The same values, and none where there are none, whatever their pandas types."""
    pairs = [each.astype(object).to_numpy() for each in (found, expected)]
    missing = [pd.isna(values) for values in pairs]
    assert np.array_equal(*missing), found.name
    assert np.array_equal(*(values[~none] for values, none in zip(pairs, missing, strict=True))), found.name


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_the_table_is_what_was_staged_without_missing_tiles(slides: dict[str, Slide], out: Path, name: str) -> None:
    slide, file = slides[name], pq.ParquetFile(out / f"{name}.parquet")
    frame = file.read().to_pandas()
    there = slide.grid[slide.complete].reset_index(drop=True)
    assert list(frame)[:3] == ["section_id", "patient_id", "spot_id"]
    assert list(frame)[10:] == [*CONFIDENCE, "out_of_distribution", *PANEL.gene_id]
    assert set(frame["section_id"]) == {name}
    assert set(frame["patient_id"]) == {f"{name} of µ"}
    for column in there:
        _require_equal(frame[column], there[column])
    for column in CONFIDENCE:
        assert np.array_equal(frame[column], getattr(slide.answer, column)[slide.complete])
    assert frame[list(PANEL.gene_id)].to_numpy().dtype == np.float32
    assert np.array_equal(frame[list(PANEL.gene_id)], slide.answer.prediction[slide.complete])
    assert np.array_equal(frame["out_of_distribution"], slide.answer.similarity[slide.complete] < 0.3)
    groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert sum(groups) == slide.complete.sum()
    assert groups[:-1] == [slide.complete[:4096].sum()] * (len(groups) - 1)
    said = {key.decode(): value.decode() for key, value in file.schema_arrow.metadata.items()}
    assert said["genes"].split(",") == list(PANEL.gene_id)
    assert said["symbols"].split(",") == list(PANEL.symbol)
    wanted = {"unit": FACTS.unit, "model_digest": FACTS.model_digest, "tile_size_px": "32", "mpp": "0.5"}
    wanted |= {"slide_fingerprint": f"print of {name}", "missing_tiles": str((~slide.complete).sum())}
    assert said | wanted == said


@pytest.mark.parametrize("name", ["A", "B", "C"])
@pytest.mark.parametrize("backed", [None, "r"])
def test_anndata_opens_it_and_it_says_the_same(slides: dict[str, Slide], out: Path, name: str, backed: str) -> None:
    slide, frame = slides[name], pq.read_table(out / f"{name}.parquet").to_pandas()
    data = anndata.read_h5ad(out / f"{name}.h5ad", backed=backed)
    assert data.X.dtype == np.float32
    assert np.array_equal(data.X[:], frame[list(PANEL.gene_id)])
    assert list(data.obs_names) == frame["spot_id"].tolist()
    assert list(data.obs) == [column for column in frame if column not in ("spot_id", *PANEL.gene_id)]
    for column in data.obs:
        _require_equal(data.obs[column], frame[column])
    assert np.array_equal(data.obsm["spatial"], frame[["x_px", "y_px"]])
    assert list(data.var_names) == list(PANEL.gene_id)
    assert data.var["symbol"].tolist() == list(PANEL.symbol)
    assert data.var["ensembl_id"].tolist() == list(PANEL.ensembl_id)
    origin = data.uns["prediction"]
    in_table = {key.decode(): value.decode() for key, value in pq.read_schema(out / f"{name}.parquet").metadata.items()}
    assert {key: in_table[key] for key in origin if key != "spatial_unit"} | {
        "spatial_unit": "px at slide level 0"
    } == origin
    picture = data.uns["spatial"][name]
    rgb, factors = picture["images"]["hires"], picture["scalefactors"]
    assert np.array_equal(rgb, np.asarray(Image.open(slide.staging / "thumbnail.jpg")))
    assert factors["tissue_hires_scalef"] * slide.record.width_px == pytest.approx(rgb.shape[1], abs=1)
    assert factors["spot_diameter_fullres"] == 32 * slide.record.scale
    if backed:
        data.file.close()


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_squares_lie_where_the_tiles_were_cut(slides: dict[str, Slide], out: Path, name: str) -> None:
    slide = slides[name]
    collection = json.loads((out / "geojson" / f"{name}.geojson").read_text())
    assert collection["type"] == "FeatureCollection"
    assert collection["prediction"]["unit"] == FACTS.unit
    features = collection["features"]
    assert len(features) == slide.complete.sum()
    rings = np.array([feature["geometry"]["coordinates"] for feature in features])
    assert rings.shape == (len(features), 1, 5, 2)
    assert np.array_equal(rings[:, 0, 0], rings[:, 0, 4])
    edge = 32 * slide.record.scale
    low, high = rings.min(axis=(1, 2)), rings.max(axis=(1, 2))
    assert low == pytest.approx(np.floor(slide.place) - edge / 2 - SCANNED_FROM)
    assert high - low == pytest.approx(np.full_like(low, edge))
    assert {len({tuple(corner) for corner in ring[0]}) for ring in rings.tolist()} == {4}
    names = slide.grid.loc[slide.complete, "spot_id"]
    for feature, spot, row, similarity in zip(
        features, names, slide.answer.prediction[slide.complete], slide.answer.similarity[slide.complete], strict=True
    ):
        said = feature["properties"]
        assert (feature["type"], feature["geometry"]["type"]) == ("Feature", "Polygon")
        assert (said["objectType"], said["isLocked"], said["name"]) == ("detection", False, spot)
        assert list(said["measurements"]) == ["similarity", "GNAS", "FASN"]
        assert np.array_equal(np.float32(list(said["measurements"].values())), [similarity, *row[:2]])


@pytest.mark.parametrize("size_px", [32, 33])
@pytest.mark.parametrize("scale", [1.0, 1.37])
def test_corners_are_those_that_tiles_are_cut_at(slides: dict[str, Slide], size_px: int, scale: float) -> None:
    centres = np.random.default_rng(0).random(50) * 1e5
    record = slides["A"].record.model_copy(update={"scale": scale})
    found = tile_left(centres, record, replace(FACTS, tile_size_px=size_px))
    assert np.array_equal(found, tiles.tile_corner(centres, size_px, scale))


def test_the_first_genes_are_shown_where_none_are_chosen_and_no_squares_stay(
    slides: dict[str, Slide], out: Path, tmp_path: Path
) -> None:
    shutil.copytree(out, tmp_path / "out")
    publish_slide(str(slides["A"].staging), str(tmp_path / "out"), FACTS, [])
    assert not (tmp_path / "out" / "geojson" / "A.geojson").exists()
    assert (tmp_path / "out" / "geojson" / "B.geojson").exists()
    widths = [Image.open(folder / "overviews" / "A.png").size for folder in (out, tmp_path / "out")]
    assert widths[1][1] > 1.5 * widths[0][1], "five maps in two rows against three in one"
    assert (tmp_path / "out" / "A.parquet").read_bytes() == (out / "A.parquet").read_bytes()


def test_a_slide_that_is_drawn_again_has_the_files_of_a_run_with_these_genes(
    slides: dict[str, Slide], out: Path, tmp_path: Path
) -> None:
    for name, slide in slides.items():
        publish_slide(str(slide.staging), str(tmp_path), FACTS, ["DUP"] if name == "A" else [])
        before = _files(tmp_path)
        with redrawn(name, str(tmp_path), FACTS, GENES) as replace_published:
            assert _files(tmp_path) == before
            replace_published()
        changed = {path for path, data in _files(tmp_path).items() if before.get(path) != data}
        assert changed == {f"overviews/{name}.png", f"geojson/{name}.geojson"}
    assert _files(tmp_path) == _files(out)


def test_a_table_that_does_not_know_its_slide_is_not_drawn_again(
    slides: dict[str, Slide], out: Path, tmp_path: Path
) -> None:
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    pq.write_table(pq.read_table(out / "A.parquet").replace_schema_metadata(None), tmp_path / "A.parquet")
    before = _files(tmp_path)
    with (
        pytest.raises(StorageError, match="no table of a slide by this version"),
        redrawn("A", str(tmp_path), FACTS, GENES),
    ):
        pass
    assert _files(tmp_path) == before


def test_the_preview_is_copied_as_it_is(slides: dict[str, Slide], out: Path) -> None:
    assert (out / "previews" / "A.jpg").read_bytes() == (slides["A"].staging / "preview.jpg").read_bytes()


def test_a_slide_without_tiles_has_a_preview_and_nothing_of_an_earlier_image(
    slides: dict[str, Slide], tmp_path: Path
) -> None:
    staging, folder = tmp_path / "C-key", tmp_path / "out"
    shutil.copytree(slides["C"].staging, staging)
    publish_slide(str(staging), str(folder), FACTS, GENES)
    assert len(_files(folder)) == 5
    empty = slides["C"].record.model_copy(update={"num_tiles": 0})
    (staging / "slide.json").write_text(empty.model_dump_json())
    assert publish_slide(str(staging), str(folder), FACTS, GENES) == empty
    assert list(_files(folder)) == ["previews/C.jpg"]


@pytest.mark.slow
def test_the_same_bytes_later_in_another_process_and_place(slides: dict[str, Slide], out: Path, tmp_path: Path) -> None:
    time.sleep(1.1)  # times in files have seconds
    shutil.copytree(slides["A"].staging, tmp_path / "elsewhere" / "A-key")
    script = (
        "import sys; from test_publish import FACTS, GENES; from mclstexp.prediction.publish import publish_slide;"
        "publish_slide(sys.argv[1], sys.argv[2], FACTS, GENES)"
    )
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root / 'platform'}:{root}:{root / 'tests'}"}
    command = [sys.executable, "-c", script, str(tmp_path / "elsewhere" / "A-key"), str(tmp_path / "out")]
    subprocess.run(command, env=environment, check=True)
    again = _files(tmp_path / "out")
    assert set(again) == {"A.parquet", "A.h5ad", "previews/A.jpg", "overviews/A.png", "geojson/A.geojson"}
    digests = [{name: hashlib.sha256(files[name]).hexdigest() for name in again} for files in (again, _files(out))]
    assert digests[0] == digests[1]


def test_from_and_to_object_storage(slides: dict[str, Slide], out: Path, s3: str) -> None:
    storage.upload_folder(slides["A"].staging, f"{s3}/staging/A", last="slide.json")
    publish_slide(f"{s3}/staging/A", f"{s3}/out", FACTS, GENES)
    published = {uri.removeprefix(f"{s3}/out/"): storage.read(uri) for uri in storage.list_files(f"{s3}/out")}
    assert published == {name: data for name, data in _files(out).items() if Path(name).stem == "A"}
