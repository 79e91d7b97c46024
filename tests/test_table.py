"""Section files: one range request per sentence, and what is read is what was written."""

from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from one_section import NUM_GENES, make_one, sentence

from mclstexp import object_store, storage
from mclstexp.data.schema import TILE_SCHEMA
from mclstexp.data.table import read_columns, read_counts, read_sentence
from mclstexp.errors import TableError
from mclstexp.slides.codec import decode_tile


@pytest.fixture
def make(tmp_path):
    return partial(make_one, tmp_path)


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
