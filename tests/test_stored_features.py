"""Training on stored features: what the loaders give is what was stored, from memory or disk, and no tile is read."""

from dataclasses import replace

import numpy as np
import pytest
from feature_tables import WIDTHS, plain_table, section_blocks, small_tiles, write
from small_table import NAMES

from mclstexp.config import Config, override
from mclstexp.data import random_spots, spots, stream
from mclstexp.data.features import FeatureReader
from mclstexp.data.genes import GenePanel
from mclstexp.data.spots import KeptReader, SentenceLoader, SpotReader, kept_spots, make_reader
from mclstexp.settings import TrainConfig
from mclstexp.training import feed
from mclstexp.training.training_sections import training_spots

DRAWS = 3
PLAIN = plain_table(views=("image",), num_draws=DRAWS)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[SpotReader, dict[tuple[str, int], dict[str, np.ndarray]]]:
    """A reader of stored features, and the blocks of each sentence as they were written."""
    root = tmp_path_factory.mktemp("stored")
    manifest, blocks, reader = small_tiles(root), {}, None
    for seed, entry in enumerate(manifest.sections):
        written = section_blocks(PLAIN, entry, 10 * seed)
        blocks |= {(entry.section_id, group): each for group, each in enumerate(written)}
        reader = write(root, PLAIN, entry, written)
    config = override(Config(), {"train.batching": "random_spots", "model.position": "none"})
    plain = make_reader(str(root), manifest, GenePanel.from_names(NAMES), config, ["A1", "B1"])
    return replace(plain, features=reader), blocks


def _joined(blocks: dict[str, np.ndarray], draw: int | None = None) -> np.ndarray:
    suffix = "" if draw is None else f"/{draw}"
    return np.concatenate([blocks[f"image/{layer}{suffix}"] for layer in WIDTHS], axis=1)


def _row(section_id: str, group: int, epoch: int = 0) -> dict[str, object]:
    own = stream.Sentence(section_id, group, (section_id, group))
    return stream.rank_slice([own], 1, 0, 1, epoch)[0]


def _load(loader: stream.Load, row: dict[str, object]) -> spots.Batch:
    return loader({name: np.array([value]) for name, value in row.items()})


def test_a_sentence_has_its_features_beside_its_own_expression(stored, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, blocks = stored
    by_tile = {sentence: reader.read_encoded(*sentence)[0] for sentence in blocks}
    monkeypatch.setattr(spots, "read_sentence", None)  # which reads tiles
    for sentence, written in blocks.items():
        found = reader.read(*sentence, draw=1)
        assert np.array_equal(found["features"], _joined(written, 1))
        assert np.array_equal(reader.read(*sentence)["features"], _joined(written))
        assert found.keys() - {"features"} == by_tile[sentence].keys()
        for name, values in by_tile[sentence].items():
            assert np.array_equal(found[name], values), name
    keep = np.array([0, 2])
    assert np.array_equal(reader.read("A1", 1, keep)["features"], _joined(blocks["A1", 1])[keep])


def test_a_loader_keeps_the_same_spots_of_features_as_of_tiles(stored) -> None:
    reader, blocks = stored
    batch = _load(SentenceLoader(reader, 0.5, seed=3), _row("A1", 0, epoch=2))
    keep = kept_spots(5, 0.5, 3, 2, "A1/0")
    assert 2 <= len(keep) < 5, "chosen so that some are dropped"
    assert batch["mask"].sum() == len(keep)
    assert np.array_equal(batch["features"][0, : len(keep)], _joined(blocks["A1", 0])[keep])
    assert np.array_equal(batch["expression"][0, : len(keep)], reader.read_spots("A1", 0)["expression"][keep])
    filler = _load(SentenceLoader(reader, 0.5, seed=3), _row("", -1))
    assert filler["features"].shape == (1, 64, 8)
    assert not filler["mask"].any()


def test_wrong_pairs_have_features_of_one_sentence_and_expression_of_another(stored) -> None:
    reader, blocks = stored
    wrong = stream.Sentence("A1", 0, ("B1", 1))
    batch = _load(SentenceLoader(reader, 0.0, 0), stream.rank_slice([wrong], 1, 0, 1, 0)[0])
    num_spots = int(batch["mask"].sum())
    assert num_spots == min(len(_joined(blocks["A1", 0])), len(_joined(blocks["B1", 1])))
    assert np.array_equal(batch["features"][0, :num_spots], _joined(blocks["A1", 0])[:num_spots])
    assert np.array_equal(batch["expression"][0, :num_spots], reader.read_spots("B1", 1)["expression"][:num_spots])


def test_draws_come_in_turn_and_sentences_start_at_different_ones(stored) -> None:
    reader, blocks = stored
    loader = SentenceLoader(reader, 0.0, 0, DRAWS)
    taken = {}
    for sentence in blocks:
        taken[sentence] = []
        for epoch in range(2 * DRAWS):
            batch = _load(loader, _row(*sentence, epoch=epoch))
            features = batch["features"][0, : int(batch["mask"].sum())]
            (draw,) = [k for k in range(DRAWS) if np.array_equal(features, _joined(blocks[sentence], k))]
            taken[sentence].append(draw)
        assert sorted(taken[sentence][:DRAWS]) == list(range(DRAWS)), "each once before any comes again"
        assert taken[sentence][:DRAWS] == taken[sentence][DRAWS:]
    assert len({of_sentence[0] for of_sentence in taken.values()}) > 1


@pytest.mark.parametrize(("max_bytes", "reads"), [(2**20, 1), (0, 3)])
def test_what_fits_into_memory_is_read_once(
    stored, monkeypatch: pytest.MonkeyPatch, max_bytes: int, reads: int
) -> None:
    reader, blocks = stored
    read: list[tuple[object, ...]] = []
    plainly = FeatureReader.read
    monkeypatch.setattr(FeatureReader, "read", lambda self, *which: read.append(which) or plainly(self, *which))
    kept = KeptReader(reader, max_bytes)
    for _ in range(3):
        for sentence in blocks:
            found, expected = kept.read(*sentence, np.array([1])), reader.read(*sentence, np.array([1]))
            assert all(np.array_equal(found[name], expected[name]) for name in ("features", "expression", "position"))
    assert len(read) == (reads + 3) * len(blocks)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_local_stream_has_the_batches_of_the_order(stored, batch_size: int) -> None:
    reader, _ = stored
    config = override(
        Config(), {"train.batch_sentences": 2, "train.feature_draws": DRAWS, "model.freeze_encoder": True}
    )
    made = feed.make_feed(config, reader, ["A1", "B1"])
    made = replace(made, batch_sentences=batch_size)
    epochs = [made.rows(epoch, ["A1/1"], 0, 1) for epoch in range(2)]
    batches = list(feed.open_batches(made, epochs, 1, stream.StreamShare(1, 1, None)))
    rows = [row for epoch in epochs for row in epoch]
    assert [name for batch in batches for name in batch["sentence_id"]] == [row["sentence_id"] for row in rows]
    expected = [_load(made.loader, row) for row in rows]
    for name in ("features", "expression", "position", "mask"):
        assert np.array_equal(
            np.concatenate([batch[name] for batch in batches]), np.concatenate([each[name] for each in expected])
        )


def test_an_error_while_reading_ahead_reaches_the_step(stored) -> None:
    reader, _ = stored
    rows = [_row("A1", 0), _row("A1", 7), _row("A1", 1)]
    batches = stream.read_ahead([rows], SentenceLoader(reader, 0.0, 0), 1)
    assert next(batches)["sentence_id"] == ["A1/0"]
    with pytest.raises(IndexError):
        list(batches)


def test_random_spots_take_their_own_features_and_draws_in_turn(stored, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, blocks = stored
    parts = [random_spots._read(reader, *sentence, DRAWS) for sentence in blocks]
    features = np.concatenate([part for _, part in parts])
    expression = np.concatenate([each["expression"] for each, _ in parts])
    encoded = random_spots.EncodedSpots(None, expression, np.zeros((len(features), 2)), features)
    monkeypatch.setattr(random_spots.ray, "get", lambda reference: reference)  # the store, which needs a cluster
    loader = random_spots.SpotLoader(encoded, 8, None, reads_features=True)  # type: ignore[arg-type]
    joined = np.concatenate([np.stack([_joined(each, k) for k in range(DRAWS)], axis=1) for each in blocks.values()])
    for epoch in range(2):
        (row,) = random_spots.rank_slice(np.array([8, 0, 3]), 4, 0, 1, epoch)
        batch = _load(loader, row)
        assert batch["spot"].tolist() == [[8, 0, 3, -1]]
        for slot, spot in enumerate([8, 0, 3]):
            assert np.array_equal(batch["features"][0, slot], joined[spot, (spot + epoch) % DRAWS])
            assert np.array_equal(batch["expression"][0, slot], expression[spot])


def test_programs_are_fitted_to_plain_tiles_and_every_draw(stored) -> None:
    reader, blocks = stored
    spots = training_spots(reader, ["B1", "A1"], TrainConfig(feature_draws=2))
    assert [section.section_id for section in spots.sections] == ["B1", "A1"]
    assert len(spots.augmented) == 2
    for draw, features in ((None, spots.features), (0, spots.augmented[0]), (1, spots.augmented[1])):
        for name in ("A1", "B1"):
            parts = [_joined(each, draw) for (section, _), each in blocks.items() if section == name]
            assert np.array_equal(features(name), np.concatenate(parts))


def test_features_of_random_spots_must_fit_into_memory(stored, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, _ = stored
    num_bytes = 4 * 16 * (DRAWS * 8 + len(NAMES))
    monkeypatch.setattr(random_spots, "MAX_BYTES", num_bytes)
    assert random_spots.require_size(reader, ["A1", "B1"], 4, DRAWS) == 16
    monkeypatch.setattr(random_spots, "MAX_BYTES", num_bytes - 1)
    with pytest.raises(random_spots.ConfigError, match="keeps all training rows in memory"):
        random_spots.require_size(reader, ["A1", "B1"], 4, DRAWS)
