"""Coverage of 90 % intervals on patients left out, one fold after the other.

    python jobs/prepare.py --samples COHORT/samples.csv --out TILES
    python jobs/embed.py --data TILES --model.image_weights WEIGHTS
    python benchmarks/coverage.py TILES

Fits a program model to the stored features of all patients but one, calibrates it, and predicts that patient. One row
per held-out section: trusted genes; the share of its values inside their intervals, as calibrated and for any depth;
the rank correlation of a tile's scale with its mean error; and the interval score (smaller is better) beside that of
intervals of constant width. `--cohort` makes the synthetic cohort of 12 patients first, with features of a small random
encoder.
"""

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import numpy as np  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402

from ingest.synthetic import CohortSpec, make_cohort  # noqa: E402
from mclstexp.config import Config  # noqa: E402
from mclstexp.data.features import FeatureReader, feature_root, load_features  # noqa: E402
from mclstexp.data.measured import MeasuredSection, read_measured  # noqa: E402
from mclstexp.data.panel import fit_panel  # noqa: E402
from mclstexp.data.schema import load_manifest  # noqa: E402
from mclstexp.data.spots import make_reader  # noqa: E402
from mclstexp.model.calibration import COVERAGE, Calibration  # noqa: E402
from mclstexp.model.fit_blend import FittedPrograms, fit_program_model  # noqa: E402
from mclstexp.model.fit_calibration import fit_calibration, groups, half_widths  # noqa: E402
from mclstexp.model.retrieval import Retrieved, resolve  # noqa: E402
from mclstexp.model.training_spots import TrainingSpots  # noqa: E402
from mclstexp.settings import RetrievalConfig  # noqa: E402
from mclstexp.training.fit_programs import program_bank  # noqa: E402
from mclstexp.training.training_sections import feature_blocks  # noqa: E402

NUM_PATIENTS = 12
RETRIEVAL = RetrievalConfig(weighting="fixed_number")
HEAD = (
    "| held out | calibrated on | trusted | coverage | any depth | rank correlation | interval score | constant width |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiles", type=Path, help="tile table with features")
    parser.add_argument("--cohort", action="store_true", help="make the table from the synthetic cohort")
    parser.add_argument("--patients", help="held-out patients, with commas; default: all in turn")
    parsed = parser.parse_args()
    if parsed.cohort:
        make_table(parsed.tiles)
    table = Table(str(parsed.tiles.resolve()))
    print(f"{HEAD}\n|---|---|---|---|---|---|---|---|", flush=True)
    shares = []
    for patient in parsed.patients.split(",") if parsed.patients else table.patients():
        shares.append(np.mean([table.print_row(*each) for each in table.fold(patient)]))
    print(f"\nmean over {len(shares)} patients: {np.mean(shares):.3f}, nominal {COVERAGE}")


def make_table(tiles: Path) -> None:
    """Makes the synthetic cohort beside a tile table, cuts it and computes features."""
    sheet = make_cohort(f"{tiles}-cohort", dataclasses.replace(CohortSpec.small(), num_patients=NUM_PATIENTS))
    encoder = ("--model.image_encoder", "small_cnn", "--model.image_layers", "pooled", "--train.precision", "fp32")
    cut = ("--tiles.size_px", 32, "--tiles.mpp", 1, "--tiles.wide_um", "none")
    for arguments in (
        ("prepare.py", "--samples", sheet, "--out", tiles, *cut),
        ("embed.py", "--data", tiles, *encoder),
    ):
        subprocess.run([sys.executable, f"jobs/{arguments[0]}", *map(str, arguments[1:])], check=True, cwd=ROOT)


class Table:
    """A tile table with features, of which one patient is left out after the other."""

    def __init__(self, root: str) -> None:
        self.root, self.manifest = root, load_manifest(root)
        name = sorted(path.name for path in Path(root, "features").iterdir())[0]
        manifest = load_features(root, name)
        assert manifest is not None
        self.features = FeatureReader(feature_root(root, name), manifest, manifest.views, manifest.encoder)
        self.blocks = feature_blocks(manifest.encoder.widths, len(manifest.views))

    def patients(self) -> list[str]:
        """Returns the patients with measured sections."""
        return sorted({entry.patient_id for entry in self.manifest.sections if entry.measured})

    def fold(self, patient: str) -> list[tuple[MeasuredSection, Retrieved, Calibration, np.ndarray]]:
        """Returns a patient's sections with their answers, calibration and constant half widths."""
        measured = [entry for entry in self.manifest.sections if entry.measured]
        training, held_out = (
            [entry.section_id for entry in measured if (entry.patient_id == patient) == is_out]
            for is_out in (False, True)
        )
        config = Config()
        panel = fit_panel(self.root, self.manifest, training, config.genes)
        reader = make_reader(self.root, self.manifest, panel, config, training)
        sections = [read_measured(reader, name) for name in training]
        spots = TrainingSpots(sections, self.features.read_section, self.blocks, reader.target)
        fitted = fit_program_model(spots, RETRIEVAL)
        calibration = fit_calibration(spots, fitted)
        constant = half_widths(np.abs(spots.expression - fitted.left_out), groups(spots))[0]
        self.target = reader.target
        tested = [read_measured(reader, name) for name in held_out]
        return [(each, self.answer(each, sections, spots, fitted), calibration, constant) for each in tested]

    def answer(
        self,
        section: MeasuredSection,
        sections: Sequence[MeasuredSection],
        spots: TrainingSpots,
        fitted: FittedPrograms,
    ) -> Retrieved:
        """Returns the answer to a section's spots of a model fitted to `spots` of `sections`."""
        bank = fitted.model.bank(program_bank(spots, fitted.keys))
        features = self.features.read_section(section.section_id)
        return fitted.model.answer(features, section.xy_um, bank, resolve(RETRIEVAL, len(bank)))

    def print_row(
        self, section: MeasuredSection, found: Retrieved, calibration: Calibration, constant: np.ndarray
    ) -> float:
        """Prints a section's row; returns its coverage."""
        measured = np.setdiff1d(np.arange(len(constant)), section.unmeasured)
        errors = np.abs(section.expression(self.target) - found.prediction)[:, measured]
        scale = calibration.scale.of(found.spread, found.similarity)[:, None]
        constant, plain, wide = (
            width[measured] for width in (constant, calibration.half_width, calibration.half_width_any_depth)
        )
        cells = [
            f"{section.section_id} of {section.patient_id}",
            f"{len(calibration.left_out_coverage)} {calibration.calibrated_on}",
            f"{calibration.trust.trusted.sum()} of {len(calibration.half_width)}",
            *(f"{(errors <= scale * width).mean():.3f}" for width in (plain, wide)),
            f"{rank_correlation(scale[:, 0], (errors / constant).mean(axis=1)):.2f}",
            *(f"{score(errors, width, constant):.3f}" for width in (scale * plain, constant)),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
        return float((errors <= scale * plain).mean())


def rank_correlation(scale: np.ndarray, errors: np.ndarray) -> float:
    """Returns Spearman's correlation of tiles' scales and errors; 0 for a constant scale."""
    return 0.0 if np.ptp(scale) == 0 else float(spearmanr(scale, errors)[0])


def score(errors: np.ndarray, width: np.ndarray, unit: np.ndarray) -> float:
    """Returns the mean interval score in units of each gene's constant width."""
    return float(np.mean((2 * width + 2 / (1 - COVERAGE) * np.maximum(errors - width, 0)) / (2 * unit)))


if __name__ == "__main__":
    main()
