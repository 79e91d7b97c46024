#!/usr/bin/env python
"""Predicts expression for the tiles of H&E slides with a registered model version."""

import _launch  # first: puts the project on the path
from _cli import Argument, describe, parse, run

from mclstexp.config import Config, override
from mclstexp.errors import ConfigError
from mclstexp.settings import TilesConfig

EXAMPLE = "python jobs/predict.py --model models:/mclstexp@champion --samples slides.csv --out s3://bucket/predictions"
ARGUMENTS = [
    Argument("model", "models:/NAME@ALIAS, models:/NAME/VERSION, or a model folder"),
    Argument("samples", "a sample sheet (.csv) of slides, or a tile table (folder or s3:// URI)"),
    Argument("out", "where SECTION.parquet and SECTION.h5ad go"),
]
SECTIONS = ("storage", "cluster", "tiles", "tracking")
FREE_TILES = ("allow_upsampling", "min_tissue")


def main() -> None:
    """Parses, fetches the version, prepares slides where a sheet is given, predicts."""
    arguments, config = parse(__doc__ or "", EXAMPLE, ARGUMENTS, SECTIONS)
    import tempfile

    from mclstexp import resources, storage, tracking
    from mclstexp.inference.model_version import ModelVersion

    with tempfile.TemporaryDirectory() as scratch:
        model = ModelVersion.load(tracking.fetch_model(config.tracking, arguments.model, scratch))
    is_sheet = arguments.samples.endswith(".csv")
    tiles = storage.join(arguments.out, "tiles") if is_sheet else arguments.samples
    if arguments.dry_run:
        print(describe(config, SECTIONS))
        print(_plan(arguments, tiles, is_sheet, model, config))
        return
    _launch.connect(config)
    resources.require_shared(config, [f"--samples {arguments.samples}", f"--out {arguments.out}"])
    if is_sheet:
        from ingest.prepare import prepare

        prepare(arguments.samples, tiles, _tiles_config(config, model))
    _predict(model, tiles, arguments.out)


def _predict(model, tiles: str, out: str) -> None:  # noqa: ANN001
    from rich.progress import Progress

    from mclstexp.inference.predict import predict_table

    with Progress() as bar:
        task = bar.add_task("predict: tiles", total=None)
        report = predict_table(model, tiles, out, lambda done, total: bar.update(task, completed=done, total=total))
    print(f"{len(report.predicted)} sections predicted ({report.num_spots} tiles), {len(report.skipped)} done before")
    if report.empty:
        print(f"no tiles, so nothing to predict: {', '.join(report.empty)}")
    print(f"predictions {out}")


def _plan(arguments, tiles: str, is_sheet: bool, model, config: Config) -> str:  # noqa: ANN001
    from mclstexp.data.schema import load_manifest
    from mclstexp.inference.predict import plan

    if is_sheet:
        from ingest.prepare import plan as prepare_plan

        return prepare_plan(arguments.samples, tiles, _tiles_config(config, model))
    return plan(load_manifest(tiles), model, arguments.out)


def _tiles_config(config: Config, model) -> Config:  # noqa: ANN001
    """Returns the settings under which slides are cut as the model's training tiles were.

    Raises:
        ConfigError: a setting that the model fixes was set to something else; names both values.
    """
    own, asked, default = model.config.tiles, config.tiles, TilesConfig()
    for name in set(TilesConfig.model_fields) - set(FREE_TILES):
        value, fixed = getattr(asked, name), getattr(own, name)
        if value not in (fixed, getattr(default, name)):
            raise ConfigError(f"the model's tiles have tiles.{name}={fixed}, got {value}; leave it out")
    free = {f"tiles.{name}": getattr(asked, name) for name in FREE_TILES}
    return override(config.model_copy(update={"tiles": own}), free)


if __name__ == "__main__":
    run(main)
