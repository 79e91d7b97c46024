"""How good a model is on validation patients while it trains, by the same retrieval that predicts.

Image embedding is shared out among the ranks; rank 0 makes the bank's keys and scores, while the others wait
for it. That fits validation sets of minutes, not of hours (the group's time limit is five minutes).
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from mclstexp.data.spots import SpotReader, decode_tiles
from mclstexp.evaluation.metrics import heg_pcc, mean_by_patient
from mclstexp.inference.bank import build_bank
from mclstexp.inference.embed import image_network
from mclstexp.inference.retrieval import ValidationSection, best_score
from mclstexp.model.towers import TwoTowers
from mclstexp.training.step import Trainee

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


def validate(trainee: Trainee, data: ValidationSet) -> float:
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


def _score(trainee: Trainee, data: ValidationSet, embedded: Mapping[Place, np.ndarray]) -> float:
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


def _embed_share(trainee: Trainee, data: ValidationSet) -> dict[Place, np.ndarray]:
    """Returns what the rank's own sentences are embedded as (or, in direct regression, predicted)."""
    config, size_px = trainee.config, data.reader.manifest.tile_size_px
    weights = trainee.model.state_dict()
    embed = image_network(config.model, size_px, weights, config.train.precision).build(trainee.device)
    share = data.places()[trainee.rank :: trainee.world_size]
    return {place: _embedded(embed, data.reader, place) for place in share}


def _embedded(embed: Callable[[np.ndarray], np.ndarray], reader: SpotReader, place: Place) -> np.ndarray:
    return embed(decode_tiles(reader.read_encoded(*place)[1], reader.manifest.tile_size_px))


def _gathered(trainee: Trainee, share: dict[Place, np.ndarray]) -> dict[Place, np.ndarray]:
    if trainee.world_size == 1:
        return share
    shares: list[dict[Place, np.ndarray]] = [{} for _ in range(trainee.world_size)]
    dist.all_gather_object(shares, share)
    return {place: values for part in shares for place, values in part.items()}
