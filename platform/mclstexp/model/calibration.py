"""How sure a program model is of its answers: intervals of each value, the trust of each gene, and when to abstain.

An interval is prediction +- half width of the gene * scale of the tile. Both are fitted to what training spots were
predicted as without their fold (`fit_calibration.py`, `trust.py`), so that they hold for patients never seen as far as
the training patients tell; `calibrated_on` says what was left out. An interval is about expression as an assay like the
training sections' would measure it. Fewer counts scatter more, so that there is a second, wider one for any depth.

Shapes: n tiles, G genes.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mclstexp.data.genes import GenePanel
from mclstexp.errors import ModelError

FILE, TRUST = "calibration.json", "trust.parquet"
SPREAD = "spread"
"""Name of `Retrieved.spread` in parts and tables."""
COVERAGE = 0.9
"""Share of a gene's values that its intervals are to contain."""
_GENES = pa.schema(
    [
        ("gene_id", pa.string()),
        ("symbol", pa.string()),
        ("correlation", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("q_value", pa.float64()),
        ("trusted", pa.bool_()),
        ("half_width", pa.float64()),
        ("half_width_any_depth", pa.float64()),
    ]
)
_WIDTHS = ("half_width", "half_width_any_depth")
_MIN_SPREAD, _MIN_DISTANCE = 1e-9, 1e-6


@dataclass(frozen=True)
class TileScale:
    """How wide a tile's intervals are beside those of a usual tile, by what is known when it is predicted.

    It is exp(strength * slopes . x); x are log(spread of the donors) and log(1 - similarity of the best match), less
    their training medians and limited to what 98 % of the training tiles have. A strength of 0 is a constant width.
    """

    strength: float
    slopes: list[float]
    median: list[float]
    low: list[float]
    high: list[float]

    def of(self, spread: np.ndarray, similarity: np.ndarray) -> np.ndarray:
        """Returns the scale of tiles, float64 (n,), from `Retrieved.spread` and `Retrieved.similarity`, (n,)."""
        return self.of_doubts(doubts(spread, similarity))

    def of_doubts(self, signs: np.ndarray) -> np.ndarray:
        """Returns the same from what `doubts` returns, (n, 2)."""
        differences = np.clip(signs, self.low, self.high) - self.median
        return np.exp(self.strength * (differences @ self.slopes))


def doubts(spread: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """Returns what tells how unsure a tile is, float64 (n, 2): log spread and log(1 - similarity)."""
    distance = 1 - similarity.astype(np.float64)
    return np.log(
        np.stack([np.maximum(spread.astype(np.float64), _MIN_SPREAD), np.maximum(distance, _MIN_DISTANCE)], axis=1)
    )


@dataclass(frozen=True)
class GeneTrust:
    """How well each gene was predicted in left-out training spots, within sections."""

    correlation: np.ndarray
    """Pearson's, the mean over sections, float64 (G,); NaN for a gene without one."""
    low: np.ndarray
    high: np.ndarray
    """Its 95 % interval, float64 (G,) each."""
    q_value: np.ndarray
    """False discovery rate at which it exceeds that of predictions moved within their sections, float64 (G,)."""
    trusted: np.ndarray
    """Whether that is at most 5 %, bool (G,)."""


@dataclass(frozen=True)
class Calibration:
    """What a model version knows of its own errors."""

    half_width: np.ndarray
    """Half the width of a gene's interval where the scale is 1, float64 (G,)."""
    half_width_any_depth: np.ndarray
    """The same from training sections thinned to about 1,000 counts per spot, if they have more, float64 (G,)."""
    scale: TileScale
    max_spread: float
    """Spread above which a tile's answer is to be set aside: 1 % of the training tiles have more."""
    calibrated_on: Literal["patients", "sections", "blocks"]
    """What was left out together; it is patients where there are three, else nothing is known of other patients."""
    left_out_coverage: dict[str, float]
    """Share of the values of each left-out patient (section, block) that intervals fitted to the others contain."""
    trust: GeneTrust

    def half_widths(self, spread: np.ndarray, similarity: np.ndarray) -> np.ndarray:
        """Returns half the widths of tiles' intervals, float64 (n, G); spread and similarity as in `TileScale.of`."""
        return self.scale.of(spread, similarity)[:, None] * self.half_width

    def abstain(self, spread: np.ndarray, out_of_distribution: np.ndarray) -> np.ndarray:
        """Returns which tiles' answers are to be set aside, bool (n,): unlike all training tiles, or donors disagree.

        Args:
            spread: of the tiles' donors, (n,).
            out_of_distribution: bool (n,), by similarity.
        """
        return out_of_distribution | (spread > self.max_spread)

    def summary(self) -> str:
        """Returns one sentence for logs and score cards."""
        shares = self.left_out_coverage.values()
        return (
            f"{self.trust.trusted.sum()} of {len(self.half_width)} genes are trusted (false discovery rate 5 %); "
            f"{COVERAGE:.0%} intervals calibrated on {len(shares)} left-out {self.calibrated_on}, which contain "
            f"{min(shares):.1%} to {max(shares):.1%} of each"
        )

    def not_finite(self) -> str | None:
        """Returns the name of the first number that is not finite and must be; None if there is none."""
        numbers = {name: getattr(self, name) for name in (*_WIDTHS, "max_spread")} | asdict(self.scale)
        bad = [name for name, value in numbers.items() if not np.isfinite(value).all()]
        return f"{bad[0]} of the calibration" if bad else None

    def columns(self) -> dict[str, np.ndarray]:
        """Returns what is known of each gene, (G,) each, by name."""
        return vars(self.trust) | {name: getattr(self, name) for name in _WIDTHS}

    def genes(self, panel: GenePanel) -> pa.Table:
        """Returns what is known of each gene, one row per gene of the model's panel."""
        columns = {"gene_id": panel.gene_id, "symbol": panel.symbol} | self.columns()
        return pa.table({name: columns[name] for name in _GENES.names}, schema=_GENES)

    def save(self, folder: str | Path, panel: GenePanel) -> None:
        """Writes `trust.parquet`, one row per gene, and `calibration.json` into a local folder."""
        pq.write_table(self.genes(panel), Path(folder, TRUST), store_schema=False)
        facts = {
            "scale": asdict(self.scale),
            "max_spread": self.max_spread,
            "calibrated_on": self.calibrated_on,
            "left_out_coverage": self.left_out_coverage,
        }
        Path(folder, FILE).write_text(json.dumps(facts, indent=1))

    @classmethod
    def load(cls, folder: str | Path, panel: GenePanel) -> "Calibration":
        """Returns what `save` wrote.

        Raises:
            ModelError: it is of other genes, or something is missing.
        """
        try:
            facts = json.loads(Path(folder, FILE).read_text())
            scale = TileScale(**facts.pop("scale"))
            table = pq.ParquetFile(Path(folder, TRUST)).read()
            values = {name: table[name].to_numpy() for name in _GENES.names[2:]}
            widths = {name: values.pop(name) for name in _WIDTHS}
            found = cls(**widths, scale=scale, trust=GeneTrust(**values), **facts)
        except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
            raise ModelError(
                f"{FILE} or {TRUST} in {folder} is damaged: {error}; fetch the model version again"
            ) from None
        if tuple(table["gene_id"].to_pylist()) != panel.gene_id:
            raise ModelError(f"{TRUST} in {folder} is about other genes than its panel; fetch the model version again")
        return found
