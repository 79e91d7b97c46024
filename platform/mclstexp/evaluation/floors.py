"""Floors fitted on a model's training spots: train mean, zeros, and ridges on colour and on frozen image features.

Features are embedded once and serve every target, in which the floors are fitted anew. Each network costs a pass over
all training tiles, which is the price of an honest comparison.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mclstexp import storage
from mclstexp.data.genes import Normaliser
from mclstexp.data.spots import Batch, SpotReader
from mclstexp.errors import UserError
from mclstexp.evaluation.metrics import density_free_pearson, pearson_per_gene
from mclstexp.evaluation.sections import MeasuredSection, normalise_section
from mclstexp.model.embed import ImageNetwork, embed_sections, encoder_network, network_of
from mclstexp.model.version import ModelVersion

SEED = 0
Show = Callable[[str, int, int], None]
"""Called with (what is embedded, spots done, spots in all)."""
Features = dict[str, dict[str, np.ndarray]]
"""Each ridge's features of each section, (N, F)."""


class Floors:
    """What was fitted on the training spots in one target."""

    def __init__(self, training: Sequence[MeasuredSection], features: Features, target: Normaliser) -> None:
        """Fits the mean and, on each kind of features, a ridge.

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
        self._mean = expression.mean(axis=0, dtype=np.float64)
        self._ridges = {
            method: RidgeFloor(
                np.concatenate([of_section[section.section_id] for section in training]), expression, groups
            )
            for method, of_section in features.items()
        }

    def predict(self, section: MeasuredSection) -> dict[str, np.ndarray]:
        """Returns each floor's prediction of a section whose features are known, float32 (N, G), by its name."""
        return {
            "train mean": constant(self._mean, len(section)),
            "zeros": constant(np.zeros(len(self._mean)), len(section)),
        } | {
            method: ridge.predict(self._features[method][section.section_id]) for method, ridge in self._ridges.items()
        }

    def alphas(self) -> str:
        """Returns the penalty of each ridge in words."""
        return ", ".join(f"{method} {ridge.alpha:g}" for method, ridge in self._ridges.items())


def floor_features(
    model: ModelVersion,
    reader: SpotReader,
    section_ids: Sequence[str],
    probe_weights: str | None,
    show: Show,
    feature_cache: str | None,
) -> Features:
    """Returns what ridges see: colour, and features of the model's encoder with random weights and as trained.

    Args:
        model: the version that is scored.
        reader: of the tile table.
        section_ids: all sections that features are needed of.
        probe_weights: `imagenet`, or a file: adds the pretrained encoder's features.
        show: told of progress.
        feature_cache: folder (local or s3://) that keeps the features of encoders that were not trained here: they
            are the same for all models of one encoder and tile. None: nothing is kept.

    Raises:
        ConfigError, ModelError: the probe's weights cannot be had or do not fit.
    """
    networks = {"random": encoder_network(model, "random", SEED)}
    if probe_weights:
        networks["pretrained"] = encoder_network(model, probe_weights, SEED)
    networks["trained"] = replace(network_of(model), head=None)
    features: Features = {}
    for word, network in networks.items():
        what = f"{word} {model.config.model.image_encoder}"
        if feature_cache is None or word == "trained":
            found = embed_shown(reader, section_ids, network, what, show)
        else:
            found = _embed_once(reader, section_ids, network, what, show, storage.join(feature_cache, word))
        features.setdefault("ridge on RGB", {name: arrays["rgb"] for name, arrays in found.items()})
        features[f"ridge on {what}"] = {name: arrays["embedding"] for name, arrays in found.items()}
    return features


def _embed_once(
    reader: SpotReader, section_ids: Sequence[str], network: ImageNetwork, what: str, show: Show, cache: str
) -> dict[str, Batch]:
    """Returns the same as `embed_shown`, read from where it is kept for the sections that are there."""
    table = {name: reader.manifest.section(name).sha256 for name in section_ids}
    places = {name: storage.join(cache, network.digest(), f"{name}-{sha256}.npz") for name, sha256 in table.items()}
    missing = [name for name, place in places.items() if not storage.exists(place)]
    for name, arrays in embed_shown(reader, missing, network, what, show).items() if missing else ():
        buffer = io.BytesIO()
        np.savez(buffer, embedding=arrays["embedding"], rgb=arrays["rgb"])
        storage.write(places[name], buffer.getvalue())
    return {name: dict(np.load(io.BytesIO(storage.read(place)))) for name, place in places.items()}


def embed_shown(
    reader: SpotReader, section_ids: Sequence[str], network: ImageNetwork, what: str, show: Show
) -> dict[str, Batch]:
    """Returns each section's `embedding` and `rgb`, as `embed_sections`; progress is shown under the name `what`."""
    total, done = sum(reader.manifest.section(name).num_spots for name in section_ids), 0

    def advance(num_spots: int) -> None:
        nonlocal done
        done += num_spots
        show(what, done, total)

    return dict(embed_sections(reader.root, reader.manifest, section_ids, network, advance))


MAX_RIDGE_SPOTS = 20_000
ALPHAS = tuple(10.0**power for power in range(-1, 7))
_MAX_FOLDS = 5
_NUM_BLOCKS = 4  # folds of a lone section: stretches of its curve, so that neighbours mostly stay together


def constant(values: np.ndarray, num_spots: int) -> np.ndarray:
    """Returns the same expression (G,), such as the training spots' mean, for every test spot, float32 (M, G)."""
    return np.tile(values.astype(np.float32), (num_spots, 1))


def library_size(totals: np.ndarray, num_genes: int) -> np.ndarray:
    """Returns ln(1 + total) of each test spot, the same for all genes, float32 (M, G).

    An oracle that reads the test section's own totals over all genes, float (M,): it shows how much of a correlation
    is density. It has no unit of expression, so that only correlations of it mean something.
    """
    return np.tile(np.log1p(totals).astype(np.float32)[:, None], (1, num_genes))


class RidgeFloor:
    """Ridge regression from standardised features to all genes at once (Hoerl and Kennard 1970).

    The penalty is the one of smallest squared error in cross-validation over the training groups.
    """

    def __init__(self, features: np.ndarray, target: np.ndarray, groups: np.ndarray, seed: int = 0) -> None:
        """Fits on features (N, F) and target (N, G) of spots in `groups` (N,), see `training_groups`."""
        if len(features) > MAX_RIDGE_SPOTS:
            kept = np.sort(np.random.default_rng(seed).choice(len(features), MAX_RIDGE_SPOTS, replace=False))
            features, target, groups = features[kept], target[kept], groups[kept]
        search = GridSearchCV(
            make_pipeline(StandardScaler(), Ridge()),
            {"ridge__alpha": ALPHAS},
            scoring="neg_mean_squared_error",
            cv=GroupKFold(min(_MAX_FOLDS, len(np.unique(groups)))),
        )
        self._fitted = search.fit(features.astype(np.float64), target, groups=groups)

    @property
    def alpha(self) -> float:
        """The penalty that was chosen."""
        return float(self._fitted.best_params_["ridge__alpha"])

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Returns predictions, float32 (M, G), for features (M, F)."""
        return np.asarray(self._fitted.predict(features.astype(np.float64)), np.float32)


def training_groups(patient_id: np.ndarray, section_id: np.ndarray) -> np.ndarray:
    """Returns the group of each training spot that cross-validation keeps together, (N,).

    Patients where there are at least two, else sections, else stretches of the one section in stored order.

    Raises:
        UserError: there are fewer than two training spots.
    """
    for groups in (patient_id, section_id):
        if len(np.unique(groups)) > 1:
            return groups
    if len(section_id) < 2:
        raise UserError(f"floors need at least 2 training spots, the training sections have {len(section_id)}")
    return np.arange(len(section_id)) * min(_NUM_BLOCKS, len(section_id)) // len(section_id)


NUM_SPLITS = 10
"""Random halvings over which a gene's correlation is averaged: the result hangs less on the seed."""
Half = tuple[np.ndarray, np.ndarray]
"""Panel counts (N, G) and totals over all genes (N,), int64."""


def noise_ceiling(counts: np.ndarray, totals: np.ndarray, target: Normaliser, seed: int) -> pd.DataFrame:
    """Returns each gene's reliability and the correlation that no prediction exceeds but by chance, G rows.

    Counts are halved at random (`halve`), each half is normalised on its own, and r is the correlation of the halves
    over spots. Spearman and Brown's formula (1910, https://doi.org/10.1111/j.2044-8295.1910.tb00206.x) makes it the
    reliability of all counts, rho = 2r / (1 + |r|): how two measurements of the same section would correlate. The
    noise-free truth correlates with one measurement by sqrt(rho) (attenuation, Spearman 1904,
    https://doi.org/10.2307/1412159), so that this, not rho, is the ceiling of a correlation: the library-size oracle
    does exceed rho. Both formulas hold for additive noise, which counting noise under a logarithm is nearly.

    Args:
        counts: raw counts of the panel's genes in all spots of one section, whole numbers (N, G).
        totals: each spot's count over all genes, whole numbers (N,).
        target: the unit that is scored.
        seed: of the halvings.

    Returns:
        Columns `pcc` and `pcc_density_free`, the ceilings of the two correlations in `scores.gene_scores`, and
        `reliability` and `reliability_density_free`, which may be negative; float64, NaN where a half is constant in
        any halving.
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
    """Returns two halves of a section's counts: each molecule goes to one of them by the toss of a coin.

    Binomial thinning: halves of Poisson counts are independent Poisson counts of half the rate (Neufeld et al. 2022,
    https://doi.org/10.1093/biostatistics/kxac047). Genes outside the panel are halved in sum.

    Args:
        counts: raw counts of the panel's genes, whole numbers (N, G).
        totals: each spot's count over all genes, whole numbers (N,).
        rng: the source of chance.
    """
    counts, totals = counts.astype(np.int64), totals.astype(np.int64)
    first = rng.binomial(counts, 0.5)
    first_totals = first.sum(axis=1) + rng.binomial(totals - counts.sum(axis=1), 0.5)
    return (first, first_totals), (counts - first, totals - first_totals)


def _spearman_brown(halves: np.ndarray) -> np.ndarray:
    """Returns the reliability of twice the length, in [-1, 1].

    The modulus changes nothing where halves agree, and keeps chance's negative correlations as large as its positive
    ones: without it two or three spots give minus infinity.
    """
    return 2 * halves / (1 + np.abs(halves))
