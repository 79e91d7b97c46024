"""The command line: made from the settings, and helpful when one is wrong."""

import importlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from _cli import JobArguments, describe, parse
from pydantic import Field

from mclstexp.config import Config, leaf_fields, load_config
from mclstexp.errors import ConfigError

ROOT = Path(__file__).parents[1]
JOBS = sorted(path for path in (ROOT / "jobs").glob("[!_]*.py"))


class Arguments(JobArguments):
    """Arguments of a job that is none."""

    data: str
    """A table."""
    out: str = "runs"
    """Where results go."""
    page_mb: float = Field(40.0, gt=0)
    """Size of a page."""
    genes: tuple[str, ...] = ()
    """Some genes."""


def _parse_both(*argv: str) -> tuple[Arguments, Config]:
    blocks = ["train", "model", "split"]
    return parse(Arguments, "Does it.", "python jobs/x.py", blocks, ["--data", "d", "--verbose", *argv])


def _parse(*argv: str) -> Config:
    return _parse_both(*argv)[1]


def test_arguments_have_their_types_and_defaults() -> None:
    arguments, _ = _parse_both("--page-mb", "2.5", "--genes", "A,B", "--dry-run")
    assert (arguments.data, arguments.out, arguments.page_mb) == ("d", "runs", 2.5)
    assert (arguments.genes, arguments.dry_run, arguments.verbose) == (("A", "B"), True, True)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("train: {epochs: 7, seed: 5}\nmodel: {spot_layers: 2}\ntiles: {size_px: 64}\n")
    config = _parse("--config", str(file), "--train.epochs", "9")
    assert (config.train.epochs, config.train.seed, config.model.spot_layers) == (9, 5, 2)
    assert (config.tiles.size_px, config.train.tower_lr) == (64, Config().train.tower_lr)


def test_jobs_that_make_a_model_have_the_default_recipe_where_no_file_is_given(tmp_path: Path) -> None:
    assert _parse() == load_config(ROOT / "jobs" / "configs" / "default.yaml")
    assert parse(Arguments, "Does it.", "python jobs/x.py", ["predict"], ["--data", "d"])[1] == Config()
    (tmp_path / "empty.yaml").touch()
    assert _parse("--config", str(tmp_path / "empty.yaml")) == Config()


def test_the_wide_view_can_be_left_out() -> None:
    def wide(*argv: str) -> float | None:
        return parse(Arguments, "Does it.", "python jobs/x.py", ["tiles"], ["--data", "d", *argv])[1].tiles.wide_um

    assert (wide(), wide("--tiles.wide_um", "none"), wide("--tiles.wide_um", "865")) == (618.0, None, 865.0)


def test_values_of_every_kind() -> None:
    given = ("--split.test_patients", "A,B", "--model.spot_width", "none", "--train.use_gpu", "--train.compile=false")
    config = _parse(*given, "--train.tower_lr", "3e-4", "--model.position=sinusoidal")
    assert config.split.test_patients == ("A", "B")
    assert _parse("--split.test_patients", " A, B ,").split.test_patients == ("A", "B")
    assert config.model.spot_width is None
    assert (config.train.use_gpu, config.train.compile) == (True, False)
    assert (config.train.tower_lr, config.model.position) == (3e-4, "sinusoidal")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.epoch", "3"], "unknown setting train.epoch in the command line; did you mean train.epochs?"),
        (["--train.spot_layers", "3"], "did you mean model.spot_layers?"),
        (["--dta", "x"], "did you mean data?"),
        (["--page-mb", "0"], "--page-mb='0': Input should be greater than 0"),
        (["--page-mb", "large"], "--page-mb='large': Input should be a valid number"),
        (["--train.epochs", "many"], "train.epochs='many': Input should be a valid integer"),
        (["--train.tower_lr", "nan"], "train.tower_lr"),
        (["--model.temperature", "0"], "model.temperature"),
        (["--model.spot_layers", "-1"], "model.spot_layers"),
        (["--train.num_workers", "3"], "train.batch_sentences=8 is not a multiple of train.num_workers=3; use 9"),
        (["--model.position", "left"], "model.position='left'"),
        (["--model.batch_norm", "sync"], "needs train.use_gpu=true"),
    ],
)
def test_mistakes_are_answered_with_what_to_do(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        _parse(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {epochs: 1}", "unknown setting trian in"),
        ("train: {epoch: 1}", "did you mean train.epochs?"),
        ("- a", "contains list, not a mapping of blocks"),
        ("train: [", "cannot read"),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"wrong\.yaml") as error:
        load_config(file)
    assert message in str(error.value)


def test_a_file_stands_on_its_base(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "ground.yaml").write_text("train: {epochs: 2, seed: 3, tower_lr: 0.5}\nmodel: {spot_layers: 1}\n")
    (tmp_path / "deep" / "middle.yaml").write_text("base: ../ground.yaml\ntrain: {epochs: 7, seed: 5}\n")
    top = tmp_path / "top.yaml"
    top.write_text("base: deep/middle.yaml\ntrain: {epochs: 9}\ntiles: {size_px: 64}\n")
    config = _parse("--config", str(top), "--train.head_lr", "0.25")
    assert (config.train.epochs, config.train.seed, config.train.tower_lr, config.train.head_lr) == (9, 5, 0.5, 0.25)
    assert (config.model.spot_layers, config.tiles.size_px) == (1, 64)
    assert config.genes == Config().genes


@pytest.mark.parametrize(
    ("base", "top", "message"),
    [
        ("train: {epochs: 1}", "base: none.yaml", "cannot read the configuration"),
        ("train: {epochs: 1}", "base: [base.yaml]", "is not a file name"),
        ("train: {epochs: 1}", "base: top.yaml", "leads back to itself"),
        ("base: top.yaml", "base: base.yaml", "leads back to itself"),
        ("train: {epoch: 1}", "base: base.yaml", "unknown setting train.epoch in"),
        ("train: {epochs: 1}", "base: base.yaml\ntrain: {epoch: 1}", "did you mean train.epochs?"),
        ("train: {epochs: 1}", "base: base.yaml\ntrain: 3", "invalid setting in"),
        ("train: {num_workers: 2}", "base: base.yaml\ntrain: {batch_sentences: 3}", "is not a multiple"),
    ],
)
def test_mistakes_of_and_in_a_base_are_answered(tmp_path: Path, base: str, top: str, message: str) -> None:
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "top.yaml").write_text(top)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "top.yaml")
    assert message in str(error.value)
    assert ("base.yaml" if "epoch:" in base else str(tmp_path)) in str(error.value)


def test_described_settings_are_settings(tmp_path: Path) -> None:
    config = _parse("--train.seed", "3", "--split.test_patients", "A")
    file = tmp_path / "resolved.yaml"
    file.write_text(describe(config, list(Config.model_fields)))
    assert load_config(file) == config


@cache
def _help(job: Path) -> tuple[str, str]:
    """Returns what a job's --help prints, and which heavy packages it imported."""
    script = (
        f"import runpy, sys; sys.path.insert(0, {str(job.parent)!r}); sys.argv = ['job', '--help']\n"
        f"try: runpy.run_path({str(job)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = [name for name in ('torch', 'ray', 'mlflow', 'boto3', 'pandas') if name in sys.modules]\n"
        "print(*heavy, end='', file=sys.stderr)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=True)
    return shown.stdout, shown.stderr


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.name)
def test_help_explains_every_setting_at_once(job: Path) -> None:
    shown = _help(job)[0]
    flat = " ".join(shown.split())
    blocks = {line.rstrip(":") for line in shown.splitlines() if line.rstrip(":") in Config.model_fields}
    chosen = getattr(importlib.import_module(job.stem), "BLOCKS", ())  # the demo has no settings of its own
    assert blocks == {name.partition(".")[0] for name in chosen}
    assert "--dry-run [true|false]" in flat
    if "train" in blocks:
        assert "dropout and initial weights. [0]" in flat
        assert "Settings from a file [jobs/configs/default.yaml]; the command line wins" in flat
        assert "pooled feature. [transition2,transition3,norm]" in flat, "the recipe's"
    for name, (block, field) in leaf_fields().items():
        if name.partition(".")[0] in chosen or name in chosen:
            assert f"--{name}" in flat
            assert " ".join((block.model_fields[field].description or "?").split()[:4]) in flat


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.name)
def test_help_needs_no_heavy_import(job: Path) -> None:
    assert _help(job)[1] == ""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("job", ["train.py", "cross_validate.py"])
def test_a_dry_run_fetches_no_weights(job: str, tiles: str, tmp_path: Path) -> None:
    """The cache of weights is empty and a proxy that does not exist stands before the network."""
    nowhere = {"TORCH_HOME": str(tmp_path / "torch"), "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    protocol = ["--protocol", "patient"] if job == "cross_validate.py" else ["--split.test_patients", "P3"]
    command = [sys.executable, str(ROOT / "jobs" / job), "--data", tiles, "--out", str(tmp_path / "out"), *protocol]
    settings = ["--model.image_encoder", "densenet121", "--model.image_weights", "imagenet", "--dry-run"]
    done = subprocess.run(
        [*command, *settings], capture_output=True, text=True, timeout=240, check=False, env=os.environ | nowhere
    )
    assert done.returncode == 0, done.stderr
    assert "image_weights: imagenet" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_moved_to_another_job_says_where() -> None:
    command = [sys.executable, str(ROOT / "jobs" / "evaluate.py"), "--protocol", "patient", "--data", "tiles"]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert failed.returncode == 2
    assert failed.stderr == ("error: --protocol is not an option any more; use jobs/cross_validate.py --protocol\n")


@pytest.mark.parametrize("job", ["evaluate.py", "cross_validate.py"])
def test_the_former_name_of_an_option_says_the_new_one(job: str) -> None:
    command = [sys.executable, str(ROOT / "jobs" / job), "--data", "tiles", "--probe-weights=imagenet"]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert failed.returncode == 2
    assert failed.stderr == "error: --probe-weights is not an option any more; use --floor-weights\n"


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(ConfigError, match="invalid argument: --data is missing"):
        parse(Arguments, "Does it.", "python jobs/x.py", ["train"], ["--out", "x", "--verbose"])


def test_a_mistake_exits_with_code_2_and_no_traceback() -> None:
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--data", "nowhere", "--train.epoch", "1"]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: unknown setting")
    assert "Traceback" not in failed.stderr


@pytest.mark.slow
def test_a_dry_run_prints_settings_and_plan_without_a_cluster(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--data", str(tmp_path), "--dry-run"]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert failed.returncode == 2
    assert "no tile table" in failed.stderr
