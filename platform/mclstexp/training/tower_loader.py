"""What the towers beside a program model are trained on: features, expression at a random depth, and program scores.

The spot tower sees each gene's difference from its section's mean at the same depth, over the gene's deviation within
sections: what is between sections tells nothing of the pairs within one. Differences are clipped as features are.
Depths are those of `thinning`, so that a spot is found however deep it was sequenced. A gene that a section does not
measure is 0, its mean.

Shapes: n spots of a sentence, G genes, R programs, F features.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mclstexp.config import Config
from mclstexp.data.genes import Normaliser
from mclstexp.data.measured import MeasuredSection, read_measured
from mclstexp.data.spots import Batch, Kept, SpotReader, each_row, joined, kept_spots, pad, rows_of
from mclstexp.model.standardise import CLIP
from mclstexp.model.thinning import shares_of, thinned
from mclstexp.model.towers import TwoTowers
from mclstexp.model.training_spots import TrainingSpots

_EPSILON = 1e-6


@dataclass(frozen=True)
class SpotInputs:
    """How expression becomes what the spot tower sees."""

    shares: Mapping[str, Sequence[float]]
    """Of the counts of each section, one for each depth; 1 first."""
    means: Mapping[str, np.ndarray]
    """Of each section at each of its depths, float32 (depths, G); NaN for a gene that it does not measure."""
    deviation: np.ndarray
    """Of each gene within sections, float32 (G,)."""

    def of(self, section_id: str, depth: int, expression: np.ndarray) -> np.ndarray:
        """Returns inputs, float32 (n, G), of a section's expression at one of its depths."""
        scores = np.nan_to_num((expression - self.means[section_id][depth]) / self.deviation)
        return scores.clip(-CLIP, CLIP).astype(np.float32)


def fit_spot_inputs(sections: Sequence[MeasuredSection], unit: Normaliser) -> SpotInputs:
    """Returns the inputs of training sections in a unit (`genes.input`)."""
    shares = {each.section_id: shares_of(each.totals) for each in sections}
    means, squares, num_measured = {}, np.zeros(()), np.zeros(())
    for section in sections:
        depths = thinned(section, unit)
        means[section.section_id] = np.stack([each.mean(axis=0) for each in depths]).astype(np.float32)
        squares = squares + np.nansum((depths[0] - depths[0].mean(axis=0)) ** 2, axis=0, dtype=np.float64)
        num_measured = num_measured + (~np.isnan(depths[0])).sum(axis=0)
    deviation = np.sqrt(squares / np.maximum(1, num_measured)) + _EPSILON
    return SpotInputs(shares, means, deviation.astype(np.float32))


@dataclass(frozen=True)
class TowerLoader:
    """The map function of towers' training: descriptor rows in, padded sentences out.

    Features are read in the worker itself, and kept; see `keeping`.
    """

    reader: SpotReader
    inputs: SpotInputs
    scores: Mapping[str, np.ndarray]
    """Program scores of each training section's spots, float32 (n, R); NaN: the spot is left out."""
    drop_spots: float
    seed: int
    num_draws: int = 0
    """As `SentenceLoader.num_draws`."""
    kept: Kept | None = None

    reads_features = True

    def keeping(self) -> "TowerLoader":
        """Returns a loader that keeps what it reads, for all epochs of one process."""
        return replace(self, kept=Kept())

    def __call__(self, rows: dict[str, np.ndarray]) -> Batch:
        """Returns sentence_id, features, expression, position, scores and mask of n sentences.

        The leading shape is (n, sentence_length).
        """
        names = ("section_id", "group", "sentence_id", "epoch")
        drawn = [self._drawn(*(row[name] for name in names)) for row in each_row(rows)]
        length = self.reader.manifest.sentence_length
        return joined([pad(spots, length) for spots in drawn]) | {"sentence_id": rows["sentence_id"]}

    def spots(self, section_id: str, group: int, depth: int = 0) -> Batch:
        """Returns expression, float32 (n, G), as the spot tower sees it, and position (n, 2) of all of a sentence."""

        def read() -> Batch:
            sentence = read_measured(self.reader, section_id, group)
            named = replace(sentence, section_id=f"{section_id}/{group}")  # so that each sentence has its own draws
            shares = [1.0, self.inputs.shares[section_id][depth]] if depth else [1.0]
            expression = thinned(named, self.reader.input, shares=shares)[-1]
            position = (sentence.xy_um - sentence.xy_um.mean(axis=0)).astype(np.float32)
            return {"expression": self.inputs.of(section_id, depth, expression), "position": position}

        return self._once((section_id, group, "spots", depth), read)

    def has_spots(self, section_id: str, group: int) -> bool:
        """Returns whether not all spots of a sentence are left out."""
        return not np.isnan(self.scores[section_id][self._rows(section_id, group), 0]).all()

    def _rows(self, section_id: str, group: int) -> slice:
        """Returns a sentence's rows of its section."""
        groups = self.reader.manifest.section(section_id).row_groups
        first = sum(part.num_rows for part in groups[:group])
        return slice(first, first + groups[group].num_rows)

    def _drawn(self, section_id: str, group: int, sentence_id: str, epoch: int) -> Batch:
        if group < 0:
            return self._none()
        scores = self.scores[section_id][self._rows(section_id, group)]
        name = zlib.crc32(sentence_id.encode())
        depth = int(np.random.default_rng([self.seed, epoch, name, 1]).integers(len(self.inputs.shares[section_id])))
        draw = (name + self.seed + epoch) % self.num_draws if self.num_draws else None
        spots = self.spots(section_id, group, depth) | self._features(section_id, group, draw) | {"scores": scores}
        keep = kept_spots(len(scores), self.drop_spots, self.seed, epoch, sentence_id)
        return rows_of(spots, keep[~np.isnan(scores[keep, 0])])

    def _features(self, section_id: str, group: int, draw: int | None) -> Batch:
        features = self.reader.features
        assert features is not None, "towers of programs read stored features"
        key = (section_id, group, "features", draw)
        return self._once(key, lambda: {"features": features.read(section_id, group, draw)})

    def _once(self, key: tuple[object, ...], read: Callable[[], Batch]) -> Batch:
        return read() if self.kept is None else self.kept.once(key, read)

    def _none(self) -> Batch:
        """Returns the arrays of a sentence without spots."""
        features = self.reader.features
        assert features is not None, "towers of programs read stored features"
        num_programs = next(iter(self.scores.values())).shape[1]
        widths = {"features": features.num_features, "expression": len(self.reader.columns), "position": 2}
        return {name: np.zeros((0, width), np.float32) for name, width in (widths | {"scores": num_programs}).items()}


def tower_loader(config: Config, reader: SpotReader, spots: TrainingSpots, left_out: int | None = None) -> TowerLoader:
    """Returns the loader of all training spots, or of those outside a fold."""
    scores = spots.scores.astype(np.float32)
    if left_out is not None:
        scores[spots.folds.fold == left_out] = np.nan
    ends = np.cumsum([len(each) for each in spots.sections])[:-1]
    by_section = dict(zip((each.section_id for each in spots.sections), np.split(scores, ends), strict=True))
    inputs, train = fit_spot_inputs(spots.sections, reader.input), config.train
    return TowerLoader(reader, inputs, by_section, train.drop_spots, train.seed, train.feature_draws)


@torch.inference_mode()
def spot_embeddings(network: TwoTowers, loader: TowerLoader, section_ids: Sequence[str]) -> np.ndarray:
    """Returns the embeddings of all spots of some sections at their own depth, float32 (N, E).

    Args:
        network: in evaluation mode, on the CPU.
        loader: of the sections.
        section_ids: training sections.
    """
    embeddings = []
    for section_id, group in loader.reader.manifest.sentences(section_ids):
        spots = {name: torch.from_numpy(values)[None] for name, values in loader.spots(section_id, group).items()}
        mask_1L = torch.ones(spots["position"].shape[:2], dtype=torch.bool)
        embeddings.append(network.embed_spots(spots["expression"], spots["position"], mask_1L)[0].float().numpy())
    return np.concatenate(embeddings)
