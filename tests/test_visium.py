"""Visium folders of every kind: what is joined and rejected; their resolution, images and tiles."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from section_reading import read
from visium_folders import (
    GENE_ROWS,
    GENES,
    HD_MPP,
    LAYOUTS,
    MPP,
    SECTION,
    hd,
    hd_bin_folder,
    positions,
    section,
    v1_h5,
    v1_mtx,
    write_mtx,
    write_spatial,
)

from ingest.header import read_header
from ingest.layout import judged_resolution
from ingest.plan import source_digests
from ingest.prepare import dry_run
from ingest.readers import READERS
from ingest.readers.files import read_preview
from ingest.section import Recipe, cut_section
from mclstexp import storage
from mclstexp.config import Config, override
from mclstexp.data.sheet import read_sheet
from mclstexp.data.table import read_columns
from mclstexp.errors import SourceError


@pytest.fixture
def mtx(tmp_path):
    return v1_mtx(tmp_path / "S1")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    row = section(tmp_path, layout(tmp_path / "S1"))
    found = read(row, tmp_path)
    assert list(found.genes) == GENES
    at = {name: i for i, name in enumerate(found.spots.spot_id)}
    assert sorted(at) == sorted(SECTION.barcode[i] for i in SECTION.expected)
    order = [at[SECTION.barcode[i]] for i in SECTION.expected]
    assert found.spots.counts.dtype == np.int32
    expected = SECTION.counts[np.ix_(SECTION.expected, GENE_ROWS)]
    np.testing.assert_array_equal(found.spots.counts.toarray()[order], expected)
    np.testing.assert_allclose(found.spots.x_px[order], SECTION.x[SECTION.expected], rtol=1e-12)
    np.testing.assert_allclose(found.spots.y_px[order], SECTION.y[SECTION.expected], rtol=1e-12)
    np.testing.assert_array_equal(found.spots.array_row[order], SECTION.row[SECTION.expected])
    np.testing.assert_array_equal(found.spots.array_col[order], SECTION.column[SECTION.expected])
    assert judged_resolution(row, found.layout, None).mpp == pytest.approx(
        HD_MPP if layout in (hd, hd_bin_folder) else MPP, rel=1e-6
    )
    preview = read_preview(row, str(tmp_path))
    assert (list(preview.genes), preview.other_features) == (GENES, {"Antibody Capture": 1})
    assert judged_resolution(row, preview.layout, None) == judged_resolution(row, found.layout, None)


def test_every_rejected_spot_is_listed_with_the_reason(tmp_path, mtx):
    table = positions().drop(index=30)
    table.to_csv(mtx / "spatial/tissue_positions_list.csv", index=False, header=False)
    found = read(section(tmp_path, mtx), tmp_path)
    reasons = {reject.spot_id: reject.reason for reject in found.rejected}
    names = {5: "not_selected", 7: "no_counts", 9: "not_selected", 20: "no_counts", 30: "no_position"}
    assert reasons == {SECTION.barcode[i]: reason for i, reason in names.items()}
    rejected = {reject.spot_id: (reject.x_px, reject.y_px) for reject in found.rejected}
    assert rejected[SECTION.barcode[5]] == pytest.approx((SECTION.x[5], SECTION.y[5]))
    assert np.isnan(rejected[SECTION.barcode[30]][0])


@pytest.mark.odd
@pytest.mark.parametrize(("columns", "features"), [(2, "genes.tsv"), (1, "features.tsv.gz")])
def test_deposited_matrices_without_kinds_or_ids(tmp_path, columns, features):
    folder = tmp_path / "CID4290"
    write_mtx(folder / "filtered_count_matrix", features, columns, suffix=".gz" if columns == 1 else "")
    write_spatial(folder / "spatial", "tissue_positions_list.csv")
    row = section(tmp_path, folder)
    found = read(row, tmp_path)
    spot = list(found.spots.spot_id).index(SECTION.barcode[0])
    preview = read_preview(row, str(tmp_path))
    assert preview.genes == found.genes
    if columns == 2:  # the antibody is known by its id
        assert list(found.genes) == GENES
        assert preview.other_features == {"Antibody Capture": 1}
        assert found.spots.counts.toarray()[spot].tolist() == SECTION.counts[0, GENE_ROWS].tolist()
    else:
        assert [gene.gene_id for gene in found.genes] == ["GNAS", "FASN", "CD3", "ENSG00000999999", "GFP"]
        assert found.spots.counts.toarray()[spot].tolist() == SECTION.counts[0].tolist()


def test_a_header_is_recognised_by_its_content_whatever_the_files_name(tmp_path, mtx):
    positions().to_csv(mtx / "spatial/tissue_positions_list.csv", index=False)
    assert len(read(section(tmp_path, mtx), tmp_path).spots) == len(SECTION.expected)


def test_folders_in_object_storage(s3, tmp_path):
    for layout in (v1_h5, v1_mtx):
        local = layout(tmp_path / layout.__name__)
        for path in (path for path in local.rglob("*") if path.is_file()):
            storage.upload(path, f"{s3}/{layout.__name__}/{path.relative_to(local)}")
        found = read(section(tmp_path, f"{s3}/{layout.__name__}"), tmp_path)
        assert len(found.spots) == len(SECTION.expected)
    storage.write(f"{s3}/image.png", b"")
    header = "section_id,patient_id,image,format,expression\n"
    storage.write(f"{s3}/samples.csv", f"{header}S1,P1,image.png,visium,v1_h5/\n".encode())
    assert read_sheet(f"{s3}/samples.csv", READERS)[0].expression == f"{s3}/v1_h5"


# ---------------------------------------------------------------- resolution, images, tiles


def paint(path, colour=(190, 120, 170), background=(243, 243, 243), **options):
    """A slide with all spots on one stained rectangle."""
    image = np.full((2000, 2400, 3), background, np.uint8)
    image[200:1900, 100:2200] = colour
    tifffile.imwrite(path, image, photometric="rgb", tile=(256, 256), compression="deflate", **options)


def test_resolution_comes_from_sheet_image_or_array_and_the_source_is_stated(tmp_path, mtx):
    paint(tmp_path / "plain.tif")
    paint(tmp_path / "tagged.tif", resolution=(1e4 / 0.49, 1e4 / 0.49), resolutionunit="CENTIMETER")
    cases = [("plain.tif", 0.51, 0.51, "sheet"), ("tagged.tif", None, 0.49, "image")]
    for image, mpp, expected, source in [*cases, ("plain.tif", None, MPP, "array of spots")]:
        header = read_header(section(tmp_path, mtx, image=str(tmp_path / image), mpp=mpp))
        assert (header.mpp, header.mpp_source) == (pytest.approx(expected, rel=1e-3), source)
    with pytest.raises(SourceError, match=r"S1: mpp is 0\.25 in the sheet and 0\.5 in the array of spots"):
        read_header(section(tmp_path, mtx, image=str(tmp_path / "plain.tif"), mpp=0.25))


def test_scale_factors_of_another_image_are_refused(tmp_path, mtx):
    write_spatial(mtx / "spatial", "tissue_positions_list.csv", {"spot_diameter_fullres": 6.5})
    paint(tmp_path / "a.tif")
    with pytest.raises(SourceError, match=r"its spots are 100 um apart at 0\.5 um/px but 3\.25 um wide"):
        cut(section(tmp_path, mtx, image=str(tmp_path / "a.tif")), tmp_path / "table")


def cut(row, root):
    tiles = override(Config(), {"tiles.size_px": 64, "tiles.sentence_length": 16}).tiles
    return cut_section(row, Recipe(tiles, MPP), {gene[0]: i for i, gene in enumerate(GENES)}, str(root), "f")


def test_tiles_of_a_section_and_its_plan(tmp_path, mtx):
    paint(tmp_path / "a.tif")
    entry = cut(section(tmp_path, mtx, image=str(tmp_path / "a.tif")), tmp_path / "table")
    assert entry.num_spots == len(SECTION.expected)
    assert entry.rejected == dict(Counter(no_counts=2, not_selected=2))
    assert entry.source_mpp == pytest.approx(MPP, rel=1e-6)
    table = read_columns(str(tmp_path / "table"), entry, ["spot_id", "gene_index", "count"]).to_pandas()
    stored = table.set_index("spot_id").loc[SECTION.barcode[3]]
    expected = SECTION.counts[3, GENE_ROWS]
    assert stored["count"].tolist() == expected[expected > 0].tolist()
    sheet = tmp_path / "samples.csv"
    sheet.write_text("section_id,patient_id,image,format,expression\nS1,P1,a.tif,visium,S1\n")
    text = dry_run(str(sheet), str(tmp_path / "out"), Config())
    assert "S1: patient P1, visium, 0.5 um/px, exact crops" in text
    assert "resolution 0.5 um/px by the array of spots: 1 section(s) (S1)" in text
    assert "genes by   Ensembl ids (ENSG) and symbols, some by" in text
    assert "left out   1 features of Antibody Capture in 1 section(s) (S1)" in text


def test_greyscale_is_refused_by_name(tmp_path, mtx):
    grey = {"colour": (150, 150, 150)}
    paint(tmp_path / "grey.tif", **grey)
    with pytest.raises(SourceError, match="section S1: its image is greyscale"):
        cut(section(tmp_path, mtx, image=str(tmp_path / "grey.tif")), tmp_path / "table")
    row = section(tmp_path, None, image=str(tmp_path / "grey.tif"), format="slide", expression=None, mpp=MPP)
    with pytest.raises(SourceError, match="section S1: its image is greyscale"):
        cut(row, tmp_path / "table")
    Image.fromarray(np.full((64, 64), 100, np.uint8)).save(tmp_path / "grey.png")
    with pytest.raises(SourceError, match=r"grey.png: its colour mode is L \(greyscale\).* give the colour image"):
        read_header(section(tmp_path, mtx, image=str(tmp_path / "grey.png")))
    paint(tmp_path / "empty.tif", colour=(243, 243, 243))
    assert cut(row.model_copy(update={"image": str(tmp_path / "empty.tif")}), tmp_path / "table").num_spots == 0


def test_a_section_is_prepared_again_when_any_of_its_files_changes(tmp_path, mtx):
    row = section(tmp_path, mtx)
    seen = {source_digests([row], {})[0]["S1"]}
    for path in sorted(path for path in mtx.rglob("*") if path.is_file()):
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        seen.add(source_digests([row], {})[0]["S1"])
        path.write_bytes(before)
    assert len(seen) == 1 + 5
    moved = Path(mtx).rename(tmp_path / "elsewhere")
    assert source_digests([section(tmp_path, moved)], {})[0]["S1"] in seen
