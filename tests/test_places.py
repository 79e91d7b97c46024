"""Positions, array, scale factors and image of a section in each format: read right, or refused by name."""

import numpy as np
import pytest
from PIL import Image
from placed_section import FORMATS, HEIGHT, MPP, WIDTH, Placed, shrunk, write_section, wrong_tiles
from prepared_here import prepare_here

from ingest.header import read_header
from ingest.readers import READERS
from mclstexp.data.sheet import read_sheet
from mclstexp.errors import SourceError

odd = pytest.mark.odd
every_format = pytest.mark.parametrize("format_", FORMATS)
with_scale = pytest.mark.parametrize("format_", ["visium", "h5ad"])


@pytest.fixture
def section():
    return Placed()


def header(sheet):
    return read_header(read_sheet(sheet, READERS)[0])


def refused(sheet):
    """Returns why a section is refused before it is cut."""
    with pytest.raises(SourceError) as caught:
        header(sheet)
    return str(caught.value)


def refused_at_cutting(sheet, tmp_path, **settings):
    """Returns why a section is refused that had nothing wrong in its header."""
    header(sheet)
    with pytest.raises(SourceError) as caught:
        prepare_here(sheet, tmp_path / "out", **settings)
    return str(caught.value)


def require_right(sheet, section, tmp_path, mpp=MPP, rejected=()):
    """Checks that each spot has the tile of its own place, at the right resolution."""
    prepared = prepare_here(sheet, tmp_path / "out")
    entry = prepared.entries["S1"]
    assert entry.source_mpp == pytest.approx(mpp, rel=1e-3)
    assert (entry.num_spots, entry.rejected) == (80 - sum(dict(rejected).values()), dict(rejected))
    assert wrong_tiles(prepared, section) == []
    spot = prepared.spots("S1")
    x_um = {name: row["x_um"] / row["x_px"] for name, row in spot.items()}
    assert list(x_um.values()) == pytest.approx([mpp] * len(x_um), rel=1e-3)


# ---------------------------------------------------------------- resolution


@every_format
@pytest.mark.parametrize("mpp", [MPP, MPP * 1.04, ""])
def test_a_section_with_an_array_needs_no_mpp(tmp_path, section, format_, mpp):
    sheet = write_section(tmp_path, section, format_, mpp=mpp)
    found = header(sheet)
    assert (found.mpp_source, found.remark) == ("sheet" if mpp else "array of spots", "")
    require_right(sheet, section, tmp_path, mpp or MPP)


@odd
@with_scale
@pytest.mark.parametrize("mpp", [0.5, 1.0, 2.2, 10.0])
def test_an_mpp_that_contradicts_the_array_is_refused(tmp_path, section, format_, mpp):
    text = refused(write_section(tmp_path, section, format_, mpp=mpp))
    assert f"section S1: mpp is {mpp:g} in the sheet and 2 in the array of spots" in text
    assert "neighbours are 50 px and 100 um apart" in text
    assert "the spots' diameter confirms the array: fix mpp, or give the image that belongs to it" in text


@odd
@pytest.mark.parametrize("format_", ["h5ad", "legacy_st"])
@pytest.mark.parametrize("mpp", [0.5, 1.0, 2.2, 10.0])
def test_a_hexagon_without_scale_factors_is_probably_visiums(tmp_path, section, format_, mpp):
    """If the other pitch would have the positions on the image, they may be in other pixels; else it is remarked."""
    section.scale = {}
    sheet = write_section(tmp_path, section, format_, mpp=mpp)
    if mpp > MPP:
        text = refused(sheet)
        assert f"mpp is {mpp:g} in the sheet and 2 in the array of spots" in text
        assert f"fix mpp, or multiply the positions by {2 / mpp:.4g} if they are in other pixels" in text
    else:
        assert header(sheet).remark.startswith(
            f"spots are {50 * mpp:g} um apart by the mpp of the sheet; usual are 100"
        )
        require_right(sheet, section, tmp_path, mpp)


@odd
@with_scale
def test_an_image_of_another_resolution_is_refused(tmp_path, section, format_):
    Image.fromarray(section.pixels()).save(tmp_path / "scan.tif", dpi=(25400 / 0.5, 25400 / 0.5))
    sheet = write_section(tmp_path, section, format_, mpp="", image="scan.tif")
    assert "mpp is 0.5 in the image and 2 in the array of spots" in refused(sheet)


@odd
@with_scale
@pytest.mark.parametrize("mpp", [MPP, ""])
@pytest.mark.parametrize("scale", [0.5, 0.17])
def test_positions_in_pixels_of_a_downscaled_picture_are_refused(tmp_path, section, format_, mpp, scale):
    section.xy_px *= scale
    section.scale["tissue_hires_scalef"] = scale
    text = refused(write_section(tmp_path, section, format_, mpp=mpp))
    picture = "tissue_hires_image.png" if format_ == "visium" else "uns['spatial']['L']['images']['hires']"
    assert f"multiply the positions by {1 / scale:.6g}, since they are in pixels of {picture} (factor {scale})" in text
    if mpp:
        assert f"mpp is 2 in the sheet and {2 / scale:.4g} in the array of spots" in text
    else:
        assert f"its spots are 100 um apart at {2 / scale:.4g} um/px but {65 / scale:.4g} um wide" in text


@odd
@every_format
@pytest.mark.parametrize("factor", [0.3, 0.75, 1.2])
def test_positions_in_other_pixels_are_refused_with_the_factor_that_fits(tmp_path, section, format_, factor):
    section.xy_px *= factor
    section.scale = {"spot_diameter_fullres": 65.0 / MPP * factor}  # of the same other image
    text = refused(write_section(tmp_path, section, format_))
    assert f"mpp is 2 in the sheet and {2 / factor:.4g} in the array of spots" in text
    if format_ == "legacy_st":
        assert f"multiply the positions by {1 / factor:.4g} if they are in other pixels" in text


@odd
@every_format
@pytest.mark.parametrize("spot_diameter", [True, False])
def test_positions_in_micrometres_are_refused(tmp_path, section, format_, spot_diameter):
    section.xy_px *= MPP
    if not spot_diameter:
        section.scale = {} if format_ == "h5ad" else section.scale | {"spot_diameter_fullres": 13.0}
    text = refused(write_section(tmp_path, section, format_))
    assert "mpp is 2 in the sheet and 1 in the array of spots (neighbours are 100 px and 100 um apart)" in text
    assert "divide the positions by mpp (2), since they are in micrometres" in text


# ---------------------------------------------------------------- square arrays


@pytest.mark.parametrize("format_", ["h5ad", "legacy_st"])
@pytest.mark.parametrize(("pitch_um", "cell"), [(200, ""), (150, ""), (208, ""), (100, 100), (50, 50), (127, 127)])
def test_square_arrays_of_a_usual_or_a_given_pitch(tmp_path, format_, pitch_um, cell):
    section = Placed(square=True, pitch_px=50)
    section.scale = {}
    mpp = pitch_um / 50
    sheet = write_section(tmp_path, section, format_, mpp=mpp, pitch_um=cell)
    assert header(sheet).remark == ""
    require_right(sheet, section, tmp_path, mpp)


@pytest.mark.parametrize("format_", ["h5ad", "legacy_st"])
def test_a_given_pitch_replaces_the_mpp(tmp_path, format_):
    section = Placed(square=True, pitch_px=50)
    section.scale = {}
    sheet = write_section(tmp_path, section, format_, mpp="", pitch_um=100)
    require_right(sheet, section, tmp_path)


@odd
@pytest.mark.parametrize("format_", ["h5ad", "legacy_st"])
@pytest.mark.parametrize("pitch_um", [85, 100, 300, 390])
def test_an_unusual_pitch_is_remarked(tmp_path, format_, pitch_um):
    section = Placed(square=True, pitch_px=50)
    section.scale = {}
    sheet = write_section(tmp_path, section, format_, mpp=pitch_um / 50)
    expected = f"spots are {pitch_um} um apart by the mpp of the sheet; usual are 200 or 150"
    assert header(sheet).remark.startswith(expected)
    plan = prepare_here(sheet, tmp_path / "out").plan
    assert f"resolution S1: {expected}" in plan.sources
    assert "pitch_um" in plan.sources


@odd
@pytest.mark.parametrize("format_", ["h5ad", "legacy_st"])
@pytest.mark.parametrize("mpp", [0.25, 0.5, 10.0, ""])
def test_an_mpp_that_no_square_array_has_is_refused(tmp_path, format_, mpp):
    section = Placed(square=True, pitch_px=50)
    section.scale = {}
    text = refused(write_section(tmp_path, section, format_, mpp=mpp))
    if mpp:
        assert f"mpp is {mpp:g} in the sheet and 4 or 3 in the array of spots" in text
        assert "neighbours are 50 px and 200 or 150 um apart" in text
        assert f"or confirm that spots are {mpp * 50:.3g} um apart by pitch_um" in text
    else:
        assert "no resolution" in text
        assert "or pitch_um, the distance of neighbouring spots" in text


@odd
@pytest.mark.parametrize("format_", ["h5ad", "legacy_st"])
def test_a_square_array_in_micrometres_or_of_another_pitch_is_refused(tmp_path, format_):
    section = Placed(square=True, pitch_px=50)
    section.scale, section.xy_px = {}, section.xy_px * 4
    text = refused(write_section(tmp_path, section, format_, mpp=4))
    assert "divide the positions by mpp (4), since they are in micrometres" in text
    section.xy_px = section.true_xy_px
    other = tmp_path / "other"
    other.mkdir()
    text = refused(write_section(other, section, format_, mpp=4, pitch_um=100))
    assert "mpp is 4 in the sheet and 2 in the array of spots" in text


# ---------------------------------------------------------------- mixed-up spots


@odd
@every_format
@pytest.mark.parametrize("square", [True, False])
def test_mixed_up_spots_are_refused(tmp_path, format_, square):
    section = Placed(square)
    section.xy_px = np.random.default_rng(0).permutation(section.xy_px)
    text = refused(write_section(tmp_path, section, format_, mpp=4 if square else MPP))
    assert "of 80 spots are not where their array positions put them: positions are mixed up" in text


@odd
@pytest.mark.parametrize(
    ("format_", "fault"),
    [
        ("visium", "40 of 80 spots have the array position of another"),
        ("h5ad", "array positions or barcodes of its 80 spots repeat"),
    ],
)
@pytest.mark.parametrize("array", ["twice", "mostly zero"])
def test_spots_with_the_array_position_of_another_are_refused(tmp_path, section, format_, fault, array):
    if array == "twice":
        section.array_xy[40:], section.xy_px[40:] = section.array_xy[:40], section.xy_px[:40]
    else:
        section.array_xy[40:] = section.array_xy[0]
    assert fault in refused(write_section(tmp_path, section, format_))


@odd
@every_format
def test_pixel_positions_on_a_line_are_refused(tmp_path, section, format_):
    section.xy_px[:, 1] = 60.0
    text = refused(write_section(tmp_path, section, format_))
    assert "the pixel positions of its 80 spots are on a line, and their array is not" in text


@odd
@every_format
def test_a_few_spots_at_the_place_of_another_are_rejected_by_name(tmp_path, section, format_):
    section.xy_px[[3, 40, 77]] = section.xy_px[[40, 77, 3]]
    sheet = write_section(tmp_path, section, format_)
    require_right(sheet, section, tmp_path, rejected={"off_array": 3})


# ---------------------------------------------------------------- mirrored, exchanged, turned


@odd
@every_format
@pytest.mark.parametrize("how", ["exchanged", "left to right", "upside down"])
@pytest.mark.parametrize("square", [True, False])
def test_positions_that_are_mirrored_are_refused(tmp_path, format_, how, square):
    section = Placed(square)
    x, y = section.xy_px.T
    moved = {"exchanged": (y, x), "left to right": (WIDTH - x, y), "upside down": (x, HEIGHT - y)}[how]
    section.xy_px = np.stack(moved, axis=1)
    section.scale = {name: value for name, value in section.scale.items() if not square or format_ == "visium"}
    text = refused(write_section(tmp_path, section, format_, mpp=4 if square else MPP))
    words = "exchange x and y of the positions" if how == "exchanged" else f"mirror the positions {how}"
    assert f"its positions show the array as in a mirror: {words} (80 of 80 spots are on tissue then" in text
    assert "set the sheet's column mirrored to true" in text


@odd
@every_format
@pytest.mark.parametrize("positions_too", [True, False])
def test_rows_and_columns_of_the_array_that_are_exchanged_are_refused(tmp_path, section, format_, positions_too):
    section.array_xy = section.array_xy[:, ::-1]
    if positions_too:
        section.xy_px = section.xy_px[:, ::-1]
    text = refused(write_section(tmp_path, section, format_))
    assert "array_row and array_col are exchanged, as the steps of the hexagon show: exchange them" in text
    assert ("exchange them, and x and y of the positions" in text) == positions_too


@odd
@every_format
def test_an_image_that_really_is_mirrored_needs_the_users_word(tmp_path, section, format_):
    section.xy_px = section.true_xy_px = section.xy_px * [-1, 1] + [WIDTH - 100, 0]
    sheet = write_section(tmp_path, section, format_)
    assert "set the sheet's column mirrored to true" in refused(sheet)
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    require_right(write_section(allowed, section, format_, mirrored="true"), section, allowed)


@odd
@every_format
def test_a_section_that_is_not_mirrored_as_the_sheet_says_is_refused(tmp_path, section, format_):
    text = refused(write_section(tmp_path, section, format_, mirrored="true"))
    assert "the sheet says mirrored, but its positions show the array as it is" in text


@odd
@every_format
@pytest.mark.parametrize(
    ("words", "turned"),
    [
        ("mirror the image left to right", lambda pixels: pixels[:, ::-1]),
        ("mirror the image upside down", lambda pixels: pixels[::-1]),
        ("turn the image by 180 degrees", lambda pixels: pixels[::-1, ::-1]),
        ("turn the image to the left", lambda pixels: np.rot90(pixels, -1)),
        ("turn the image to the right", lambda pixels: np.rot90(pixels)),
    ],
)
def test_an_image_that_was_turned_after_the_measurement_is_refused(tmp_path, section, format_, words, turned):
    pixels = np.ascontiguousarray(turned(section.pixels()))
    text = refused_at_cutting(write_section(tmp_path, section, format_, pixels=pixels), tmp_path)
    assert f"of 80 spots are on tissue, but 80 if you {words}: do so (" in text


def without_array(section):
    section.array_xy = np.full((80, 2), np.nan)
    section.scale = {}
    return section


@odd
@pytest.mark.parametrize(
    ("words", "move"),
    [
        ("exchange x and y of the positions", lambda x, y: (y, x)),
        ("mirror the image or the positions left to right", lambda x, y: (WIDTH - x, y)),
        ("mirror the image or the positions upside down", lambda x, y: (x, HEIGHT - y)),
        ("turn the image by 180 degrees", lambda x, y: (WIDTH - x, HEIGHT - y)),
    ],
)
def test_without_an_array_the_tissue_tells(tmp_path, section, words, move):
    section.xy_px = np.stack(move(*section.xy_px.T), axis=1)
    text = refused_at_cutting(write_section(tmp_path, without_array(section), "h5ad"), tmp_path)
    assert f"80 if you {words}" in text
    prepared = prepare_here(tmp_path / "samples.csv", tmp_path / "forced", **{"tiles.min_tissue": 0.0})
    assert prepared.entries["S1"].num_spots > 0, "the user's word counts"


@odd
@pytest.mark.parametrize("factor", [0.5, 0.85, 1.2])
def test_without_an_array_a_given_pitch_is_compared(tmp_path, section, factor):
    section.xy_px = section.xy_px * factor
    text = refused(write_section(tmp_path, without_array(section), "h5ad", pitch_um=100))
    assert f"its spots are {100 * factor:.4g} um apart at 2 um/px but 100 um by the sheet's column pitch_um" in text
    assert f"or multiply positions in other pixels by {1 / factor:.4g}" in text


@odd
@pytest.mark.parametrize("scale", [0.5, 0.17])
def test_without_an_array_the_spots_diameter_tells_downscaled_pixels(tmp_path, section, scale):
    section.xy_px, factors = section.xy_px * scale, {"spot_diameter_fullres": 32.5, "tissue_hires_scalef": scale}
    section = without_array(section)
    section.scale = factors
    text = refused(write_section(tmp_path, section, "h5ad"))
    assert f"its spots are {100 * scale:.3g} um apart at 2 um/px but 65 um wide" in text
    assert f"multiply the positions by {1 / scale:.6g}, since they are in pixels of uns['spatial']" in text


def test_cells_in_no_pattern_may_be_closer_than_a_spots_diameter(tmp_path, section):
    """Tools for single cells write the scale factors of Visium all the same."""
    section = without_array(section)
    section.xy_px = np.random.default_rng(0).uniform(60, 380, (80, 2))
    section.scale = {"spot_diameter_fullres": 89.0, "tissue_hires_scalef": 1.0}
    assert header(write_section(tmp_path, section, "h5ad")).mpp == MPP


def test_without_an_array_a_section_that_is_right_passes(tmp_path, section):
    require_right(write_section(tmp_path, without_array(section), "h5ad"), section, tmp_path)


@odd
@every_format
def test_positions_off_the_tissue_are_refused(tmp_path, section, format_):
    pixels = np.full((HEIGHT, WIDTH, 3), 245, np.uint8)
    pixels[190:310, 340:460] = (190, 90, 160)
    text = refused_at_cutting(write_section(tmp_path, section, format_, pixels=pixels), tmp_path)
    assert "of 80 spots are on tissue: do the positions belong to another image?" in text
    assert "tiles.min_tissue (now 0.1) to 0" in text


# ---------------------------------------------------------------- the image


@with_scale
@pytest.mark.parametrize("scale", [0.5, 0.123])
def test_a_picture_of_the_same_image_is_accepted(tmp_path, section, format_, scale):
    section.scale["tissue_hires_scalef"] = scale
    hires = shrunk(section.pixels(), scale)
    require_right(write_section(tmp_path, section, format_, hires=hires), section, tmp_path)


@odd
@with_scale
@pytest.mark.parametrize("mpp", [MPP, MPP / 0.5, ""])
def test_the_hires_picture_as_the_image_is_refused_with_both_sizes(tmp_path, section, format_, mpp):
    hires = shrunk(section.pixels(), 0.5)
    text = refused(write_section(tmp_path, section, format_, pixels=hires, hires=hires, mpp=mpp))
    assert "its image is 400 x 250 px, like " in text
    assert "but positions are in pixels of the full image of 800 x 500 px: give that one" in text


@odd
@with_scale
@pytest.mark.parametrize(("width", "height"), [(800, 400), (1600, 1000), (760, 500), (500, 800)])
def test_an_image_of_another_size_than_the_picture_tells_is_refused(tmp_path, section, format_, width, height):
    image = Image.fromarray(section.pixels()).resize((width, height))
    text = refused(write_section(tmp_path, section, format_, pixels=image, hires=shrunk(section.pixels(), 0.5)))
    assert f"its image is {width:,} x {height:,} px" in text
    assert "(400 x 250 px, factor 0.5) belongs to one of 800 x 500 px" in text
    assert ("turn it back" in text) == (width < height)


@odd
@with_scale
def test_a_downscaled_image_without_its_picture_is_refused(tmp_path, section, format_):
    text = refused(write_section(tmp_path, section, format_, pixels=shrunk(section.pixels(), 0.5), mpp=MPP / 0.5))
    assert "mpp is 4 in the sheet and 2 in the array of spots" in text
    other = tmp_path / "other"
    other.mkdir()
    text = refused_at_cutting(write_section(other, section, format_, pixels=shrunk(section.pixels(), 0.5)), other)
    assert "spots are on its image of 400 x 250 px" in text
    assert "(factor 0.5); give the full-resolution image" in text


@odd
@with_scale
def test_positions_beyond_the_image_that_a_picture_tells_are_refused(tmp_path, section, format_):
    section.xy_px[:, 0] += 3000
    text = refused(write_section(tmp_path, section, format_, hires=shrunk(section.pixels(), 0.5)))
    assert "positions reach to 3,535 x 364 px, but by " in text
    assert "the full-resolution image is 800 x 500 px: give positions in its pixels" in text


@odd
@every_format
def test_an_image_that_is_too_small_is_refused_with_the_extent_of_the_positions(tmp_path, section, format_):
    section.scale = {"spot_diameter_fullres": 65 / MPP}
    image = section.pixels()[:200, :300]
    text = refused_at_cutting(write_section(tmp_path, section, format_, pixels=image), tmp_path)
    assert "only 20 of 80 spots are on its image of 300 x 200 px" in text
    assert "positions reach to 535 x 364 px: give positions in pixels of this very image" in text
