"""What a model must beat, and the lines to read its scores by.

Floors are fitted on the model's training spots: train mean, zeros, ridges (`model.probe`) on colour and on features of
the image encoder, and the probe of HEST-bench. Of a frozen encoder, ridge and probe see what encoders are usually
probed by, the preset's own pooled feature of the tile alone; where the model sees more layers or views, another ridge
sees all of them. Features of an encoder that was not trained here are made once, beside the tiles, and serve
every model, fold and target; the first time costs a pass over all tiles for each network, which is the price of an
honest comparison.

Reference lines read the held-out section itself, so a model need not beat them: the library-size oracle shows how much
of a correlation is density, and the noise ceiling how much of it counting noise leaves.

Shapes: N training spots, M spots of a scored section, G genes, F features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from mclstexp.config import Config, override
from mclstexp.data.genes import Normaliser
from mclstexp.data.measured import MeasuredSection, normalise_section
from mclstexp.data.schema import load_manifest
from mclstexp.data.spots import SpotReader
from mclstexp.evaluation.hest_probe import HestProbe
from mclstexp.evaluation.metrics import density_free_pearson, pearson_per_gene
from mclstexp.model.embed import embed_sections, network_of
from mclstexp.model.encoders import layer_widths
from mclstexp.model.extract import Wanted, can_store, features, wanted
from mclstexp.model.frozen import FrozenEncoder, frozen_encoder
from mclstexp.model.probe import Probe, measured_parts
from mclstexp.model.version import ModelVersion
from mclstexp.progress import Show
from mclstexp.settings import ModelConfig

SEED = 0
HEST_PROBE = "HEST-bench probe"
"""The floor by which HEST-bench ranks encoders, on the own pooled feature of a frozen model's."""
ALL_FEATURES = "ridge on the model's features"
"""The floor that sees all layers and views of a frozen model, where these are more than its encoder's own feature."""
NUM_SPLITS = 10
"""Random halvings over which the noise ceiling averages, so that it depends less on the seed."""
Asked = dict[str, tuple[FrozenEncoder, Wanted]]
"""Encoders that were not trained here, and what is wanted of each, by the floor that sees it."""
Half = tuple[np.ndarray, np.ndarray]
"""Panel counts (M, G) and totals (M,), int64."""


@dataclass(frozen=True)
class Seen:
    """The features that a floor sees."""

    sections: Mapping[str, np.ndarray]
    """Of each section, (M, F)."""
    widths: tuple[int, ...]
    """Of the blocks, such as layers and views, that the features consist of; their sum is F."""


class Floors:
    """The floors of one target, fitted on the training spots."""

    def __init__(self, training: Sequence[MeasuredSection], features: Mapping[str, Seen], target: Normaliser) -> None:
        """Fits the mean and, on what each floor sees, a ridge or the probe; a gene where its section measures it."""
        expression = np.concatenate([section.expression(target) for section in training])
        names = [section.section_id for section in training]
        self._features = features
        self._mean = np.zeros(expression.shape[1])
        for genes, spots in measured_parts(expression):
            self._mean[genes] = expression[np.ix_(spots, genes)].mean(axis=0, dtype=np.float64)
        self._fitted = {method: _fit(method, seen, names, expression) for method, seen in features.items()}

    def predict(self, section: MeasuredSection) -> dict[str, np.ndarray]:
        """Returns each floor's prediction of a section with known features, float32 (M, G), by the floor's name."""
        return {
            "train mean": constant(self._mean, len(section)),
            "zeros": constant(np.zeros(len(self._mean)), len(section)),
        } | {
            method: fitted.predict(self._features[method].sections[section.section_id])
            for method, fitted in self._fitted.items()
        }

    def alphas(self) -> str:
        """Returns the penalty of each ridge in words; a range where genes measured by different spots have several."""
        ridges = {method: each.alphas for method, each in self._fitted.items() if isinstance(each, Probe)}
        return ", ".join(f"{method} {_range(alphas)}" for method, alphas in ridges.items())


def _fit(method: str, seen: Seen, names: Sequence[str], expression: np.ndarray) -> Probe | HestProbe:
    features = np.concatenate([seen.sections[name] for name in names])
    if method == HEST_PROBE:
        return HestProbe(features, expression)
    return Probe(features, expression, seen.widths)


def _range(alphas: Sequence[float]) -> str:
    """Returns the lowest and the highest of some penalties in words."""
    low, high = (f"{limit(alphas):.0f}" for limit in (min, max))
    return low if low == high else f"{low} to {high}"


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
) -> dict[str, Seen]:
    """Returns what ridges and probe see, by floor: colour, and features of the model's encoder with several weights.

    Features of encoders that were not trained here are made once and stored beside the tiles; where `floor_weights`
    are a frozen model's own, they are one floor.

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
    root, manifest, config = reader.root, reader.manifest, model.config
    name = config.model.image_encoder
    stored = {
        method: features(root, manifest, section_ids, encoder, blocks, show, scratch=scratch)
        for method, (encoder, blocks) in _asked(config, model.tile_size_px, model.encoder, floor_weights).items()
    }
    colours = next(iter(stored.values()))
    found = {"ridge on RGB": Seen({section: colours.read_colours(section) for section in section_ids}, (6,))}
    for method, encoded in stored.items():
        found[method] = Seen({section: encoded.read_section(section) for section in section_ids}, encoded.widths)
    if model.encoder is not None:
        return found | {HEST_PROBE: found[f"ridge on frozen {name}"]}
    network, what = replace(network_of(model), head=None), f"tiles through trained {name}"
    embedded = embed_sections(root, manifest, section_ids, network, show, what)
    widths = layer_widths(name, model.tile_size_px, config.model.image_layers)[1] * len(config.model.image_views)
    trained = Seen({section: arrays["embedding"] for section, arrays in embedded}, widths)
    return found | {f"ridge on trained {name}": trained}


def make_floor_features(
    config: Config, tiles: str, section_ids: Sequence[str], floor_weights: str | None, show: Show
) -> None:
    """Stores what the floors of models of these settings will read, before several of them are scored at once.

    Where nothing can be stored beside the tiles, each of them computes it.

    Raises:
        ConfigError, ModelError: `floor_weights` cannot be loaded or do not fit.
    """
    if not can_store(tiles):
        return
    manifest, model = load_manifest(tiles), config.model
    own = frozen_encoder(model, manifest.tile_size_px, config.train.seed) if model.freeze_encoder else None
    for encoder, blocks in _asked(config, manifest.tile_size_px, own, floor_weights).values():
        features(tiles, manifest, section_ids, encoder, blocks, show)


def _asked(config: Config, tile_size_px: int, own: FrozenEncoder | None, floor_weights: str | None) -> Asked:
    """Returns the encoders that floors see beside a trained one; `own` is a frozen model's."""
    name, blocks = config.model.image_encoder, _plain(config)
    asked = {
        f"ridge on {word} {name}": (encoder, blocks)
        for word, encoder in floor_encoders(config.model, tile_size_px, floor_weights).items()
        if own is None or encoder.record.digest != own.record.digest
    }
    if own is None:
        return asked
    probed, view = own.with_own_layer(), ("image",)
    if (own.record.layers, blocks.views) != (probed.record.layers, view):
        asked[ALL_FEATURES] = own, blocks  # first, so that the probe's, which are mostly among them, are found
    return asked | {f"ridge on frozen {name}": (probed, replace(blocks, views=view))}


def _plain(config: Config) -> Wanted:
    """Returns the blocks of a model's settings without augmented draws, which serve training alone."""
    return wanted(override(config, {"train.feature_draws": 0}))


def library_size(totals: np.ndarray, num_genes: int) -> np.ndarray:
    """Returns ln(1 + total) of each scored spot, the same for all genes, float32 (M, G): the library-size oracle.

    It reads the scored section's own totals, float (M,), and shows how much of a correlation is
    density. It is not in a unit of expression, so only its correlations mean something.
    """
    return np.tile(np.log1p(totals).astype(np.float32)[:, None], (1, num_genes))


def noise_ceiling(
    counts: np.ndarray, totals: np.ndarray, target: Normaliser, seed: int, in_total: np.ndarray | bool = True
) -> pd.DataFrame:
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
        totals: each spot's count over the genes of the total, whole numbers (M,).
        target: the scored unit.
        seed: of the halvings.
        in_total: whether each gene of the panel is part of the totals, bool (G,), or for all.

    Returns:
        Columns `pcc` and `pcc_density_free`, the ceilings of these two scores (`scores.SCORES`), and `reliability` and
        `reliability_density_free`, which may be negative; float64, NaN where a half is constant in any halving.
    """
    rng = np.random.default_rng(seed)
    plain, density_free = np.zeros((2, NUM_SPLITS, counts.shape[1]))
    for split in range(NUM_SPLITS):
        first, second = (normalise_section(target, *half) for half in halve(counts, totals, rng, in_total))
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


def halve(
    counts: np.ndarray, totals: np.ndarray, rng: np.random.Generator, in_total: np.ndarray | bool = True
) -> tuple[Half, Half]:
    """Returns two halves of a section's counts: the toss of a coin decides for each molecule.

    Binomial thinning: halves of Poisson counts are independent Poisson counts of half the rate (Neufeld et al. 2022,
    https://doi.org/10.1093/biostatistics/kxac047). Genes outside the panel are halved in sum.

    Args:
        counts: raw counts of the panel's genes, whole numbers (M, G).
        totals: each spot's count over the genes of the total, whole numbers (M,).
        rng: the source of randomness.
        in_total: whether each gene of the panel is part of the totals, bool (G,), or for all.
    """
    counts, totals = counts.astype(np.int64), totals.astype(np.int64)
    first = rng.binomial(counts, 0.5)
    others = totals - counts.sum(axis=1, where=in_total)
    first_totals = first.sum(axis=1, where=in_total) + rng.binomial(others, 0.5)
    return (first, first_totals), (counts - first, totals - first_totals)


def _spearman_brown(halves: np.ndarray) -> np.ndarray:
    """Returns the reliability of twice the length, in [-1, 1].

    The modulus changes nothing for positive correlations, and keeps chance's negative ones as large as its positive
    ones: without it two or three spots give minus infinity.
    """
    return 2 * halves / (1 + np.abs(halves))
