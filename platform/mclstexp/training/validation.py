"""The score of a model on validation patients by the same retrieval that predicts, and the choice of that retrieval.

`score` runs after epochs of training; `choose_retrieval` runs once, at the end, and picks k and the temperature.

The ranks share the embedding of images; rank 0 makes the bank's keys and scores while the others wait for it. That
suits validation sets of minutes, not of hours (the group's time limit is five minutes).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch.distributed as dist

from mclstexp.config import Config
from mclstexp.data.measured import read_measured
from mclstexp.data.spots import SpotReader, decode_tiles
from mclstexp.evaluation.metrics import heg_pcc, highest_genes, mean_by_patient
from mclstexp.model.bank import Bank, build_bank
from mclstexp.model.embed import image_head, image_network
from mclstexp.model.retrieval import neighbours, resolve, weighted_mean, weights
from mclstexp.model.towers import TwoTowers
from mclstexp.settings import RetrievalConfig
from mclstexp.training.step import RankState
from mclstexp.training.tower_loader import TowerLoader, spot_embeddings

VALIDATION_PCC = "validation_pcc"
"""Metric: PCC over the 50 highest genes of each validation section, mean over sections, then over patients."""
TRIED_K = (10, 20, 50, 100, 200, 400)
TRIED_TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_SentenceKey = tuple[str, int]
"""Section id and index of the row group."""


@dataclass(frozen=True)
class ValidationSet:
    """The sections to score and those of the bank; crosses process borders."""

    reader: SpotReader
    train: tuple[str, ...]
    validation: tuple[str, ...]
    towers: TowerLoader | None = None
    """Of the training sections, for the towers of programs; None: other models."""

    def keeping(self) -> "ValidationSet":
        """Returns the same, keeping what towers read from score to score."""
        return replace(self, towers=self.towers and self.towers.keeping())


@dataclass(frozen=True)
class ValidationSection:
    """A section of a validation patient."""

    patient_id: str
    queries: np.ndarray
    """Image embeddings, float32 (Q, D)."""
    truth: np.ndarray
    """Measured expression in the bank's unit, (Q, G); NaN for a gene that the section does not measure."""


def validate(rank_state: RankState, data: ValidationSet) -> float:
    """Returns the model's `VALIDATION_PCC`; every rank must call it.

    The retrieval's k and temperature, if the configuration leaves them open, are those that score best, as in a
    finished model.
    """
    if rank_state.world_size > 1:
        for buffer in rank_state.model.buffers():  # each rank has its own batch statistics; those of rank 0 are saved
            dist.broadcast(buffer, src=0)
    embedded = _gathered(rank_state, _embed_share(rank_state, data))
    scores = [_score(rank_state, data, embedded) if rank_state.rank == 0 else float("nan")]
    if rank_state.world_size > 1:
        dist.broadcast_object_list(scores, src=0)
    return scores[0]


def choose_retrieval(sections: Sequence[ValidationSection], bank: Bank, config: RetrievalConfig) -> RetrievalConfig:
    """Returns the settings with the `k` and `temperature` of the highest mean PCC over the 50 highest genes.

    As on the score card, correlations are taken within a section over its own highest genes, and averaged by patient.
    Only settings that the configuration leaves open are chosen.
    """
    tried, means = _tried(sections, bank, config)
    return tried[int(means.argmax())]


def best_score(sections: Sequence[ValidationSection], bank: Bank, config: RetrievalConfig) -> float:
    """Returns the mean PCC over the 50 highest genes with the settings that `choose` would return."""
    return float(_tried(sections, bank, config)[1].max())


def _embed_share(rank_state: RankState, data: ValidationSet) -> dict[_SentenceKey, np.ndarray]:
    """Returns the embeddings (in direct regression: the predictions) of the rank's share of sentences."""
    share = data.reader.manifest.sentences(data.validation)[rank_state.rank :: rank_state.world_size]
    embed = _embedder(rank_state, data.reader)
    return {sentence: embed(*sentence) for sentence in share}


def _embedder(rank_state: RankState, reader: SpotReader) -> Callable[[str, int], np.ndarray]:
    """Returns the map from a sentence (section id, row group) to its embeddings, from its features or its tiles."""
    config, weights, size_px = rank_state.config, rank_state.model.state_dict(), reader.manifest.tile_size_px
    features = reader.features
    if features is not None:
        head = image_head(config.model, size_px, weights, config.train.precision)
        of_features = head.build(rank_state.device)
        return lambda section_id, group: of_features(features.read(section_id, group))
    of_tiles = image_network(config.model, size_px, weights, config.train.precision).build(rank_state.device)
    return lambda section_id, group: of_tiles(
        decode_tiles(reader.read_encoded(section_id, group)[1].to_pylist(), size_px)
    )


def _gathered(rank_state: RankState, share: dict[_SentenceKey, np.ndarray]) -> dict[_SentenceKey, np.ndarray]:
    if rank_state.world_size == 1:
        return share
    shares: list[dict[_SentenceKey, np.ndarray]] = [{} for _ in range(rank_state.world_size)]
    dist.all_gather_object(shares, share)
    return {sentence: values for part in shares for sentence, values in part.items()}


def _score(rank_state: RankState, data: ValidationSet, embedded: Mapping[_SentenceKey, np.ndarray]) -> float:
    manifest = data.reader.manifest
    sections = [
        ValidationSection(
            manifest.section(name).patient_id,
            np.concatenate([embedded[sentence] for sentence in manifest.sentences([name])]),
            data.reader.read_section(name)["payload"],
        )
        for name in data.validation
    ]
    if not isinstance(rank_state.model, TwoTowers):
        scores = np.array([heg_pcc(section.truth, section.queries) for section in sections])
        return float(mean_by_patient([section.patient_id for section in sections], scores))
    model = copy.deepcopy(rank_state.model).cpu().float().eval()
    bank = _bank(model, rank_state.config, data)
    return best_score(sections, bank, rank_state.config.retrieval)


def _bank(model: TwoTowers, config: Config, data: ValidationSet) -> Bank:
    if data.towers is None:
        return build_bank(model, data.reader, data.train, config.train.batching == "random_spots")
    measured = [read_measured(data.reader, name) for name in data.train]
    expression = np.concatenate([each.expression(data.reader.target) for each in measured])
    no_names = np.full(len(expression), "", object)  # who the donors are changes no score
    return Bank.of(spot_embeddings(model, data.towers, data.train), expression, no_names, no_names, no_names)


def _tried(
    sections: Sequence[ValidationSection], bank: Bank, config: RetrievalConfig
) -> tuple[list[RetrievalConfig], np.ndarray]:
    """Returns all settings that a configuration leaves open, and each one's score."""
    fixed = resolve(config, len(bank))
    fixed_k = fixed.k if config.weighting == "fixed_number" else config.k
    all_k = [fixed_k] if fixed_k else [k for k in TRIED_K if k <= len(bank)] or [len(bank)]
    open_temperature = config.weighting == "softmax" and config.temperature is None
    temperatures = TRIED_TEMPERATURES if open_temperature else (fixed.temperature,)
    tried = [
        fixed.model_copy(update={"k": k, "temperature": temperature}) for k, temperature in product(all_k, temperatures)
    ]
    scores = np.array([_scores(section, bank, tried, max(all_k)) for section in sections])
    return tried, mean_by_patient([section.patient_id for section in sections], scores)


def _scores(section: ValidationSection, bank: Bank, tried: Sequence[RetrievalConfig], max_k: int) -> list[float]:
    """Returns the mean PCC over a section's own highest genes with each of the tried settings."""
    genes = highest_genes(section.truth)
    own = bank.of_genes(genes)
    best = neighbours(section.queries, bank, tried[0].model_copy(update={"k": max_k}))
    means = []
    for config in tried:
        found = best.first(config.k or max_k)
        predicted = weighted_mean(found.ids, weights(found, config), own)
        means.append(heg_pcc(section.truth[:, genes], predicted))
    return means
