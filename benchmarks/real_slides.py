"""Predictions at the measured spots of a section, from its slide, from that slide's very pixels, and from its JPEG.

    python benchmarks/real_slides.py list DATA OUT       # before prediction: what is to be predicted, and where
    python benchmarks/real_slides.py compare MODEL OUT   # after it

Steps of `benchmarks/real_slides.sh`. The slide was made from the JPEG and is compressed once more, so that their pixels
differ a little; a PNG of the slide's finest level has its exact pixels and goes through the other reader of images.
"""

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import numpy as np  # noqa: E402
import openslide  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from PIL import Image  # noqa: E402

from mclstexp.data.schema import load_manifest  # noqa: E402
from mclstexp.data.sheet import read_sheet  # noqa: E402
from mclstexp.data.spots import make_reader  # noqa: E402
from mclstexp.data.table import read_columns  # noqa: E402
from mclstexp.evaluation.metrics import highest_genes, pearson_per_gene  # noqa: E402
from mclstexp.model.version import ModelVersion  # noqa: E402

SECTION, SLIDE = "C5", "slides/C5_aperio.svs"
WAYS = ("slide", "pixels", "jpeg")
TOLERANCE = 1e-5


def list_spots(data: Path, out: Path) -> None:
    """Writes the sheet of the section in its three forms, and the table of its measured spots for each."""
    path = data / SLIDE
    row = next(row for row in read_sheet(str(data / "samples.csv")) if row.section_id == SECTION)
    with openslide.OpenSlide(path) as slide:
        mpp = slide.properties[openslide.PROPERTY_NAME_MPP_X]
        pixels = slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")
    pixels.save(out / "pixels.png", compress_level=1)
    images = {"slide": (path, ""), "pixels": (out / "pixels.png", mpp), "jpeg": (row.image, row.mpp)}
    manifest = load_manifest(str(out / "tiles"))
    spots = read_columns(str(out / "tiles"), manifest.section(SECTION), ["spot_id", "x_px", "y_px"]).to_pylist()
    with open(out / "spot_slides.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["section_id", "patient_id", "format", "image", "mpp"])
        writer.writerows([way, row.patient_id, "slide", *images[way]] for way in WAYS)
    with open(out / "spots.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["section_id", "spot_id", "x_px", "y_px"])
        writer.writerows([way, *spot.values()] for way in WAYS for spot in spots)
    print(f"{len(spots)} spots of {SECTION}, slide of {float(mpp):.4g} um/px, JPEG of {row.mpp} um/px by the sheet")


def compare(folder: Path, out: Path) -> None:
    """Prints how far the three predictions agree, and how each correlates with what was measured."""
    model = ModelVersion.load(folder)
    manifest = load_manifest(str(out / "tiles"))
    measured = make_reader(
        str(out / "tiles"), manifest, model.panel, model.config, model.training.sections
    ).read_section(SECTION)
    spots = measured["spot_id"].tolist()
    predicted = {way: _prediction(out / "spots" / f"{way}.parquet", model.panel.gene_id, spots) for way in WAYS}
    crops = {way: _crops(out / "spot_slides.csv", out / "spots.csv", way, model.tile_size_px) for way in WAYS}
    for way in WAYS[1:]:
        apart = np.abs(predicted["slide"] - predicted[way])
        pixels = np.abs(crops["slide"].astype(int) - crops[way])
        alike = pearson_per_gene(predicted["slide"], predicted[way])
        print(
            f"slide against {way}: pixels differ by {pixels.mean():.3f} on average, {pixels.max()} at most; "
            f"predictions by {apart.mean():.2g}, {apart.max():.2g} at most; a gene's maps correlate by "
            f"{np.nanmedian(alike):.4f} (median)"
        )
    highest = highest_genes(measured["payload"])
    for way in WAYS:
        of_genes = pearson_per_gene(measured["payload"], predicted[way])
        print(
            f"{way:6} with measured: PCC {np.nan_to_num(of_genes).mean():.4f} over {len(of_genes)} genes, "
            f"{np.nan_to_num(of_genes[highest]).mean():.4f} over the {len(highest)} highest; {len(spots)} spots"
        )
    same = np.abs(predicted["slide"] - predicted["pixels"]).max() <= TOLERANCE
    print(f"equal pixels give {'equal' if same else 'DIFFERENT'} values (within {TOLERANCE})")
    if not same:
        raise SystemExit(1)


def _prediction(path: Path, genes: tuple[str, ...], spots: list[str]) -> np.ndarray:
    """Returns a slide's prediction in the order of the measured spots, float32 (n, G)."""
    table = pq.read_table(path)
    row_of = {spot: row for row, spot in enumerate(table["spot_id"].to_pylist())}
    return np.stack([table[gene].to_numpy() for gene in genes], axis=1)[[row_of[spot] for spot in spots]]


def _crops(sheet: Path, spots: Path, way: str, size_px: int) -> np.ndarray:
    """Returns the tiles of the spots, cut by Pillow or OpenSlide alone, uint8 (n, size_px, size_px, 3)."""
    image = next(row["image"] for row in csv.DictReader(sheet.read_text().splitlines()) if row["section_id"] == way)
    rows = [row for row in csv.DictReader(spots.read_text().splitlines()) if row["section_id"] == way]
    corners = [tuple(int(float(row[axis])) - size_px // 2 for axis in ("x_px", "y_px")) for row in rows]
    if way == "slide":
        with openslide.OpenSlide(image) as slide:
            return np.stack([slide.read_region(at, 0, (size_px,) * 2).convert("RGB") for at in corners])
    Image.MAX_IMAGE_PIXELS = None
    whole = Image.open(image)
    return np.stack([whole.crop((x, y, x + size_px, y + size_px)) for x, y in corners])


if __name__ == "__main__":
    verb, source, out = sys.argv[1:]
    {"list": list_spots, "compare": compare}[verb](Path(source).resolve(), Path(out).resolve())
