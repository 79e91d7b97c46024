"""The best model of a sweep becomes `challenger`; `champion` moves to it only where a paired comparison says so."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

from mclstexp import tracking
from mclstexp.config import override
from mclstexp.data.genes import normalisers
from mclstexp.data.spots import make_reader
from mclstexp.errors import ConfigError, ModelError, RunError, UserError
from mclstexp.evaluation.floors import embed_shown
from mclstexp.evaluation.metrics import highest_genes, mean_by_patient
from mclstexp.evaluation.sections import read_measured
from mclstexp.model.embed import network_of
from mclstexp.model.version import ModelVersion
from mclstexp.training import finish
from mclstexp.training.run import Run
from mclstexp.training.trainer import fit
from tuning.results import finished_model
from tuning.sweep import Sweep, Trial
from tuning.trial import open_trial

DRAWS = 2000
FEWEST_BLOCKS = 8
_LEVEL = 0.95


@dataclass(frozen=True)
class Pair:
    """One section with what both models say of it, over the same genes and in the same unit."""

    patient_id: str
    place_um: np.ndarray
    """(N, 2)."""
    truth: np.ndarray
    """(N, G)."""
    champion: np.ndarray
    """(N, G)."""
    challengers: np.ndarray
    """(R, N, G), a training each."""


@dataclass(frozen=True)
class Difference:
    """Challenger minus champion: PCC over each section's 50 highest genes, mean over sections, then patients."""

    mean: float
    low: float
    high: float
    """The 95 % interval."""

    @property
    def is_better(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0

    def __str__(self) -> str:
        return f"{self.mean:+.4f} (95 % from {self.low:+.4f} to {self.high:+.4f})"


@dataclass(frozen=True)
class Promotion:
    """What was decided."""

    version: str
    is_champion: bool
    reason: str


def promote(sweep: Sweep, best: Trial) -> Promotion:
    """Registers the best trial's model as challenger, compares it with the champion, and moves `champion` or not.

    The best settings are trained again with other seeds (tune.replicates), and those stand for them: the trial itself
    was the best of many on these patients. They chose the settings too, which still favours the challenger a little.
    """
    run = open_trial(best.name, best.settings, sweep.plan)
    config = run.config.tracking
    earlier = tracking.version_of(config, tracking.CHAMPION)
    version = _register(run)
    tracking.set_alias(config, version, tracking.CHALLENGER)
    if earlier is None:
        tracking.set_alias(config, version, tracking.CHAMPION)
        return _decided(sweep, Promotion(version, True, f"{config.model_name} had no champion"))
    if earlier == version:
        return _decided(sweep, Promotion(version, True, "it is the champion already"))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = tracking.fetch_model(config, f"models:/{config.model_name}/{earlier}", scratch)
            champion = ModelVersion.load(folder)
        obstacle = _obstacle(run, champion)
        if obstacle:
            return _decided(sweep, Promotion(version, False, f"not compared with version {earlier}: {obstacle}"))
        pairs = _pairs(run, champion, _replicates(sweep, best))
        difference = compare(pairs, run.config.tune.block_um, run.config.tune.seed)
    except UserError as error:
        return _decided(sweep, Promotion(version, False, f"not compared with version {earlier}: {error}"))
    said = f"PCC over the 50 highest genes, against version {earlier}: {difference}"
    if difference.is_better:
        tracking.set_alias(config, version, tracking.CHAMPION)
        return _decided(sweep, Promotion(version, True, said))
    return _decided(sweep, Promotion(version, False, f"{said}: the interval does not lie above zero"))


def _register(run: Run) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        folder = tracking.fetch_model(run.config.tracking, finish.model_uri(run), scratch)
        tags = {"protocol": run.config.split.protocol, "run": run.name}
        return tracking.register(run.config.tracking, run.mlflow_run_id, folder, tags)


def _obstacle(run: Run, champion: ModelVersion) -> str:
    """Returns why the champion cannot be compared with the run, or nothing."""
    validation = {run.manifest.section(name).patient_id for name in run.split.validation}
    known = sorted(validation & set(champion.training.patients))
    if known:
        return f"it was trained on the validation patients {', '.join(known)}"
    _, unit = normalisers(champion.config.genes)
    if unit != run.reader.target:
        return f"it answers in another unit: {unit.unit()}, not {run.reader.target.unit()}"
    if unit.scheme == "per_spot_panel" and set(champion.panel.gene_id) != set(run.panel.gene_id):
        return "both divide by the panel's own total, and their panels differ"
    if not set(champion.panel.gene_id) & set(run.panel.gene_id):
        return "the panels share no gene"
    try:
        champion.require_table(run.manifest)
    except ModelError as error:
        return str(error)
    return ""


def _replicates(sweep: Sweep, best: Trial) -> list[ModelVersion]:
    """Returns the models of the best settings under the seeds that follow the best trial's own.

    Raises:
        RunError: a training failed or left no checkpoint.
    """
    seed = override(sweep.plan.config, best.settings).train.seed
    return [_replicate(sweep, best, seed + step) for step in range(1, sweep.plan.config.tune.replicates + 1)]


def _replicate(sweep: Sweep, best: Trial, seed: int) -> ModelVersion:
    run = open_trial(f"{best.name}-seed{seed}", best.settings | {"train.seed": seed}, sweep.plan)
    if not finish.is_finished(run):
        metrics = tracking.metric_log(run.config.tracking, run.mlflow_run_id)
        try:
            finish.finish(run, fit(run, metrics.log))
        finally:
            metrics.close()
    tracking.finish_run(run.config.tracking, run.mlflow_run_id)
    model = finished_model(run)
    if model is None:
        raise RunError(f"the training {run.name} left no checkpoint; delete {run.uri} and run the same command again")
    return model


def _pairs(run: Run, champion: ModelVersion, challengers: list[ModelVersion]) -> list[Pair]:
    """Returns each validation section with what champion and challengers say, over the genes that they share."""
    shared = [gene for gene in champion.panel.gene_id if gene in set(run.panel.gene_id)]
    answers = [_answers(run, model, shared) for model in (champion, *challengers)]
    truth = {name: read_measured(run.reader, name) for name in run.split.validation}
    own = _columns(run.panel.gene_id, shared)
    return [
        Pair(
            section.patient_id,
            section.xy_um,
            section.expression(run.reader.target)[:, own],
            answers[0][name],
            np.stack([said[name] for said in answers[1:]]),
        )
        for name, section in truth.items()
    ]


def _answers(run: Run, model: ModelVersion, genes: list[str]) -> Mapping[str, np.ndarray]:
    """Returns what a model says of each validation section, float32 (N, genes)."""
    reader = make_reader(run.reader.root, run.manifest, model.panel, model.config)
    embedded = embed_shown(reader, list(run.split.validation), network_of(model), "model", lambda *_: None)
    columns = _columns(model.panel.gene_id, genes)
    return {name: model.predict(arrays["embedding"]).prediction[:, columns] for name, arrays in embedded.items()}


def _columns(panel: tuple[str, ...], genes: list[str]) -> list[int]:
    place = {gene: index for index, gene in enumerate(panel)}
    return [place[gene] for gene in genes]


def _decided(sweep: Sweep, promotion: Promotion) -> Promotion:
    config = sweep.plan.config.tracking
    tags = {"promotion": str(promotion.is_champion).lower(), "promotion.reason": promotion.reason}
    tracking.finish_run(config, sweep.plan.mlflow_run_id, tags=tags)
    tracking.tag_version(config, f"models:/{config.model_name}/{promotion.version}", tags)
    return promotion


def compare(pairs: Sequence[Pair], block_um: float, seed: int) -> Difference:
    """Returns the difference with its interval, from DRAWS draws of blocks, `block_um` um wide, and the replicates.

    Raises:
        ConfigError: a section has fewer than FEWEST_BLOCKS blocks.
    """
    rng = np.random.default_rng(seed)
    patients = [pair.patient_id for pair in pairs]
    of_replicates = mean_by_patient(
        patients, np.array([_differences(pair, np.ones((1, len(pair.truth))))[0] for pair in pairs])
    )
    draws = [_differences(pair, _block_weights(pair.place_um, block_um, rng)).mean(axis=1) for pair in pairs]
    tissue = mean_by_patient(patients, np.array(draws)).var(ddof=1)
    seeds = of_replicates.var(ddof=1) / len(of_replicates) if len(of_replicates) > 1 else 0.0
    freedom = (len(of_replicates) - 1) * ((tissue + seeds) / seeds) ** 2 if seeds else np.inf
    reach = scipy.stats.t.ppf((1 + _LEVEL) / 2, freedom) * np.sqrt(tissue + seeds)
    mean = of_replicates.mean()
    return Difference(float(mean), float(mean - reach), float(mean + reach))


def _block_weights(place_um: np.ndarray, block_um: float, rng: np.random.Generator) -> np.ndarray:
    """Returns how often each spot is drawn, float (T, N): all spots of a block alike; refuses too few blocks."""
    cells = np.floor((place_um - place_um.min(axis=0)) / block_um).astype(int)
    _, block = np.unique(cells, axis=0, return_inverse=True)
    num_blocks = block.max() + 1
    if num_blocks < FEWEST_BLOCKS:
        raise ConfigError(
            f"tune.block_um={block_um:g} cuts a section into {num_blocks} blocks, too few to be drawn; set it so that "
            f"there are {FEWEST_BLOCKS}, and no smaller than the distance over which tissue is alike"
        )
    counts = rng.multinomial(num_blocks, np.full(num_blocks, 1 / num_blocks), size=DRAWS)
    return counts[:, block.ravel()].astype(float)


def _differences(pair: Pair, weights: np.ndarray) -> np.ndarray:
    """Returns each replicate's gain over the champion under weights of spots, (T, R) for (T, N)."""
    genes = highest_genes(pair.truth)
    truth, champion = pair.truth[:, genes], pair.champion[:, genes]
    base = _weighted_pcc(truth, champion, weights)
    gains = [_weighted_pcc(truth, said[:, genes], weights) - base for said in pair.challengers]
    return np.stack(gains, axis=1)


def _weighted_pcc(truth: np.ndarray, said: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the mean over genes of the weighted correlation, (T,); one that is not defined counts as 0."""
    truth, said = (values.astype(np.float64) - values.mean(axis=0, dtype=np.float64) for values in (truth, said))
    total = weights.sum(axis=1, keepdims=True)
    mean_t, mean_s = weights @ truth / total, weights @ said / total
    product = weights @ (truth * said) / total - mean_t * mean_s
    square_t, square_s = (weights @ (values**2) / total - mean**2 for values, mean in ((truth, mean_t), (said, mean_s)))
    norm = np.sqrt(np.clip(square_t, 0, None) * np.clip(square_s, 0, None))
    return np.divide(product, norm, out=np.zeros_like(product), where=norm > 1e-12).mean(axis=1)
