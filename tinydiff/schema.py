"""A configuration as frozen dataclasses: read from TOML and `key=value`, checked, printed with each key's meaning.

A dataclass is the only place where a key, its default, its range and its one-line meaning stand. Nothing here knows which
keys there are.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_args, get_type_hints

from tinydiff.errors import UsageError
from tinydiff.files import shown
from tinydiff.system import unreadable

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # pyright: ignore[reportMissingImports]


MAX_LIST = 16
CHOSEN = "chosen: "  # before a reason
TEXT = r'"(?:[^"\\]|\\.)*"'
REASON = re.compile(rf'(\w+) = (?:{TEXT}|\[(?:{TEXT}|[^"\]])*\]|[^"\[\s]+)\s+# {CHOSEN}(.*)$')
Bound = float | None
EITHER = {
    int | tuple[int, ...]: (int, tuple[int, ...]),
    str | tuple[str, ...]: (str, tuple[str, ...]),
}  # one, or a list


def key(
    default: Any,
    doc: str,
    low: Bound = None,
    high: Bound = None,
    choices: Collection[str] = (),
    own: bool | Collection[Any] = False,
) -> Any:
    """A configuration key: default, meaning, closed range, allowed names (a table that grows may be given itself).

    `own`: of a network's settings, one that other programs have no form of where it is not at its default, or its values that
    they have no form of.
    """
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "choices": choices, "own": own})


def section(kind: type, doc: str, after: str = "", **changes: Any) -> Any:
    """A nested table, its defaults changed; it is printed after the table `after`, or in its own place."""
    return field(default_factory=lambda: kind(**changes), metadata={"doc": doc, "after": after})


class Key(NamedTuple):
    """What a value has to be in other programs' JSON: its type, a closed range, and the names that it may have."""

    kind: Any
    low: Bound = None
    high: Bound = None
    choices: Collection[str] = ()

    def of(self, table: Mapping[str, Any], name: str) -> Any:
        """The value of a table's key. Raises ValueError, which names the key."""
        problem, value = check(self.kind, table[name], self._asdict())
        if problem:
            raise ValueError(f"{name}: {problem}")
        return value


@lru_cache
def extended(base: type, tables: tuple[tuple[str, type, Any], ...]) -> type:
    """Dataclass `base` with further nested tables (name, type, `section`), which replace those of the same name."""
    return dataclasses.make_dataclass(base.__name__, tables, bases=(base,), frozen=True)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dict; UsageError where it is missing, over 1 MB or not TOML."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UsageError(f"{shown(path)}: not a regular file; give a tinydiff.toml")
        data = path.read_bytes()
        if len(data) > 1_000_000:
            raise UsageError(f"{shown(path)}: {len(data)} bytes is no configuration; expected a tinydiff.toml")
        return tomllib.loads(data.decode("utf-8"))
    except FileNotFoundError:
        fix = "`tinydiff inspect > tinydiff.toml` writes the default"
        raise UsageError(f"{shown(path)}: no such configuration; {fix}") from None
    except OSError as error:
        raise unreadable(error, path, UsageError) from None
    except (ValueError, RecursionError) as error:  # besides bad TOML and UTF-8, an integer of thousands of digits
        raise UsageError(f"{shown(path)}: not valid TOML: {str(error) or 'nested too deep'}") from None


def set_key(table: dict[str, Any], text: str, problems: list[str]) -> None:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        problems.append(f"{brief(text)} is not KEY=VALUE")
        return
    try:
        parsed = tomllib.loads(f"v = {value.strip()}")["v"]
    except (ValueError, RecursionError):
        parsed = value.strip()
    *parents, last = name.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            problems.append(f"{shown(name)[:80]}: set twice, as a value and as a table")
            return
    table[last] = parsed


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` on top, table by table."""
    both = {k for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | {k: merge(base[k], v) if k in both else v for k, v in over.items()}


def build(kind: type, table: Any, path: str, problems: list[str]) -> Any:
    """An instance of dataclass `kind` from a table; what is wrong is added to `problems` and left at its default."""
    if not isinstance(table, dict):
        problems.append(f"{path.rstrip('.')}: expected a table, got {brief(table)}")
        return kind()
    hints, fields = get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for name, value in table.items():
        if name not in fields:
            inner = [key for key in flat(kind()) if key.endswith(f".{name}")]
            fix = f" (there are: {', '.join(path + key for key in inner)})" if inner else nearest(name, fields)
            problems.append(f"{path}{shown(name)[:80]}: unknown key{fix}")
        elif dataclasses.is_dataclass(hints[name]):
            default = to_dict(fields[name].default_factory())  # type: ignore[misc]
            inner = merge(default, value) if isinstance(value, dict) else value
            values[name] = build(hints[name], inner, f"{path}{name}.", problems)
        else:
            problem, value = check(hints[name], value, fields[name].metadata)
            problems += [f"{path}{name}: {problem}"] if problem else []
            values |= {} if problem else {name: value}
    return kind(**values)


def nearest(name: str, names: Any) -> str:
    """The suffix ' (did you mean ...?)' for a mistyped name, or a list of what there is."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f" (did you mean '{close[0]}'?)" if close else f" (there are: {', '.join(names)})"


def check(kind: Any, value: Any, meta: Mapping[str, Any]) -> tuple[str, Any]:
    """(problem, value): '' and the converted value where it is of the kind and in range."""
    if dataclasses.is_dataclass(table := next(iter(get_args(kind)), None)):
        return _tables(table, value)
    if kind in EITHER:
        kind = EITHER[kind][isinstance(value, list | tuple)]
    if kind in (tuple[int, ...], tuple[str, ...]):
        if not isinstance(value, list | tuple) or not value:
            return f"expected a list of one or more, got {brief(value)}", value
        if len(value) > MAX_LIST:
            return f"{len(value)} entries, above {MAX_LIST}", value
        results = [check(int if kind == tuple[int, ...] else str, v, meta) for v in value]
        return next((p for p, _ in results if p), ""), tuple(v for _, v in results)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if type(value) is not kind:
        return f"expected {kind.__name__}, got {brief(value)}", value
    if kind is str and any("\ud800" <= c <= "\udfff" for c in value):
        return f"{brief(value)} is not valid Unicode", value
    if meta["choices"] and value not in meta["choices"]:
        return f"unknown name {brief(value)}{nearest(str(value)[:80], meta['choices'])}", value
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not finite", value
    for bound, wrong in (("low", lambda b: value < b), ("high", lambda b: value > b)):
        if meta[bound] is not None and wrong(meta[bound]):
            return f"{brief(value)} is {'below' if bound == 'low' else 'above'} {meta[bound]}", value
    return "", value


def _tables(kind: Any, value: Any) -> tuple[str, Any]:
    """(problem, value) of a list of tables of one kind; a key at its default is as good as left out."""
    if not isinstance(value, list | tuple) or len(value) > MAX_LIST:
        return f"expected a list of at most {MAX_LIST} tables, got {brief(value)}", value
    problems, usual = list[str](), {(k, type(v), v) for k, v in to_dict(kind()).items()}
    made = []
    for number, given in enumerate(value, 1):
        table = to_dict(given) if isinstance(given, kind) else given
        if isinstance(table, dict):
            table = {k: v for k, v in table.items() if isinstance(v, list | dict) or (k, type(v), v) not in usual}
        made.append(build(kind, table, f"entry {number}.", problems))
    return "; ".join(problems), tuple(made)


def brief(value: Any) -> str:
    """A value as a message shows it: on one line, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a table nested too deep
        return f"<{type(value).__name__} too large to show>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dict of a configuration, lists as tuples."""
    return dataclasses.asdict(config)


def flat(config: Any) -> dict[str, Any]:
    """Every key as `section.key`: value."""
    return dict(keys(to_dict(config)))


def keys(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of nested tables as `section.key`, with its value."""
    for name, value in table.items():
        yield from keys(value, f"{path}{name}.") if isinstance(value, dict) else [(path + name, value)]


def to_toml(config: Any, without: Collection[str] = (), reasons: Mapping[str, str] = MappingProxyType({})) -> str:
    """The configuration as commented TOML; reading it gives an equal configuration, but for the tables it is `without`.

    Of a key that has its value for one of the `reasons`, that is the comment instead of its meaning.
    """
    lines = ["# tinydiff configuration. Every key with its value; `--set section.key=value` changes one for a run."]
    lines += [f"# Not read by this run, and left out: {', '.join(f'[{name}]' for name in without)}."] if without else []
    return "\n".join([*lines, "", *_table(config, "", without, reasons)]).rstrip() + "\n"


def reasons_of(path: Path) -> dict[str, str]:
    """The reasons in a file that `to_toml` wrote; none where there is no such file."""
    found, table = dict[str, str](), ""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        if header := re.match(r"\[([\w.]+)\]", line):
            table = f"{header[1]}."
        elif match := REASON.match(line):
            found[table + match[1]] = match[2]
    return found


def _table(part: Any, path: str, without: Collection[str], reasons: Mapping[str, str]) -> Iterator[str]:
    fields = [f for f in dataclasses.fields(part) if path + f.name not in without]
    nested = [f for f in fields if dataclasses.is_dataclass(getattr(part, f.name))]
    for f in (f for f in fields if f not in nested):
        choices = f.metadata["choices"]
        doc = f.metadata["doc"] + (f" ({' | '.join(choices)})" if choices else "")
        doc = CHOSEN + " ".join(reasons[path + f.name].split()) if path + f.name in reasons else doc
        yield f"{f.name} = {_literal(getattr(part, f.name))}".ljust(40) + f"  # {doc}"
    names = [f.name for f in nested]
    for f in sorted(nested, key=lambda f: names.index(f.metadata["after"] or f.name)):
        yield ""
        yield f"[{path}{f.name}]".ljust(40) + f"  # {f.metadata['doc']}"
        yield from _table(getattr(part, f.name), f"{path}{f.name}.", without, reasons)


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c for c in escaped) + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if dataclasses.is_dataclass(value):
        said = {f.name: v for f in dataclasses.fields(value) if (v := getattr(value, f.name)) != f.default}
        return "{ " + ", ".join(f"{name} = {_literal(v)}" for name, v in said.items()) + " }"
    return repr(value)
