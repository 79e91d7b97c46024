"""The parts of a network that are fitted to the training sections before its first step, and not learnt."""

from collections.abc import Sequence

import numpy as np
import torch

from mclstexp.config import Config
from mclstexp.data.measured import read_measured
from mclstexp.data.spots import SpotReader
from mclstexp.model.neighbours import pitch_um
from mclstexp.model.training_spots import TrainingSpots
from mclstexp.training.training_sections import training_spots


def fitted_parts(
    config: Config, reader: SpotReader, section_ids: Sequence[str], spots: TrainingSpots | None = None
) -> dict[str, torch.Tensor]:
    """Returns the tensors of the network that are fitted to the training sections before the first step.

    Where there are fewer directions than `model.image_directions`, the others are 0.

    Args:
        config: the settings.
        reader: of the tile table, with stored features if directions are asked for.
        section_ids: the training sections.
        spots: the same, if they were read before.
    """
    fitted: dict[str, torch.Tensor] = {}
    if config.model.position == "distance":
        pitch = spots.pitch_um if spots else pitch_um([read_measured(reader, name).xy_um for name in section_ids])
        fitted["spot_tower.pitch_um"] = torch.tensor(pitch, dtype=torch.float32)
    if config.model.image_directions is not None:
        spots = spots or training_spots(reader, section_ids, config.train)
        directions = spots.directions[:, : config.model.image_directions]
        size = np.sqrt(np.mean((spots.drawn()[1] @ directions) ** 2))
        missing = config.model.image_directions - directions.shape[1]
        directions = np.pad(directions, ((0, 0), (0, missing)))
        parts = {
            "mean": spots.own.mean,
            "factor": 1 / spots.own.deviation,
            "directions": spots.own.weight[:, None] * directions / size,
        }
        fitted |= {f"image_head.0.{name}": torch.tensor(part, dtype=torch.float32) for name, part in parts.items()}
    return fitted
