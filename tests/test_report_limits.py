"""Reports of results that are too large for a page, incomplete, far away or without a training run."""

import json
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
from report_page import NAMES, SPOTS, Page, make_report, run_job, slides_of

from mclstexp import storage
from mclstexp.errors import ResultError
from mclstexp.report import page, page_data
from mclstexp.report.result import open_result

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow


@pytest.mark.slow
def test_without_mlflow_there_is_a_page_that_says_why(make_result: Callable[..., Path], tmp_path: Path) -> None:
    alone = make_report(make_result(tmp_path, "patient", {"fold": "abc"}))
    assert "No training curves: there is no run abc: tracking.uri=" in alone.page.text
    assert not (alone.out / "training_curves.png").exists()
    assert not (tmp_path / "mlflow.db").exists()


def test_a_page_names_what_it_leaves_out_to_stay_within_its_size(
    make_result: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_result(tmp_path)
    least = make_report(run, "--genes", "FLAT", "--page-mb", "0.001")
    assert "0 of 8 genes are in this page" in least.page.text
    assert "by method: left out to keep the page small; see pcc_by_method.png" in least.page.text
    monkeypatch.setattr(page, "_PICTURES_SHARE", 0.0)
    a_map = 2 * 2 * SPOTS * 4 / 3 + 2 * 120
    room = len(least.html.encode()) + 4.5 * a_map
    some = make_report(run, "--genes", "FLAT", "--page-mb", f"{room / 1e6:.6f}")
    shown = some.page.data["choice"]["genes"]
    assert 1 < len(shown) < len(NAMES)
    assert "FLAT" in shown
    assert f"{len(shown)} of 8 genes are in this page" in some.page.text
    assert all(set(slide["genes"]) <= set(shown) for slide in slides_of(some.page).values())
    assert len(some.html.encode()) < 1.1 * room


@pytest.mark.slow
def test_gene_maps_are_the_first_pictures_to_be_left_out(
    make_result: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page.maps, "embedded", lambda path: "data:," + 9_994 * "x")
    monkeypatch.setattr(page, "_PICTURES_SHARE", 1.0)
    some = make_report(make_result(tmp_path), "--page-mb", "0.035")
    assert {path.name for path in some.out.glob("*.png") if f"({path.name})" in some.page.text} == {
        *("pcc_by_method.png", "domains_S1_kmeans.png", "domains_S1_leiden.png")
    }
    assert "see genes_S1.png beside it" in some.page.text


def test_a_large_picture_of_a_slide_is_shrunk_and_spots_stay_on_it(
    make_result: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_result(tmp_path) / "sections" / "S1.h5ad"
    stored = anndata.read_h5ad(path)
    slide = stored.uns["spatial"]["S1"]
    slide["images"]["hires"] = np.zeros((1500, 1800, 3), np.uint8)
    slide["scalefactors"]["tissue_hires_scalef"] = 1.5
    stored.write_h5ad(path)
    data = page_data.slide_data(open_result(str(tmp_path), tmp_path).section("S1"))
    assert (data["width"], data["height"]) == (900, 750)
    np.testing.assert_allclose(np.stack([data["x"], data["y"]], axis=1), 0.75 * stored.obsm["spatial"], atol=0.05)


def test_a_folder_without_a_result_is_refused_with_the_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=rf"no score_card\.json.* or jobs/cross_validate\.py and --out {tmp_path}"):
        run_job("--run", tmp_path)


def test_an_older_or_incomplete_result_is_refused(make_result: Callable[..., Path], tmp_path: Path) -> None:
    make_result(tmp_path)
    record = json.loads((tmp_path / "score_card.json").read_text())
    (tmp_path / "sections" / "S1.h5ad").write_bytes(b"damaged")
    with pytest.raises(ResultError, match=r"the prediction of section S1, .*S1\.h5ad, is damaged or incomplete"):
        run_job("--run", tmp_path)
    (tmp_path / "sections" / "S1.h5ad").unlink()
    with pytest.raises(ResultError, match=r"has no sections/S1\.h5ad, which its score_card\.json names"):
        run_job("--run", tmp_path)
    del record["predictions"]
    (tmp_path / "score_card.json").write_text(json.dumps(record))
    with pytest.raises(ResultError, match=r"older version \(predictions: Field required\)"):
        run_job("--run", tmp_path)


@pytest.mark.slow
def test_a_result_may_be_in_object_storage(s3: str, make_result: Callable[..., Path], tmp_path: Path) -> None:
    make_result(tmp_path, "patient")
    for path in storage.list_files(str(tmp_path)):
        storage.upload(path, f"{s3}/scores/{Path(path).relative_to(tmp_path)}")
    printed = run_job("--run", f"{s3}/scores")
    assert printed.splitlines()[-1] == f"page {s3}/scores/report/report.html"
    page = Page(storage.read(f"{s3}/scores/report/report.html").decode())
    assert set(slides_of(page)) == {"S1", "S-2"}
    assert storage.exists(f"{s3}/scores/report/genes_S1.png")
