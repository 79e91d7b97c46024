"""The end of training: the version's retrieval settings and out-of-distribution threshold."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from ood_reference import expected_threshold
from random_version import random_version

from mclstexp.config import Config, override
from mclstexp.data.folds import Split
from mclstexp.data.genes import GenePanel
from mclstexp.errors import RunError
from mclstexp.model.towers import TwoTowers
from mclstexp.progress import hidden
from mclstexp.training import finish
from mclstexp.training.run import Run

SIZES = {"A1": 30, "A2": 25, "B1": 40}  # tiles of each section
ORGANS = {"A1": "skin", "A2": "lung", "B1": None}


class _Manifest(SimpleNamespace):
    """Sections of random spots."""

    def section(self, name: str) -> SimpleNamespace:
        of = {"section_id": name, "patient_id": name[0], "species": "homo sapiens", "organ": ORGANS[name]}
        return SimpleNamespace(**of, num_spots=SIZES[name], row_groups=[SimpleNamespace(num_rows=SIZES[name])])

    def patients(self, names: tuple[str, ...]) -> set[str]:
        return {self.section(name).patient_id for name in names}

    def digest(self) -> str:
        return "digest"

    def read_section(self, name: str) -> dict[str, np.ndarray]:
        rng, size = np.random.default_rng(len(name)), SIZES[name]
        expression = rng.random((size, 4)).astype(np.float32)
        of = {"section_id": np.full(size, name, object), "patient_id": np.full(size, name[0], object)}
        spots = np.array([f"{name}-{spot}" for spot in range(size)], object)
        position = rng.normal(0, 300, (size, 2)).astype(np.float32)
        return {"expression": expression, "payload": expression, "position": position, "spot_id": spots} | of


def _run(train: tuple[str, ...], validation: tuple[str, ...], **changed: object) -> Run:
    settings = {"model.image_encoder": "small_cnn", "model.spot_layers": 1, "model.spot_width": 16}
    config = override(Config(), settings | {"model.embedding_dim": 8, "retrieval.k": 3} | changed)
    manifest = _Manifest(tile_size_px=32, mpp=0.5)
    read = {"read_section": manifest.read_section, "features": None, "total": None}
    reader = SimpleNamespace(manifest=manifest, root="table", position="sinusoidal", **read)
    panel = GenePanel(tuple("ABCD"), ("",) * 4, ("",) * 4)
    split = Split(train=train, validation=validation, test=())
    return cast(
        Run, SimpleNamespace(config=config, manifest=manifest, reader=reader, panel=panel, split=split, encoder=None)
    )


@pytest.mark.parametrize("train", [("A1", "B1"), ("A1",)])
def test_training_ends_with_a_threshold_where_there_are_other_sections(
    train: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, embedded = np.random.default_rng(5), []
    tiles = {name: rng.normal(size=(size, 8)).astype(np.float32) for name, size in SIZES.items()}

    def embed(root: str, manifest: object, names: list[str], *rest: object) -> list[tuple[str, dict[str, np.ndarray]]]:
        embedded.append(list(names))
        return [(name, {"embedding": tiles[name]}) for name in names]

    monkeypatch.setattr(finish, "embed_sections", embed)
    run = _run(train, ("A2",))
    weights = TwoTowers(run.config.model, 4, 0, 32).eval().state_dict()
    version = finish._version(run, weights, 1, hidden)
    assert embedded == [["A2", *train] if len(train) > 1 else ["A2"]], "one pass over the needed sections"
    assert version.config.retrieval.temperature is not None
    if len(train) == 1:
        assert version.ood_similarity is None
        return
    expected = expected_threshold({name: tiles[name] for name in train}, version.bank)
    assert version.ood_similarity == pytest.approx(expected, abs=1e-6)


def test_a_direct_regression_has_no_threshold_and_embeds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "embed_sections", None)
    run = _run(("A1", "B1"), (), **{"model.predictor": "regression"})
    assert finish._version(run, {"a": torch.zeros(1)}, 1, hidden).ood_similarity is None


@pytest.mark.parametrize("array", ["weights", "payload"])
def test_a_model_whose_answer_is_not_finite_is_refused(array: str) -> None:
    version = random_version()
    finish.require_finite_answer(version)
    values = version.weights["image_head.project.weight"] if array == "weights" else version.bank.payload
    values[:] = float("inf")
    with pytest.raises(RunError, match="answer to a probe is not finite: training has diverged"):
        finish.require_finite_answer(version)


@pytest.mark.parametrize(
    ("train", "organs"), [(("A1", "B1"), ("skin",)), (("A2", "A1"), ("lung", "skin")), (("B1",), ())]
)
def test_a_version_records_species_and_organs_of_its_training(train: tuple[str, ...], organs: tuple[str, ...]) -> None:
    run = _run(train, ("A2",) if "A2" not in train else (), **{"model.predictor": "regression"})
    training = finish._version(run, {"a": torch.zeros(1)}, 3, hidden).training
    assert (training.species, training.organs) == (("homo sapiens",), organs)
