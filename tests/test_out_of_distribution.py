"""The threshold below which a tile resembles nothing in the bank, and the flag that predictions carry."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from mclstexp.config import Config, override
from mclstexp.data.folds import Split
from mclstexp.data.genes import GenePanel
from mclstexp.model.bank import Bank, drawn_sections, ood_similarity
from mclstexp.model.towers import TwoTowers
from mclstexp.training import finish
from mclstexp.training.run import Run

SIZES = {"A1": 30, "A2": 25, "B1": 40}


def _bank(sizes: dict[str, int] = SIZES) -> Bank:
    rng = np.random.default_rng(0)
    sections = np.concatenate([np.full(size, name, object) for name, size in sizes.items()])
    keys = rng.normal(size=(len(sections), 6)).astype(np.float32)
    patients = np.array([name[0] for name in sections], object)
    return Bank.of(keys, keys[:, :2].copy(), sections, patients, np.arange(len(sections)).astype(str).astype(object))


def _queries(bank: Bank) -> dict[str, np.ndarray]:
    """Each section's tiles lie on its own spots, so that only other sections can make them unlike."""
    return {name: bank.keys[bank.section_id == name] for name in dict.fromkeys(bank.section_id)}


def _expected(queries: dict[str, np.ndarray], bank: Bank) -> float:
    unit = bank.keys / np.linalg.norm(bank.keys.astype(np.float64), axis=1, keepdims=True)
    best = []
    for name, section in queries.items():
        for query in section.astype(np.float64):
            cosines = [unit[row] @ query for row in range(len(unit)) if bank.section_id[row] != name]
            best.append(max(cosines) / np.linalg.norm(query))
    best = sorted(best)
    place = 0.01 * (len(best) - 1)
    low = int(place)
    return best[low] + (place - low) * (best[low + 1] - best[low])


def test_the_threshold_is_the_first_percentile_over_tiles_asked_of_other_sections() -> None:
    bank = _bank()
    queries = _queries(bank)
    assert _expected(queries, bank) < 0.9
    assert ood_similarity(queries, bank) == pytest.approx(_expected(queries, bank), abs=1e-6)
    drawn = {name: queries[name] for name in ("A2", "B1")}
    assert ood_similarity(drawn, bank) == pytest.approx(_expected(drawn, bank), abs=1e-6)


def test_one_training_section_sets_no_threshold() -> None:
    bank = _bank({"A1": 20})
    assert ood_similarity(_queries(bank), bank) is None
    assert ood_similarity({}, _bank()) is None
    assert drawn_sections({"A1": 20}) == []


def test_sections_are_drawn_whole_alike_each_time_and_within_the_limit() -> None:
    sizes = {f"S{section:02}": 100 + section for section in range(40)}
    assert drawn_sections(sizes) == list(sizes)
    drawn = drawn_sections(sizes, most=1000)
    assert drawn == drawn_sections(sizes, most=1000) == sorted(drawn)
    assert 1000 - 140 < sum(sizes[name] for name in drawn) <= 1000
    assert drawn != list(sizes)[: len(drawn)], "a draw, not the first ones"
    assert drawn_sections({"large": 50, "larger": 60}, most=40) == ["large"]


class _Manifest(SimpleNamespace):
    """Sections with expression of random spots; `embed` stands for the tiles' way through Ray."""

    def section(self, name: str) -> SimpleNamespace:
        groups = [SimpleNamespace(num_rows=SIZES[name])]
        return SimpleNamespace(section_id=name, patient_id=name[0], num_spots=SIZES[name], row_groups=groups)

    def digest(self) -> str:
        return "digest"

    def read_section(self, name: str) -> dict[str, np.ndarray]:
        rng, size = np.random.default_rng(len(name)), SIZES[name]
        expression = rng.random((size, 4)).astype(np.float32)
        of = {"section_id": np.full(size, name, object), "patient_id": np.full(size, name[0], object)}
        spots = np.array([f"{name}-{spot}" for spot in range(size)], object)
        place = rng.normal(0, 300, (size, 2)).astype(np.float32)
        return {"expression": expression, "payload": expression, "position": place, "spot_id": spots} | of


def _run(train: tuple[str, ...], validation: tuple[str, ...], **changed: object) -> Run:
    settings = {"model.image_encoder": "small_cnn", "model.spot_layers": 1, "model.spot_width": 16}
    config = override(Config(), settings | {"model.embedding_dim": 8, "retrieval.k": 3} | changed)
    manifest = _Manifest(tile_size_px=32, mpp=0.5)
    reader = SimpleNamespace(manifest=manifest, read_section=manifest.read_section, root="table", position="sinusoidal")
    panel = GenePanel(tuple("ABCD"), ("",) * 4, ("",) * 4)
    split = Split(train=train, validation=validation, test=())
    return cast(Run, SimpleNamespace(config=config, manifest=manifest, reader=reader, panel=panel, split=split))


@pytest.mark.parametrize("train", [("A1", "B1"), ("A1",)])
def test_training_ends_with_a_threshold_where_there_are_other_sections(
    train: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, asked = np.random.default_rng(5), []
    tiles = {name: rng.normal(size=(size, 8)).astype(np.float32) for name, size in SIZES.items()}

    def embed(root: str, manifest: object, names: list[str], *rest: object) -> list[tuple[str, dict[str, np.ndarray]]]:
        asked.append(list(names))
        return [(name, {"embedding": tiles[name]}) for name in names]

    monkeypatch.setattr(finish, "embed_sections", embed)
    run = _run(train, ("A2",))
    weights = TwoTowers(run.config.model, 4, 0, 32).eval().state_dict()
    version = finish._version(run, weights, 1)
    assert asked == [["A2", *train] if len(train) > 1 else ["A2"]], "one pass, and none in vain"
    assert version.config.retrieval.temperature is not None
    if len(train) == 1:
        assert version.ood_similarity is None
        return
    expected = _expected({name: tiles[name] for name in train}, version.bank)
    assert version.ood_similarity == pytest.approx(expected, abs=1e-6)


def test_a_direct_regression_has_no_threshold_and_embeds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "embed_sections", None)
    run = _run(("A1", "B1"), (), **{"model.predictor": "regression"})
    assert finish._version(run, {"a": torch.zeros(1)}, 1).ood_similarity is None
