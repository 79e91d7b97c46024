"""The answer to tiles: from their images or features to what a slide's parts keep of them, on one device.

A retrieval model and a direct regression answer each tile with its expression. A program model answers with scores,
which become expression when the slide is known as a whole (`decode.SlideDecoder`).

Shapes: n tiles, G genes, R programs, C components of the level.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mclstexp.model.bank import Bank
from mclstexp.model.blend import ProgramModel, spread
from mclstexp.model.calibration import SPREAD
from mclstexp.model.device import turn
from mclstexp.model.embed import ImageHead, ImageNetwork, head_of, network_of
from mclstexp.model.nearest import Keys
from mclstexp.model.retrieval import Neighbours, Retrieved, neighbours, regressed, resolve, weigh
from mclstexp.model.version import ModelVersion
from mclstexp.settings import RetrievalConfig


@dataclass(frozen=True)
class TileAnswers:
    """What a part of a slide keeps."""

    values: np.ndarray
    """float32 (n, G): expression; or (n, 2R): scores, as in `decode.TileScores`."""
    sums: np.ndarray
    """float64 (C,): components of the level, summed over complete tiles; (0,) without programs."""
    confidence: dict[str, np.ndarray]
    """What `Retrieved` says of each tile beside its prediction, float32 (n,) each; `spread` with programs alone."""


@dataclass(frozen=True)
class Answerer:
    """A model's way from tiles to answers as data: it is built where it is used."""

    network: ImageNetwork | ImageHead
    bank: Bank | None
    """What is searched, its payload what is retrieved; None for a direct regression."""
    retrieval: RetrievalConfig
    programs: ProgramModel | None = None

    def build(self, device: torch.device) -> Callable[[tuple[np.ndarray, ...], np.ndarray], TileAnswers]:
        """Returns the map from tiles to answers, for several threads at once: while one weighs what it found, the
        device embeds and searches for another.

        It takes the tiles, as `ImageNetwork.build` or `ImageHead.build` say, and which are complete, bool (n,).
        """
        embed = self.network.build(device)
        keys = None if self.bank is None else Keys(self.bank.directions, device)

        def answer(inputs: tuple[np.ndarray, ...], complete: np.ndarray) -> TileAnswers:
            with turn(device):
                embedding = embed(*inputs)
                found = None if keys is None else self._found(embedding, keys)
            return self._answer(embedding, complete, found)

        return answer

    def queries(self, embedding: np.ndarray) -> np.ndarray:
        """Returns what the bank is searched for, float32 (n, D), by embeddings of tiles as the network gives them."""
        return embedding if self.programs is None else self.programs.queries(embedding)

    def _found(self, embedding: np.ndarray, keys: Keys) -> Neighbours:
        assert self.bank is not None
        return neighbours(self.queries(embedding), self.bank, self.retrieval, keys)

    def _answer(self, embedding: np.ndarray, complete: np.ndarray, found: Neighbours | None) -> TileAnswers:
        if self.bank is None or found is None:
            return _of(regressed(embedding))
        answer = weigh(found, self.bank, self.retrieval)
        if self.programs is None:
            return _of(answer)
        tiles = self.programs.tile_scores(embedding, answer.prediction, complete)
        confidence = _confidence(answer) | {SPREAD: spread(answer.prediction)}
        return TileAnswers(tiles.values, tiles.sums, confidence)


def answerer_of(model: ModelVersion, of_features: bool = False) -> Answerer:
    """Returns what answers tiles, or (`of_features`) stored features of the model's frozen encoder.

    Raises:
        ModelError: the weights of its frozen encoder cannot be found; or its encoder was trained and takes no features.
    """
    network = head_of(model) if of_features else network_of(model)
    bank = model.searched_bank
    retrieval = model.config.retrieval if bank is None else resolve(model.config.retrieval, len(bank))
    return Answerer(network, bank, retrieval, model.programs)


def _of(found: Retrieved) -> TileAnswers:
    return TileAnswers(found.prediction, np.zeros(0), _confidence(found))


def _confidence(found: Retrieved) -> dict[str, np.ndarray]:
    return {name: values for name, values in vars(found).items() if name not in ("prediction", SPREAD)}
