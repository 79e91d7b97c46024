"""What a model must beat, and the lines to read its scores by.

Floors are fitted on the model's training spots: train mean, zeros, ridges on colour and on image features, and the
probe of HEST-bench on a frozen encoder's. Features of an encoder that was not trained here are made once, beside the
tiles, and serve every model, fold and target; the first time costs a pass over all tiles for each network, which is
the price of an honest comparison. Reference lines read the held-out section itself, so a
model need not beat them: the library-size oracle shows how much of a correlation is density, and the noise ceiling how
much of it counting noise leaves.

Shapes: N training spots, M spots of a scored section, G genes, F features.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from mclstexp.config import Config, override
from mclstexp.data.features import FeatureReader
from mclstexp.data.genes import Normaliser
from mclstexp.data.measured import MeasuredSection, normalise_section
from mclstexp.data.schema import load_manifest
from mclstexp.data.spots import SpotReader
from mclstexp.evaluation.hest_probe import HestProbe
from mclstexp.evaluation.metrics import density_free_pearson, pearson_per_gene
from mclstexp.evaluation.ridge import RidgeFloor, measured_parts, training_groups
from mclstexp.model.embed import embed_sections, network_of
from mclstexp.model.extract import Wanted, can_store, features, wanted
from mclstexp.model.frozen import FrozenEncoder, frozen_encoder
from mclstexp.model.version import ModelVersion
from mclstexp.progress import Show
from mclstexp.settings import ModelConfig

SEED = 0
PROBE = "HEST-bench probe"
"""The floor by which HEST-bench ranks encoders, on the features of a frozen model."""
NUM_SPLITS = 10
"""Random halvings over which the noise ceiling averages, so that it depends less on the seed."""
Features = dict[str, dict[str, np.ndarray]]
"""Features of each section by the floor that sees them, (M, F)."""
Half = tuple[np.ndarray, np.ndarray]
"""Panel counts (M, G) and totals over all genes (M,), int64."""


class Floors:
    """The floors of one target, fitted on the training spots."""

    def __init__(self, training: Sequence[MeasuredSection], features: Features, target: Normaliser) -> None:
        """Fits the mean and, on each kind of features, a ridge or the probe; a gene where its section measures it.

        Raises:
            UserError: there are fewer than two training spots.
        """
        expression = np.concatenate([section.expression(target) for section in training])
        patient, section_id = (
            np.concatenate([np.full(len(section), getattr(section, name), object) for section in training])
            for name in ("patient_id", "section_id")
        )
        groups = training_groups(patient, section_id)
        self._features = features
        self._mean = np.zeros(expression.shape[1])
        for genes, spots in measured_parts(expression):
            self._mean[genes] = expression[np.ix_(spots, genes)].mean(axis=0, dtype=np.float64)
        self._fitted = {
            method: _fit(method, np.concatenate([of[section.section_id] for section in training]), expression, groups)
            for method, of in features.items()
        }

    def predict(self, section: MeasuredSection) -> dict[str, np.ndarray]:
        """Returns each floor's prediction of a section with known features, float32 (M, G), by the floor's name."""
        return {
            "train mean": constant(self._mean, len(section)),
            "zeros": constant(np.zeros(len(self._mean)), len(section)),
        } | {
            method: fitted.predict(self._features[method][section.section_id])
            for method, fitted in self._fitted.items()
        }

    def alphas(self) -> str:
        """Returns the penalty of each ridge in words."""
        ridges = {method: each for method, each in self._fitted.items() if isinstance(each, RidgeFloor)}
        return ", ".join(f"{method} {ridge.alpha:g}" for method, ridge in ridges.items())


def _fit(method: str, features: np.ndarray, expression: np.ndarray, groups: np.ndarray) -> RidgeFloor | HestProbe:
    if method == PROBE:
        return HestProbe(features, expression)
    return RidgeFloor(features, expression, groups)


def constant(values: np.ndarray, num_spots: int) -> np.ndarray:
    """Returns the same expression (G,), such as the training spots' mean, for every scored spot, float32 (M, G)."""
    return np.tile(values.astype(np.float32), (num_spots, 1))


def floor_encoders(config: ModelConfig, tile_size_px: int, floor_weights: str | None) -> dict[str, FrozenEncoder]:
    """Returns the model's image encoder with random weights and, where `floor_weights` names some, with those.

    Raises:
        ConfigError, ModelError: `floor_weights` cannot be loaded or do not fit.
    """
    weights = {"random": "random"} | ({"pretrained": floor_weights} if floor_weights else {})
    return {
        word: frozen_encoder(config.model_copy(update={"image_weights": source}), tile_size_px, SEED)
        for word, source in weights.items()
    }


def floor_features(
    model: ModelVersion,
    reader: SpotReader,
    section_ids: Sequence[str],
    floor_weights: str | None,
    show: Show,
    scratch: str,
) -> Features:
    """Returns what ridges and probe see: colour, and features of the model's encoder with its own and other weights.

    Features of encoders that were not trained here are made once and stored beside the tiles. A frozen encoder's own
    are those that the model was trained on; where `floor_weights` are its weights, they are one floor.

    Args:
        model: the version to score.
        reader: of the tile table.
        section_ids: all sections whose features are needed.
        floor_weights: `imagenet`, or a file: adds the pretrained encoder's features.
        show: takes progress.
        scratch: as `extract.features`.

    Raises:
        ConfigError, ModelError: `floor_weights` cannot be loaded or do not fit.
        TableError: stored features are damaged.
    """
    stored = _stored_features(model, reader, section_ids, floor_weights, show, scratch)
    colours = next(iter(stored.values()))
    name = model.config.model.image_encoder
    found: Features = {"ridge on RGB": {section: colours.read_colours(section) for section in section_ids}}
    for word, encoded in stored.items():
        found[f"ridge on {word} {name}"] = {section: encoded.read_section(section) for section in section_ids}
    if model.encoder is None:
        network, what = replace(network_of(model), head=None), f"tiles through trained {name}"
        embedded = embed_sections(reader.root, reader.manifest, section_ids, network, show, what)
        found[f"ridge on trained {name}"] = {section: arrays["embedding"] for section, arrays in embedded}
    else:
        found[PROBE] = found[f"ridge on frozen {name}"]
    return found


def make_floor_features(
    config: Config, tiles: str, section_ids: Sequence[str], floor_weights: str | None, show: Show
) -> None:
    """Stores what the floors of models of these settings will read, before several of them are scored at once.

    Where nothing can be stored beside the tiles, each of them computes it.

    Raises:
        ConfigError, ModelError: `floor_weights` cannot be loaded or do not fit.
    """
    manifest = load_manifest(tiles)
    if not can_store(tiles):
        return
    for encoder in floor_encoders(config.model, manifest.tile_size_px, floor_weights).values():
        features(tiles, manifest, section_ids, encoder, _plain(config), show)


def _stored_features(
    model: ModelVersion,
    reader: SpotReader,
    section_ids: Sequence[str],
    floor_weights: str | None,
    show: Show,
    scratch: str,
) -> dict[str, FeatureReader]:
    """Returns the features of every encoder that was not trained here, by what its weights are."""
    own, config = model.encoder, model.config
    asked = {
        word: (encoder, _plain(config))
        for word, encoder in floor_encoders(config.model, model.tile_size_px, floor_weights).items()
        if own is None or encoder.record.digest != own.record.digest
    }
    if own is not None:
        asked["frozen"] = (own, wanted(config))
    return {
        word: features(reader.root, reader.manifest, section_ids, encoder, blocks, show, scratch=scratch)
        for word, (encoder, blocks) in asked.items()
    }


def _plain(config: Config) -> Wanted:
    """Returns the blocks of a model's settings without augmented draws, which serve training alone."""
    return wanted(override(config, {"train.feature_draws": 0}))


def library_size(totals: np.ndarray, num_genes: int) -> np.ndarray:
    """Returns ln(1 + total) of each scored spot, the same for all genes, float32 (M, G): the library-size oracle.

    It reads the scored section's own totals over all genes, float (M,), and shows how much of a correlation is
    density. It is not in a unit of expression, so only its correlations mean something.
    """
    return np.tile(np.log1p(totals).astype(np.float32)[:, None], (1, num_genes))


def noise_ceiling(counts: np.ndarray, totals: np.ndarray, target: Normaliser, seed: int) -> pd.DataFrame:
    """Returns each gene's reliability and the correlation that predictions exceed only by chance, G rows.

    Counts are halved at random (`halve`), each half is normalised on its own, and r is the correlation of the halves
    over spots. Spearman and Brown's formula (1910, https://doi.org/10.1111/j.2044-8295.1910.tb00206.x) makes it the
    reliability of all counts, rho = 2r / (1 + |r|): how two measurements of the same section would correlate. The
    noise-free truth correlates with one measurement by sqrt(rho) (attenuation, Spearman 1904,
    https://doi.org/10.2307/1412159), so that this, not rho, is the ceiling of a correlation: the library-size oracle
    does exceed rho. Both formulas hold for additive noise, which counting noise under a logarithm is nearly.

    Counting noise is the only noise that one measurement shows: spill between spots and differences between sections
    are not in the ceiling, so a real model stays below it. Its errors are upwards: a negative estimate counts as 0, and
    under the logarithm halves of few counts resemble each other too much. In simulated sections it is within 0.02 of
    the best possible prediction from ten counts per spot and gene, and up to 0.09 above it at one to three.

    Args:
        counts: raw counts of the panel's genes in all spots of one section, whole numbers (M, G).
        totals: each spot's count over all genes, whole numbers (M,).
        target: the scored unit.
        seed: of the halvings.

    Returns:
        Columns `pcc` and `pcc_density_free`, the ceilings of these two scores (`scores.SCORES`), and `reliability` and
        `reliability_density_free`, which may be negative; float64, NaN where a half is constant in any halving.
    """
    rng = np.random.default_rng(seed)
    plain, density_free = np.zeros((2, NUM_SPLITS, counts.shape[1]))
    for split in range(NUM_SPLITS):
        first, second = (normalise_section(target, *half) for half in halve(counts, totals, rng))
        plain[split] = pearson_per_gene(first, second)
        density_free[split] = density_free_pearson(first, second, totals)
    reliability, reliability_free = (_spearman_brown(halves.mean(axis=0)) for halves in (plain, density_free))
    return pd.DataFrame(
        {
            "pcc": np.sqrt(reliability.clip(0)),
            "pcc_density_free": np.sqrt(reliability_free.clip(0)),
            "reliability": reliability,
            "reliability_density_free": reliability_free,
        }
    )


def halve(counts: np.ndarray, totals: np.ndarray, rng: np.random.Generator) -> tuple[Half, Half]:
    """Returns two halves of a section's counts: the toss of a coin decides for each molecule.

    Binomial thinning: halves of Poisson counts are independent Poisson counts of half the rate (Neufeld et al. 2022,
    https://doi.org/10.1093/biostatistics/kxac047). Genes outside the panel are halved in sum.

    Args:
        counts: raw counts of the panel's genes, whole numbers (M, G).
        totals: each spot's count over all genes, whole numbers (M,).
        rng: the source of randomness.
    """
    counts, totals = counts.astype(np.int64), totals.astype(np.int64)
    first = rng.binomial(counts, 0.5)
    first_totals = first.sum(axis=1) + rng.binomial(totals - counts.sum(axis=1), 0.5)
    return (first, first_totals), (counts - first, totals - first_totals)


def _spearman_brown(halves: np.ndarray) -> np.ndarray:
    """Returns the reliability of twice the length, in [-1, 1].

    The modulus changes nothing for positive correlations, and keeps chance's negative ones as large as its positive
    ones: without it two or three spots give minus infinity.
    """
    return 2 * halves / (1 + np.abs(halves))
