"""What `default` reaches beside the probe, and what each of its parts is worth.

    python benchmarks/programs.py WEIGHTS TILES [TILES ...] [--only METHOD ...] [--panel FILE]

Each tile table needs wide views, as `jobs/prepare.py` cuts them, and at least two patients. Features are made where
they are missing. One patient is left out after the other; tables whose largest patient has several sections also
leave out each of these alone. Prints Markdown: scores as on score cards (means over patients, or sections), MSE as a
share of the train mean's, PCC all beside the probe's with a 95 % interval of the difference (spatial blocks within
sections drawn anew; with two patients it tells how sure the figure is on these slides, not on the next patient).

Towers are trained in this process, on one core, by the steps of the training workers; with each of `SEEDS`.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from sklearn.cluster import KMeans  # noqa: E402

from mclstexp.cluster import connect  # noqa: E402
from mclstexp.config import Config, load_config, override  # noqa: E402
from mclstexp.data.features import FeatureReader  # noqa: E402
from mclstexp.data.genes import Normaliser, normalisers  # noqa: E402
from mclstexp.data.measured import MeasuredSection, read_measured  # noqa: E402
from mclstexp.data.panel import fit_panel  # noqa: E402
from mclstexp.data.schema import IMAGE, IMAGE_WIDE, Manifest, load_manifest, require_views  # noqa: E402
from mclstexp.data.spots import SpotReader, make_reader  # noqa: E402
from mclstexp.data.stream import StreamShare  # noqa: E402
from mclstexp.evaluation.metrics import highest_genes  # noqa: E402
from mclstexp.model.extract import features, wanted  # noqa: E402
from mclstexp.model.fit_blend import fit_program_model  # noqa: E402
from mclstexp.model.frozen import frozen_encoder  # noqa: E402
from mclstexp.model.probe import Probe  # noqa: E402
from mclstexp.model.programs import fit_programs  # noqa: E402
from mclstexp.model.retrieval import resolve  # noqa: E402
from mclstexp.model.spot_keys import TrainedTowers  # noqa: E402
from mclstexp.model.towers import TwoTowers, build_network  # noqa: E402
from mclstexp.model.training_spots import TrainingSpots  # noqa: E402
from mclstexp.training.feed import SentenceFeed, open_batches, tower_feed  # noqa: E402
from mclstexp.training.fit_programs import embedded, program_bank  # noqa: E402
from mclstexp.training.fitted_parts import fitted_parts  # noqa: E402
from mclstexp.training.run import planned, with_views  # noqa: E402
from mclstexp.training.share import share_of  # noqa: E402
from mclstexp.training.step import lone_rank, train_step  # noqa: E402
from mclstexp.training.tower_loader import tower_loader  # noqa: E402
from mclstexp.training.training_sections import feature_blocks  # noqa: E402

DRAWS = 200
SEEDS = (0, 1, 2)
CHANGED = {
    "fit_programs": "training_spots",
    "thinned_target": "training_spots",
    **dict.fromkeys(("SHARE", "SHARES", "TOWER_SHARE", "TOWER_SHARES"), "choose_blend"),
}
"""Names that variants change, and their modules in `mclstexp.model`."""
Units = dict[str, list[np.ndarray]]
"""`scores` of sections by what is averaged: the patient, or the section."""
SCORES = ("PCC all", "PCC HEG50", "density-free", "MSE / train mean's")


@dataclass(frozen=True)
class Variant:
    """The method with one thing changed."""

    views: int = 2
    layers: int = 3
    """Last layers of a view that are seen."""
    neighbours: bool = True
    changes: tuple[tuple[str, object], ...] = ()
    """Names in `CHANGED`, and what they are instead."""
    level: float | None = None
    """Share of the level; None: as fitted."""
    seed: int | None = None
    """Of the towers; None: there are none."""
    within: bool = False
    """Whether features are z-scored within their section, instead of by training statistics."""


_ALONE = (("SHARE", 1.0), ("SHARES", (1.0,)))
VARIANTS = {
    **{f"default, seed {seed}": Variant(seed=seed) for seed in SEEDS},
    "towers' retrieval alone": Variant(seed=0, changes=(*_ALONE, ("TOWER_SHARE", 1.0), ("TOWER_SHARES", (1.0,)))),
    "no towers": Variant(),
    "all components instead of 16": Variant(changes=(("fit_programs", partial(fit_programs, num_programs=10_000)),)),
    "target not thinned": Variant(changes=(("thinned_target", lambda section, target: section.expression(target)),)),
    "no neighbours": Variant(neighbours=False),
    "no wide view": Variant(views=1),
    "no context: neither": Variant(views=1, neighbours=False),
    "last layer of the tile alone": Variant(views=1, layers=1, neighbours=False),
    "ridge alone": Variant(changes=(("SHARE", 0.0), ("SHARES", (0.0,)))),
    "retrieval alone": Variant(changes=_ALONE),
    "z-scores within the section": Variant(within=True),
    "level of the train mean": Variant(level=0.0),
    "level of the probe": Variant(level=1.0),
}


@dataclass(frozen=True)
class Fold:
    """What is trained on and what is left out."""

    protocol: str
    train: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A tile table with its stored features, and the sections of one fold."""

    config: Config
    root: str
    manifest: Manifest
    stored: FeatureReader

    @property
    def target(self) -> Normaliser:
        """The unit of expression."""
        return normalisers(self.config.genes)[1]

    def reader(self, fold: Fold) -> SpotReader:
        """Returns the reader over the panel of the training sections."""
        panel = fit_panel(self.root, self.manifest, fold.train, self.config.genes)
        reader = make_reader(self.root, self.manifest, panel, self.config, fold.train)
        return replace(reader, features=self.stored)

    def columns(self, variant: Variant) -> np.ndarray:
        """Returns the columns of the features that a variant sees, int64."""
        widths, ends = self.stored.manifest.encoder.widths, np.cumsum(self.stored.manifest.encoder.widths)
        first = ends[-1] - sum(widths[-variant.layers :])
        return np.concatenate([np.arange(first, ends[-1]) + view * ends[-1] for view in range(variant.views)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="weights of model.image_encoder in default.yaml, here DenseNet-121")
    parser.add_argument("tiles", nargs="+", help="tile tables")
    parser.add_argument("--only", action="append", help="methods, by the start of their names; may be repeated [all]")
    parser.add_argument("--panel", default="hvg", help="genes.panel, such as a file of genes [hvg]")
    parsed = parser.parse_args()
    config = override(
        load_config(ROOT / "jobs" / "configs" / "default.yaml"),
        {"model.image_weights": parsed.weights, "train.precision": "fp32", "genes.panel": parsed.panel},
    )
    connect(config, {})
    chosen = {name: each for name, each in VARIANTS.items() if not parsed.only or name.startswith(tuple(parsed.only))}
    for tiles in parsed.tiles:
        report(open_table(tiles, config), chosen)


def open_table(tiles: str, config: Config) -> Table:
    """Returns a tile table with its features."""
    manifest = load_manifest(tiles)
    require_views(manifest, (IMAGE, IMAGE_WIDE))
    config = with_views(config, manifest)
    encoder = frozen_encoder(config.model, manifest.tile_size_px, config.train.seed)
    names = [entry.section_id for entry in manifest.sections if entry.measured]
    return Table(config, tiles, manifest, features(tiles, manifest, names, encoder, wanted(config)))


def folds(manifest: Manifest) -> list[Fold]:
    """Returns the folds of a table: each patient left out, and each section of the patient with the most."""
    patient_of = {entry.section_id: entry.patient_id for entry in manifest.sections if entry.measured}
    patients = sorted(set(patient_of.values()))

    def left_out(protocol: str, test: Sequence[str]) -> Fold:
        return Fold(protocol, tuple(name for name in patient_of if name not in test), tuple(test))

    of = {patient: [name for name, each in patient_of.items() if each == patient] for patient in patients}
    found = [left_out("patients apart", names) for names in of.values()]
    most = max(of.values(), key=len)
    return found + [left_out("section left out", [name]) for name in most if len(most) > len(patients)]


def report(table: Table, variants: Mapping[str, Variant]) -> None:
    """Prints the scores of variants on one table."""
    scored: dict[str, dict[str, Units]] = {}
    for fold in folds(table.manifest):
        reader = table.reader(fold)
        train, test = ([read_measured(reader, name) for name in names] for names in (fold.train, fold.test))
        answers = {"probe": probe(table, train, test)}
        for name, variant in variants.items():
            answers[name] = predicted(table, variant, reader, train, test)
            print(f"{Path(table.root).name}: {fold.protocol}, {', '.join(fold.test)}: {name}", file=sys.stderr)
        truth = np.concatenate([section.expression(table.target) for section in train])
        for method, values in answers.items():
            for section, value in zip(test, values, strict=True):
                unit = section.section_id if fold.protocol.startswith("section") else section.patient_id
                rows = scored.setdefault(fold.protocol, {}).setdefault(method, {}).setdefault(unit, [])
                rows.append(scores(section, section.expression(table.target), value, np.nanmean(truth, axis=0)))
    for protocol, methods in scored.items():
        print(f"\n{Path(table.root).name}, {protocol}:\n")
        print(f"| method | {' | '.join(SCORES)} | PCC all beside the probe's |\n{'|---' * 6}|")
        for method, units in methods.items():
            print(f"| {method} | {' | '.join(cells(units, methods['probe']))} |")
    print(flush=True)


def probe(table: Table, train: Sequence[MeasuredSection], test: Sequence[MeasuredSection]) -> list[np.ndarray]:
    """Returns the probe's prediction of each left-out section, (N, G): a linear one on the tile's last layer."""
    columns = table.columns(VARIANTS["last layer of the tile alone"])
    seen = np.concatenate([table.stored.read_section(section.section_id)[:, columns] for section in train])
    fitted = Probe(seen, np.concatenate([section.expression(table.target) for section in train]))
    return [fitted.predict(table.stored.read_section(section.section_id)[:, columns]) for section in test]


def predicted(
    table: Table,
    variant: Variant,
    reader: SpotReader,
    train: Sequence[MeasuredSection],
    test: Sequence[MeasuredSection],
) -> list[np.ndarray]:
    """Returns a variant's prediction of each left-out section, (N, G)."""
    columns = table.columns(variant)
    blocks = feature_blocks(table.stored.manifest.encoder.widths[-variant.layers :], variant.views)
    blocks = blocks if variant.neighbours else replace(blocks, near=())

    def read(section_id: str) -> np.ndarray:
        values = table.stored.read_section(section_id)[:, columns]
        return (values - values.mean(axis=0)) / (values.std(axis=0) + 1e-6) if variant.within else values

    spots = TrainingSpots(train, read, blocks, table.target)
    with ExitStack() as changed:
        for name, value in variant.changes:
            changed.enter_context(patch(f"mclstexp.model.{CHANGED[name]}.{name}", value))
        towers = None if variant.seed is None else train_towers(table.config, reader, spots, variant.seed)
        fitted = fit_program_model(spots, table.config.retrieval, towers)
    model = fitted.model
    if variant.level is not None:
        model = replace(model, level=replace(model.level, share=variant.level))
    bank = model.bank(program_bank(spots, fitted.keys))
    retrieval = resolve(table.config.retrieval, len(bank))
    answers = [model.answer(read(section.section_id), section.xy_um, bank, retrieval) for section in test]
    return [answer.prediction for answer in answers]


def train_towers(config: Config, reader: SpotReader, spots: TrainingSpots, seed: int) -> TrainedTowers:
    """Returns towers of all training spots, and those without each fold."""
    names = [section.section_id for section in spots.sections]
    config = planned(override(config, {"train.seed": seed}), reader.manifest, names)
    fitted = fitted_parts(config, reader, names)
    all_folds = (None, *range(spots.folds.num_folds))
    feeds = [tower_feed(config, tower_loader(config, reader, spots, fold)) for fold in all_folds]
    networks = [train_network(config, reader, feed, fitted) for feed in feeds]
    return embedded(networks, spots, tower_loader(config, reader, spots).keeping())


def train_network(config: Config, reader: SpotReader, feed: SentenceFeed, fitted: dict[str, torch.Tensor]) -> TwoTowers:
    """Returns two towers, trained as a lone training worker trains them."""
    torch.manual_seed(config.train.seed)
    torch.set_num_threads(1)
    network = build_network(config.model, len(reader.columns), 0, reader.manifest.tile_size_px)
    assert isinstance(network, TwoTowers), "a program model's network is two towers"
    network.load_state_dict(network.state_dict() | fitted)
    rank_state = lone_rank(config, network, config.train.epochs * feed.num_steps())
    state = rank_state.state
    epochs = (feed.rows(epoch, [], 0, 1) for epoch in range(config.train.epochs))
    batches = open_batches(feed, epochs, 1, StreamShare(1, 0, None))
    for state.epoch in range(config.train.epochs):
        for batch in islice(batches, feed.num_steps()):
            train_step(rank_state, share_of(batch))
            state.step += 1
    return network.eval()


def scores(section: MeasuredSection, truth: np.ndarray, value: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Returns SCORES of one section, float64 (1 + DRAWS, 4): of all spots, then of spatial blocks drawn anew."""
    num_blocks = int(np.clip(len(section) // 20, 3, 12))
    block = KMeans(num_blocks, n_init=2, random_state=0).fit_predict(section.xy_um)
    rng = np.random.default_rng(len(section))
    drawn = rng.multinomial(num_blocks, np.full(num_blocks, 1 / num_blocks), DRAWS)
    weight = np.vstack([np.ones(len(section)), drawn[:, block]])
    size = np.log1p(section.totals) - np.log1p(section.totals).mean()

    def without_size(values: np.ndarray) -> np.ndarray:
        centred = values - values.mean(axis=0)
        return centred - size[:, None] * (size @ centred / (size @ size))

    truth, value = truth.astype(np.float64), value.astype(np.float64)
    plain = correlations(weight, truth, value)
    free = correlations(weight, without_size(truth), without_size(value))
    error, of_mean = (weight @ np.nanmean((each - truth) ** 2, axis=1) for each in (value, mean))
    highest = np.nan_to_num(plain[:, highest_genes(truth)])
    return np.stack(
        [np.nanmean(plain, axis=1), highest.mean(axis=1), np.nanmean(free, axis=1), error / of_mean], axis=1
    )


def correlations(weight: np.ndarray, truth: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Returns each gene's correlation over spots with weights (D, N), float64 (D, G); NaN where one is constant."""
    total = weight.sum(axis=1, keepdims=True)
    t, p = weight @ truth / total, weight @ value / total
    covariance = weight @ (truth * value) / total - t * p
    variance = (weight @ truth**2 / total - t**2) * (weight @ value**2 / total - p**2)
    return np.where(variance > 1e-18, covariance / np.sqrt(np.maximum(variance, 1e-18)), np.nan)


def cells(units: Units, floor: Units) -> list[str]:
    """Returns a method's scores, and its PCC all divided by the probe's with the interval of the difference."""
    own, probe = (np.mean([np.mean(rows, axis=0) for rows in each.values()], axis=0) for each in (units, floor))
    low, high = np.percentile(own[1:, 0] - probe[1:, 0], [2.5, 97.5])
    ratio = f"{own[0, 0] / probe[0, 0]:.2f} times ({own[0, 0] - probe[0, 0]:+.3f}, {low:+.3f} to {high:+.3f})"
    return [*(f"{score:.3f}" for score in own[0]), ratio]


if __name__ == "__main__":
    main()
