"""The bank: its keys, its donors, its files, which run no code, and its out-of-distribution threshold."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ood_reference import expected_threshold
from safetensors.numpy import load_file, save_file

from mclstexp.data.spots import Batch
from mclstexp.errors import ModelError
from mclstexp.model.bank import ARRAYS, DONORS, Bank, build_bank, drawn_sections, ood_similarity
from mclstexp.model.towers import TwoTowers
from mclstexp.settings import ModelConfig

LENGTHS = {"B": [16, 16, 5], "A": [9]}  # spots of each section's sentences
NUM_GENES = 6
SIZES = {"A1": 30, "A2": 25, "B1": 40}  # tiles of each section


@dataclass
class _Reader:
    """Two measured sections of random spots, read in whole."""

    sections: dict[str, Batch]

    @property
    def manifest(self) -> SimpleNamespace:
        return self

    def section(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(row_groups=[SimpleNamespace(num_rows=rows) for rows in LENGTHS[name]])

    def read_section(self, name: str) -> Batch:
        return dict(self.sections[name])


@pytest.fixture
def reader() -> _Reader:
    rng = np.random.default_rng(0)
    sections = {}
    for name, lengths in LENGTHS.items():
        n = sum(lengths)
        sections[name] = {
            "expression": rng.random((n, NUM_GENES)).astype(np.float32),
            "payload": rng.random((n, NUM_GENES)).astype(np.float32),
            "position": rng.normal(0, 300, (n, 2)).astype(np.float32),
            "spot_id": np.array([f"{name}x{i}" for i in range(n)], object),
            "section_id": np.full(n, name, object),
            "patient_id": np.full(n, f"patient of {name}", object),
        }
    return _Reader(sections)


@pytest.fixture(scope="module")
def towers() -> TwoTowers:
    torch.manual_seed(0)
    config = ModelConfig(image_encoder="small_cnn", spot_layers=1, spot_width=16, spot_heads=2, embedding_dim=8)
    return TwoTowers(config, NUM_GENES, 0, 32).eval()


def _keys(towers: TwoTowers, spots: Batch, start: int, stop: int) -> np.ndarray:
    expression, position = (torch.from_numpy(spots[name][start:stop])[None] for name in ("expression", "position"))
    with torch.inference_mode():
        return towers.embed_spots(expression, position, torch.ones(1, stop - start, dtype=torch.bool))[0].numpy()


def test_keys_attend_within_their_sentence_only(reader: _Reader, towers: TwoTowers) -> None:
    shown = []
    bank = build_bank(towers, reader, ["B", "A"], random_spots=False, show=lambda *report: shown.append(report))
    assert shown == [("bank: sections", 1, 2), ("bank: sections", 2, 2)]
    assert bank.section_id.tolist() == ["B"] * 37 + ["A"] * 9
    assert bank.patient_id[0] == "patient of B"
    assert bank.spot_id.tolist() == [f"Bx{i}" for i in range(37)] + [f"Ax{i}" for i in range(9)]
    assert np.array_equal(bank.payload[37:], reader.sections["A"]["payload"])
    assert bank.keys[:16] == pytest.approx(_keys(towers, reader.sections["B"], 0, 16), abs=1e-6)
    assert bank.keys[32:37] == pytest.approx(_keys(towers, reader.sections["B"], 32, 37), abs=1e-6)
    assert bank.keys[37:] == pytest.approx(_keys(towers, reader.sections["A"], 0, 9), abs=1e-6)
    assert bank.keys.dtype == bank.payload.dtype == np.float32
    assert len(bank) == 46


def test_keys_of_random_spots_are_made_in_batches_of_32_across_sections(reader: _Reader, towers: TwoTowers) -> None:
    bank = build_bank(towers, reader, ["B", "A"], random_spots=True)
    joined = {
        name: np.concatenate([reader.sections[section][name] for section in "BA"])
        for name in ("expression", "position")
    }
    assert bank.keys[:32] == pytest.approx(_keys(towers, joined, 0, 32), abs=1e-6)
    assert bank.keys[32:] == pytest.approx(_keys(towers, joined, 32, 46), abs=1e-6)
    by_sentence = build_bank(towers, reader, ["B", "A"], random_spots=False)
    assert not np.allclose(bank.keys[:32], by_sentence.keys[:32], atol=1e-3), "the batches must differ"


def test_a_saved_bank_loads_whole(reader: _Reader, towers: TwoTowers, tmp_path: Path) -> None:
    bank = build_bank(towers, reader, ["B", "A"], random_spots=False)
    bank.save(tmp_path, {})
    loaded = Bank.load(tmp_path)
    for name, values in vars(bank).items():
        assert np.array_equal(getattr(loaded, name), values), name
        assert values is None or getattr(loaded, name).dtype == values.dtype


def test_a_loaded_bank_is_a_memory_map_with_stored_directions(
    reader: _Reader, towers: TwoTowers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = build_bank(towers, reader, ["B", "A"], random_spots=False)
    saved.save(tmp_path, {})
    monkeypatch.setattr("mclstexp.model.bank.directions", None)  # loading must not compute them
    bank = Bank.load(tmp_path)
    for name in ("keys", "payload", "directions"):
        values = getattr(bank, name)
        while isinstance(values, np.ndarray) and not isinstance(values, np.memmap):
            values = values.base.obj if isinstance(values.base, memoryview) else values.base
        assert isinstance(values, np.memmap), name
        assert not getattr(bank, name).flags.writeable
    assert np.array_equal(bank.directions, saved.directions)


def test_a_bank_of_an_earlier_schema_gets_the_directions_of_its_keys(
    reader: _Reader, towers: TwoTowers, tmp_path: Path
) -> None:
    bank = build_bank(towers, reader, ["B", "A"], random_spots=False)
    bank.save(tmp_path, {})
    arrays = load_file(tmp_path / ARRAYS)
    del arrays["directions"]
    save_file(arrays, tmp_path / ARRAYS)
    assert np.array_equal(Bank.load(tmp_path).directions, bank.directions)


def _partial_bank() -> Bank:
    """Three sections of 30, 25 and 40 spots; A2 does not measure the first gene, B1 neither of two."""
    bank = _random_bank()
    payload = bank.payload.copy()
    payload[bank.section_id == "A2", 0] = np.nan
    payload[bank.section_id == "B1"] = np.nan
    return Bank.of(bank.keys, payload, bank.section_id, bank.patient_id, bank.spot_id)


@pytest.mark.odd
def test_a_bank_keeps_which_sections_measure_a_gene(tmp_path: Path) -> None:
    bank = _partial_bank()
    assert bank.measured is not None
    assert bank.measured.tolist() == [[True, True], [False, True], [False, False]]
    assert np.isfinite(bank.payload).all()
    mine = bank.payload[bank.section_id == "A1"].astype(np.float64)
    two = bank.payload[bank.patient_id == "A"].astype(np.float64)
    np.testing.assert_allclose(bank.mean_payload, [mine[:, 0].mean(), two[:, 1].mean()])
    bank.save(tmp_path, {})
    loaded = Bank.load(tmp_path)
    for name in ("keys", "payload", "measured", "section_code", "mean_payload"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(bank, name), err_msg=name)
    np.testing.assert_array_equal(bank.of_genes(np.array([1])).measured, bank.measured[:, [1]])


def test_a_bank_whose_sections_measure_all_has_the_file_of_before(tmp_path: Path) -> None:
    bank = _random_bank()
    bank.save(tmp_path, {"tiles": "of 32 px"})
    arrays = {name: getattr(bank, name) for name in ("keys", "payload", "directions")}
    save_file(arrays, tmp_path / "expected", {"made_for": '{"tiles": "of 32 px"}'})
    assert (tmp_path / ARRAYS).read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.odd
@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (np.ones((2, 2), bool), "says for 2 sections and 2 genes .* has 3 sections and 2 genes"),
        (np.ones((3, 1), bool), "says for 3 sections and 1 genes .* has 3 sections and 2 genes"),
        (np.ones((3, 2), np.float32), "expected float32 keys, payload, directions .and bool measured."),
    ],
)
def test_a_bank_that_contradicts_itself_on_what_is_measured_is_refused(
    tmp_path: Path, measured: np.ndarray, message: str
) -> None:
    _partial_bank().save(tmp_path, {})
    save_file(load_file(tmp_path / ARRAYS) | {"measured": measured}, tmp_path / ARRAYS)
    with pytest.raises(ModelError, match=message):
        Bank.load(tmp_path)


def test_files_of_two_banks_are_refused(reader: _Reader, towers: TwoTowers, tmp_path: Path) -> None:
    bank = build_bank(towers, reader, ["B", "A"], random_spots=False)
    replace(bank, spot_id=bank.spot_id[:5], section_id=bank.section_id[:5], patient_id=bank.patient_id[:5]).save(
        tmp_path, {}
    )
    with pytest.raises(ModelError, match="46 payload and 5 donors"):
        Bank.load(tmp_path)


def test_no_arrow_type_is_stored_by_name(reader: _Reader, towers: TwoTowers, tmp_path: Path) -> None:
    build_bank(towers, reader, ["A"], random_spots=False).save(tmp_path, {})
    assert b"ARROW:" not in (tmp_path / DONORS).read_bytes()


class _Canary(pa.ExtensionType):
    """A type whose reading leaves a trace."""

    trace: Path | None = None

    def __init__(self) -> None:
        super().__init__(pa.string(), "test.canary")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "_Canary":
        if cls.trace is not None:
            cls.trace.touch()
        return cls()


def test_donors_with_a_type_that_runs_code_are_refused_unread(tmp_path: Path) -> None:
    names = np.array(["a", "b"], object)
    Bank.of(np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32), names, names, names).save(tmp_path, {})
    pa.register_extension_type(_Canary())
    try:
        column = pa.ExtensionArray.from_storage(_Canary(), pa.array(["a", "b"]))
        columns = dict.fromkeys(("section_id", "patient_id", "spot_id"), column)
        pq.write_table(pa.table(columns), tmp_path / DONORS)
        _Canary.trace = tmp_path / "ran"
        with pytest.raises(ModelError, match="embeds Arrow type metadata"):
            Bank.load(tmp_path)
        assert not (tmp_path / "ran").exists()
    finally:
        pa.unregister_extension_type("test.canary")


def _random_bank(sizes: dict[str, int] = SIZES) -> Bank:
    rng = np.random.default_rng(0)
    sections = np.concatenate([np.full(size, name, object) for name, size in sizes.items()])
    keys = rng.normal(size=(len(sections), 6)).astype(np.float32)
    patients = np.array([name[0] for name in sections], object)
    return Bank.of(keys, keys[:, :2].copy(), sections, patients, np.arange(len(sections)).astype(str).astype(object))


def _queries(bank: Bank) -> dict[str, np.ndarray]:
    """Returns tiles equal to their section's own spots, so that only other sections can give a low cosine."""
    return {name: bank.keys[bank.section_id == name] for name in dict.fromkeys(bank.section_id)}


def test_the_threshold_is_the_first_percentile_of_cosines_to_other_sections() -> None:
    bank = _random_bank()
    queries = _queries(bank)
    assert expected_threshold(queries, bank) < 0.9
    assert ood_similarity(queries, bank) == pytest.approx(expected_threshold(queries, bank), abs=1e-6)
    drawn = {name: queries[name] for name in ("A2", "B1")}
    assert ood_similarity(drawn, bank) == pytest.approx(expected_threshold(drawn, bank), abs=1e-6)


def test_one_training_section_sets_no_threshold() -> None:
    bank = _random_bank({"A1": 20})
    assert ood_similarity(_queries(bank), bank) is None
    assert ood_similarity({}, _random_bank()) is None
    assert drawn_sections({"A1": 20}) == []


def test_whole_sections_are_drawn_the_same_each_time_and_within_the_limit() -> None:
    sizes = {f"S{section:02}": 100 + section for section in range(40)}
    assert drawn_sections(sizes) == list(sizes)
    drawn = drawn_sections(sizes, max_tiles=1000)
    assert drawn == drawn_sections(sizes, max_tiles=1000) == sorted(drawn)
    assert 1000 - 140 < sum(sizes[name] for name in drawn) <= 1000
    assert drawn != list(sizes)[: len(drawn)], "a draw, not the first ones"
    assert drawn_sections({"large": 50, "larger": 60}, max_tiles=40) == ["large"]
