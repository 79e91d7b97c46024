"""The ledger: claims, answers, what a fault may replace, and entries of earlier versions."""

import io
import json

import pandas as pd
import pytest

from mclstexp import storage
from mclstexp.errors import ConflictError, PredictError
from mclstexp.prediction.ledger import Entry, claim_slide, commit, entry, set_aside, slides, stored, summarise


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest) -> str:
    """An output on disk, then one on an S3 server."""
    return str(request.getfixturevalue("tmp_path")) if request.param == "local" else request.getfixturevalue("s3")


def _claim(key: str) -> Entry:
    return Entry(slide_id="A", key=key, state="publishing")


def _done(key: str, image: str = "first") -> Entry:
    return Entry(slide_id="A", key=key, state="done", fingerprint=image)


def test_an_answer_replaces_its_claim(out: str) -> None:
    commit(out, _done("k"), claim_slide(out, _claim("k"), over=stored(out, "A")))
    assert entry(out, "A") == _done("k")
    commit(out, _done("other"), claim_slide(out, _claim("other"), over=stored(out, "A")))
    assert entry(out, "A") == _done("other")


def test_a_run_that_lost_its_claim_to_other_settings_cannot_commit_its_answer(out: str) -> None:
    ours = claim_slide(out, _claim("ours"), over=stored(out, "A"))
    theirs = claim_slide(out, _claim("theirs"), over=stored(out, "A"))
    with pytest.raises(ConflictError):
        commit(out, _done("ours"), ours)
    assert entry(out, "A") == _claim("theirs")
    commit(out, _done("theirs"), theirs)
    with pytest.raises(ConflictError):
        commit(out, _done("ours"), ours)


def test_runs_of_equal_settings_share_a_claim(out: str) -> None:
    before = stored(out, "A")  # as one run reads it before the other claims
    first, second = (claim_slide(out, _claim("k"), over=before) for _ in range(2))
    assert claim_slide(out, _claim("k"), over=stored(out, "A")) == second
    commit(out, _done("k"), second)
    with pytest.raises(ConflictError):
        commit(out, _done("k").model_copy(update={"finished": "later"}), first)
    assert entry(out, "A") == _done("k")


def test_an_entry_that_changed_since_it_was_read_is_not_claimed(out: str) -> None:
    before = stored(out, "A")
    commit(out, _done("k"), claim_slide(out, _claim("k"), over=before))
    with pytest.raises(ConflictError):
        claim_slide(out, _claim("other"), over=before)
    assert entry(out, "A") == _done("k")


@pytest.mark.parametrize(
    ("state", "image", "stays"),
    [
        ("quarantined", "first", True),
        ("quarantined", "second", False),
        ("failed", "second", True),
        ("failed", "", True),
    ],
)
def test_a_prediction_outlives_faults_but_not_a_damaged_image_that_replaced_its_own(
    out: str, state: str, image: str, stays: bool
) -> None:
    commit(out, _done("k", "first"), claim_slide(out, _claim("k"), over=stored(out, "A")))
    fault = Entry(slide_id="A", key="attempt", state=state, fingerprint=image, reason="broken")
    set_aside(out, fault)
    assert entry(out, "A") == (_done("k", "first") if stays else fault)


def test_a_fault_replaces_the_claim_of_a_dead_run(out: str) -> None:
    claim_slide(out, _claim("k"), over=stored(out, "A"))
    fault = Entry(slide_id="A", key="attempt", state="failed", reason="broken")
    set_aside(out, fault)
    assert entry(out, "A") == fault


def test_the_summary_states_what_a_model_knows_of_predicted_slides(out: str) -> None:
    found = {"B": _done("k").model_copy(update={"slide_id": "B"}), "A": _claim("k")}
    uri = summarise(out, found, {"level_mse": 0.25, "other": None})
    rows = pd.read_csv(io.BytesIO(storage.read(uri)))
    assert list(rows) == [*Entry.model_fields, "level_mse", "other"]
    assert rows["slide_id"].tolist() == ["A", "B"]
    assert rows["level_mse"].fillna(-1).tolist() == [-1, 0.25]
    assert rows["other"].isna().all()


@pytest.mark.parametrize(("state", "genes"), [("done", "GNAS,FASN"), ("publishing", "drawing GNAS"), ("empty", "")])
def test_entries_with_genes_are_read_as_their_state_says(out: str, state: str, genes: str) -> None:
    """Earlier versions wrote the genes of a slide's pictures into its entry."""
    old = Entry(slide_id="A", key="k", state=state, fingerprint="first")
    uri = storage.join(out, "ledger", "A.json")
    storage.write(uri, json.dumps(old.model_dump() | {"genes": genes}).encode())
    assert entry(out, "A") == old
    assert slides(out) == ["A"]
    commit(out, _done("k"), claim_slide(out, _claim("k"), over=stored(out, "A")))
    assert entry(out, "A") == _done("k")
    assert "genes" not in json.loads(storage.read(uri))
    assert "genes" not in storage.read(summarise(out, {"A": old})).decode()
    storage.write(uri, json.dumps(old.model_dump() | {"other": ""}).encode())
    with pytest.raises(PredictError, match="is not a ledger entry of this version"):
        entry(out, "A")
