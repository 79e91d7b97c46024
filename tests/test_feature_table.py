"""Feature tables: what is read is what was written, by any Parquet reader too; one request per sentence; no damage."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from feature_tables import WIDTHS, plain_table, record, section_blocks, small_tiles, write

from mclstexp import storage
from mclstexp.data.feature_writer import damaged_parts, has_file, remove_stale, write_features
from mclstexp.data.features import FeatureReader, load_features
from mclstexp.data.row_groups import read_footer
from mclstexp.data.schema import MANIFEST, load_manifest
from mclstexp.errors import ConfigError, ModelError, TableError

PLAIN = plain_table()


def _joined(blocks: dict[str, np.ndarray], suffix: str = "", views: tuple[str, ...] = PLAIN.views) -> np.ndarray:
    return np.concatenate([blocks[f"{view}/{layer}{suffix}"] for view in views for layer in WIDTHS], axis=1)


def test_features_come_back_as_they_were_written(tmp_path: Path) -> None:
    entry = small_tiles(tmp_path).section("A1")
    blocks = section_blocks(PLAIN, entry)
    reader = write(tmp_path, PLAIN, entry, blocks)
    assert reader.num_features == 16
    for group, sentence in enumerate(blocks):
        found = reader.read("A1", group)
        assert found.dtype == np.float32
        assert np.array_equal(found, _joined(sentence))
        assert np.array_equal(reader.read("A1", group, draw=0), _joined(sentence, "/0"))
    assert np.array_equal(reader.read_section("A1"), np.concatenate([_joined(each) for each in blocks]))
    assert np.array_equal(reader.read_section("A1", draw=0), np.concatenate([_joined(each, "/0") for each in blocks]))
    assert np.array_equal(reader.read_colours("A1"), np.concatenate([each["image/rgb"] for each in blocks]))
    wide = replace(reader, views=("image_wide",))
    assert np.array_equal(wide.read("A1", 1), _joined(blocks[1], views=("image_wide",)))
    assert (reader.widths, wide.widths) == ((5, 3, 5, 3), (5, 3))
    turned = replace(reader, views=("image",), encoder=record(layers=("mean", "class"), widths=(3, 5)))
    expected = [blocks[1]["image/mean/0"], blocks[1]["image/class/0"]]
    assert np.array_equal(turned.read("A1", 1, draw=0), np.concatenate(expected, axis=1))
    assert replace(turned, encoder=record(layers=("mean",), widths=(3,))).num_features == 3
    with pytest.raises(TableError, match="has 1 draws of each tile, and no draw 1"):
        reader.read("A1", 0, draw=1)


def test_any_parquet_reader_reads_a_block(tmp_path: Path) -> None:
    entry = small_tiles(tmp_path).section("A1")
    blocks = section_blocks(PLAIN, entry)
    reader = write(tmp_path, PLAIN, entry, blocks)
    table = pq.read_table(storage.join(reader.root, reader.manifest.section("A1").file))
    assert table["spot_id"][0].as_py() == "spot0"
    found = np.array([np.frombuffer(each, "<f4") for each in table["image/mean"].to_pylist()])
    assert np.array_equal(found, np.concatenate([each["image/mean"] for each in blocks]))
    assert [each.num_rows for each in reader.manifest.section("A1").row_groups] == [5, 4]


def test_float16_rounds_and_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    plain = plain_table(dtype="float16")
    entry = small_tiles(tmp_path).section("A1")
    blocks = section_blocks(plain, entry)
    reader = write(tmp_path, plain, entry, blocks)
    expected = _joined(blocks[0]).astype(np.float16)
    assert np.array_equal(reader.read("A1", 0), expected.astype(np.float32))
    assert np.array_equal(reader.read_colours("A1")[:5], blocks[0]["image/rgb"])
    blocks[1]["image/mean"][2, 1] = -70_000
    with pytest.raises(ConfigError, match=r"section A1, spot spot2: .*image/mean is 70000, beyond 65504.*float32"):
        write(tmp_path, plain, entry, blocks)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    entry = small_tiles(tmp_path).section("A1")
    blocks = section_blocks(PLAIN, entry)
    blocks[1]["image/class"][3, 0] = value
    with pytest.raises(ModelError, match=r"section A1, spot spot3: .* image/class are not finite"):
        write(tmp_path, PLAIN, entry, blocks)
    assert load_features(str(tmp_path), PLAIN.name) is None


def test_a_sentence_costs_one_request_and_only_its_columns(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = small_tiles(tmp_path).section("A1")
    reader = write(f"{s3}/table", PLAIN, entry, section_blocks(PLAIN, entry))
    asked: list[int | None] = []
    plainly = storage.read

    def noted(uri: str, start: int = 0, length: int | None = None) -> bytes:
        asked.append(length)
        return plainly(uri, start, length)

    monkeypatch.setattr(storage, "read", noted)
    for draw in (None, 0, None):
        reader.read("A1", 1, draw)
    footer, *sentences = asked
    section = reader.manifest.section("A1")
    assert footer == section.size_bytes - section.footer_offset
    assert len(sentences) == 3
    assert all(length is not None and length < section.row_groups[1].length / 2 for length in sentences)


def test_a_name_covers_what_the_numbers_depend_on_and_nothing_else() -> None:
    origin = record(licence="MIT", stores_weights=False, hub="a/b", commit="c", uri="s3://x/y")
    assert plain_table(encoder=origin).name == PLAIN.name
    assert PLAIN.name.startswith("small_cnn-")
    assert plain_table(encoder=record(name="timm/vit")).name.startswith("timm-vit-")
    others = [
        plain_table(encoder=record(digest=64 * "1")),
        plain_table(encoder=record(mean=(0.4, 0.5, 0.5))),
        plain_table(encoder=record(crop_px=4)),
        plain_table(encoder=record(layers=("mean", "class"), widths=(3, 5))),
        plain_table(views=("image",)),
        plain_table(dtype="float16"),
        plain_table(arithmetic="bf16"),
        plain_table(num_draws=2),
        plain_table(augmentation="default"),
        plain_table(seed=1),
        plain_table(libraries={"torch": "3"}),
    ]
    assert len({PLAIN.name, *(other.name for other in others)}) == 1 + len(others)


def test_sections_are_missing_until_they_are_stored_as_they_are_cut_now(tmp_path: Path) -> None:
    tiles, names = small_tiles(tmp_path), ["A1", "B1"]
    assert load_features(str(tmp_path), PLAIN.name) is None
    assert PLAIN.missing(tiles, names) == names
    for entry in tiles.sections:
        reader = write(tmp_path, PLAIN, entry, section_blocks(PLAIN, entry))
    assert load_features(str(tmp_path), PLAIN.name) == reader.manifest
    assert reader.manifest.missing(tiles, names) == []
    with pytest.raises(TableError, match="has no section A2; known: A1, B1"):
        reader.read("A2", 0)
    stale_file = Path(reader.root, reader.manifest.section("B1").file)
    cut_again = tiles.section("B1").model_copy(update={"sha256": "other"})
    changed = tiles.model_copy(update={"sections": (tiles.section("A1"), cut_again)})
    assert reader.manifest.missing(changed, names) == ["B1"]
    storage.write(str(tmp_path / MANIFEST), changed.encode())
    assert remove_stale(str(tmp_path), PLAIN) == ["B1"]
    assert not stale_file.exists()
    assert remove_stale(str(tmp_path), PLAIN) == []
    left = load_features(str(tmp_path), PLAIN.name)
    assert left is not None
    assert [each.section_id for each in left.sections] == ["A1"]
    replace(reader, manifest=left).read_section("A1")


@pytest.mark.parametrize("on_s3", [False, True])
def test_of_two_writers_neither_loses_a_section(
    tmp_path: Path, on_s3: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"{request.getfixturevalue('s3')}/table" if on_s3 else str(tmp_path)
    first, second = small_tiles(tmp_path).sections
    if on_s3:
        storage.upload_folder(tmp_path, root, MANIFEST)
    plainly, blocks = storage.publish, section_blocks(PLAIN, second, 5)

    def outrun(uri: str, data: bytes, previous: str | None) -> str:
        monkeypatch.setattr(storage, "publish", plainly)
        write(root, PLAIN, second, blocks)
        return plainly(uri, data, previous)

    monkeypatch.setattr(storage, "publish", outrun)
    reader = write(root, PLAIN, first, section_blocks(PLAIN, first))
    assert [each.section_id for each in reader.manifest.sections] == ["A1", "B1"]
    assert np.array_equal(reader.read("B1", 0), _joined(blocks[0]))

    again = write(root, PLAIN, second, section_blocks(PLAIN, second, 50))
    assert again.manifest == reader.manifest, "the first writer's features stay"
    names = {uri.rpartition("/")[2] for uri in storage.list_files(reader.root) if uri.endswith(".parquet")}
    assert names == {each.file for each in reader.manifest.sections}


def test_every_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    entry = small_tiles(tmp_path).section("A1")
    blocks = section_blocks(PLAIN, entry)
    reader = write(tmp_path, PLAIN, entry, blocks)
    section = reader.manifest.section("A1")
    uri = storage.join(reader.root, section.file)
    assert damaged_parts(reader.root, section) == []
    whole = storage.read(uri)
    found = 0
    for place in range(0, len(whole), 7):
        storage.write(uri, whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        sentences = [i for i, each in enumerate(section.row_groups) if each.offset <= place < each.offset + each.length]
        expected = [f"sentence {i}" for i in sentences] or ["head" if place < 4 else "footer"]
        assert damaged_parts(reader.root, section) == expected
        read_footer.cache_clear()
        outcome = _read_or_fault(reader)
        if isinstance(outcome, str):
            assert "features of section A1, sentence 0" in outcome
            assert "run jobs/embed.py again" in outcome
            found += 1
        else:
            assert np.array_equal(outcome, _joined(blocks[0])), place
    assert found > len(whole) / 7 / 4


def _read_or_fault(reader: FeatureReader) -> np.ndarray | str:
    try:
        return reader.read("A1", 0)
    except TableError as error:
        return str(error)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_cut_file_is_found(tmp_path: Path, share: float) -> None:
    entry = small_tiles(tmp_path).section("A1")
    reader = write(tmp_path, PLAIN, entry, section_blocks(PLAIN, entry))
    section = reader.manifest.section("A1")
    uri = storage.join(reader.root, section.file)
    assert has_file(reader.root, section)
    whole = storage.read(uri)
    storage.write(uri, whole[: int(share * len(whole))])
    assert not has_file(reader.root, section)
    assert "footer" in damaged_parts(reader.root, section)
    with pytest.raises(TableError, match="features of section A1, sentence 1"):
        reader.read("A1", 1)
    storage.delete(uri)
    assert not has_file(reader.root, section)
    assert len(damaged_parts(reader.root, section)) == 4
    with pytest.raises(TableError, match=r"features of section A1, sentence 1 .* are missing"):
        reader.read("A1", 1)


@pytest.mark.parametrize("change", [lambda text: text[:-9], lambda text: text.replace("fp32", "bf16"), lambda text: ""])
def test_a_damaged_manifest_is_named_and_replaced(tmp_path: Path, change) -> None:
    entry = small_tiles(tmp_path).section("A1")
    reader = write(tmp_path, PLAIN, entry, section_blocks(PLAIN, entry))
    path = Path(reader.root, MANIFEST)
    path.write_text(change(path.read_text()))
    with pytest.raises(TableError, match=r"manifest.json is damaged: .*run jobs/embed.py again"):
        load_features(str(tmp_path), PLAIN.name)
    assert write(tmp_path, PLAIN, entry, section_blocks(PLAIN, entry)).manifest == reader.manifest


def test_a_damaged_section_is_replaced_even_by_the_same_cut(tmp_path: Path) -> None:
    entry = small_tiles(tmp_path).section("A1")
    reader = write(tmp_path, PLAIN, entry, section_blocks(PLAIN, entry))
    damaged, blocks = reader.manifest.section("A1"), section_blocks(PLAIN, entry, 9)
    sentences = [([str(i) for i in range(len(each["image/rgb"]))], each) for each in blocks]
    manifest = write_features(str(tmp_path), PLAIN, entry, sentences, damaged)
    assert np.array_equal(replace(reader, manifest=manifest).read("A1", 0), _joined(blocks[0]))
    assert not Path(reader.root, damaged.file).exists()
    assert load_manifest(str(tmp_path)).section("A1").sha256 == manifest.section("A1").tiles_sha256
