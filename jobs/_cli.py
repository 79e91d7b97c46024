"""The command line of all jobs, made from pydantic fields: a job's own arguments and the configuration's settings.

`--train.epochs 3` on the command line wins over `--config FILE.yaml`, which wins over the defaults. Without a file,
jobs that make a model use `configs/default.yaml`. Name, type, bounds and help text of an argument or a setting are
written once, at its field.
"""

import argparse
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml
from _launch import ROOT, hide_logs_of_ray
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mclstexp.config import Config, leaf_fields, load_config, override, unknown_setting, validation_faults
from mclstexp.errors import ConfigError, UserError
from mclstexp.settings import ConfigBlock

RECIPE = ROOT / "jobs" / "configs" / "default.yaml"
"""Settings of the jobs that make a model, where no file is given."""


class JobArguments(ConfigBlock):
    """Base of each job's own arguments: what to work on, while settings say how. `--page-mb` is the field `page_mb`."""

    former: typing.ClassVar[Mapping[str, str]] = {}
    """Options of earlier versions, and what to do instead."""
    dry_run: bool = False
    """Print the settings and the plan, and start nothing."""
    verbose: bool = False
    """Show the log lines of Ray and MLflow too."""


Arguments = typing.TypeVar("Arguments", bound=JobArguments)


def parse(
    kind: type[Arguments],
    purpose: str,
    example: str,
    blocks: Sequence[str],
    argv: Sequence[str] | None = None,
    implied: Mapping[str, object] | None = None,
) -> tuple[Arguments, Config]:
    """Returns the job's arguments and the resolved configuration, and applies its storage block to this process.

    Args:
        kind: the job's arguments.
        purpose: what the job does, for --help.
        example: a command line, for --help.
        blocks: the blocks of the configuration that the job reads, or single settings; only these are options.
        argv: the command line without the program's name; default sys.argv.
        implied: settings that the job itself makes, whatever the file and the command line say.

    Raises:
        ConfigError: an unknown or invalid argument or setting, with the nearest valid name.
    """
    settings = [name for name in leaf_fields() if name.partition(".")[0] in blocks or name in blocks]
    recipe = RECIPE if "model" in blocks else None
    known, unknown = _parser(kind, purpose, example, settings, recipe).parse_known_args(argv)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        if name in kind.former:
            raise ConfigError(f"--{name} is not an option any more; {kind.former[name]}")
        valid = [_option(name) for name in kind.model_fields] + ["config", *settings]
        raise ConfigError(unknown_setting(name, valid, "the command line"))
    given = {name: text for name, text in vars(known).items() if text is not None and name != "config"}
    fields = {**kind.model_fields, **{name: _setting(name) for name in settings}}
    values = {name: _value(fields[name], text) for name, text in given.items()}
    arguments = _validated(kind, {name: value for name, value in values.items() if name in kind.model_fields})
    changed = {name: value for name, value in values.items() if "." in name} | dict(implied or {})
    config = override(load_config((known.config or recipe) if settings else None), changed, "the command line")
    os.environ.update(config.storage.environment())
    if not arguments.verbose:
        hide_logs_of_ray()
    return arguments, config


def run(job: Callable[[], None]) -> None:
    """Runs a job; a user's mistake is printed without a traceback and exits with code 2."""
    try:
        job()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def describe(config: Config, blocks: Sequence[str]) -> str:
    """Returns the resolved settings of some blocks as YAML."""
    whole = {name for name in blocks if "." not in name}
    return yaml.safe_dump(config.model_dump(mode="json", include=whole), sort_keys=False).rstrip()


def _parser(
    kind: type[JobArguments], purpose: str, example: str, settings: Sequence[str], recipe: Path | None
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=purpose,
        epilog=f"example: {example}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = {name: field for name, field in kind.model_fields.items() if name not in JobArguments.model_fields}
    for name, field in own.items():
        _add(parser, _option(name), name, field, field.default)
    if settings:
        used = f" [{recipe.relative_to(ROOT)}]" if recipe else ""
        text = f"Settings from a file{used}; the command line wins over it."
        parser.add_argument("--config", metavar="FILE.yaml", help=text)
    for name, field in JobArguments.model_fields.items():
        _add(parser, _option(name), name, field, field.default)
    values = load_config(recipe).model_dump()
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name in settings:
        block, _, last = name.partition(".")
        if block not in groups:
            title = Config.model_fields[block].annotation.__doc__ or ""
            groups[block] = parser.add_argument_group(block, title)
        _add(groups[block], name, name, _setting(name), values[block][last])
    return parser


def _add(group: argparse._ActionsContainer, option: str, name: str, field: FieldInfo, value: object) -> None:
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
    default = "" if shown is None or shown is False or shown == "" else f" [{shown}]"
    default = " (required)" if field.is_required() else default
    text = f"{field.description}{default}".replace("%", "%%")
    switch: dict[str, typing.Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
    group.add_argument(f"--{option}", dest=name, help=text, metavar=_metavar(field.annotation), **switch)


def _option(name: str) -> str:
    return name.replace("_", "-")


def _setting(name: str) -> FieldInfo:
    block, field = leaf_fields()[name]
    return block.model_fields[field]


def _metavar(annotation: object) -> str:
    """Returns what a value looks like, for --help."""
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) is tuple:
        return "A,B,..."
    if typing.get_origin(annotation) is types.UnionType:
        return _metavar(typing.get_args(annotation)[0])
    return {bool: "true|false", int: "N", float: "X"}.get(annotation, "TEXT")  # type: ignore[call-overload]


def _value(field: FieldInfo, text: str) -> object:
    """Returns a command-line text as the plain value that pydantic validates."""
    if typing.get_origin(field.annotation) is tuple:
        return [name for part in text.split(",") if (name := part.strip())]
    if text.lower() in ("none", "null") and type(None) in typing.get_args(field.annotation):
        return None
    return text


def _validated(kind: type[Arguments], values: dict[str, object]) -> Arguments:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"invalid argument: {validation_faults(error, '--', _option)}") from None
