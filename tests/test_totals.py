"""Spot totals where sections measure different genes: what is refused, what is said, and the values that result."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from random_version import random_version
from small_table import NAMES, make_table, random_counts

from mclstexp.config import Config, override
from mclstexp.data.genes import GenePanel, Normaliser
from mclstexp.data.measured import MeasuredSection, read_measured
from mclstexp.data.panel import fit_panel
from mclstexp.data.schema import MANIFEST, Manifest
from mclstexp.data.spots import SpotReader, make_reader, total_genes
from mclstexp.data.totals import GeneCounts, other_totals
from mclstexp.errors import ConfigError, ModelError, RunError
from mclstexp.evaluation.floors import halve, noise_ceiling
from mclstexp.evaluation.sections import scored_targets
from mclstexp.model.thinning import thinned
from mclstexp.model.version import ModelVersion
from mclstexp.settings import GenesConfig
from mclstexp.training.run import RECORD, Run, open_run
from tuning.promotion import _obstacle

LACKS = {"A1": [0], "B1": [1, 4], "C1": [7]}
"""Genes that a section does not measure; A1 and B1 train."""
SHARED = [2, 3, 5, 6, 7]
TOTAL = {"genes.total": "shared"}
PANEL = GenePanel.from_names([NAMES[gene] for gene in (6, 0, 2, 4)])
COLUMNS = [6, 0, 2, 4]
UNIT = "ln(1 + 10000 * count / spot total over the genes that all training sections measure)"


def _table(root: Path, lacks: dict[str, list[int]] = LACKS) -> tuple[Manifest, dict[str, np.ndarray]]:
    """A tile table whose sections lack some genes, and the sections' counts, (n, 8)."""
    measures = {name: ~np.isin(np.arange(len(NAMES)), genes) for name, genes in lacks.items()}
    counts = {name: (1 + random_counts(9 + seed, seed)) * measures[name] for seed, name in enumerate(lacks)}
    root.mkdir(exist_ok=True)
    return _of_16_px(root, make_table(root, counts, measures=measures)), counts


def _of_16_px(root: Path, manifest: Manifest) -> Manifest:
    """The smallest tiles that a run takes; no test reads them."""
    changed = manifest.model_copy(update={"tile_size_px": 16})
    (root / MANIFEST).write_bytes(changed.encode())
    return changed


def _reader(root: Path, manifest: Manifest, **settings: object) -> SpotReader:
    return make_reader(str(root), manifest, PANEL, override(Config(), TOTAL | settings), ["A1", "B1"])


def _open(root: Path, name: str | None = None, **settings: object) -> Run:
    changed = {"split.test_patients": ["C"], "genes.num_genes": 4, "genes.min_sections": 0.5} | settings
    return open_run(str(root), str(root.parent / "runs"), name, override(Config(), changed), lambda *_: "untracked")


def _expected(counts: np.ndarray, lacks: list[int]) -> np.ndarray:
    """Expression of the panel over totals of the shared genes, (n, 4)."""
    values = np.log(1 + 1e4 * counts[:, COLUMNS] / counts[:, SHARED].sum(axis=1, keepdims=True))
    values[:, [gene in lacks for gene in COLUMNS]] = np.nan
    return values


@pytest.mark.parametrize("name", LACKS)
def test_shared_totals_are_over_the_genes_that_all_training_sections_measure(tmp_path: Path, name: str) -> None:
    manifest, counts = _table(tmp_path)
    reader = _reader(tmp_path, manifest)
    assert reader.target.unit() == UNIT
    expected = _expected(counts[name], LACKS[name])
    spots, section = reader.read_section(name), read_measured(reader, name)
    np.testing.assert_allclose(spots["payload"], expected, rtol=1e-5)
    known = ~np.isnan(expected)
    np.testing.assert_allclose(spots["expression"][known], expected[known], rtol=1e-5)
    np.testing.assert_array_equal(section.totals, counts[name][:, SHARED].sum(axis=1))
    np.testing.assert_allclose(section.expression(reader.target), expected, rtol=1e-5)
    np.testing.assert_allclose(thinned(section, reader.target)[0], expected, rtol=1e-5)
    sentences = [reader.read_encoded(name, group)[0]["expression"] for group in range(2)]
    np.testing.assert_array_equal(np.concatenate(sentences), spots["expression"])


def test_a_score_card_divides_by_the_models_own_totals(tmp_path: Path) -> None:
    manifest, counts = _table(tmp_path)
    reader = _reader(tmp_path, manifest, **{"genes.target": "per_gene", "genes.log_base": "10"})
    targets = scored_targets(reader.target, reader.input)
    assert list(targets) == ["per_gene", "per_spot", reader.input.unit()]
    assert targets["per_spot"].unit() == UNIT
    section = read_measured(reader, "C1")
    np.testing.assert_allclose(section.expression(targets["per_spot"]), _expected(counts["C1"], [7]), rtol=1e-5)
    own = counts["C1"][:, COLUMNS]
    np.testing.assert_allclose(section.expression(targets["per_gene"]), np.log10(1 + 1e4 * own / own.sum(axis=0)), 1e-5)


def test_an_hvg_panel_is_ranked_by_shared_totals(tmp_path: Path) -> None:
    manifest, counts = _table(tmp_path)
    config = GenesConfig(min_sections=0.5, total="shared")
    panel = fit_panel(str(tmp_path), manifest, ["A1", "B1"], config)
    variance = []
    for gene in range(len(NAMES)):
        own = [counts[name] for name in ("A1", "B1") if gene not in LACKS[name]]
        variance.append(np.concatenate([np.log(1 + 1e4 * c[:, gene] / c[:, SHARED].sum(axis=1)) for c in own]).var())
    assert list(panel.gene_id) == [NAMES[gene] for gene in np.argsort(-np.array(variance))]
    assert panel != fit_panel(str(tmp_path), manifest, ["A1", "B1"], GenesConfig(min_sections=0.5)), "a test that tells"


def _lost(counts: np.ndarray, genes: list[int]) -> float:
    return counts[:, genes].sum() / counts.sum()


@pytest.mark.odd
def test_training_sections_whose_totals_differ_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    _, counts = _table(tmp_path / "table")
    share = _lost(counts["A1"], [1, 4])
    assert share > _lost(counts["B1"], [0])
    with pytest.raises(ConfigError) as refused:
        _open(tmp_path / "table")
    text = str(refused.value)
    assert "measure different genes (5 of 8 are measured by all)" in text
    assert f"{share:.1%} of the counts of A1 are in genes that B1 does not measure" in text
    assert "Set --genes.total shared (totals over the 5 genes that all measure)" in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("input_", "target"), [("per_spot_panel", "per_gene"), ("per_gene", "per_gene")])
def test_units_without_a_total_over_all_genes_are_not_concerned(tmp_path: Path, input_: str, target: str) -> None:
    _table(tmp_path / "table")
    units = {"genes.input": input_, "genes.target": target}
    assert _open(tmp_path / "table", **units).split.train == ("A1", "B1")
    with pytest.raises(ConfigError, match=rf"genes\.total=shared has no effect with genes\.input={input_}"):
        _open(tmp_path / "table", **units, **TOTAL)


@pytest.mark.odd
def test_genes_that_hold_few_counts_do_not_matter_and_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Tables of counts often leave out genes without counts; a single count elsewhere changes no total to speak of."""
    counts = {name: random_counts(40, seed) + 1 for seed, name in enumerate(("A1", "B1", "C1"))}
    for values in counts.values():
        values[:, 3] = 0
    counts["A1"][5, 3] = 2
    listed = {name: counts[name].any(axis=0) for name in counts}
    (tmp_path / "table").mkdir()
    _of_16_px(tmp_path / "table", make_table(tmp_path / "table", counts, measures=listed))
    with caplog.at_level(logging.WARNING):
        _open(tmp_path / "table")
    share = _lost(counts["A1"], [3])
    assert 0 < share < 0.01
    assert f"(7 of 8 are measured by all), and {share:.1%} of the counts of A1" in caplog.text


@pytest.mark.odd
def test_held_out_sections_of_another_assay_are_refused_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, counts = _table(tmp_path / "table", {"A1": [], "B1": [], "C1": [7, 2]})
    share = max(_lost(counts[name], [2, 7]) for name in ("A1", "B1"))
    said = f"spot totals of section C1 are over other genes than those of training sections: {share:.1%} of the counts"
    with pytest.raises(ConfigError, match=re.escape(f"genes.total=shared: {said}")):
        _open(tmp_path / "table", **TOTAL)
    with caplog.at_level(logging.WARNING):
        _open(tmp_path / "table")
    assert said in caplog.text


def test_a_held_out_section_that_counts_more_is_named_unless_totals_are_shared(tmp_path: Path) -> None:
    manifest, counts = _table(tmp_path, {"A1": [1, 4], "B1": [1, 4], "C1": []})
    found = GeneCounts(str(tmp_path), manifest)
    (said,) = other_totals(found, ["A1", "B1"], ["A1", "C1"], None)
    assert f"section C1 are over other genes than those of training sections: {_lost(counts['C1'], [1, 4]):.1%}" in said
    assert other_totals(found, ["A1", "B1"], ["A1", "C1"], ~np.isin(np.arange(8), [1, 4])) == []


def test_lists_that_do_not_differ_cost_no_reading(tmp_path: Path) -> None:
    manifest, _ = _table(tmp_path, {"A1": [3], "B1": [3]})
    for entry in manifest.sections:
        (tmp_path / entry.file).unlink()
    assert not GeneCounts(str(tmp_path), manifest).lost(["A1", "B1"], ["A1", "B1"]).any()


@pytest.mark.odd
def test_shared_totals_need_lists_and_a_gene_in_common(tmp_path: Path) -> None:
    manifest, _ = _table(tmp_path)
    silent = manifest.model_copy(
        update={"sections": tuple(entry.model_copy(update={"genes": None}) for entry in manifest.sections)}
    )
    with pytest.raises(ConfigError, match="does not say which genes A1, B1 measure; prepare it again"):
        _reader(tmp_path, silent)
    (tmp_path / "apart").mkdir()
    apart, _ = _table(tmp_path / "apart", {"A1": [0, 1, 2, 3], "B1": [4, 5, 6, 7]})
    with pytest.raises(ConfigError, match="the training sections A1, B1 share no gene"):
        _reader(tmp_path / "apart", apart)


def test_runs_keep_their_names_and_shared_totals_make_others(tmp_path: Path) -> None:
    _table(tmp_path / "table", {"A1": [0], "B1": [0], "C1": [0]})
    run = _open(tmp_path / "table")
    assert "total" not in json.loads(Path(run.uri, RECORD).read_text())["identity"]["genes"], "as before it"
    assert _open(tmp_path / "table", **{"genes.total": "all"}).name == run.name
    shared = _open(tmp_path / "table", **TOTAL)
    assert shared.name != run.name
    assert total_genes(run.reader) is None
    assert total_genes(shared.reader).gene_id == tuple(NAMES[1:])
    with pytest.raises(RunError, match=r'genes\.total: "all" -> "shared"'):
        _open(tmp_path / "table", run.name, **TOTAL)


def test_a_run_that_began_before_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _table(tmp_path / "table")
    with monkeypatch.context() as before:
        before.setattr("mclstexp.training.run.require_totals", lambda *_: [])
        run = _open(tmp_path / "table")
    assert _open(tmp_path / "table").name == run.name


# Counts in the panel that are not in the total


def _section(num_spots: int = 300) -> MeasuredSection:
    """Spots with 8,000 counts of three panel genes, of which the first is not in the total, and of others."""
    counts = np.random.default_rng(3).multinomial(8000, [0.5, 0.2, 0.1, 0.2], size=num_spots)
    spots, xy = np.arange(num_spots), np.zeros((num_spots, 2))
    totals, in_total = counts[:, 1:].sum(axis=1), np.array([False, True, True])
    return MeasuredSection("a", "P", spots, xy, xy, spots, counts[:, :3].astype(np.float32), totals, in_total=in_total)


def test_thinned_totals_leave_out_the_panels_other_genes() -> None:
    target = Normaliser("per_spot_all", 1e4, "e", "shared")
    whole, thin = thinned(_section(), target)  # 4,000 counts in the total: thinned to .3 alone
    for expression in (whole, thin):
        np.testing.assert_allclose((np.expm1(expression) / 1e4).mean(axis=0), [1, 0.4, 0.2], rtol=0.02)
    kept = np.expm1(thin)[:, 1] / 1e4
    np.testing.assert_allclose(kept.std(), np.sqrt(0.4 * 0.6 / 1200), rtol=0.15)


def test_halves_leave_out_the_panels_other_genes() -> None:
    section = _section()
    (first, first_totals), (second, second_totals) = halve(
        section.counts, section.totals, np.random.default_rng(0), section.in_total
    )
    np.testing.assert_array_equal(first + second, section.counts)
    np.testing.assert_array_equal(first_totals + second_totals, section.totals)
    np.testing.assert_allclose(first_totals.mean(), 2000, rtol=0.01)
    assert (first_totals >= first[:, 1:].sum(axis=1)).all()
    ceiling = noise_ceiling(section.counts, section.totals, Normaliser("per_spot_all", 1e4, "e"), 0, section.in_total)
    assert ceiling["pcc"].notna().all()


# What a version records


def _version(genes: list[str]) -> ModelVersion:
    version = random_version()
    version.config, version.total_genes = override(version.config, TOTAL), GenePanel.from_names(genes)
    return version


def test_a_version_names_the_genes_of_its_totals(tmp_path: Path) -> None:
    digests = []
    for folder, genes in (("one", NAMES[:5]), ("same", NAMES[:5]), ("other", NAMES[:4])):
        (tmp_path / folder).mkdir()
        _version(list(genes)).save(tmp_path / folder)
        loaded = ModelVersion.load(tmp_path / folder)
        assert loaded.total_genes == GenePanel.from_names(genes)
        digests.append(loaded.digest)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.odd
@pytest.mark.parametrize("total", ["all", "shared"])
def test_a_version_whose_genes_and_setting_disagree_is_refused(tmp_path: Path, total: str) -> None:
    version = _version(list(NAMES))
    if total == "all":
        version.config = override(version.config, {"genes.total": "all"})
    else:
        version.total_genes = None
    version.save(tmp_path)
    with pytest.raises(ModelError, match=rf"genes of spot totals, and genes\.total={total}"):
        ModelVersion.load(tmp_path)


def test_the_bank_of_a_version_with_other_totals_is_refused(tmp_path: Path) -> None:
    for name, genes in (("one", NAMES[:5]), ("other", NAMES[:4])):
        (tmp_path / name).mkdir()
        _version(list(genes)).save(tmp_path / name)
    (tmp_path / "one" / "bank.safetensors").write_bytes((tmp_path / "other" / "bank.safetensors").read_bytes())
    files = json.loads((tmp_path / "one" / "files.json").read_text())
    files["bank.safetensors"] = json.loads((tmp_path / "other" / "files.json").read_text())["bank.safetensors"]
    (tmp_path / "one" / "files.json").write_text(json.dumps(files))
    with pytest.raises(ModelError, match="it was made for spot totals over 4 genes"):
        ModelVersion.load(tmp_path / "one")


def test_recorded_genes_make_the_totals_of_another_table(tmp_path: Path) -> None:
    """Its genes are in another order, and its training sections would share others."""
    manifest, counts = _table(tmp_path / "own")
    recorded = total_genes(_reader(tmp_path / "own", manifest))
    order = [7, 3, 0, 1, 2, 6, 5, 4]
    (tmp_path / "other").mkdir()
    names = [NAMES[gene] for gene in order]
    moved = make_table(tmp_path / "other", {name: values[:, order] for name, values in counts.items()}, names)
    config = override(Config(), TOTAL)
    reader = make_reader(str(tmp_path / "other"), moved, PANEL, config, ["A1", "B1"], recorded)
    found = read_measured(reader, "B1").expression(reader.target)
    np.testing.assert_allclose(found[:, :3], _expected(counts["B1"], [])[:, :3], rtol=1e-5)


@pytest.mark.odd
def test_a_table_without_a_gene_of_the_totals_is_refused(tmp_path: Path) -> None:
    manifest, _ = _table(tmp_path)
    recorded = GenePanel.from_names([*NAMES[:3], "ABSENT"])
    with pytest.raises(ModelError, match="over 4 genes, and the tile table lacks 1 of them: ABSENT"):
        make_reader(str(tmp_path), manifest, PANEL, override(Config(), TOTAL), ["A1", "B1"], recorded)


@pytest.mark.parametrize("same", [True, False])
def test_a_champion_with_other_totals_is_not_compared(tmp_path: Path, same: bool) -> None:
    _table(tmp_path / "table", LACKS | {"C1": []})
    run = _open(tmp_path / "table", **TOTAL)
    champion = _version([NAMES[gene] for gene in (SHARED if same else SHARED[1:])])
    assert (_obstacle(run, champion).startswith("both divide by spot totals over the genes")) != same
