"""TIFFs that are no scanner's own format: what they contain and state, and who reads them.

OpenSlide and Pillow read most of them. tifffile reads what they miss: OME-TIFF, whose resolution is in XML, whose
levels are in SubIFDs and whose colours may be three grey pages, and compressions such as JPEG 2000.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC, RESUNIT, TiffFile, TiffPage, TiffPageSeries

from mclstexp.errors import SourceError
from mclstexp.messages import some_of
from mclstexp.slides.jpeg_tiles import JpegTiles, jpeg_levels
from mclstexp.slides.ome import OmeImage, colour_order, read_ome, to_micrometres
from mclstexp.slides.plain import MAX_PLAIN_PX, Plain, wrong_colours
from mclstexp.slides.pyramid import Pyramid, require_edges
from mclstexp.slides.resolution import agreed_mpp, stated_mpp
from mclstexp.slides.tiff_levels import TIFFFILE_FAULTS, TiffLevels, is_shrunken, plane_levels

APERIO, GENERIC = "aperio", "generic-tiff"
"""OpenSlide's names of the formats that other programs than the scanner's write too."""
_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_COMMON = (
    *(COMPRESSION.NONE, COMPRESSION.LZW, COMPRESSION.OJPEG, COMPRESSION.JPEG, COMPRESSION.PACKBITS),
    *(COMPRESSION.ADOBE_DEFLATE, COMPRESSION.DEFLATE, COMPRESSION.ZSTD),
)
"""Compressions that OpenSlide and Pillow read."""
_JPEG = (COMPRESSION.OJPEG, COMPRESSION.JPEG)  # those whose decoders turn YCbCr into RGB
_COLOURS = (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR)
_GREY = (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE)
_SIDE_IMAGES = ("label", "macro", "thumbnail", "overview")
_MAX_TILE_PX = 2**26
_MIN_OTHER_SHARE = 0.1  # of the largest image's pixels, from which another one may be meant
_ALPHA = (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA)
_AXES = {"Z": "depth", "T": "time", "C": "channels", "Q": "pages", "I": "pages"}
_UNIT_UM = {RESUNIT.CENTIMETER: 1e4, RESUNIT.INCH: 25400.0}


def is_tiff(path: str | Path) -> bool:
    """Returns whether a local file is a TIFF, from its first bytes, whatever its name."""
    with open(path, "rb") as file:
        return file.read(4) in _MAGIC


def open_tiff(path: str, detected: str | None) -> Pyramid | JpegTiles | Plain | TiffLevels:
    """Opens a local TIFF with the reader that reads it rightly.

    Args:
        path: the file.
        detected: `APERIO`, `GENERIC`, or None if OpenSlide does not know its format.

    Raises:
        SourceError: it is turned, is not one colour image of 8 bits, or states contradictory resolutions.
    """
    try:
        with TiffFile(path) as file:
            levels = _open_aperio(path, file) if detected == APERIO else _open_generic(path, file, detected)
            return _with_jpeg_tiles(path, file, levels) if isinstance(levels, Pyramid) else levels
    except TIFFFILE_FAULTS as error:
        raise SourceError(f"its TIFF directories are damaged: {error}; copy or export it again") from error


def _open_aperio(path: str, file: TiffFile) -> Pyramid:
    """Opens a slide in Aperio's format, whose pages OpenSlide knows."""
    pages = [page for page in file.pages if isinstance(page, TiffPage) and page.is_tiled]
    _require_upright(pages)
    slide = Pyramid(path)
    agreed_mpp({"image description": slide.mpp, "resolution tags": stated_mpp(_tag_sizes(file, pages[0]))})
    return slide


def _with_jpeg_tiles(path: str, file: TiffFile, slide: Pyramid) -> Pyramid | JpegTiles:
    """Returns a slide that decodes its storage tiles itself, where OpenSlide's levels are in JPEG."""
    levels = jpeg_levels(slide.dimensions, [page for page in file.pages if isinstance(page, TiffPage)])
    return slide if levels is None else JpegTiles(path, slide, levels)


def _open_generic(path: str, file: TiffFile, detected: str | None) -> Pyramid | Plain | TiffLevels:
    """Opens a TIFF whose pages nobody knows before they are looked at."""
    series = _main_series(file)
    _require_upright([level.keyframe for level in series.levels])
    described = _described(file, series)
    _require_colour(series, described)
    _require_bounded(series)
    _require_whole(series, os.path.getsize(path))
    mpp = agreed_mpp(
        {
            "OME-XML": stated_mpp(list(described.pixel_um)) if described else None,
            "resolution tags": stated_mpp(_tag_sizes(file, series.keyframe)),
        }
    )
    if not described and series.keyframe.compression in _COMMON:
        if detected is None and len(file.pages) == 1:
            return Plain(path, mpp)
        if detected and (slide := _pyramid_of(path, mpp, _size(series))):
            return slide
    _require_decoded_colours(series.keyframe)
    order = colour_order(described.channels) if described and "S" not in series.axes else (0, 1, 2)
    return TiffLevels(path, plane_levels(series, order), mpp)


def _pyramid_of(path: str, mpp: float | None, size: tuple[int, int]) -> Pyramid | None:
    """Returns the slide as OpenSlide reads it; None if its finest level is another page, such as a small first one."""
    slide = Pyramid(path, mpp)
    if slide.dimensions[0] == size:
        return slide
    slide.close()
    return None


def _main_series(file: TiffFile) -> TiffPageSeries:
    """Returns the largest image with its levels, beside which there is none but labels, masks and shrunken copies."""
    by_size = sorted(file.series, key=_num_px, reverse=True)
    if not by_size:
        raise SourceError("it contains no image; copy or export it again")
    main, *others = by_size
    for other in others:
        beside = other.name.lower().startswith(_SIDE_IMAGES) or other.keyframe.is_reduced or other.keyframe.is_mask
        beside |= is_shrunken(_size(other), _size(main))
        if not beside and _num_px(other) >= _MIN_OTHER_SHARE * _num_px(main):
            sizes = [f"{width} x {height} px" for width, height in map(_size, by_size)]
            raise SourceError(f"it holds several images ({some_of(sizes)}): store each in a file of its own")
    return main


def _size(series: TiffPageSeries) -> tuple[int, int]:
    """Returns width and height."""
    edges = dict(zip(series.axes, series.shape, strict=True))
    return edges.get("X", 1), edges.get("Y", 1)


def _num_px(series: TiffPageSeries) -> int:
    return math.prod(_size(series))


def _require_upright(pages: Sequence[TiffPage]) -> None:
    """Refuses pages that are to be turned: OpenSlide turns them within each storage tile, or not at all."""
    turned = {page.tags.valueof("Orientation", 1) for page in pages} - {0, 1}
    if turned:
        raise SourceError(
            f"its TIFF orientation is {', '.join(map(str, sorted(turned)))}, which makes positions ambiguous: write "
            "its pixels again upright, with the orientation 1"
        )


def _require_colour(series: TiffPageSeries, described: OmeImage | None) -> None:
    """Refuses what is not one picture of three 8-bit colours, with or without alpha."""
    page, edges = series.keyframe, dict(zip(series.axes, series.shape, strict=True))
    if series.is_multifile or any(page is None for level in series.levels for page in level.pages):
        raise SourceError("planes that its OME-XML names are not in this file: export the slide as one file")
    of_colours = [axis for axis in "SCIQ" if described and edges.get(axis) == described.num_channels]
    channels = edges.pop(next(iter(of_colours), "S"), 1)
    stack = [f"{num} along {_AXES.get(axis, axis)}" for axis, num in edges.items() if axis not in "XY" and num > 1]
    if stack:
        raise SourceError(f"it holds several images, {' x '.join(stack)}: store one image of colours")
    alpha = channels == 4 and bool(page.extrasamples) and page.extrasamples[0] in _ALPHA
    palette = channels == 1 and page.photometric == PHOTOMETRIC.PALETTE
    coloured = (channels == 3 or alpha) and page.photometric in ((*_COLOURS, *_GREY) if described else _COLOURS)
    if page.dtype != np.uint8 or not (coloured or palette):
        grey = " (greyscale)" if page.photometric in _GREY and channels < 3 else ""
        raise wrong_colours(f"{channels} x {page.bitspersample} bit {_name(page.photometric)}{grey}")


def _require_bounded(series: TiffPageSeries) -> None:
    """Refuses what would not fit into memory: OpenSlide ends the process instead."""
    for page in (level.keyframe for level in series.levels):
        require_edges(page.imagewidth, page.imagelength)
        if page.is_tiled:
            what, num_px, most = "a storage tile", page.tilewidth * page.tilelength, _MAX_TILE_PX
        else:
            what, num_px, most = "its image in strips", page.imagewidth * page.imagelength, MAX_PLAIN_PX
        if num_px > most:
            raise SourceError(f"{what} has {num_px} px; at most {most} are allowed: convert it to a pyramid of tiles")


def _require_whole(series: TiffPageSeries, num_bytes: int) -> None:
    """Refuses a file that ends before its pixels, or has too few of them."""
    for page in (page for level in series.levels for page in level.pages if page is not None):
        ends = [sum(part) for part in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if len(ends) < math.prod(page.chunked) or max(ends) > num_bytes:
            raise SourceError(f"it is cut off after {num_bytes} bytes, before its last pixels: copy it again")


def _require_decoded_colours(page: TiffPage) -> None:
    """Refuses colours that tifffile hands on without turning them into RGB."""
    coded = page.photometric == PHOTOMETRIC.YCBCR and page.compression not in _JPEG
    if coded or page.photometric == PHOTOMETRIC.PALETTE:
        raise wrong_colours(f"{_name(page.photometric)} with compression {_name(page.compression)}")


def _described(file: TiffFile, series: TiffPageSeries) -> OmeImage | None:
    """Returns what the OME-XML says of an image, found by its size; None if the file is no OME-TIFF.

    Raises:
        SourceError: the XML is damaged, or describes no such image, or several differently.
    """
    if not file.is_ome:
        return None
    width, height = _size(series)
    images = read_ome(file.ome_metadata or "")
    fitting = {image for image in images if (image.width, image.height) == (width, height)}
    if len(fitting) != 1:
        listed = some_of([f"{image.width} x {image.height} px" for image in images])
        raise SourceError(
            f"its OME-XML describes images of {listed or 'no size'}; its image has {width} x {height} px and must be "
            "described once: export the slide again"
        )
    return fitting.pop()


def _tag_sizes(file: TiffFile, page: TiffPage) -> list[float]:
    """Returns the micrometres per pixel along x and y that the tags of resolution state."""
    unit_um = _UNIT_UM.get(page.tags.valueof("ResolutionUnit", RESUNIT.INCH))
    if unit_um is None and file.imagej_metadata:
        unit_um = to_micrometres(1.0, str(file.imagej_metadata.get("unit", "pixel")).replace("\\u00B5", "µ"))
    ratios = [page.tags.valueof(name, (0, 1)) for name in ("XResolution", "YResolution")]
    return [unit_um * below / above for above, below in ratios if unit_um and above and below]


def _name(code: object) -> str:
    return str(getattr(code, "name", code))
