"""The best model of a sweep becomes `challenger`; `champion` moves to it only if a paired comparison says so.

The comparison costs some trainings (tune.replicates) with other seeds: the best trial itself was the luckiest of many
on the same patients.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

from mclstexp import tracking
from mclstexp.config import override
from mclstexp.data.genes import normalisers
from mclstexp.data.measured import MeasuredSection, read_measured
from mclstexp.data.spots import total_genes
from mclstexp.errors import ConfigError, ModelError, UserError
from mclstexp.evaluation.metrics import highest_genes, mean_by_patient
from mclstexp.model.embed import embed_model
from mclstexp.model.version import ModelVersion
from mclstexp.progress import Show, hidden
from mclstexp.training.complete import train_to_end
from mclstexp.training.finish import model_uri
from mclstexp.training.run import Run
from tuning.sweep import Sweep, Trial
from tuning.trial import open_trial

DRAWS = 2000
MIN_BLOCKS = 8
_LEVEL = 0.95


@dataclass(frozen=True)
class Promotion:
    """The decision."""

    version: str
    is_champion: bool
    reason: str


@dataclass(frozen=True)
class Pair:
    """One section with the predictions of both models, over the same genes and in the same unit."""

    patient_id: str
    xy_um: np.ndarray
    """Micrometres, (N, 2)."""
    truth: np.ndarray
    """(N, G)."""
    champion: np.ndarray
    """(N, G)."""
    challengers: np.ndarray
    """(R, N, G), one for each training."""


@dataclass(frozen=True)
class Difference:
    """Challenger minus champion: PCC over each section's 50 highest genes, mean over sections, then patients."""

    mean: float
    low: float
    high: float
    """The 95 % interval."""

    @property
    def is_better(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.low > 0

    def __str__(self) -> str:
        return f"{self.mean:+.4f} (95 % from {self.low:+.4f} to {self.high:+.4f})"


def promote(sweep: Sweep, best: Trial, show: Show = hidden) -> Promotion:
    """Registers the best trial's model as challenger, compares it with the champion, and moves `champion` or not.

    The best settings are trained again with other seeds (tune.replicates), and these models are compared in place of
    the trial's own. The validation patients chose the settings too, which still favours the challenger a little.
    """
    run = open_trial(best.name, best.settings, sweep.plan)
    config = run.config.tracking
    earlier = tracking.version_of(config, tracking.CHAMPION)
    version = _register(run)
    tracking.set_alias(config, version, tracking.CHALLENGER)

    if earlier is None:
        tracking.set_alias(config, version, tracking.CHAMPION)
        return _recorded(sweep, Promotion(version, True, f"{config.model_name} had no champion"))
    if earlier == version:
        return _recorded(sweep, Promotion(version, True, "it is the champion already"))
    try:
        champion = _load(run, earlier)
        obstacle = _obstacle(run, champion)
        if obstacle:
            return _recorded(sweep, Promotion(version, False, f"not compared with version {earlier}: {obstacle}"))
        pairs = _pairs(run, champion, _replicates(sweep, best, show))
        difference = compare(pairs, run.config.tune.block_um, run.config.tune.seed)
    except UserError as error:
        return _recorded(sweep, Promotion(version, False, f"not compared with version {earlier}: {error}"))

    result = f"PCC over the 50 highest genes, against version {earlier}: {difference}"
    if difference.is_better:
        tracking.set_alias(config, version, tracking.CHAMPION)
        return _recorded(sweep, Promotion(version, True, result))
    return _recorded(sweep, Promotion(version, False, f"{result}: the interval is not wholly above zero"))


def compare(pairs: Sequence[Pair], block_um: float, seed: int) -> Difference:
    """Returns the difference with its interval, over DRAWS draws of blocks of tissue and over the replicates.

    Args:
        pairs: the sections.
        block_um: edge of a block in micrometres.
        seed: seed of the draws.

    Raises:
        ConfigError: a section has fewer than MIN_BLOCKS blocks.
    """
    rng = np.random.default_rng(seed)
    patients = [pair.patient_id for pair in pairs]
    of_replicates = mean_by_patient(
        patients, np.array([_differences(pair, np.ones((1, len(pair.truth))))[0] for pair in pairs])
    )
    draws = [_differences(pair, _block_weights(pair.xy_um, block_um, rng)).mean(axis=1) for pair in pairs]
    tissue = mean_by_patient(patients, np.array(draws)).var(ddof=1)
    seeds = of_replicates.var(ddof=1) / len(of_replicates) if len(of_replicates) > 1 else 0.0
    freedom = (len(of_replicates) - 1) * ((tissue + seeds) / seeds) ** 2 if seeds else np.inf
    reach = scipy.stats.t.ppf((1 + _LEVEL) / 2, freedom) * np.sqrt(tissue + seeds)
    mean = of_replicates.mean()
    return Difference(float(mean), float(mean - reach), float(mean + reach))


def _register(run: Run) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        folder = tracking.fetch_model(run.config.tracking, model_uri(run), scratch)
        tags = {"protocol": run.config.split.protocol, "run": run.name}
        return tracking.register(run.config.tracking, run.mlflow_run_id, folder, tags)


def _recorded(sweep: Sweep, promotion: Promotion) -> Promotion:
    """Tags the sweep's run and the new version with the decision, and returns it."""
    config = sweep.plan.config.tracking
    tags = {"promotion": str(promotion.is_champion).lower(), "promotion.reason": promotion.reason}
    tracking.finish_run(config, sweep.plan.mlflow_run_id, tags=tags)
    tracking.tag_version(config, f"models:/{config.model_name}/{promotion.version}", tags)
    return promotion


def _load(run: Run, version: str) -> ModelVersion:
    """Returns a registered model version."""
    config = run.config.tracking
    with tempfile.TemporaryDirectory() as scratch:
        return ModelVersion.load(tracking.fetch_model(config, f"models:/{config.model_name}/{version}", scratch))


def _obstacle(run: Run, champion: ModelVersion) -> str:
    """Returns why the champion cannot be compared with the run; empty if it can."""
    known = sorted(run.manifest.patients(run.split.validation) & set(champion.training.patients))
    if known:
        return f"it was trained on the validation patients {', '.join(known)}"
    _, unit = normalisers(champion.config.genes)
    if unit != run.reader.target:
        return f"it answers in another unit: {unit.unit()}, not {run.reader.target.unit()}"
    own, others = (genes and set(genes.gene_id) for genes in (total_genes(run.reader), champion.total_genes))
    if unit.total == "shared" and own != others:
        return "both divide by spot totals over the genes that their training sections share, and these genes differ"
    if unit.scheme == "per_spot_panel" and set(champion.panel.gene_id) != set(run.panel.gene_id):
        return "both divide by the panel's own total, and their panels differ"
    shared = set(champion.panel.gene_id) & set(run.panel.gene_id)
    if not shared:
        return "the panels share no gene"
    for name in run.split.validation:
        if shared <= {run.panel.gene_id[gene] for gene in run.reader.unmeasured.get(name, ())}:
            return f"section {name} measures none of the {len(shared)} genes that the panels share"
    try:
        champion.require_table(run.manifest)
    except ModelError as error:
        return str(error)
    return ""


def _replicates(sweep: Sweep, best: Trial, show: Show) -> list[ModelVersion]:
    """Returns models of the best settings with the seeds that follow the best trial's own.

    Raises:
        RunError: a training failed or left no checkpoint.
    """
    first = override(sweep.plan.config, best.settings).train.seed + 1
    return [_replicate(sweep, best, seed, show) for seed in range(first, first + sweep.plan.config.tune.replicates)]


def _replicate(sweep: Sweep, best: Trial, seed: int, show: Show) -> ModelVersion:
    run = open_trial(f"{best.name}-seed{seed}", best.settings | {"train.seed": seed}, sweep.plan)
    metrics = tracking.metric_log(run.config.tracking, run.mlflow_run_id)
    try:
        model = train_to_end(run, metrics.log, show)
    finally:
        metrics.close()
    tracking.finish_run(run.config.tracking, run.mlflow_run_id)
    return model


def _pairs(run: Run, champion: ModelVersion, challengers: list[ModelVersion]) -> list[Pair]:
    """Returns each validation section with the predictions of champion and challengers over their common genes."""
    shared = [gene for gene in champion.panel.gene_id if gene in set(run.panel.gene_id)]
    measured = {name: read_measured(run.reader, name) for name in run.split.validation}
    predicted = [_predicted(run, model, measured, shared) for model in (champion, *challengers)]
    columns = _columns(run.panel.gene_id, shared)
    return [
        Pair(
            section.patient_id,
            section.xy_um,
            section.expression(run.reader.target)[:, columns],
            predicted[0][name],
            np.stack([of_challenger[name] for of_challenger in predicted[1:]]),
        )
        for name, section in measured.items()
    ]


def _predicted(
    run: Run, model: ModelVersion, measured: Mapping[str, MeasuredSection], genes: list[str]
) -> Mapping[str, np.ndarray]:
    """Returns a model's predictions of each validation section, float32 (N, genes)."""
    embedded = embed_model(run.reader.root, run.manifest, run.split.validation, model)
    columns = _columns(model.panel.gene_id, genes)
    return {
        name: model.predict(arrays["embedding"], measured[name].xy_um).prediction[:, columns]
        for name, arrays in embedded
    }


def _columns(panel: tuple[str, ...], genes: list[str]) -> list[int]:
    column_of = {gene: column for column, gene in enumerate(panel)}
    return [column_of[gene] for gene in genes]


def _block_weights(xy_um: np.ndarray, block_um: float, rng: np.random.Generator) -> np.ndarray:
    """Returns how often each spot is drawn, float (DRAWS, N), the same for all spots of a block."""
    cells = np.floor((xy_um - xy_um.min(axis=0)) / block_um).astype(int)
    _, block = np.unique(cells, axis=0, return_inverse=True)
    num_blocks = block.max() + 1
    if num_blocks < MIN_BLOCKS:
        raise ConfigError(
            f"tune.block_um={block_um:g} cuts a section into {num_blocks} blocks, too few to draw from; set it so that "
            f"there are at least {MIN_BLOCKS}, but no smaller than the distance over which tissue is similar"
        )
    counts = rng.multinomial(num_blocks, np.full(num_blocks, 1 / num_blocks), size=DRAWS)
    return counts[:, block.ravel()].astype(float)


def _differences(pair: Pair, weights: np.ndarray) -> np.ndarray:
    """Returns each replicate's gain over the champion, (T, R), with weights of the spots, (T, N)."""
    genes = highest_genes(pair.truth)
    truth, champion = pair.truth[:, genes], pair.champion[:, genes]
    base = _weighted_pcc(truth, champion, weights)
    gains = [_weighted_pcc(truth, predicted[:, genes], weights) - base for predicted in pair.challengers]
    return np.stack(gains, axis=1)


def _weighted_pcc(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the mean over genes of the weighted correlation, (T,); an undefined one counts as 0."""
    truth, predicted = (
        values.astype(np.float64) - values.mean(axis=0, dtype=np.float64) for values in (truth, predicted)
    )
    total = weights.sum(axis=1, keepdims=True)
    mean_t, mean_p = weights @ truth / total, weights @ predicted / total
    product = weights @ (truth * predicted) / total - mean_t * mean_p
    square_t, square_p = (
        weights @ (values**2) / total - mean**2 for values, mean in ((truth, mean_t), (predicted, mean_p))
    )
    norm = np.sqrt(np.clip(square_t, 0, None) * np.clip(square_p, 0, None))
    return np.divide(product, norm, out=np.zeros_like(product), where=norm > 1e-12).mean(axis=1)
