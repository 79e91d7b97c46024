"""What earlier code wrote is read as it is, and no number has moved; see written_before/README.md."""

import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mclstexp.config import Config
from mclstexp.data.schema import load_genes, load_manifest
from mclstexp.data.spots import make_reader
from mclstexp.data.table import read_sentence
from mclstexp.evaluation import scores
from mclstexp.evaluation.evaluate import evaluate
from mclstexp.model.version import ModelVersion
from mclstexp.prediction import ledger
from mclstexp.prediction.cohort import open_cohort
from mclstexp.prediction.draw import draw_slide
from mclstexp.report.biology import unique_names
from mclstexp.report.result import open_result
from mclstexp.training.run import open_run

ARCHIVE = Path(__file__).parent / "written_before" / "cee49a0.tar.xz"
RUN = "run-b09507c13ec4-3bf87c"


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def model(before: Path) -> ModelVersion:
    return ModelVersion.load(before / "model")


def test_a_tile_table(before: Path, model: ModelVersion) -> None:
    root = str(before / "tiles")
    manifest = load_manifest(root)
    assert manifest.digest() == model.training.manifest_digest
    assert len(load_genes(root, manifest)) == 12
    spots = {entry.section_id: entry.num_spots for entry in manifest.sections}
    for entry in manifest.sections:
        sentences = [read_sentence(root, entry, index) for index in range(len(entry.row_groups))]
        assert sum(map(len, sentences)) == spots[entry.section_id]
    reader = make_reader(root, manifest, model.panel, model.config, model.training.sections)
    assert reader.read_section("P1S1")["expression"].any()


def test_a_model_version_gives_the_same_answers(before: Path, model: ModelVersion) -> None:
    with np.load(before / "answers.npz") as answers:
        found = vars(model.predict(answers["queries"], np.zeros((len(answers["queries"]), 2))))
        assert np.isnan(found.pop("spread")).all()  # of programs alone
        for name in found:
            np.testing.assert_allclose(found[name], answers[name], rtol=1e-6, err_msg=name)
    assert (model.digest, model.ood_similarity) == ("a78e7f9546bc", 0.25)


def test_a_run_is_found_again(before: Path, model: ModelVersion) -> None:
    def track(config: Config, name: str, known: str | None) -> str:
        assert (name, known) == (RUN, "0123456789abcdef")
        return str(known)

    run = open_run(str(before / "tiles"), str(before / "runs"), RUN, model.config, track)
    assert (run.panel, run.split.test, run.mlflow_run_id) == (model.panel, ("P3S1",), "0123456789abcdef")


def test_a_result_folder(before: Path, model: ModelVersion, tmp_path: Path) -> None:
    result = open_result(str(before / "scores"), tmp_path)
    section = result.section("P3S1")
    assert (result.record.model_digest, result.panel) == (model.digest, model.panel)
    assert section.measured.shape == section.predicted.shape == (result.num_spots["P3S1"], 10)
    assert set(result.per_gene["gene"]) == set(unique_names(result))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_score_card_has_the_same_numbers(
    before: Path, model: ModelVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All scores of then; of all methods but the ridges, another regression since (`model/probe.py`)."""
    stored = open_result(str(before / "scores"), tmp_path).record
    known = [score for score in scores.SCORES if score.name in stored.sections[0]]
    monkeypatch.setattr(scores, "SCORES", tuple(known))
    card = evaluate(model, str(before / "tiles"))

    def plain(texts: Sequence[str]) -> list[str]:
        return [text for text in texts if "ridge" not in text]

    assert card.heading() == stored.heading
    assert plain(card.verdicts()) == plain(stored.verdicts)
    assert plain(card.notes) == plain(stored.notes)
    assert not card.rows["not_measured"].any()
    rows, expected = (
        table[~table["method"].str.startswith("ridge")].reset_index(drop=True)
        for table in (card.rows.drop(columns="not_measured"), pd.DataFrame(stored.sections))
    )
    pd.testing.assert_frame_equal(rows, expected, check_dtype=False, rtol=1e-4, atol=1e-6)


def test_a_prediction_is_settled_and_can_be_drawn(before: Path, model: ModelVersion) -> None:
    out = str(before / "predictions")
    cohort = open_cohort(str(before / "slides"), model, out, Config().predict)
    ledger.claim_output(out, ledger.Owner(model_digest=model.digest, settings=cohort.settings))
    entry = ledger.entry(out, "P4S1")
    assert cohort.is_settled(entry, retry_quarantined=False)
    assert entry.num_tiles == 25
    assert draw_slide(out, "P4S1", model.panel.names()[2:3])
    assert (before / "predictions/overviews/P4S1.png").is_file()
