"""Maps: what the written pixels show."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from mclstexp.evaluation.domains import NO_DOMAIN
from mclstexp.figures import colour_limits
from mclstexp.report.biology import number_labels
from mclstexp.report.maps import draw_domain_maps, draw_gene_maps, draw_spots, match_labels
from mclstexp.report.result import Thumbnail

SIDE = 10
PITCH_PX = 100.0


def _xy_px() -> np.ndarray:
    rows, columns = np.indices((SIDE, SIDE)).reshape(2, -1)
    return np.stack([columns, rows], axis=1) * PITCH_PX + 500.0


def _thumbnail() -> Thumbnail:
    """A slide of 2,000 x 1,600 level-0 pixels, red above y = 800 and blue below."""
    rgb = np.zeros((80, 100, 3), np.uint8)
    rgb[:40, :, 0] = rgb[40:, :, 2] = 255
    return Thumbnail(rgb, scale=20.0)


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def _has(pixels: np.ndarray, colour: tuple[float, ...]) -> bool:
    return bool((np.abs(pixels - 255 * np.array(colour[:3])).max(axis=-1) <= 2).any())


def test_spots_and_slide_are_drawn_at_their_level_0_pixels() -> None:
    xy_px = _xy_px()
    figure = Figure(figsize=(6, 6))
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = np.arange(len(xy_px)) / len(xy_px)
    draw_spots(axes, xy_px, _thumbnail()).set(array=values, cmap="viridis", clim=(0, 1))
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba()).astype(int)

    def seen(x_px: float, y_px: float) -> np.ndarray:
        x, y = axes.transData.transform((x_px, y_px))
        return pixels[pixels.shape[0] - 1 - round(y), round(x), :3]

    for spot in (0, 7, 55, 99):
        np.testing.assert_allclose(
            seen(*xy_px[spot]), 255 * np.array(matplotlib.colormaps["viridis"](values[spot])[:3]), atol=2
        )
        np.testing.assert_array_equal(seen(*(xy_px[spot] + [0.35 * PITCH_PX, 0])), seen(*xy_px[spot]))
    red, blue = seen(550, 750), seen(550, 850)
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


def test_measured_and_predicted_share_one_colour_scale(tmp_path: Path) -> None:
    xy_px = _xy_px()
    measured = np.linspace(0, 4, len(xy_px))[:, None]
    top = matplotlib.colormaps["viridis"](1.0)
    left, right = {}, {}
    for name, predicted in {"half": measured / 2, "equal": measured}.items():
        path = tmp_path / f"{name}.png"
        draw_gene_maps(path, xy_px, ["GNAS"], {"measured": measured, "predicted": predicted}, "ln(1 + 1e4 share)", "")
        pixels = _pixels(path)[60:-10]
        left[name], right[name] = pixels[:, : 36 * 9], pixels[:, 37 * 9 : 67 * 9]
    assert _has(left["half"], top)
    assert not _has(right["half"], top)
    assert _has(right["equal"], top)


def test_each_gene_has_a_row_and_a_scale_of_its_own(tmp_path: Path) -> None:
    xy_px = _xy_px()
    measured = np.random.default_rng(0).random((len(xy_px), 3)) * [1, 10, 0]
    heights = []
    for count in (1, 3):
        path = tmp_path / f"{count}.png"
        maps = {"measured": measured[:, :count], "predicted": measured[:, :count]}
        draw_gene_maps(path, xy_px, ["GNAS", "FASN", "zero"][:count], maps, "unit", "", _thumbnail())
        heights.append(Image.open(path).height)
    assert heights[1] == 3 * heights[0]


def test_one_spot_does_not_take_the_whole_scale_unless_it_is_all_there_is() -> None:
    values = np.append(np.linspace(0, 3, 400), 50.0)
    assert colour_limits(values) == pytest.approx(tuple(np.percentile(values, [1, 99])))
    assert colour_limits(values)[1] < 3
    assert colour_limits(np.where(values == 50, 50.0, 0.0)) == (0, 50)
    assert colour_limits(np.zeros((10, 2))) == (0, 0)


def test_columns_that_are_not_the_genes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        draw_gene_maps(tmp_path / "a.png", _xy_px(), ["GNAS"], {"measured": np.zeros((SIDE**2, 2))}, "unit", "")


def test_domains_take_the_numbers_of_the_labels_that_they_cover() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, 2, NO_DOMAIN])
    domains = np.array([2, 2, 1, 1, 1, 0, NO_DOMAIN, 3])
    assert match_labels(labels, domains).tolist() == [0, 0, 1, 1, 1, 2, NO_DOMAIN, 6]


def test_the_most_spots_in_all_are_covered_not_each_domain_its_best() -> None:
    labels = np.repeat([0, 0, 1, 1], [6, 5, 1, 5])
    domains = np.repeat([0, 1, 0, 1], [6, 5, 1, 5])
    assert set(zip(domains.tolist(), match_labels(labels, domains).tolist(), strict=True)) == {(0, 0), (1, 1)}


def test_a_domain_never_takes_a_label_that_it_does_not_cover() -> None:
    labels, domains = np.array([0, 0, 0, 1]), np.array([0, 0, 1, NO_DOMAIN])
    assert match_labels(labels, domains).tolist() == [0, 0, 3, NO_DOMAIN]


def test_labels_are_numbered_by_name() -> None:
    names, numbers = number_labels(["immune", None, "cancer", "undetermined", "immune"])
    assert names == ["cancer", "immune"]
    assert numbers.tolist() == [1, NO_DOMAIN, 0, NO_DOMAIN, 1]


def test_domain_maps_do_not_depend_on_how_domains_are_numbered(tmp_path: Path) -> None:
    xy_px = _xy_px()
    numbers = (xy_px[:, 1] > 900).astype(int) + (xy_px[:, 0] > 800)
    labels = np.array(["cancer", "fat", "immune"], object)[numbers]
    labels[:3] = ["undetermined", None, ""]
    found = {name: order[numbers] for name, order in {"a": np.array([0, 1, 2]), "b": np.array([2, 0, 1])}.items()}
    for name, domains in found.items():
        draw_domain_maps(
            tmp_path / f"{name}.png", xy_px, labels, {"measured": domains, "predicted": domains}, "", _thumbnail()
        )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pixels = _pixels(tmp_path / "a.png")[60:-120]
    assert _has(pixels[:, : pixels.shape[1] // 3], (0.75, 0.75, 0.75))
    assert not _has(pixels[:, pixels.shape[1] // 3 :], (0.75, 0.75, 0.75))


@pytest.mark.parametrize("heading", ["protocol reference: LEAK", "held out: C2; " * 20 + "\nLEAK"])
def test_a_heading_is_above_the_maps_and_takes_no_room_from_them(tmp_path: Path, heading: str) -> None:
    xy_px, values = _xy_px(), np.zeros((SIDE**2, 1))
    seen = {}
    for name, text in {"without": "", "with": heading}.items():
        draw_gene_maps(tmp_path / f"{name}.png", xy_px, ["GNAS"], {"measured": values}, "unit", text)
        seen[name] = _pixels(tmp_path / f"{name}.png")
    more = seen["with"].shape[0] - seen["without"].shape[0]
    assert more > 10
    above = seen["with"][:more]
    assert (above < 128).any()
    assert (above[:, [0, -1]] == 255).all(), "the heading must fit"
    left = np.abs(seen["with"][more + 40 :].mean() - seen["without"][40:].mean())
    assert left < 3
