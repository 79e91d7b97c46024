"""The report: what the page holds, decoded again, against the result folder that it was made from."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from report_page import NAMES, SPOTS, Made, make_report, run_job, slides_of

from mclstexp import tracking
from mclstexp.config import Config, override
from mclstexp.errors import ConfigError
from mclstexp.report.result import open_result
from mclstexp.report.tables import gene_lines, target_tables

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow


@pytest.fixture(scope="module")
def made(make_result: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The report of a leaking result, with a training run that MLflow knows and one that it does not."""
    folder = tmp_path_factory.mktemp("report")
    config = override(Config(), {"tracking.uri": f"sqlite:///{folder}/mlflow.db"})
    run_id = tracking.start_run(config, "known", {})
    metrics = tracking.metric_log(config.tracking, run_id)
    for step in range(5):
        metrics.log(step, {"loss": 5.0 - step, "spots_per_s": 100.0})
    metrics.close()
    make_result(folder, training_runs={"known": run_id, "unknown": "0" * 32})
    (folder / "mine.yaml").write_text("tiny: {two: [ENSG3, ABSENT], one: [GNAS]}")
    return make_report(folder, "--cohort", "tiny", "--markers", folder / "mine.yaml", "--genes", "ENSG4")


def _values(gene: dict[str, Any]) -> np.ndarray:
    levels = np.frombuffer(base64.b64decode(gene["levels"]), np.uint8)
    return gene["low"] + levels.reshape(2, -1) / 255 * (gene["high"] - gene["low"])


def test_the_last_line_is_the_uri_of_the_page(made: Made) -> None:
    assert made.printed.splitlines()[-1] == f"page {made.out / 'report.html'}"


@pytest.mark.parametrize("name", ["S1", "S-2"])
def test_maps_decode_to_the_stored_expression(made: Made, name: str) -> None:
    stored = anndata.read_h5ad(made.run / "sections" / f"{name}.h5ad")
    genes = slides_of(made.page)[name]["genes"]
    assert set(genes) == {NAMES[gene] for gene in stored.var_names}
    for column, gene_id in enumerate(stored.var_names):
        gene = genes[NAMES[gene_id]]
        both = np.stack([stored.layers["measured"][:, column], stored.X[:, column]]).astype(float)
        low, high = np.percentile(both, [1, 99])
        assert (gene["low"], gene["high"]) == pytest.approx((low, high))
        np.testing.assert_allclose(_values(gene), both.clip(low, high), atol=(high - low) / 255 / 2 + 1e-9)
        if both[0].std() == 0:
            assert gene["pcc"] is None
        else:
            assert gene["pcc"] == pytest.approx(np.corrcoef(both)[0, 1], abs=1e-5)


def test_spots_are_at_their_coordinates_on_the_slide(made: Made) -> None:
    stored = anndata.read_h5ad(made.run / "sections" / "S1.h5ad")
    slide = slides_of(made.page)["S1"]
    np.testing.assert_allclose(np.stack([slide["x"], slide["y"]], axis=1), stored.obsm["spatial"] / 10, atol=0.05)
    assert (slide["width"], slide["height"]) == (120, 100)
    left, top, right, bottom = slide["window"]
    assert left < min(slide["x"]) < max(slide["x"]) < right
    assert top < min(slide["y"]) < max(slide["y"]) < bottom
    assert base64.b64decode(slide["image"].partition(",")[2]).startswith(b"\xff\xd8")


def test_every_gene_of_the_panel_can_be_chosen_with_sets_first(made: Made) -> None:
    choice = made.page.data["choice"]
    assert sorted(choice["genes"]) == sorted(NAMES.values())
    assert choice["sets"] == [["chosen", ["ENSG4"]], ["two", [NAMES["ENSG3"]]], ["one", ["GNAS"]]]
    assert "Genes of two that are not in the panel: ABSENT." in made.page.text
    assert "All 8 genes are in this page." in made.page.text


def test_the_colour_scale_is_viridis(made: Made) -> None:
    rgb = np.frombuffer(base64.b64decode(made.page.data["choice"]["colours"]), np.uint8).reshape(256, 3)
    assert rgb[[0, 255]].tolist() == [[68, 1, 84], [253, 231, 36]]  # van der Walt and Smith 2015


def test_a_leak_is_named_on_the_page_and_on_every_picture(made: Made) -> None:
    assert made.page.text.count("LEAK that this protocol allows: <others> trained") >= 2
    assert "protocol reference: LEAK" in made.page.text
    pictures = list(made.out.glob("*.png"))
    assert {path.name for path in pictures} == {
        *("pcc_by_method.png", "training_curves.png", "genes_S1.png", "genes_S-2.png"),
        *("domains_S1_kmeans.png", "domains_S1_leiden.png"),
    }
    assert len(made.headings) == len(pictures)
    for heading in made.headings:
        assert "protocol reference" in heading
        assert "LEAK that this protocol allows" in " ".join(heading.split())


@pytest.mark.slow
def test_a_result_without_a_leak_does_not_mention_one(make_result: Callable[..., Path], tmp_path: Path) -> None:
    honest = make_report(make_result(tmp_path, "patient"))
    assert "protocol patient" in honest.page.text
    assert "LEAK" not in honest.html
    assert all("protocol patient" in heading for heading in honest.headings)
    assert "The result names no training run." in honest.page.text


def test_the_page_needs_nothing_but_itself(made: Made) -> None:
    for _, attributes in made.page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            address = attributes.get(name)
            assert address is None or address.startswith(("#", "data:")), address
    outside = re.compile(r"@import|url\(|https?://|\bfetch\(|XMLHttpRequest|\bimport\b|WebSocket")
    assert not outside.search(re.sub(r'"data:[^"]*"', "", made.html))


def test_names_are_escaped_everywhere(made: Made) -> None:
    tags = {tag for tag, _ in made.page.tags}
    assert not tags & {"b", "name", "others", "per"}
    assert made.html.lower().count("</script") == made.html.lower().count("<script")
    gene_table = next(table for table in made.page.tables if table[0][0] == "gene")
    shown = {row[0] for row in gene_table[1:]}
    assert {NAMES["ENSG2"], NAMES["ENSG3"], "ENSG4", NAMES["ENSG5"], NAMES["ENSG6"]} <= shown
    assert "ln(1 + x), <per spot> & more" in made.page.text


def test_score_tables_equal_the_card(made: Made) -> None:
    record = json.loads((made.run / "score_card.json").read_text())
    (mean,) = (row for row in record["means"] if (row["method"], row["gene_set"]) == ("model", "all"))
    table = made.page.tables[0]
    cells = dict(zip(table[0], table[1], strict=True))
    assert cells["method"] == "model"
    for column, score in {"PCC all": "pcc", "PCC density-free": "pcc_density_free", "RMSE": "rmse"}.items():
        low, high = (f"{mean[f'{score}_{end}']:.3f}".replace("-", "−") for end in ("low", "high"))
        assert cells[column] == f"{mean[score]:.3f}{low} to {high}"
    assert cells["undefined"] == "2"
    values = {row["method"]: row for row in record["means"] if row["gene_set"] == "all"}
    assert values["model"]["mse"] < values["ridge on RGB"]["mse"]
    for score, best in {"pcc": "model", "mse": "model"}.items():
        marked = [
            method for method, row in values.items() if any(cell[:5] == f"{row[score]:.3f}" for cell in made.page.best)
        ]
        assert marked == [best]
    assert all(verdict in made.page.text for verdict in record["verdicts"])
    assert "Each section (2)" in made.page.text


def test_genes_are_shown_beside_the_best_floor(made: Made) -> None:
    means = pd.read_csv(made.run / "gene_means.csv").set_index(["method", "gene"])["mean"]
    table = next(table for table in made.page.tables if table[0][0] == "gene")
    row = next(row for row in table[1:] if row[0] == "GNAS")
    model, floor = means["model", "GNAS"], means["ridge on RGB", "GNAS"]
    assert table[0][5] == "ridge on RGB"
    assert [row[2], row[5], row[6]] == [f"{value:.3f}".replace("-", "−") for value in (model, floor, model - floor)]
    assert row[1] == "one"


def test_significant_genes_are_ranked_with_their_caveat(made: Made) -> None:
    ranked = pd.read_csv(made.out / "significant_genes.csv")
    assert list(ranked.columns[:3]) == ["protocol", "rank", "gene"]
    assert set(ranked["protocol"]) == {"reference"}
    first = slides_of(made.page)["S1"]["genes"][ranked["gene"][0]]
    assert first["pcc"] > 0.9
    assert ranked.set_index("gene").loc["FLAT", "undefined"] == 2
    assert "These p-values are too small" in made.page.text


def test_domains_are_compared_where_there_are_labels(made: Made) -> None:
    table = pd.read_csv(made.out / "domains.csv").set_index("method")
    assert list(table.index) == ["measured", "smoothed measured", "predicted"]
    assert set(table["protocol"]) == {"reference"}
    assert set(table["section_id"]) == {"S1"}
    assert table.loc["measured", "kmeans_ari"] > 0.8  # the bands differ in every second gene
    assert (table["spots_used"] == SPOTS).all()
    assert "No domains to compare, because no spot has a label: section S-2." in made.page.text
    assert "The measure rewards smoothness" in made.page.text


def test_training_curves_are_drawn_and_an_unknown_run_is_named(made: Made) -> None:
    assert f"Run unknown: tracking.uri=sqlite:///{made.run}/mlflow.db has no loss of {'0' * 32}." in made.page.text
    assert (made.out / "training_curves.png").is_file()


def test_a_dry_run_says_what_would_be_drawn(made: Made, tmp_path: Path) -> None:
    printed = run_job("--run", made.run, "--out", tmp_path / "out", "--dry-run")
    assert "would draw 2 section(s), S1, S-2" in printed
    assert "training curves of: known, unknown" in printed
    assert f"into {tmp_path}/out" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--genes", "GNAS,NOPE"), "panel of 8 genes does not have NOPE"),
        (("--markers", "mine.yaml"), "needs --cohort"),
        (("--page-mb", "big"), "invalid argument: --page-mb='big': Input should be a valid number"),
    ],
)
def test_mistakes_are_refused_with_the_fix(made: Made, argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        run_job("--run", made.run, *argv)


@pytest.mark.odd
@pytest.mark.slow
def test_a_gene_that_a_section_does_not_measure_is_not_shown_as_zero(
    make_result: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_result(tmp_path, "patient", unmeasured={"S1": [1], "S-2": [0, 1]})
    made = make_report(run, "--genes", "GNAS,ENSG2")
    assert "section S-2 does not measure [0, 1]" in made.page.text
    slides = slides_of(made.page)
    for name, gene_id in (("S1", "ENSG2"), ("S-2", "ENSG1"), ("S-2", "ENSG2")):
        gene, stored = slides[name]["genes"][NAMES[gene_id]], anndata.read_h5ad(run / "sections" / f"{name}.h5ad")
        predicted = stored[:, gene_id].X.ravel().astype(float)
        assert np.isnan(stored[:, gene_id].layers["measured"]).all()
        low, high = np.percentile(predicted, [1, 99])
        levels = np.frombuffer(base64.b64decode(gene["levels"]), np.uint8)
        step = (high - low) / 255
        np.testing.assert_allclose(low + levels * step, predicted.clip(low, high), atol=step / 2 + 1e-6)
        assert gene["pcc"] is None
    assert len(base64.b64decode(slides["S1"]["genes"]["GNAS"]["levels"])) == 2 * SPOTS
    ranked = pd.read_csv(made.out / "significant_genes.csv").set_index("gene")
    assert (ranked.loc["GNAS", "sections"], ranked.loc["GNAS", "undefined"]) == (1, 0)
    assert NAMES["ENSG2"] not in ranked.index, "measured nowhere"
    assert made.page.tables[0][0][-2:] == ["undefined", "not measured"]
    assert made.page.tables[0][1][-2:] == ["2", "3"], "FLAT is constant in both sections"
    gene_table = next(table for table in made.page.tables if table[0][0] == "gene")
    cells = {row[0]: row[-2:] for row in gene_table[1:]}
    assert (cells["GNAS"], cells[NAMES["ENSG2"]], cells["FLAT"]) == (["0", "1"], ["0", "2"], ["2", "0"])
    domains = pd.read_csv(made.out / "domains.csv").set_index("method")
    assert np.isfinite(domains["kmeans_ari"]).all()


def test_a_result_of_before_counts_no_unmeasured_genes(make_result: Callable[..., Path], tmp_path: Path) -> None:
    run = make_result(tmp_path, "patient")
    now = open_result(str(run), tmp_path)
    record = json.loads((run / "score_card.json").read_text())
    for table in ("means", "patients", "sections"):
        record[table] = [{name: row[name] for name in row if name != "not_measured"} for row in record[table]]
    (run / "score_card.json").write_text(json.dumps(record))
    means = pd.read_csv(run / "gene_means.csv").drop(columns="not_measured")
    means.to_csv(run / "gene_means.csv", index=False)
    before = open_result(str(run), tmp_path)
    assert target_tables(before.record) == target_tables(now.record)
    assert repr(gene_lines(before)) == repr(gene_lines(now))
