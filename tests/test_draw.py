"""Pictures of chosen genes from published tables: what they show, when they are drawn again, faults of slides."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from staged_slides import GENES, INFO, PANEL, SCANNED_FROM, Slide, publish, stage, write

from mclstexp import storage
from mclstexp.errors import ConfigError, ConflictError, PredictError, StorageError
from mclstexp.prediction import draw
from mclstexp.prediction.draw import PictureRecord, draw_slide, draw_slides, require_genes, slides_to_draw
from mclstexp.prediction.ledger import Entry, set_aside
from mclstexp.prediction.writers.slide import PredictedSlide, tile_left
from mclstexp.progress import hidden
from mclstexp.slides import tiles


@pytest.fixture(scope="module")
def slides(staged: dict[str, Slide]) -> dict[str, Slide]:
    return staged


@pytest.fixture(scope="module")
def published(slides: dict[str, Slide], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides that are done."""
    folder = tmp_path_factory.mktemp("published")
    for slide in slides.values():
        publish(slide, folder)
    return folder


@pytest.fixture(scope="module")
def out(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, drawn with two genes."""
    folder = tmp_path_factory.mktemp("drawn")
    shutil.copytree(published, folder, dirs_exist_ok=True)
    for name in "ABC":
        assert draw_slide(str(folder), name, GENES)
    return folder


@pytest.fixture
def own(out: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(out, tmp_path / "own")
    return tmp_path / "own"


def _files(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _changed(folder: Path, before: dict[str, bytes]) -> set[str]:
    after = _files(folder)
    return {path for path in after.keys() | before.keys() if after.get(path) != before.get(path)}


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_squares_are_where_the_tiles_were_cut(slides: dict[str, Slide], out: Path, name: str) -> None:
    slide = slides[name]
    collection = json.loads((out / "geojson" / f"{name}.geojson").read_text())
    assert collection["type"] == "FeatureCollection"
    assert collection["prediction"]["unit"] == INFO.unit
    features = collection["features"]
    assert len(features) == slide.complete.sum()
    rings = np.array([feature["geometry"]["coordinates"] for feature in features])
    assert rings.shape == (len(features), 1, 5, 2)
    assert np.array_equal(rings[:, 0, 0], rings[:, 0, 4])
    edge = 32 * slide.record.scale
    low, high = rings.min(axis=(1, 2)), rings.max(axis=(1, 2))
    assert low == pytest.approx(np.floor(slide.centre_px) - edge / 2 - SCANNED_FROM)
    assert high - low == pytest.approx(np.full_like(low, edge))
    assert {len({tuple(corner) for corner in ring[0]}) for ring in rings.tolist()} == {4}
    names = slide.grid.loc[slide.complete, "spot_id"]
    for feature, spot, row, similarity in zip(
        features, names, slide.answer.values[slide.complete], slide.answer.similarity[slide.complete], strict=True
    ):
        properties = feature["properties"]
        assert (feature["type"], feature["geometry"]["type"]) == ("Feature", "Polygon")
        assert (properties["objectType"], properties["isLocked"], properties["name"]) == ("detection", False, spot)
        assert list(properties["measurements"]) == ["similarity", "GNAS", "FASN"]
        assert np.array_equal(np.float32(list(properties["measurements"].values())), [similarity, *row[:2]])


@pytest.mark.parametrize("size_px", [32, 33])
@pytest.mark.parametrize("scale", [1.0, 1.37])
def test_corners_are_those_that_tiles_are_cut_at(slides: dict[str, Slide], size_px: int, scale: float) -> None:
    centres = np.random.default_rng(0).random(50) * 1e5
    slide = PredictedSlide("", Path("none"), replace(INFO, tile_size_px=size_px), np.zeros((1, 1, 3), np.uint8))
    vars(slide)["record"] = slides["A"].record.model_copy(update={"scale": scale})
    assert np.array_equal(tile_left(centres, slide), tiles.tile_corner(centres, size_px, scale))


def test_the_record_beside_the_pictures_names_genes_model_and_table(out: Path) -> None:
    record = PictureRecord.model_validate_json((out / "overviews" / "A.json").read_bytes())
    assert record == PictureRecord(
        genes=("ENSG01", "FASN"),
        has_geojson=True,
        model_digest=INFO.model_digest,
        table=str(storage.version(str(out / "A.parquet"))),
    )


def test_the_first_genes_are_shown_if_none_are_chosen_and_no_squares_stay(out: Path, own: Path) -> None:
    before = _files(own)
    assert draw_slide(str(own), "A", [])
    assert _changed(own, before) == {"overviews/A.json", "overviews/A.png", "geojson/A.geojson"}
    assert not (own / "geojson" / "A.geojson").exists()
    sizes = [Image.open(folder / "overviews" / "A.png").size for folder in (out, own)]
    assert sizes[1][1] > 1.5 * sizes[0][1], "five maps in two rows against three in one"
    assert json.loads((own / "overviews" / "A.json").read_text())["genes"] == list(PANEL.gene_id[:4])


def test_pictures_that_show_these_genes_of_this_table_are_not_drawn_again(own: Path) -> None:
    before = _files(own)
    assert not draw_slide(str(own), "A", GENES)
    assert not draw_slide(str(own), "A", ["ENSG01", "FASN"]), "the same genes by other names"
    assert _changed(own, before) == set()
    assert draw_slide(str(own), "A", ["FASN", "GNAS"]), "another order"
    assert draw_slide(str(own), "A", GENES)
    assert _changed(own, before) == set(), "the same bytes again"
    (own / "geojson" / "A.geojson").unlink()
    assert draw_slide(str(own), "A", GENES)
    assert _changed(own, before) == set()


def test_pictures_of_an_older_table_or_without_a_record_are_drawn_again(
    slides: dict[str, Slide], own: Path, tmp_path: Path
) -> None:
    before = _files(own)
    slide = stage(tmp_path, "A", 30, 20, missing=7)
    slide.answer.values[:] = slide.answer.values[::-1].copy()
    write(slide)
    publish(slide, own, key="other")
    assert not [path for path in _files(own) if path.startswith(("overviews/A", "geojson/A"))]
    assert draw_slide(str(own), "A", GENES)
    assert _files(own)["overviews/A.png"] != before["overviews/A.png"]

    # As a process leaves it that draws the old table while the new one is published.
    storage.write(str(own / "overviews" / "A.png"), before["overviews/A.png"])
    storage.write(str(own / "overviews" / "A.json"), before["overviews/A.json"])
    assert draw_slide(str(own), "A", GENES)
    assert _files(own)["overviews/A.png"] != before["overviews/A.png"]
    for broken in (b"{}", None):
        record = str(own / "overviews" / "A.json")
        storage.write(record, broken) if broken else storage.delete(record)
        assert draw_slide(str(own), "A", GENES)


@pytest.mark.slow
def test_two_drawings_at_once_end_with_pictures_and_record_of_one(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process draws the slide between this one's pictures and its record."""
    expected, published, others = _files(own), storage.publish, [["DUP"], ["ENSG05"]]

    def interrupted(uri: str, data: bytes, previous: str | None) -> str:
        if others:
            monkeypatch.setattr(storage, "publish", published)
            draw_slide(str(own), "A", others.pop())
            monkeypatch.setattr(storage, "publish", interrupted)
        return published(uri, data, previous)

    monkeypatch.setattr(storage, "publish", interrupted)
    storage.delete(str(own / "overviews" / "A.json"))
    assert draw_slide(str(own), "A", GENES)
    assert _changed(own, expected) == set()
    monkeypatch.setattr(draw, "_TRIES", 1)
    others.append(["DUP"])
    with pytest.raises(ConflictError):
        draw_slide(str(own), "A", ["ENSG05"])


def test_a_killed_drawing_leaves_no_record_of_other_pictures(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _files(own)

    def killed(*arguments: object, **options: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            draw_slide(str(own), "A", ["DUP"])
    assert not (own / "overviews" / "A.json").exists()
    assert draw_slide(str(own), "A", GENES)
    assert _changed(own, before) == set()


def _without_metadata(folder: Path) -> None:
    pq.write_table(pq.read_table(folder / "A.parquet").replace_schema_metadata(None), folder / "A.parquet")


def _without_thumbnail(folder: Path) -> None:
    with h5py.File(folder / "A.h5ad", "a") as file:
        del file["uns"]["spatial"]


def _not_done(folder: Path) -> None:
    set_aside(str(folder), Entry(slide_id="A", key="k", state="failed", reason="no disk"), also_predictions=True)


FAULTS = [
    pytest.param(
        _without_metadata, StorageError, r"A\.parquet is of an earlier version.*run jobs/predict.py", id="old"
    ),
    pytest.param(_not_done, PredictError, "the slide is failed no disk", id="failed"),
    pytest.param(lambda folder: (folder / "A.parquet").unlink(), FileNotFoundError, r"A\.parquet", id="no table"),
    pytest.param(lambda folder: (folder / "A.parquet").write_bytes(b"x"), StorageError, r"A\.parquet", id="damaged"),
    pytest.param(lambda folder: (folder / "A.h5ad").unlink(), FileNotFoundError, r"A\.h5ad", id="no h5ad"),
    pytest.param(
        lambda folder: (folder / "A.h5ad").write_bytes((folder / "A.h5ad").read_bytes()[:1000]),
        StorageError,
        r"A\.h5ad is damaged.*remove .*ledger/A\.json and run jobs/predict.py",
        id="damaged h5ad",
    ),
    pytest.param(
        _without_thumbnail, StorageError, r"A\.h5ad is damaged.*run jobs/predict.py", id="h5ad without a thumbnail"
    ),
]


@pytest.mark.parametrize(("damage", "kind", "fault"), FAULTS)
def test_a_slide_that_cannot_be_drawn_states_why_and_keeps_its_pictures(
    own: Path, damage: Callable[[Path], None], kind: type[Exception], fault: str
) -> None:
    damage(own)
    before = _files(own)
    with pytest.raises(kind, match=fault):
        draw_slide(str(own), "A", ["DUP"])
    assert _changed(own, before) == set()


@pytest.mark.ray
@pytest.mark.slow
def test_no_fault_of_a_slide_stops_the_others(ray_session: None, own: Path, s3: str) -> None:
    (own / "A.h5ad").unlink()
    for path, data in _files(own).items():
        storage.write(f"{s3}/{path}", data)
    report = draw_slides(s3, ["A", "B", "C"], ["DUP"], hidden)
    assert (report.num_drawn, report.num_up_to_date, list(report.faults)) == (2, 0, ["A"])
    assert "A.h5ad" in report.faults["A"]
    squares = json.loads(storage.read(f"{s3}/geojson/C.geojson"))["features"]
    assert list(squares[0]["properties"]["measurements"]) == ["similarity", "DUP ENSG03", "DUP ENSG04"]
    report = draw_slides(s3, ["B", "C"], ["DUP"], hidden)
    assert (report.num_drawn, report.num_up_to_date, report.faults) == (0, 2, {})


def test_slides_that_are_done_are_drawn_or_those_that_are_named(own: Path, tmp_path: Path) -> None:
    _not_done(own)
    assert slides_to_draw(str(own)) == ["B", "C"]
    assert slides_to_draw(str(own), ["A", "C"]) == ["A", "C"]
    with pytest.raises(PredictError, match=r"no prediction of slide AA; did you mean A\?"):
        slides_to_draw(str(own), ["AA", "B"])
    for named in ([], ["A"]):
        with pytest.raises(PredictError, match=r"contains no predicted slides; give the --out of jobs/predict\.py"):
            slides_to_draw(str(tmp_path / "empty"), named)


def test_genes_are_checked_before_anything_is_drawn(own: Path) -> None:
    _without_metadata(own)
    require_genes(str(own), ["A", "B"], ["DUP", "ENSG05", "µ1"])
    require_genes(str(own), ["A"], ["XQ"])  # no table can be read; drawing gives the reason
    with pytest.raises(ConfigError, match=r"panel of 6 genes does not have gnas \(did you mean GNAS\?\)"):
        require_genes(str(own), ["A", "B"], ["gnas"])


def test_a_model_without_a_bank_measures_no_similarity(tmp_path: Path) -> None:
    slide = stage(tmp_path, "R", 5, 4)
    slide.answer.similarity[:] = np.nan
    write(slide)
    publish(slide, tmp_path / "out")
    draw_slide(str(tmp_path / "out"), "R", GENES)
    text = (tmp_path / "out" / "geojson" / "R.geojson").read_text()
    squares = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["features"]
    assert list(squares[0]["properties"]["measurements"]) == ["GNAS", "FASN"]
