"""Publishing of staged slides, against what was staged: every file is read back by the library that users have."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import anndata
import matplotlib
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from staged_slides import CONFIDENCE, FACTS, GENES, PANEL, SCANNED_FROM, TILE_PX, Slide, stage, write

from ingest import tiling
from mclstexp import storage
from mclstexp.data.genes import GenePanel
from mclstexp.errors import ConfigError, PartError, StorageError
from mclstexp.inference.model_facts import choose_genes, gene_labels
from mclstexp.inference.parts import parts_done
from mclstexp.inference.publish import publish_slide, redrawn
from mclstexp.inference.slide_geojson import write_geojson
from mclstexp.inference.slide_h5ad import write_h5ad
from mclstexp.inference.slide_overview import MOST_GENES, draw_overview, paint
from mclstexp.inference.slide_table import tile_corner, write_table


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Slide]:
    """A last short part and missing tiles; two row groups at another resolution; given positions."""
    folder = tmp_path_factory.mktemp("staging")
    return {
        "A": stage(folder, "A", 30, 20, missing=7),
        "B": stage(folder, "B", 88, 50, scale=1.37, missing=40),
        "C": stage(folder, "C", 16, 16, given=True),
    }


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
    found = tile_corner(centres, record, replace(FACTS, tile_size_px=size_px))
    assert np.array_equal(found, tiling.tile_corner(centres, size_px, scale))


def test_a_gradient_shows_in_the_overview_where_it_lies(slides: dict[str, Slide], tmp_path: Path) -> None:
    """Two pictures that differ in one gene differ exactly on its map, whose tiles then have their own colours."""
    slide, pictures = stage(tmp_path, "G", 20, 12), {}
    column, row = ((slide.grid[name].to_numpy() // TILE_PX) for name in ("x_px", "y_px"))
    ramp = column + (row == 2) * (column == 15) * -10.0
    for name, values in {"seen": ramp, "other": 19 - ramp}.items():
        slide.answer.prediction[:, 1] = values
        write(slide)
        publish_slide(str(slide.staging), str(tmp_path / name), FACTS, ["FASN"])
        pictures[name] = np.asarray(Image.open(tmp_path / name / "overviews" / "G.png").convert("RGB")).astype(int)
    differ = (pictures["seen"] != pictures["other"]).any(axis=2)
    top, bottom, left, right = (edge for axis in (1, 0) for edge in np.flatnonzero(differ.any(axis=axis))[[0, -1]])
    assert (right - left) / (bottom - top) == pytest.approx(20 / 12, rel=0.03)
    assert left > 0.45 * pictures["seen"].shape[1], "the slide itself stands first"
    limits = np.quantile(ramp, [0.01, 0.99])
    for tile in range(len(ramp)):
        shade = (ramp[tile] - limits[0]) / (limits[1] - limits[0])
        y = top + (row[tile] + 0.5) / 12 * (bottom - top)
        x = left + (column[tile] + 0.5) / 20 * (right - left)
        expected = 255 * np.array(matplotlib.colormaps["viridis"](shade)[:3])
        assert pictures["seen"][round(y), round(x)] == pytest.approx(expected, abs=2), (row[tile], column[tile])


def test_of_a_hundred_genes_over_a_long_slide_the_first_are_drawn(tmp_path: Path) -> None:
    slide = stage(tmp_path, "L", 2, 60)
    names = [f"GENE{number}" for number in range(100)]
    place = {name: slide.grid[name].to_numpy() for name in ("x_px", "y_px")}
    pq.write_table(pa.table(place | dict.fromkeys(names, slide.answer.prediction[:, 0])), tmp_path / "table.parquet")
    facts = replace(FACTS, panel=GenePanel.from_names(names))
    sizes = []
    for num_genes in (MOST_GENES, 100):
        thumbnail = np.full((384, 13, 3), 230, np.uint8)
        places = tmp_path / "map.png", tmp_path / "table.parquet"
        draw_overview(*places, slide.record, facts, range(num_genes), thumbnail)
        sizes.append(Image.open(tmp_path / "map.png").size)
    assert sizes[0][1] == pytest.approx(30_000, abs=1), "as many pixels as an edge may have"
    assert sizes[1] == pytest.approx(sizes[0], abs=5), "a line more in the heading, and no map more"


def test_paint_fills_boxes_and_means_where_they_overlap() -> None:
    rng = np.random.default_rng(3)
    first, values = rng.integers(0, (18, 9), (40, 2)), rng.normal(size=40)
    last = first + rng.integers(1, 3, (40, 2))
    expected = np.full((10, 20), np.nan)
    for y in range(10):
        for x in range(20):
            over = [k for k in range(40) if first[k, 0] <= x < last[k, 0] and first[k, 1] <= y < last[k, 1]]
            expected[y, x] = np.mean(values[over]) if over else np.nan
    boxes = [np.stack([first[:, axis], last[:, axis]]) for axis in (0, 1)]
    assert paint(*boxes, values, (10, 20)) == pytest.approx(expected, nan_ok=True)


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


@pytest.mark.slow
def test_the_same_bytes_later_in_another_process_and_place(slides: dict[str, Slide], out: Path, tmp_path: Path) -> None:
    time.sleep(1.1)  # times in files have seconds
    shutil.copytree(slides["A"].staging, tmp_path / "elsewhere" / "A-key")
    script = (
        "import sys; from test_publish import FACTS, GENES; from mclstexp.inference.publish import publish_slide;"
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


def test_the_table_comes_last(slides: dict[str, Slide], tmp_path: Path) -> None:
    (tmp_path / "geojson").write_text("a file where the folder should be")
    with pytest.raises(StorageError):
        publish_slide(str(slides["A"].staging), str(tmp_path), FACTS, GENES)
    assert (tmp_path / "A.h5ad").exists()
    assert not (tmp_path / "A.parquet").exists()


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "damaged and is removed"),
        (lambda path: path.write_bytes(b""), "damaged and is removed"),
        (lambda path: path.write_bytes((path.parent / "00002.safetensors").read_bytes()), r"float32 \(88, 6\)"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_damaged_part_is_named_and_counts_as_not_done(
    slides: dict[str, Slide], tmp_path: Path, damage: object, fault: str
) -> None:
    staging = tmp_path / "A-key"
    shutil.copytree(slides["A"].staging, staging)
    assert parts_done(str(staging)) == {0, 1, 2}
    damage(staging / "parts" / "00001.safetensors")
    with pytest.raises(PartError, match=rf"A-key/parts/00001.safetensors .*{fault}"):
        publish_slide(str(staging), str(tmp_path / "out"), FACTS, GENES)
    assert parts_done(str(staging)) == {0, 2}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["grid.parquet", "slide.json", "thumbnail.jpg"])
def test_another_damage_of_the_staging_folder_is_named(slides: dict[str, Slide], tmp_path: Path, file: str) -> None:
    shutil.copytree(slides["A"].staging, tmp_path / "A")
    (tmp_path / "A" / file).write_bytes((slides["C"].staging / file).read_bytes()[:-30])
    with pytest.raises(StorageError, match=rf"A/{file} is damaged.*remove .*A and run the same command again"):
        publish_slide(str(tmp_path / "A"), str(tmp_path / "out"), FACTS, GENES)
    if file == "thumbnail.jpg":
        return
    (tmp_path / "A" / file).write_bytes((slides["C"].staging / file).read_bytes())
    with pytest.raises(StorageError, match=r"grid.parquet is damaged: it has (256|600) tiles"):
        publish_slide(str(tmp_path / "A"), str(tmp_path / "out"), FACTS, GENES)


def test_without_a_threshold_or_a_bank_nothing_is_called_out_of_distribution(tmp_path: Path) -> None:
    """A direct regression: no similarity, no donors."""
    slide = stage(tmp_path, "R", 5, 4)
    for name in CONFIDENCE:
        getattr(slide.answer, name)[:] = np.nan
    write(slide)
    publish_slide(str(slide.staging), str(tmp_path / "out"), replace(FACTS, ood_similarity=None), GENES)
    table = pq.read_table(tmp_path / "out" / "R.parquet")
    assert table.schema.field("out_of_distribution").type == pa.bool_()
    assert table["out_of_distribution"].null_count == 20
    assert np.isnan(table["similarity"].to_numpy()).all()
    assert anndata.read_h5ad(tmp_path / "out" / "R.h5ad").obs["out_of_distribution"].isna().all()
    text = (tmp_path / "out" / "geojson" / "R.geojson").read_text()
    squares = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["features"]
    assert list(squares[0]["properties"]["measurements"]) == ["GNAS", "FASN"]


def test_a_slide_whose_tiles_all_lack_pixels_has_empty_files(tmp_path: Path) -> None:
    slide = stage(tmp_path, "E", 5, 4, missing=20)
    publish_slide(str(slide.staging), str(tmp_path / "out"), FACTS, GENES)
    assert pq.read_table(tmp_path / "out" / "E.parquet").num_rows == 0
    assert anndata.read_h5ad(tmp_path / "out" / "E.h5ad").shape == (0, len(PANEL))
    assert json.loads((tmp_path / "out" / "geojson" / "E.geojson").read_text())["features"] == []


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


def test_genes_are_found_by_any_name_and_unknown_ones_get_the_nearest(slides: dict[str, Slide], tmp_path: Path) -> None:
    assert choose_genes(PANEL, ["FASN", "ENSG01", "GNAS", "DUP"]) == [1, 0, 2, 3]
    assert gene_labels(PANEL, [1, 2, 3, 4]) == ["FASN", "DUP ENSG03", "DUP ENSG04", "ENSG05"]
    assert gene_labels(PANEL, [2]) == ["DUP"]
    with pytest.raises(
        ConfigError, match=r"panel of 6 genes lacks gnas \(did you mean GNAS\?\); XQ \(it has, for exam"
    ):
        publish_slide(str(slides["A"].staging), str(tmp_path), FACTS, ["gnas", "FASN", "XQ"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_memory_is_that_of_few_groups_of_tiles(tmp_path: Path) -> None:
    """Peak of Python and NumPy, and of Arrow, for a slide of six groups; the pictures' is that of the thumbnail."""
    num_genes, num_groups, peaks = 256, 6, {}
    facts = replace(FACTS, panel=GenePanel.from_names(f"G{index}" for index in range(num_genes)))
    slide = stage(tmp_path, "M", 64, 64 * num_groups)
    slide.answer.prediction = np.zeros((4096 * num_groups, num_genes), np.float32)
    write(slide)
    staging, record, table = str(slide.staging), slide.record, tmp_path / "table"
    del slide
    thumbnail = np.zeros((10, 10, 3), np.uint8)
    writers = {
        "table": lambda: write_table(table, staging, record, facts),
        "h5ad": lambda: write_h5ad(tmp_path / "h5ad", table, record, facts, thumbnail),
        "geojson": lambda: write_geojson(tmp_path / "geojson", table, record, facts, [0]),
    }
    default = pa.default_memory_pool()
    for name, write_file in writers.items():
        pool = pa.proxy_memory_pool(default)
        pa.set_memory_pool(pool)
        tracemalloc.start()
        try:
            write_file()
            peaks[name] = (tracemalloc.get_traced_memory()[1], pool.max_memory())
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(default)
    group = 4096 * num_genes * 4
    in_groups = {name: np.array(peak) / group for name, peak in peaks.items()}
    assert in_groups["table"].max() > 1, "a group has to be seen for this to mean anything"
    assert {name: peak.tolist() for name, peak in in_groups.items() if peak.max() > 4} == {}


def test_publishing_starts_without_torch() -> None:
    script = "import sys, mclstexp.inference.publish; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "platform")}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
