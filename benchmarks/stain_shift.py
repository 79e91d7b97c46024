"""How much the answer of `default` moves when a section is stained otherwise, with and without stain draws.

    python benchmarks/stain_shift.py WEIGHTS TILES --test B4 C4 --scratch FOLDER --picture docs/pictures/stain_shift.png

Each test section is recoloured in optical density, tile by tile, encoded again and predicted by models of all other
measured sections. Four shifts at several strengths s scale haematoxylin and eosin (Ruifrok and Johnston 2001): bluer
(1 + s, 1 - s), pinker (1 - s, 1 + s), darker (both 1 + s) and paler (both 1 - s). One more gives the section the stain
vectors and concentrations that are the usual target of Macenko et al. 2009 (https://doi.org/10.1109/ISBI.2009.5193250).
The tile table needs wide views, as `jobs/prepare.py` cuts them. Features and draws are made where they are missing, and
those of recoloured tiles are kept in the scratch folder. Models have no towers: their seed would blur the comparison.

Prints Markdown, means over the four shifts: 1 - r is 1 less the mean over genes of the correlation with the prediction
of the unchanged section; RMS is the change of all values, and of the section's means alone, over the standard deviation
of the prediction within the section; then the scores of the prediction.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from programs import SCORES, Fold, Table, correlations, open_table, scores  # noqa: E402

from mclstexp.cluster import connect  # noqa: E402
from mclstexp.config import load_config, override  # noqa: E402
from mclstexp.data.measured import MeasuredSection, read_measured  # noqa: E402
from mclstexp.data.spots import decode_tiles  # noqa: E402
from mclstexp.data.table import read_columns  # noqa: E402
from mclstexp.figures import new_figure  # noqa: E402
from mclstexp.model.augment import STAINS  # noqa: E402
from mclstexp.model.extractor import Extractor  # noqa: E402
from mclstexp.model.fit_blend import fit_program_model  # noqa: E402
from mclstexp.model.frozen import frozen_encoder  # noqa: E402
from mclstexp.model.retrieval import resolve  # noqa: E402
from mclstexp.model.training_spots import TrainingSpots  # noqa: E402
from mclstexp.training.fit_programs import program_bank  # noqa: E402
from mclstexp.training.training_sections import feature_blocks  # noqa: E402

STRENGTHS = (0.1, 0.2, 0.4)
SIGNS = {"bluer": (1, -1), "pinker": (-1, 1), "darker": (1, 1), "paler": (-1, -1)}
MACENKO = "Macenko target"
TARGET_VECTORS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
TARGET_CONCENTRATIONS = np.array([1.9705, 1.0308])
"""Haematoxylin and eosin of the usual target: directions, and 99th percentiles, of the natural optical density."""
MIN_DENSITY, TAIL = 0.15, 1.0
PLAIN, DRAWS, WITHIN = "plain tiles", "with {} draws", "z-scores within the section"
COLUMNS = ("1 - r", "RMS", "RMS of means", *SCORES)
Predict = Callable[[np.ndarray], np.ndarray]
"""From a section's features, (n, F), to its expression, (n, G)."""


@dataclass(frozen=True)
class Tiles:
    """The tiles of a section, uint8 (n, size, size, 3) by view."""

    views: dict[str, np.ndarray]

    @cached_property
    def densities(self) -> np.ndarray:
        """Natural optical densities of some stained pixels of the first view, (n, 3)."""
        pixels = next(iter(self.views.values()))[:, ::8, ::8].reshape(-1, 3)
        found = density(pixels)
        return found[(found > MIN_DENSITY).all(axis=1)]

    def stained(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the tiles with their optical densities multiplied by a matrix, (3, 3)."""
        return {view: np.stack([recoloured(tile, matrix) for tile in tiles]) for view, tiles in self.views.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="weights of model.image_encoder in default.yaml, here DenseNet-121")
    parser.add_argument("tiles", help="tile table")
    parser.add_argument("--test", nargs="+", required=True, help="sections")
    parser.add_argument("--draws", type=int, default=3, help="augmented draws of each training tile")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for features of recoloured tiles")
    parser.add_argument("--picture", type=Path, help="where to draw them")
    parsed = parser.parse_args()
    settings = {
        "model.image_weights": parsed.weights,
        "train.precision": "fp32",
        "train.feature_draws": parsed.draws,
        "train.augmentation": "default",
        "train.epochs": 0,
    }
    config = override(load_config(ROOT / "jobs" / "configs" / "default.yaml"), settings)
    connect(config, {})
    table = open_table(parsed.tiles, config)
    of_stains = {name: stained_features(table, name, parsed.scratch) for name in parsed.test}
    measured = [entry.section_id for entry in table.manifest.sections if entry.measured]
    figures = {}
    for name, stains in of_stains.items():
        fold = Fold("section left out", tuple(each for each in measured if each != name), (name,))
        figures[name] = figures_of(table, fold, stains)
        report(name, figures[name])
    if parsed.picture:
        draw(parsed.picture, figures)


def stain_matrices(tiles: Tiles) -> dict[str, np.ndarray]:
    """Returns the matrices (3, 3) by which the optical densities of a section's pixels are multiplied, by stain."""
    stains = np.array(STAINS) / np.linalg.norm(STAINS, axis=1, keepdims=True)
    found = {}
    for strength in STRENGTHS:
        for name, (haematoxylin, eosin) in SIGNS.items():
            scale = np.diag([1 + strength * haematoxylin, 1 + strength * eosin, 1])
            found[f"{name} {strength}"] = np.linalg.inv(stains) @ scale @ stains
    own, concentrations = macenko(tiles.densities)
    to_own = np.linalg.pinv(own)
    scale = np.diag(TARGET_CONCENTRATIONS / concentrations)
    found[MACENKO] = to_own @ scale @ TARGET_VECTORS + np.eye(3) - to_own @ own
    return found


def macenko(densities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the directions of haematoxylin and eosin, (2, 3), and the 99th percentiles of their concentrations."""
    plane = np.linalg.eigh(np.cov(densities.T))[1][:, 1:]
    plane *= np.sign(plane.sum(axis=0))
    on_plane = densities @ plane
    angles = np.percentile(np.arctan2(on_plane[:, 0], on_plane[:, 1]), [TAIL, 100 - TAIL])
    vectors = np.stack([np.sin(angles), np.cos(angles)], axis=1) @ plane.T
    vectors = vectors[np.argsort(-vectors[:, 0])]  # haematoxylin absorbs more red
    return vectors, np.percentile(densities @ np.linalg.pinv(vectors), 100 - TAIL, axis=0)


def density(pixels: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(pixels, 1) / np.float32(255))


def recoloured(tile: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    changed = np.exp(-density(tile) @ matrix.astype(np.float32)) * 255
    return changed.round().clip(0, 255).astype(np.uint8)


def stained_features(table: Table, section_id: str, scratch: Path) -> dict[str, np.ndarray]:
    """Returns the features of a section under each stain, (n, F): stored ones, or those in the scratch folder."""
    stored = table.stored
    entry, views = table.manifest.section(section_id), stored.views
    columns = read_columns(table.root, entry, list(views))
    sizes = {view: table.manifest.view_size_px(view) for view in views}
    tiles = Tiles({view: decode_tiles(columns[view].to_pylist(), sizes[view]) for view in views})
    plain = stored.manifest.model_copy(update={"num_draws": 0, "augmentation": "none"})
    encoder = frozen_encoder(table.config.model, table.manifest.tile_size_px, table.config.train.seed)
    encode = Extractor(encoder.state(), plain, torch.device("cpu"))
    names = [name for view in views for name in stored.encoder.blocks(view)]
    scratch.mkdir(parents=True, exist_ok=True)
    found = {"unchanged": stored.read_section(section_id)}
    for stain, matrix in stain_matrices(tiles).items():
        path = scratch / f"{section_id}-{stain.replace(' ', '-')}-{entry.sha256[:8]}.npy"
        if not path.exists():
            blocks = encode(tiles.stained(matrix), section_id)
            np.save(path, np.concatenate([blocks[name] for name in names], axis=1))
            print(f"encoded {path}", file=sys.stderr, flush=True)
        found[stain] = np.load(path)
    return found


def figures_of(table: Table, fold: Fold, stains: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Returns COLUMNS by model and stain."""
    reader = table.reader(fold)
    train, (test,) = ([read_measured(reader, name) for name in names] for names in (fold.train, fold.test))
    num_draws = table.config.train.feature_draws
    plain = fitted(table, train, test, 0)
    models = {
        PLAIN: plain,
        DRAWS.format(num_draws): fitted(table, train, test, num_draws),
        WITHIN: _with_level_of(plain, fitted(table, train, test, 0, within_section)),
    }
    mean = np.nanmean(np.concatenate([each.expression(table.target) for each in train]), axis=0)
    found = {}
    for name, predict in models.items():
        before = predict(stains["unchanged"])
        found[name] = {}
        for stain, features in stains.items():
            after = predict(features)
            of_scores = scores(test, test.expression(table.target), after, mean)[0]
            found[name][stain] = np.concatenate([changes(before, after), of_scores])
    return found


def fitted(
    table: Table,
    train: Sequence[MeasuredSection],
    test: MeasuredSection,
    num_draws: int,
    of_section: Callable[[np.ndarray], np.ndarray] = lambda features: features,
) -> Predict:
    """Returns the prediction of a fitted model that sees any section's features through `of_section`."""
    stored, start = table.stored, time.monotonic()

    def read(section_id: str, draw: int | None = None) -> np.ndarray:
        return of_section(stored.read_section(section_id, draw))

    blocks = feature_blocks(stored.encoder.widths, len(stored.views))
    draws = [partial(read, draw=draw) for draw in range(num_draws)]
    spots = TrainingSpots(train, read, blocks, table.target, draws)
    found = fit_program_model(spots, table.config.retrieval)
    bank = found.model.bank(program_bank(spots, found.keys))
    retrieval = resolve(table.config.retrieval, len(bank))
    print(f"fitted with {num_draws} draws in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return lambda features: found.model.answer(of_section(features), test.xy_um, bank, retrieval).prediction


def within_section(features: np.ndarray) -> np.ndarray:
    return (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-6)


def _with_level_of(level: Predict, pattern: Predict) -> Predict:
    """Returns the pattern of one model on the level of another: z-scores within a section have no level."""

    def predict(features: np.ndarray) -> np.ndarray:
        found = pattern(features)
        return found - found.mean(axis=0) + level(features).mean(axis=0)

    return predict


def changes(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Returns the first three of COLUMNS for two predictions of a section, (n, G)."""
    before, after = before.astype(np.float64), after.astype(np.float64)
    correlation = np.nanmean(correlations(np.ones((1, len(before))), before, after))
    size = np.sqrt(before.var(axis=0).mean())
    of_means = (after - before).mean(axis=0)
    return np.array(
        [1 - correlation, np.sqrt(((after - before) ** 2).mean()) / size, np.sqrt((of_means**2).mean()) / size]
    )


def grouped(stains: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns COLUMNS, means over the four shifts of a strength."""
    groups = {"unchanged": ["unchanged"]}
    groups |= {f"strength {strength}": [f"{name} {strength}" for name in SIGNS] for strength in STRENGTHS}
    groups[MACENKO] = [MACENKO]
    return {group: np.mean([stains[name] for name in names], axis=0) for group, names in groups.items()}


def report(section_id: str, models: dict[str, dict[str, np.ndarray]]) -> None:
    print(f"\n{section_id}:\n\n| stain | model | {' | '.join(COLUMNS)} |\n{'|---' * (2 + len(COLUMNS))}|")
    of_models = {name: grouped(stains) for name, stains in models.items()}
    for group in next(iter(of_models.values())):
        for name, of_group in of_models.items():
            print(f"| {group} | {name} | {' | '.join(f'{value:.3f}' for value in of_group[group])} |")
    print(flush=True)


def draw(path: Path, figures: dict[str, dict[str, dict[str, np.ndarray]]]) -> None:
    """Draws change and scores over strength, one row of panels for each section; dots are the four shifts."""
    shown = (0, 1, 3, 4)
    figure = new_figure(3.2 * len(shown), 2.8 * len(figures), "A section stained otherwise; dots are four shifts")
    axes = figure.subplots(len(figures), len(shown), squeeze=False)
    for row, (section_id, models) in zip(axes, figures.items(), strict=True):
        for panel, column in zip(row, shown, strict=True):
            for index, (name, stains) in enumerate(models.items()):
                means = [stains["unchanged"], *(grouped(stains)[f"strength {each}"] for each in STRENGTHS)]
                panel.plot((0, *STRENGTHS), [each[column] for each in means], color=f"C{index}", label=name)
                for strength in STRENGTHS:
                    dots = [stains[f"{sign} {strength}"][column] for sign in SIGNS]
                    panel.scatter([strength] * len(dots), dots, color=f"C{index}", s=8)
            panel.set(title=f"{section_id}: {COLUMNS[column]}", xlabel="strength of the shift")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=70)


if __name__ == "__main__":
    main()
