"""Maps of a section's domains: the pathologist's labels beside what was found from expression.

A found domain has a number and no name, so it takes the colour of the label that it covers best: each label's colour
is given once, such that the covered spots are most in all. Domains that cover none take colours of their own.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from scipy.optimize import linear_sum_assignment

from mclstexp.evaluation.domains import NO_DOMAIN, is_labelled
from mclstexp.report.figures import new_figure
from mclstexp.report.section_axes import Thumbnail, draw_spots, map_size_in

_LEGEND_IN = 1.1
_LEGEND = "found domains take the colour of the label that they cover best;\nother colours: no label is left for them"
_DPI = 90
_NO_DOMAIN_COLOUR = (0.75, 0.75, 0.75, 1.0)


def draw_domain_maps(
    path: str | Path,
    place_px: np.ndarray,
    labels: Sequence[str | None],
    found: Mapping[str, np.ndarray],
    heading: str,
    thumbnail: Thumbnail | None = None,
) -> None:
    """Writes a PNG with the labels' map and one map for each way to find domains.

    Args:
        path: local file to write.
        place_px: float (N, 2), spot centres in level-0 pixels.
        labels: a label of each spot; grey where there is none (see `is_labelled`).
        found: int (N,) domains by title ("measured", "predicted"); NO_DOMAIN is grey.
        heading: what every picture says: what was held out, the protocol and its leaks.
        thumbnail: the slide, drawn beneath.
    """
    names, numbers = number_labels(labels)
    maps = {"labels": numbers} | {title: match_labels(numbers, domains) for title, domains in found.items()}
    width, height = map_size_in(place_px)
    figure = new_figure(width * len(maps), height + _LEGEND_IN, heading)
    for axes, (title, domains) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        _draw(axes, title, domains, place_px, thumbnail)
    numbered = dict(enumerate(names)) | ({NO_DOMAIN: "none"} if NO_DOMAIN in numbers else {})
    handles = [Patch(color=colour, label=numbered[number]) for number, colour in _colours(numbered).items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(maps) + 1, title=_LEGEND)
    figure.savefig(path, dpi=_DPI)


def number_labels(labels: Sequence[str | None]) -> tuple[list[str], np.ndarray]:
    """Returns the different labels in the order of their names, and int64 (N,): each spot's, or NO_DOMAIN."""
    used = is_labelled(labels)
    names, inverse = np.unique(np.asarray(labels, object)[used].astype(str), return_inverse=True)
    numbers = np.full(len(used), NO_DOMAIN, np.int64)
    numbers[used] = inverse
    return names.tolist(), numbers


def match_labels(labels: np.ndarray, domains: np.ndarray) -> np.ndarray:
    """Returns domains, int (N,), renumbered so that they take the numbers of the labels that they cover best.

    Most spots in all are covered (Kuhn 1955, https://doi.org/10.1002/nav.3800020109); a domain without a label of its
    own gets a number beyond the labels'. NO_DOMAIN stays.
    """
    both = (labels != NO_DOMAIN) & (domains != NO_DOMAIN)
    overlap = np.zeros((domains.max() + 1, labels.max() + 1), np.int64)
    np.add.at(overlap, (domains[both], labels[both]), 1)
    domain, label = linear_sum_assignment(overlap, maximize=True)
    covers = overlap[domain, label] > 0
    number = overlap.shape[1] + np.arange(overlap.shape[0])
    number[domain[covers]] = label[covers]
    return np.where(domains == NO_DOMAIN, NO_DOMAIN, number[domains])


def _draw(axes: Axes, title: str, domains: np.ndarray, place_px: np.ndarray, thumbnail: Thumbnail | None) -> None:
    colours = _colours(np.unique(domains).tolist())
    draw_spots(axes, place_px, thumbnail).set(facecolors=[colours[number] for number in domains.tolist()])
    axes.set_title(title)


def _colours(numbers: Iterable[int]) -> dict[int, tuple[float, float, float, float]]:
    """Returns the colour of each domain's number; they repeat after 12."""
    palette = matplotlib.colormaps["Paired"]
    return {
        number: _NO_DOMAIN_COLOUR if number == NO_DOMAIN else palette((2 * number + 1 - number // 6) % 12)
        for number in numbers
    }
