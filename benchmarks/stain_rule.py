"""Prints the figures of the H&E rule for every image in a folder, and which images it would flag.

    python benchmarks/stain_rule.py ../shared/data --mpp 0.7

For H&E images each line that ends with a reason is a false alarm. Images without a resolution are read at `--mpp`,
which only sets how fine the tissue mask is.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

from mclstexp.errors import SourceError  # noqa: E402
from mclstexp.prediction.cohort import EXTENSIONS  # noqa: E402
from mclstexp.slides.slide import open_slide  # noqa: E402
from mclstexp.slides.stain import not_h_and_e, stain_figures  # noqa: E402
from mclstexp.slides.tissue import find_tissue_on_thumbnail  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mpp", type=float, default=0.5, help="um per pixel of images that do not state it")
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.folder.rglob("*") if path.suffix.lower()[1:] in EXTENSIONS)
    reasons = [measure(path, arguments.mpp) for path in paths]
    print(f"{sum(map(bool, reasons))} of {len(reasons)} images flagged")


def measure(path: Path, mpp: float) -> str:
    try:
        with open_slide(path) as slide:
            mask, thumbnail = find_tissue_on_thumbnail(slide, slide.mpp or mpp)
    except SourceError as error:
        print(f"{path.name:40} {error}", flush=True)
        return str(error)
    reason = not_h_and_e(thumbnail, mask.is_tissue)
    figures = "  ".join(f"{name} {value:.3f}" for name, value in vars(stain_figures(thumbnail, mask.is_tissue)).items())
    print(f"{path.name:40} {figures}  {reason}", flush=True)
    return reason


if __name__ == "__main__":
    main()
