"""The command line of all jobs, made from the configuration's fields.

`--train.epochs 3` on the command line wins over `--config FILE.yaml`, which wins over the defaults. argparse is
driven by the pydantic fields themselves, so that a setting and its help are written once.
"""

import argparse
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import yaml

from mclstexp.config import Config, leaf_fields, load_config, override, unknown_setting
from mclstexp.errors import ConfigError, UserError


@dataclass(frozen=True)
class Argument:
    """One argument of a job, beside the settings: what to work on."""

    name: str
    help: str
    required: bool = True
    default: str | None = None
    is_switch: bool = False


def parse(
    purpose: str,
    example: str,
    arguments: Sequence[Argument],
    sections: Sequence[str],
    argv: Sequence[str] | None = None,
) -> tuple[argparse.Namespace, Config]:
    """Returns the job's arguments (with `dry_run`) and the resolved configuration, and applies its storage block.

    Args:
        purpose: what the job does, for --help.
        example: a command line, for --help.
        arguments: the job's own arguments.
        sections: the configuration's sections that the job reads; only their settings are options.
        argv: the command line without the program's name; default sys.argv.

    Raises:
        ConfigError: an unknown or invalid setting, with the nearest valid name.
    """
    settings = [name for name in leaf_fields() if name.partition(".")[0] in sections]
    parser = _parser(purpose, example, arguments, settings)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        valid = [argument.name for argument in arguments] + ["config", "dry-run", *settings]
        raise ConfigError(unknown_setting(unknown[0].lstrip("-").partition("=")[0], valid, "the command line"))
    given = {name: _value(name, text) for name, text in vars(known).items() if "." in name and text is not None}
    config = override(load_config(known.config), given, "the command line")
    os.environ.update(config.storage.environment())
    return known, config


def run(job: Callable[[], None]) -> None:
    """Runs a job; a user's mistake is printed without a traceback and exits with code 2."""
    try:
        job()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def describe(config: Config, sections: Sequence[str]) -> str:
    """Returns the resolved settings of some sections as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json", include=set(sections)), sort_keys=False).rstrip()


def _parser(
    purpose: str, example: str, arguments: Sequence[Argument], settings: Sequence[str]
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=purpose,
        epilog=f"example: {example}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for argument in arguments:
        if argument.is_switch:
            parser.add_argument(f"--{argument.name}", action="store_true", help=argument.help)
            continue
        parser.add_argument(
            f"--{argument.name}", required=argument.required, default=argument.default, help=argument.help, metavar="X"
        )
    parser.add_argument("--config", metavar="FILE.yaml", help="settings; the command line wins over it")
    parser.add_argument("--dry-run", action="store_true", help="print the settings and the plan, start nothing")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name in settings:
        section = name.partition(".")[0]
        if section not in groups:
            title = Config.model_fields[section].annotation.__doc__ or ""  # type: ignore[union-attr]
            groups[section] = parser.add_argument_group(section, title)
        _add_setting(groups[section], name)
    return parser


def _add_setting(group: argparse._ArgumentGroup, name: str) -> None:
    section, field = leaf_fields()[name]
    info = section.model_fields[field]
    default = "" if info.default in (None, ()) else f" [{info.default}]"
    text = f"{info.description}{default}".replace("%", "%%")
    switch: dict[str, object] = {"nargs": "?", "const": "true"} if info.annotation is bool else {}
    group.add_argument(f"--{name}", dest=name, help=text, metavar=_kind(info.annotation), **switch)  # type: ignore[arg-type]


def _kind(annotation: object) -> str:
    """Returns what a setting's value looks like, for --help."""
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) is tuple:
        return "A,B,..."
    if typing.get_origin(annotation) is types.UnionType:
        return _kind(typing.get_args(annotation)[0])
    return {bool: "true|false", int: "N", float: "X"}.get(annotation, "TEXT")  # type: ignore[call-overload]


def _value(name: str, text: str) -> object:
    """Returns a command-line text as the plain value that pydantic validates."""
    section, field = leaf_fields()[name]
    annotation = section.model_fields[field].annotation
    if typing.get_origin(annotation) is tuple:
        return [part for part in text.split(",") if part]
    if text.lower() in ("none", "null") and type(None) in typing.get_args(annotation):
        return None
    return text
