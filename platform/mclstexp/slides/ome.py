"""What OME-XML says about the images of an OME-TIFF: pixel sizes, in micrometres, and names of channels."""

import re
from dataclasses import dataclass
from xml.etree import ElementTree

from mclstexp.errors import SourceError

_MICROMETRES = {
    "pm": 1e-6,
    "å": 1e-4,
    "nm": 1e-3,
    "µm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "micrometers": 1.0,
    "micrometre": 1.0,
    "micrometres": 1.0,
    "nanometer": 1e-3,
    "nanometers": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
    "dm": 1e5,
    "m": 1e6,
    "km": 1e9,
    "thou": 25.4,
    "mil": 25.4,
    "pt": 25400 / 72,
    "in": 25400.0,
    "inch": 25400.0,
    "ft": 304800.0,
}
_NO_UNIT = ("", "pixel", "pixels", "reference frame")  # lengths that are no lengths
_COLOURS = {"red": 0, "r": 0, "green": 1, "g": 1, "blue": 2, "b": 2}
_WORDS = re.compile(r"[\s:_.-]+")
_UNNAMED = re.compile(r"(channel|ch|c)?[\s:_#.-]*[\d:]*")  # as programs number them


@dataclass(frozen=True)
class OmeImage:
    """One image of an OME-TIFF."""

    width: int
    height: int
    pixel_um: tuple[float, ...]
    """Micrometres along x and y, as far as they are stated."""
    num_channels: int
    """Colours or stains of a pixel."""
    channels: tuple[str, ...]
    """Names of channels, some maybe empty."""


def read_ome(xml: str) -> list[OmeImage]:
    """Returns the images that OME-XML describes.

    Raises:
        SourceError: it is damaged, or states a size in an unknown unit.
    """
    try:
        root = ElementTree.fromstring(xml)
        return [_image(pixels) for pixels in root.iterfind("{*}Image/{*}Pixels")]
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise SourceError(f"its OME-XML is damaged ({error}); export the slide again") from None


def to_micrometres(size: float, unit: str) -> float | None:
    """Returns a length in micrometres, or None if its unit is no length.

    Raises:
        SourceError: the unit is unknown.
    """
    name = unit.strip().lower().replace("\u03bc", "\u00b5")  # the Greek letter and the micro sign
    if name in _NO_UNIT:
        return None
    if name not in _MICROMETRES:
        known = ", ".join(sorted(_MICROMETRES))
        raise SourceError(f"its pixel size has the unit {unit!r}; known are {known}: fix the file")
    return size * _MICROMETRES[name]


def colour_order(channels: tuple[str, ...]) -> tuple[int, ...]:
    """Returns where red, green and blue are among three channels: by their names, or in this order if names tell none.

    Raises:
        SourceError: the channels are something else, such as stains of fluorescence.
    """
    names = [name.strip().lower() for name in channels]
    colours = [_COLOURS.get(_WORDS.split(name)[-1]) for name in names]  # the last word: `Brightfield-R`
    if len(names) == 3 and set(colours) == {0, 1, 2}:
        return tuple(colours.index(colour) for colour in range(3))
    if len(set(names)) == 1 or all(_UNNAMED.fullmatch(name) for name in names):
        return 0, 1, 2
    raise SourceError(
        f"its channels are {', '.join(channels)}, not red, green and blue: give the colour image of the H&E stain"
    )


def _image(pixels: ElementTree.Element) -> OmeImage:
    sizes = []
    for axis in "XY":
        if value := pixels.get(f"PhysicalSize{axis}"):
            sizes.append(to_micrometres(float(value), pixels.get(f"PhysicalSize{axis}Unit", "µm")))
    return OmeImage(
        width=int(pixels.attrib["SizeX"]),
        height=int(pixels.attrib["SizeY"]),
        pixel_um=tuple(size for size in sizes if size is not None),
        num_channels=int(pixels.attrib["SizeC"]),
        channels=tuple(channel.get("Name", "") for channel in pixels.iterfind("{*}Channel")),
    )
