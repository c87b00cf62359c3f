"""The command line of all recipes: flags from dataclasses, help in two lengths, and errors of one line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
import inspect
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from eval.columns import plural as plural
from recipes.common.accepted import choices_of, limits_text, number_kind, numbers_text

C = TypeVar("C")
REQUIRED = dataclasses.MISSING
GROUPS = ("what to do", "model and data", "method", "optimisation", "measurement", "machine and output")
TRACKERS = ("tensorboard", "wandb")
LINE, WORD = 280, 140  # characters of a message, and of a word in it


def flag(default: Any, help: str, group: str = "what to do", **metadata: Any) -> Any:
    """Declare a field of a recipe's configuration, which is also a flag and a key of config.json.

    ``default``: `REQUIRED` for none. ``group``: one of `GROUPS`. ``metadata``: ``choices``, or a function that returns them. ``short``:
    False leaves the flag out of the short help. ``was``: an older name that is still accepted. ``own``: a function of the parsed values
    that returns the text of the default, where it depends on other flags. ``at_least``, ``above``, ``at_most``, ``below``: bounds of a
    number, or of each in a tuple. ``path``: a key of `recipes.common.accepted.PATHS`.
    """
    assert group in GROUPS, group
    return dataclasses.field(default=default, metadata={"help": help, "group": group, "short": True, **metadata})


model_flag = partial(flag, group="model and data")
method_flag = partial(flag, group="method")
training_flag = partial(flag, group="optimisation")
measuring_flag = partial(flag, group="measurement")
machine_flag = partial(flag, group="machine and output")


def parse(config: type[C], doc: str, presets: dict[str, dict], argv: list[str] | None = None) -> C:
    """Read a configuration from flags. A preset changes defaults; flags override it.

    ``doc``: the recipe's docstring, shown by ``--help``. ``config`` may hold ``MOVED``: {old flag: command that replaces it}, and
    ``TOPICS``: {topic of --help: text}.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of(config, doc)
    _refuse_moved(config, argv)
    if {"-h", "--help"} & set(argv):
        for action in parser._actions:
            action.required = False
    chosen = parser.parse_args(argv)
    preset = presets[chosen.preset]
    parser.set_defaults(**preset)
    chosen = parser.parse_args(argv)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(chosen).items() if k not in ("help", "trust")}
    if chosen.help:
        _show_help(config, doc, chosen.help, values, preset)
    tracker = values.get("log_with")
    if isinstance(tracker, str) and importlib.util.find_spec(tracker) is None:
        fail(f"--log-with {tracker}: the package {tracker} is not installed: pip install {tracker}")
    if chosen.trust:
        from teachers.networks.factory import trust

        trust(*chosen.trust)
    return config(**values)


class Completing(Exception):
    """Hand the parser of a recipe to the completion of a shell, which needs no more of the recipe."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


def flags_first(module: str, config: type, doc: str | None, presets: dict[str, dict]) -> None:
    """End --help and wrong flags here, between a recipe's flags and the imports of its algorithm, which take seconds.

    ``module``: the recipe's ``__name__``. Nothing happens where it is imported and not run.
    """
    if module != "__main__":
        return
    if "_ARGCOMPLETE" in os.environ:
        raise Completing(parser_of(config, doc or ""))
    with one_line_errors():
        parse(config, doc or "", presets)


def fail(message: str) -> NoReturn:
    """End the program with exit code 2 and one line on standard error, written by the main process and at most `LINE` long."""
    if os.environ.get("RANK", "0") == "0":
        line = " ".join(_cut(word, WORD) for word in str(message).split())
        print(f"error: {_cut(line, LINE)}", file=sys.stderr)
    raise SystemExit(2)


def _cut(text: str, most: int) -> str:
    """Return the text, without its middle where it has more than ``most`` characters: its end often says what is accepted."""
    return text if len(text) <= most else f"{text[: most // 2 - 2]}...{text[1 - most // 2 :]}"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn ValueError and OSError into one line and exit code 2. For loading and checking what a user gave.

    So is what a small machine or a huge number leads to: a lack of memory.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:  # torch's type is RuntimeError
        if not isinstance(error, MemoryError) and "not enough memory" not in str(error):
            raise
        fail(f"not enough memory: {error}")


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")  # argparse takes -1e3 and -inf for flags

    def error(self, message: str) -> NoReturn:
        flags = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        if "unrecognized" in message:
            unknown = next((word for word in message.split() if word.startswith("-")), "")
            near = difflib.get_close_matches(unknown, flags, 2, 0.5)
            near += [name for name in flags if unknown.lstrip("-") and unknown.lstrip("-") in name and name not in near][
                : 3 - len(near)
            ]
            message += ": " + (f"nearest are {', '.join(near)}; " if near else "") + "--help all lists the flags"
        fail(message)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Lines of 100 columns, which never break a name at its hyphen."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=100)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


def parser_of(
    config: type, doc: str, values: dict[str, Any] | None = None, preset: dict[str, Any] | None = None, full: bool = True
) -> argparse.ArgumentParser:
    """Build the parser of a configuration.

    For the help: ``values``, parsed values that defaults depend on; ``preset``, defaults that differ; ``full``, show all flags.
    """
    name = Path(inspect.getfile(config)).stem
    more = "" if full else "\nThis is the short help. More: --help all"
    more += "".join(f", --help {topic}" for topic in getattr(config, "TOPICS", {})) if not full else ""
    parser = _Parser(
        prog=name, usage=f"{name} [FLAGS]", description=doc.strip(), epilog=more or None, allow_abbrev=False, add_help=False,
        formatter_class=_Formatter,
    )  # fmt: skip
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    groups["what to do"].add_argument(
        "-h", "--help", nargs="?", const="short", help="short help; --help all shows every flag", metavar="TOPIC"
    )
    about = "modules of your own whose factories model files may name, as in --teacher; their code is run"
    groups["machine and output"].add_argument(
        "--trust", nargs="+", default=[], metavar="MODULE", help=about if full else argparse.SUPPRESS
    )
    kinds = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        default = _default_text(field, (preset or {}).get(field.name, field.default), values)
        _add_flag(groups[field.metadata["group"]], field, kinds[field.name], default, full or field.metadata["short"])
    return parser


def _add_flag(group: Any, field: dataclasses.Field, kind: Any, default_text: str, shown: bool) -> None:
    default, names = field.default, ["--" + field.name.replace("_", "-")]
    options: dict[str, Any] = {"dest": field.name}
    if field.metadata.get("was"):
        names.append("--" + field.metadata["was"].replace("_", "-"))
    if default is REQUIRED:
        options["required"] = True
    else:
        options["default"] = default
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        if typing.get_origin(kind) is tuple:
            kind, options["nargs"] = typing.get_args(kind)[0], "+"
        options |= {"type": _reader(kind, field.metadata) if number_kind(kind) else kind, "metavar": kind.__name__.upper()}
    if "choices" in field.metadata:
        options["choices"] = choices_of(field)
    about = [f"one of {', '.join(map(str, options['choices']))}"] if "choices" in options else []
    about += [text for text in (limits_text(field.metadata), default_text) if text]
    text = field.metadata["help"] + (f" ({'; '.join(about)})" if about else "")
    options["help"] = text.replace("%", "%%") if shown else argparse.SUPPRESS
    group.add_argument(*names, **options)


def _reader(kind: type, metadata: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return the function that reads a number from the text of a flag."""

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            message = f"invalid {kind.__name__} value: {text!r}; accepted are {numbers_text(kind, metadata)}"
            raise argparse.ArgumentTypeError(message) from None

    return read


def _default_text(field: dataclasses.Field, default: Any, values: dict[str, Any] | None) -> str:
    """Return how the help shows a default: of the flag, or where it has none, what ``own`` makes of the parsed values."""
    own: Callable[[dict], str] | None = field.metadata.get("own")
    if default is REQUIRED:
        return "required"
    if default is None or default == ():
        return "" if own is None or values is None else f"default: {own(values)}"
    if isinstance(default, bool):
        return f"default: {'on' if default else 'off'}"
    return f"default: {' '.join(map(str, default)) if isinstance(default, tuple) else default}"


def _show_help(config: type, doc: str, topic: str, values: dict[str, Any], preset: dict[str, Any]) -> NoReturn:
    topics = getattr(config, "TOPICS", {})
    if topic in topics:
        print("\n".join(textwrap.fill(line, 100, break_on_hyphens=False) for line in topics[topic].splitlines()))
    elif topic in ("short", "all"):
        parser_of(config, doc, values, preset, topic == "all").print_help()
    else:
        fail(f"--help {topic}: accepted are --help, --help all{''.join(f', --help {name}' for name in topics)}")
    raise SystemExit(0)


def _refuse_moved(config: type, argv: list[str]) -> None:
    for old, command in getattr(config, "MOVED", {}).items():
        if any(word.partition("=")[0] == old for word in argv):
            fail(f"{old} is a command of its own now: {command}")
