"""The real sections stay as they were: digests of tiles and counts, pinned with the code of November 2026 (ff39caa).

Tiles of 64 px, to be quick; what they show is compared after decoding, so no encoder matters. Another version of the
libraries that decode JPEG may change them: then pin them again with that version and the old code.
"""

import hashlib
import os
from pathlib import Path

import pytest
from prepared_here import prepare_here, tile
from prepared_tables import write_sheet

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("MCLSTEXP_DATA" not in os.environ, reason="MCLSTEXP_DATA names no folder of real data"),
]
DATA = Path(os.environ.get("MCLSTEXP_DATA", ""))
SIZE = {"tiles.size_px": 64}
MEASURED = {
    "B4": [277, {"no_counts": 1, "no_tissue": 6}, "975896c9b89603d2", "3c0701fc57ac9ad6"],
    "C2": [187, {}, "3d47a33fe348a142", "b768cacb55472196"],
    "C3": [180, {"no_counts": 2}, "41c636b363ffb9fd", "459763cde6467c5e"],
    "C4": [184, {"no_counts": 3}, "71d429360ea8bc64", "0313fab97226b0f3"],
    "C5": [181, {"no_counts": 2}, "dceb119702f8ad78", "870cc404f81d649d"],
    "A1": [346, {"no_counts": 2}, "77d7777d3fc2cf35", "f9c28c13151c39a0"],
    "MOB1": [379, {"no_position": 11, "not_selected": 1689}, "eda3d8775979cb0d", "c7bfb4c36447edb9"],
}
SLIDES = {
    "C5_aperio": [492, {"no_tissue": 2105}, "544a0a8a60e1efc4"],
    "cmu_small_region": [51, {"no_tissue": 37}, "0f60c224f186179b"],
    "tcga-cr-7395-01a-01-ts1": [169, {"no_tissue": 52}, "3a231b2a251ed5e5"],
}
BY_OPENSLIDE = SLIDES | {
    "C5_aperio": [492, {"no_tissue": 2105}, "ef8497e04dbaaaef"],
    "tcga-cr-7395-01a-01-ts1": [145, {"missing_pixels": 24, "no_tissue": 52}, "a606406db899db23"],
}
"""As it shows them, with its seams counted as missing pixels; pinned with the code that only read through it."""


def digests(prepared, section_id):
    """Returns num_spots, the rejected by reason, and digests of tiles and places, and of counts, in order of spots."""
    entry, spots = prepared.entries[section_id], prepared.spots(section_id)
    pixels, counts = hashlib.sha256(), hashlib.sha256()
    for name, spot in sorted(spots.items()):
        place = [name, spot["array_row"], spot["array_col"], spot["x_px"], spot["y_px"], spot["x_um"], spot["y_um"]]
        pixels.update(repr(place).encode() + tile(spot).tobytes())
        if entry.measured:
            counts.update(repr([name, sorted(prepared.counts(spot).items())]).encode())
    found = [entry.num_spots, entry.rejected, pixels.hexdigest()[:16]]
    return [*found, counts.hexdigest()[:16]] if entry.measured else found


def all_digests(sheet, out, **settings):
    prepared = prepare_here(sheet, out, **SIZE, **settings)
    return {name: digests(prepared, name) for name in prepared.entries}


def test_full_resolution(tmp_path):
    found = all_digests(DATA / "samples.csv", tmp_path / "out")
    assert found == {name: MEASURED[name] for name in ("C2", "C3", "C4", "C5", "B4")}


def test_low_resolution(tmp_path):
    assert all_digests(DATA / "samples_lowres.csv", tmp_path / "out") == {"A1": MEASURED["A1"]}


def test_olfactory_bulb(tmp_path):
    """Its array is used in every second position, 100 um along each axis."""
    files = {"image": "MOB1.jpg", "expression": "MOB1.tsv.gz", "positions": "MOB1_selection.tsv"}
    row = {"section_id": "MOB1", "patient_id": "M", "format": "legacy_st", "mpp": 4.1}
    row |= {column: str(DATA / "mob" / name) for column, name in files.items()}
    assert all_digests(write_sheet(tmp_path, [row]), tmp_path / "out") == {"MOB1": MEASURED["MOB1"]}


@pytest.mark.parametrize("by_openslide", [False, True])
def test_slides(tmp_path, monkeypatch, by_openslide):
    """Tiles of 2 um/px: resampled from levels of the pyramids, and from a single level."""
    if by_openslide:
        monkeypatch.setattr("mclstexp.slides.tiff.jpeg_levels", lambda *_: None)
        monkeypatch.setattr("mclstexp.slides.slide._MIN_ALPHA", 255)
    mpp = {"cmu_small_region": "", "tcga-cr-7395-01a-01-ts1": 0.5, "C5_aperio": ""}
    rows = [
        {"section_id": name, "patient_id": name, "format": "slide", "image": DATA / "slides" / f"{name}.svs", "mpp": um}
        for name, um in mpp.items()
    ]
    found = all_digests(write_sheet(tmp_path, rows), tmp_path / "out", **{"tiles.mpp": 2.0})
    assert found == (BY_OPENSLIDE if by_openslide else SLIDES)
