"""How good a model is on validation patients while it trains, by the same retrieval that predicts.

Image embedding is shared out among the ranks; rank 0 makes the bank's keys and scores, while the others wait
for it. That fits validation sets of minutes, not of hours (the group's time limit is five minutes).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch.distributed as dist

from mclstexp.data.spots import SpotReader, decode_tiles
from mclstexp.evaluation.metrics import heg_pcc, highest_genes, mean_by_patient
from mclstexp.model.bank import Bank, build_bank
from mclstexp.model.embed import image_network
from mclstexp.model.retrieval import neighbours, resolve, weighted_mean, weights
from mclstexp.model.towers import TwoTowers
from mclstexp.settings import RetrievalConfig
from mclstexp.training.step import RankState

VALIDATION_PCC = "validation_pcc"
"""Metric: PCC over the 50 highest genes of each validation section, mean over sections, then over patients."""
Place = tuple[str, int]
"""Section and sentence."""


@dataclass(frozen=True)
class ValidationSet:
    """What is scored, and what the bank is made of; crosses process borders."""

    reader: SpotReader
    train: tuple[str, ...]
    validation: tuple[str, ...]

    def places(self) -> list[Place]:
        """Returns the validation sentences in stored order."""
        manifest = self.reader.manifest
        return [(name, group) for name in self.validation for group in range(len(manifest.section(name).row_groups))]


def validate(trainee: RankState, data: ValidationSet) -> float:
    """Returns the model's `VALIDATION_PCC`; every rank must call it.

    k and the temperature of retrieval are those that score best where the configuration leaves them open, as a
    finished model's are.
    """
    if trainee.world_size > 1:
        for buffer in trainee.model.buffers():  # each rank has batch statistics of its own; those of rank 0 are saved
            dist.broadcast(buffer, src=0)
    embedded = _gathered(trainee, _embed_share(trainee, data))
    scores = [_score(trainee, data, embedded) if trainee.rank == 0 else float("nan")]
    if trainee.world_size > 1:
        dist.broadcast_object_list(scores, src=0)
    return scores[0]


def _score(trainee: RankState, data: ValidationSet, embedded: Mapping[Place, np.ndarray]) -> float:
    spots = {name: data.reader.read_section(name) for name in data.validation}
    said = {name: np.concatenate([embedded[place] for place in data.places() if place[0] == name]) for name in spots}
    sections = [
        ValidationSection(data.reader.manifest.section(name).patient_id, said[name], spots[name]["payload"])
        for name in spots
    ]
    if not isinstance(trainee.model, TwoTowers):
        scores = np.array([heg_pcc(section.truth, section.queries) for section in sections])
        return float(mean_by_patient([section.patient_id for section in sections], scores))
    model = copy.deepcopy(trainee.model).cpu().float().eval()
    random_spots = trainee.config.train.batching == "random_spots"
    bank = build_bank(model, data.reader, data.train, random_spots, lambda: None)
    return best_score(sections, bank, trainee.config.retrieval)


def _embed_share(trainee: RankState, data: ValidationSet) -> dict[Place, np.ndarray]:
    """Returns what the rank's own sentences are embedded as (or, in direct regression, predicted)."""
    config, size_px = trainee.config, data.reader.manifest.tile_size_px
    weights = trainee.model.state_dict()
    embed = image_network(config.model, size_px, weights, config.train.precision).build(trainee.device)
    share = data.places()[trainee.rank :: trainee.world_size]
    return {place: _embedded(embed, data.reader, place) for place in share}


def _embedded(embed: Callable[[np.ndarray], np.ndarray], reader: SpotReader, place: Place) -> np.ndarray:
    return embed(decode_tiles(reader.read_encoded(*place)[1], reader.manifest.tile_size_px))


def _gathered(trainee: RankState, share: dict[Place, np.ndarray]) -> dict[Place, np.ndarray]:
    if trainee.world_size == 1:
        return share
    shares: list[dict[Place, np.ndarray]] = [{} for _ in range(trainee.world_size)]
    dist.all_gather_object(shares, share)
    return {place: values for part in shares for place, values in part.items()}


TRIED_K = (10, 20, 50, 100, 200, 400)
TRIED_TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class ValidationSection:
    """A section of a validation patient."""

    patient_id: str
    queries: np.ndarray
    """Image embeddings, float32 (Q, D)."""
    truth: np.ndarray
    """Measured expression in the bank's unit, (Q, G)."""


def choose(sections: Sequence[ValidationSection], bank: Bank, config: RetrievalConfig) -> RetrievalConfig:
    """Returns the settings with the `k` and `temperature` of the highest mean PCC over the 50 highest genes.

    As on the score card, correlations are taken within a section over its own highest genes, and averaged by patient.
    Only what the configuration leaves open is chosen.
    """
    tried, means = _tried(sections, bank, config)
    return tried[int(means.argmax())]


def best_score(sections: Sequence[ValidationSection], bank: Bank, config: RetrievalConfig) -> float:
    """Returns the mean PCC over the 50 highest genes under the settings that `choose` would return."""
    return float(_tried(sections, bank, config)[1].max())


def _tried(
    sections: Sequence[ValidationSection], bank: Bank, config: RetrievalConfig
) -> tuple[list[RetrievalConfig], np.ndarray]:
    """Returns all settings that a configuration leaves open, and each one's score."""
    fixed = resolve(config, len(bank))
    all_k = [config.k] if config.k else [k for k in TRIED_K if k <= len(bank)] or [len(bank)]
    open_temperature = config.weighting == "softmax" and config.temperature is None
    temperatures = TRIED_TEMPERATURES if open_temperature else (fixed.temperature,)
    tried = [
        fixed.model_copy(update={"k": k, "temperature": temperature}) for k, temperature in product(all_k, temperatures)
    ]
    scores = np.array([_scores(section, bank, tried, max(all_k)) for section in sections])
    return tried, mean_by_patient([section.patient_id for section in sections], scores)


def _scores(section: ValidationSection, bank: Bank, tried: Sequence[RetrievalConfig], most: int) -> list[float]:
    """Returns the mean PCC over a section's own highest genes under each of the tried settings."""
    genes = highest_genes(section.truth)
    payload = bank.payload[:, genes]
    best = neighbours(section.queries, bank, tried[0].model_copy(update={"k": most}))
    means = []
    for config in tried:
        found = best.first(config.k or most)
        said = weighted_mean(found.ids, weights(found, config), payload)
        means.append(heg_pcc(section.truth[:, genes], said))
    return means
