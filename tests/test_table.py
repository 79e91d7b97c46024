"""Section files: one range request a sentence, every damage found, nothing executed."""

import base64
import pickle
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mclstexp import object_store, storage
from mclstexp.data import table
from mclstexp.data.images import decode_tile, encode_tile
from mclstexp.data.schema import GENE_SCHEMA, MANIFEST, TILE_SCHEMA, Manifest, RowGroup, SectionEntry
from mclstexp.data.table import read_columns, read_counts, read_sentence, tile_crc, write_section
from mclstexp.errors import TableError

NUM_GENES = 50


def sentence(first, num_spots, section_id="S1", measured=True):
    rng = np.random.default_rng(first)
    images = [encode_tile(rng.integers(0, 256, (16, 16, 3), np.uint8), "png", 90) for _ in range(num_spots)]
    genes = [np.sort(rng.choice(NUM_GENES, 7, replace=False)).tolist() for _ in range(num_spots)]
    spots = np.arange(first, first + num_spots)
    columns = {
        "section_id": [section_id] * num_spots,
        "patient_id": ["P"] * num_spots,
        "spot_id": [f"spot{i}" for i in spots],
        "array_row": pa.array(spots, pa.int32()),
        "array_col": pa.nulls(num_spots, pa.int32()),
        "x_px": spots * 10.0,
        "y_px": spots * 20.0,
        "x_um": spots * 5.0,
        "y_um": spots * 10.0,
        "image": images,
        "tissue_fraction": np.linspace(0, 1, num_spots).astype(np.float32),
        "label": pa.nulls(num_spots, pa.string()),
        "crc": pa.array(map(tile_crc, images), pa.uint32()),
        "gene_index": genes if measured else pa.nulls(num_spots, pa.list_(pa.int32())),
        "count": [rng.integers(1, 100, 7).tolist() for _ in spots]
        if measured
        else pa.nulls(num_spots, pa.list_(pa.int32())),
    }
    return pa.table(columns, schema=TILE_SCHEMA)


@dataclass
class Made:
    root: str
    entry: SectionEntry
    sentences: list[pa.Table]

    @property
    def uri(self):
        return storage.join(self.root, self.entry.file)


@pytest.fixture
def make(tmp_path):
    def make(root=str(tmp_path / "table"), sentences=None, section_id="S1", measured=True):
        if sentences is None:
            sentences = [sentence(first, num, measured=measured) for first, num in ((0, 9), (9, 8), (17, 8))]
        local = tmp_path / "scratch.parquet"
        written = write_section(local, sentences)
        storage.upload(local, storage.join(root, "tiles/S1.parquet"))
        entry = SectionEntry(
            section_id=section_id,
            patient_id="P",
            site="",
            file="tiles/S1.parquet",
            size_bytes=written.size_bytes,
            sha256=written.sha256,
            footer_offset=written.footer_offset,
            row_groups=written.row_groups,
            num_spots=sum(group.num_rows for group in written.row_groups),
            measured=measured,
            max_array=24,
            source_mpp=0.5,
            width_px=1000,
            height_px=1000,
            fingerprint="x-y",
            rejects_file="rejects/S1.parquet",
            rejected={},
            num_labelled=0,
            thumbnail_file="",
            thumbnail_scale=1.0,
        )
        write_manifest(root, entry)
        table._read_footer.cache_clear()
        return Made(root, entry, sentences)

    return make


def write_manifest(root, entry):
    genes = pa.table({name: [f"{name}{i}" for i in range(NUM_GENES)] for name in GENE_SCHEMA.names}, schema=GENE_SCHEMA)
    buffer = pa.BufferOutputStream()
    pq.write_table(genes, buffer)
    manifest = Manifest(
        tile_size_px=16,
        mpp=0.5,
        encoding="jpeg",
        jpeg_quality=90,
        sentence_length=16,
        genes_file="genes.parquet",
        genes_sha256="",
        num_genes=NUM_GENES,
        sections=(entry,),
    )
    storage.write(storage.join(root, "genes.parquet"), buffer.getvalue().to_pybytes())
    storage.write(storage.join(root, MANIFEST), manifest.encode())


@pytest.fixture
def gets(s3):
    """The byte ranges of all GETs so far."""
    ranges = []

    def note(request, **_):
        ranges.append(request.headers.get("Range", b"").decode())

    events = object_store.client().meta.events
    events.register("before-send.s3.GetObject", note)
    yield ranges
    events.unregister("before-send.s3.GetObject", note)


def test_sentences_come_back_as_they_were_written(make):
    made = make()
    for index, expected in enumerate(made.sentences):
        found = read_sentence(made.root, made.entry, index)
        assert found.schema == TILE_SCHEMA
        assert found.equals(expected)
    assert decode_tile(found["image"][0].as_py()).shape == (16, 16, 3)


def test_row_groups_are_sentences_without_gaps(make):
    made = make()
    assert [group.num_rows for group in made.entry.row_groups] == [9, 8, 8]
    end = 4
    for group in made.entry.row_groups:
        assert group.offset == end
        end += group.length
    assert end == made.entry.footer_offset
    metadata = pq.read_metadata(made.uri)
    chunks = [metadata.row_group(1).column(i) for i in range(metadata.num_columns)]
    assert {chunk.compression for chunk in chunks} == {"ZSTD"}
    by_name = {chunk.path_in_schema: chunk for chunk in chunks}
    assert by_name["image"].dictionary_page_offset is None
    assert by_name["count.list.element"].dictionary_page_offset is not None
    assert metadata.metadata is None, "an embedded Arrow schema would be parsed by readers"


def test_any_parquet_reader_reads_the_file(make):
    made = make()
    assert pq.read_table(made.uri).equals(pa.concat_tables(made.sentences))


def test_a_sentence_costs_one_range_request(make, s3, gets):
    made = make(root=f"{s3}/table")
    for index in (2, 0, 1, 2):
        read_sentence(made.root, made.entry, index)
    footer, *sentences = gets
    groups = made.entry.row_groups
    assert footer == f"bytes={made.entry.footer_offset}-{made.entry.size_bytes - 1}"
    assert sentences == [
        f"bytes={group.offset}-{group.offset + group.length - 1}" for group in (groups[i] for i in (2, 0, 1, 2))
    ]


def test_columns_come_without_the_images_bytes(make, s3, gets):
    big = [sentence(first, 8) for first in (0, 8)]
    made = make(root=f"{s3}/table", sentences=big)
    names = ["spot_id", "x_um", "gene_index", "count"]
    found = read_columns(made.root, made.entry, names)
    assert found.equals(pa.concat_tables(big).select(names))
    spans = [tuple(map(int, text.removeprefix("bytes=").split("-"))) for text in gets[1:]]
    image = pq.read_metadata(pa.BufferReader(storage.read(made.uri))).row_group(0).column(9)
    assert image.path_in_schema == "image"
    assert all(last < image.data_page_offset or image.data_page_offset < first for first, last in spans)
    assert (
        sum(last - first + 1 for first, last in spans) < made.entry.footer_offset - 2 * image.total_compressed_size + 8
    )


def test_counts_of_a_section(make):
    made = make()
    expected = np.zeros((25, NUM_GENES), np.int32)
    for row, spot in enumerate(pa.concat_tables(made.sentences).to_pylist()):
        expected[row, spot["gene_index"]] = spot["count"]
    counts = read_counts(made.root, made.entry)
    assert counts.dtype == np.int32
    np.testing.assert_array_equal(counts.toarray(), expected)
    assert read_counts(made.root, made.entry, num_genes=60).shape == (25, 60)
    with pytest.raises(TableError, match="gene indices do not fit"):
        read_counts(made.root, made.entry, num_genes=10)


def test_slides_have_no_counts(make):
    made = make(measured=False)
    assert read_sentence(made.root, made.entry, 0)["gene_index"].null_count == 9
    with pytest.raises(TableError, match=r"section S1 .* has no counts"):
        read_counts(made.root, made.entry)


def test_empty_section(make):
    made = make(sentences=[])
    assert made.entry.row_groups == ()
    assert read_columns(made.root, made.entry, ["spot_id"]).num_rows == 0
    assert read_counts(made.root, made.entry).shape == (0, NUM_GENES)


def test_spots_without_any_count(make):
    empty = sentence(0, 3).drop(["gene_index", "count"])
    lists = pa.array([[], [4], []], pa.list_(pa.int32()))
    made = make(sentences=[empty.append_column("gene_index", lists).append_column("count", lists).cast(TILE_SCHEMA)])
    assert read_counts(made.root, made.entry).toarray().sum(axis=1).tolist() == [0, 4, 0]


# ---------------------------------------------------------------- damage


def outcome(made):
    try:
        return read_sentence(made.root, made.entry, 0).equals(made.sentences[0])
    except TableError as error:
        return str(error)


def test_flipped_bytes_are_found_or_harmless(make):
    made = make(sentences=[sentence(0, 3)])
    whole = storage.read(made.uri)
    outcomes = []
    for place in range(made.entry.row_groups[0].offset, made.entry.footer_offset, 23):
        storage.write(made.uri, whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
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
    place = TILE_SCHEMA.get_field_index("image")
    made = make(sentences=[wrong.set_column(place, TILE_SCHEMA.field("image"), pa.array(images, pa.binary()))])
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
    with pytest.raises(TableError, match=r"section S2.* holds rows of section \['S1'\]"):
        read_sentence(made.root, made.entry, 0)
    with pytest.raises(TableError, match=r"section S2.* holds rows of section \['S1'\]"):
        read_columns(made.root, made.entry, ["x_px"])


def replaced(made, data):
    """The same entry over other Parquet bytes, with a fitting place for each row group."""
    storage.write(made.uri, data)
    metadata = pq.read_metadata(pa.BufferReader(data))
    footer_offset = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    group = RowGroup(offset=4, length=footer_offset - 4, num_rows=metadata.num_rows)
    table._read_footer.cache_clear()
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
    with pytest.raises(TableError, match="other types or names"):
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
