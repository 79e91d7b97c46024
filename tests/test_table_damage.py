"""Damaged section files: every damage found, nothing executed."""

import base64
import pickle
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from one_section import make_one, sentence

from mclstexp import storage
from mclstexp.data import row_groups
from mclstexp.data.schema import TILE_SCHEMA, RowGroup
from mclstexp.data.table import read_columns, read_sentence
from mclstexp.errors import TableError


@pytest.fixture
def make(tmp_path):
    return partial(make_one, tmp_path)


def outcome(made):
    try:
        return read_sentence(made.root, made.entry, 0).equals(made.sentences[0])
    except TableError as error:
        return str(error)


def test_flipped_bytes_are_found_or_harmless(make):
    made = make(sentences=[sentence(0, 3)])
    whole = storage.read(made.uri)
    outcomes = []
    for index in range(made.entry.row_groups[0].offset, made.entry.footer_offset, 23):
        storage.write(made.uri, whole[:index] + bytes([whole[index] ^ 0x10]) + whole[index + 1 :])
        outcomes.append(outcome(made))
    found = [text for text in outcomes if text is not True]
    assert all("section S1, sentence 0" in str(text) for text in found)
    assert len(found) > 0.9 * len(outcomes)


def test_a_flipped_page_byte_is_an_error_that_names_the_section(make):
    made = make()
    whole = bytearray(storage.read(made.uri))
    group = made.entry.row_groups[1]
    whole[group.offset + group.length // 2] ^= 1
    storage.write(made.uri, bytes(whole))
    read_sentence(made.root, made.entry, 0)
    with pytest.raises(TableError, match=r"section S1, sentence 1 \(tiles/S1.parquet\) is damaged"):
        read_sentence(made.root, made.entry, 1)
    with pytest.raises(TableError, match="section S1, columns"):
        read_columns(made.root, made.entry, TILE_SCHEMA.names)


def test_a_tile_that_does_not_match_its_checksum_names_the_spot(make):
    wrong = sentence(0, 4)
    images = wrong["image"].to_pylist()
    images[2] = images[1]
    column = TILE_SCHEMA.get_field_index("image")
    made = make(sentences=[wrong.set_column(column, TILE_SCHEMA.field("image"), pa.array(images, pa.binary()))])
    with pytest.raises(TableError, match=r"section S1, sentence 0 .* the tile of spot spot2"):
        read_sentence(made.root, made.entry, 0)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_files_are_refused(make, share):
    made = make()
    whole = storage.read(made.uri)
    storage.write(made.uri, whole[: int(len(whole) * share)])
    with pytest.raises(TableError, match="section S1"):
        read_sentence(made.root, made.entry, 0)


def test_missing_file_says_why(make):
    made = make()
    storage.delete(made.uri)
    with pytest.raises(TableError, match=r"section S1.* is missing: if the table was prepared again"):
        read_sentence(made.root, made.entry, 0)


def test_a_file_of_another_section_is_refused(make):
    made = make(section_id="S2")
    with pytest.raises(TableError, match=r"section S2.* has rows of section S1"):
        read_sentence(made.root, made.entry, 0)
    with pytest.raises(TableError, match=r"section S2.* has rows of section S1"):
        read_columns(made.root, made.entry, ["x_px"])


def replaced(made, data):
    """The same entry over other Parquet bytes, with the byte range of each row group."""
    storage.write(made.uri, data)
    metadata = pq.read_metadata(pa.BufferReader(data))
    footer_offset = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    group = RowGroup(offset=4, length=footer_offset - 4, num_rows=metadata.num_rows)
    row_groups.read_footer.cache_clear()
    return made.entry.model_copy(
        update={
            "size_bytes": len(data),
            "footer_offset": footer_offset,
            "row_groups": (group,),
            "num_spots": metadata.num_rows,
        }
    )


def parquet_bytes(content, **options):
    buffer = pa.BufferOutputStream()
    pq.write_table(content, buffer, **({"store_schema": False, "write_page_checksum": True} | options))
    return buffer.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.append_column("extra", pa.array(range(t.num_rows))),
        lambda t: t.drop(["crc"]),
        lambda t: t.rename_columns([*TILE_SCHEMA.names[:-1], "counts"]),
        lambda t: t.set_column(5, "x_px", t["x_px"].cast(pa.float32())),
        lambda t: t.select([1, 0, *range(2, 14)]),
    ],
)
def test_other_columns_are_refused(make, change):
    made = make()
    entry = replaced(made, parquet_bytes(change(made.sentences[0])))
    with pytest.raises(TableError, match="differ in name or type"):
        read_sentence(made.root, entry, 0)


class Canary:
    """Unpickling it leaves a mark."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


class CraftedType(pa.ExtensionType):
    """An extension type as careless libraries write them: its metadata is unpickled when a schema is read."""

    def __init__(self, payload=b""):
        self.payload = payload
        super().__init__(pa.binary(), "crafted.type")

    def __arrow_ext_serialize__(self):
        return base64.b64encode(self.payload)

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        return cls(pickle.loads(base64.b64decode(serialized)) and b"")


@pytest.fixture
def crafted_type():
    pa.register_extension_type(CraftedType())
    yield CraftedType
    pa.unregister_extension_type("crafted.type")


def test_crafted_extension_types_do_not_run_code(make, crafted_type, tmp_path):
    made = make()
    mark = tmp_path / "executed"
    first = made.sentences[0]
    images = pa.ExtensionArray.from_storage(
        crafted_type(pickle.dumps(Canary(str(mark)))), first["image"].combine_chunks()
    )
    data = parquet_bytes(first.set_column(9, "image", images), store_schema=True)
    entry = replaced(made, data)
    assert mark.exists(), "the canary must be alive: reading the footer alone, unguarded, runs it"
    mark.unlink()
    with pytest.raises(TableError, match="embeds Arrow type metadata"):
        read_sentence(made.root, entry, 0)
    with pytest.raises(TableError, match="embeds Arrow type metadata"):
        read_columns(made.root, entry, ["x_px"])
    assert not mark.exists()


def test_manifest_that_points_elsewhere_is_refused(make):
    made = make()
    groups = made.entry.row_groups
    swapped = made.entry.model_copy(update={"row_groups": (groups[1], groups[0], groups[2])})
    with pytest.raises(TableError, match="section S1, sentence 0"):
        read_sentence(made.root, swapped, 0)
    fewer = made.entry.model_copy(update={"row_groups": groups[:2]})
    with pytest.raises(TableError, match="its footer has 25 rows"):
        read_sentence(made.root, fewer, 0)
