"""Fields of a recipe as texts, `name=value`: what `ldm-edu train --set` takes and `ldm-edu recipes NAME` prints."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from inspect import formatannotation
from typing import Any, TypeVar, cast, get_args, get_origin

from ldm_edu.checks import check_fields, shown
from ldm_edu.errors import LDMError
from ldm_edu.files import brief, printable
from ldm_edu.training.recipes import AnyRecipe, Recipe, flatten, recipe_from_dict, recipe_to_dict

__all__ = ["as_overrides", "with_overrides"]

A = TypeVar("A", bound=AnyRecipe)


# What stands behind the sign of equality -----------------------------------------------------------------------------

# Numbers that YAML 1.1 reads in base 8, 16, 2 or 60, but not an exponent such as the one of 1e-04.
_OTHER_BASES = re.compile(r"(?<![\w.])(?<![eE][-+])0[0-9xXbB_]|[0-9]:[0-9]")


_MOST_NESTED = 1000  # lists and dicts in a value; tens of thousands, one in the other, would end the process


def _numbers(value: Any) -> bool:
    "Is this a number, or a list of numbers?"
    if isinstance(value, list):
        return bool(value) and all(map(_numbers, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_plain(value: Any) -> None:
    "ValueError where a value asks OmegaConf for another one, or where a name in it is no text."
    if isinstance(value, Mapping):
        for name, each in value.items():
            if not isinstance(name, str):
                raise ValueError(f"{shown(name)} is no name of a field")
            _check_plain(each)
    elif isinstance(value, list):
        for each in value:
            _check_plain(each)
    elif isinstance(value, str) and ("${" in value or value == "???"):
        raise ValueError("references (${…}) and ??? are not looked up: write the value itself")


def _parsed(text: str) -> Any:
    "The value of a text in YAML, in lists, dicts, numbers, truth values and texts; ValueError where it is none."
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if sum(map(text.count, ("[", "{", "- ", "? "))) > _MOST_NESTED:
        raise ValueError("its lists and dicts are nested too deeply")
    if "&" in text and "*" in text:  # an anchor that is repeated again and again would fill the memory
        raise ValueError("YAML's anchors and aliases (&, *) are not read: write the value itself")
    try:
        made = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        value = cast(dict[str, Any], made)["value"]
        _check_plain(value)
    except (OmegaConfBaseException, YAMLError, RecursionError) as error:
        raise ValueError(f"this is no YAML ({brief(error)})") from error
    if _numbers(value) and _OTHER_BASES.search(text):
        zeros = " without leading zeros" * bool(re.search(r"\b0[0-9]", text))
        raise ValueError(f"YAML reads this as {shown(value)}: write decimal numbers{zeros}")
    return value


def _split(override: str) -> tuple[list[str], Any]:
    "The names on the way to a field, and its new value; `LDMError` where an override is not `name=value`."
    name, sign, text = override.partition("=") if isinstance(override, str) else ("", "", "")
    if not name.strip() or not sign or not text.strip():
        raise LDMError(f"{shown(override)} should be name=value, such as diffusion.training.lr=1e-4 (null: none)")
    path = re.sub(r"\[(\d+)\]", r".\1", name.strip()).split(".")
    try:
        return path, _parsed(text.strip())
    except ValueError as error:
        raise LDMError(f"{printable(override):.100}: {error}") from error


def _written(value: Any) -> str:
    "A value in YAML, in one line and without spaces between its parts."
    if isinstance(value, str):
        try:
            if value.strip() == value and _parsed(value) == value and _parsed(f"[{value}]") == [value]:
                return value
        except ValueError:
            pass
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def as_overrides(recipe: AnyRecipe) -> list[str]:
    """Every field of a recipe with its value, in the form that `with_overrides` takes: `diffusion.training.lr=0.001`.

    There, a dict is merged with the field's, and a list replaces it; so a list without entries has a line, too.
    """
    flat = flatten(recipe_to_dict(recipe))
    if isinstance(recipe, Recipe) and not recipe.diffusion.conditioners:
        flat["diffusion.conditioners"] = []  # `flatten` leaves out what is empty
    return [f"{name}={_written(value)}" for name, value in flat.items() if name != "kind"]


# The names before it -------------------------------------------------------------------------------------------------


class _Unknown(Exception):
    "A dotted name that is no field."


def _part(kind: Any) -> type | None:
    "The dataclass that a field holds, perhaps None in its place; None for a field without fields of its own."
    found = [each for each in (kind, *get_args(kind)) if isinstance(each, type) and is_dataclass(each)]
    return found[0] if found and get_origin(kind) is not tuple else None


def _item(kind: Any) -> type | None:
    "The dataclass of which a field holds several; None for other fields."
    first = get_args(kind)[0] if get_origin(kind) is tuple else None
    return first if isinstance(first, type) and is_dataclass(first) else None


def _field_names(cls: type, prefix: str = "") -> Iterator[str]:
    "The dotted names of all fields of a dataclass, those of parts that may be None among them."
    for field in fields(cls):
        part = _part(field.type)
        yield from [f"{prefix}{field.name}"] if part is None else _field_names(part, f"{prefix}{field.name}.")


def _close(name: str, names: Sequence[str]) -> list[str]:
    "The names that a wrong one may stand for: with the same end, the same last word, or nearly the same one."
    word, last = name.rpartition(".")[2], {each: each.rpartition(".")[2] for each in names}
    words = difflib.get_close_matches(word, set(last.values()), 3, 0.75)
    ends, same = ([each for each in names if f".{each}".endswith(f".{end}")] for end in (name, word))
    for found in (ends, same, [each for each in names if last[each] in words]):
        if found:
            return sorted(found, key=lambda each: -difflib.SequenceMatcher(None, name, each).ratio())[:4]
    return []


def _unknown(recipe: AnyRecipe, name: str) -> LDMError:
    "The error for a name that is no field, with those that may be meant."
    there = list(flatten(recipe_to_dict(recipe)))[1:]  # without `kind`
    known, part = [*there, *_field_names(type(recipe))], name.rpartition(".")[0]
    below = [each[len(part) + 1 :] for each in known if part and each.startswith(f"{part}.")]
    beside = dict.fromkeys(each.partition(".")[0] for each in below)
    instead = f"`ldm-edu recipes {recipe.name}` lists its fields"
    if close := _close(name, there) or _close(name, known):
        instead = f"did you mean {' or '.join(close)}?"
    elif beside:
        instead = f"{part} has {', '.join(beside)}"
    return LDMError(f"{shown(name)[1:-1]} is no field of recipe {recipe.name}; {instead}")


# One field -----------------------------------------------------------------------------------------------------------


def _hint(kind: Any, value: Any) -> str:
    "How a value of a wrong type may have been meant."
    if value == "None":
        return "; in YAML, none is written null"
    if isinstance(value, str) and value.startswith("("):
        return "; in YAML, a list is written [1, 2, 4]"
    if isinstance(value, str) and type(_quiet(value)) in (int, float):
        return "; without quotes it is a number"
    if not isinstance(value, str | None) and str in (kind, *get_args(kind)):
        return "; in quotes inside the quotes of the shell it is a text"
    return f", such as {int(value)}" if isinstance(value, float) and value.is_integer() else ""


def _quiet(text: str) -> Any:
    "The value of a text in YAML; None where it is none."
    try:
        return _parsed(text)
    except ValueError:
        return None


def _as_float(kind: Any, value: Any) -> Any:
    "`value`, a whole number as a float where a field takes floats: so 1 and 1.0 make the same recipe."
    inner = get_args(kind)
    if get_origin(kind) is tuple:
        return [_as_float(inner[0], each) for each in value]
    is_float = float in (kind, *inner) and int not in inner
    return float(value) if is_float and type(value) is int else value


def _leaf(cls: type, field: str, kind: Any, value: Any, at: str) -> Any:
    "`value` for a field without fields of its own; `LDMError` where it is of another type."
    written = shown(value if isinstance(value, str) else _written(value))[1:-1]
    if (part := _part(kind)) is not None and value is not None:
        raise LDMError(f"{at}={written} has fields of its own: set one, such as {at}.{fields(part)[0].name}")
    try:
        check_fields(cls, {field: value})
    except (LDMError, OverflowError) as error:
        is_number = isinstance(value, int | float) and float in (kind, *get_args(kind))
        wanted = "a finite number" if is_number else formatannotation(kind).replace(f"{__package__}.recipes.", "")
        raise LDMError(f"{at}={written} should be {wanted}{_hint(kind, value)}") from error
    if value == "None" and type(None) in get_args(kind):
        raise LDMError(f"{at}=None is a text{_hint(kind, value)}")
    return _as_float(kind, value)


def _changed(cls: type, old: Mapping[str, Any], path: Sequence[str], value: Any, at: str) -> dict[str, Any]:
    "The fields of a dataclass with `value` in the one at `path`; without a path, with each entry of a dict in its own."
    new = dict(old)
    kinds = {field.name: field.type for field in fields(cls)}
    for (name, *rest), each in [(path, value)] if path else [([name], each) for name, each in value.items()]:
        if name not in kinds:
            raise _Unknown(".".join([f"{at}{name}", *rest]))
        new[name] = _in_field(cls, name, kinds[name], new.get(name), rest, each, f"{at}{name}")
    return new


def _in_field(cls: type, field: str, kind: Any, old: Any, path: Sequence[str], value: Any, at: str) -> Any:
    "What a field of a dataclass holds when `value` is put at `path` below it."
    part, item = _part(kind), _item(kind)
    if part is not None and (path or isinstance(value, Mapping)):
        return _changed(part, old or {}, path, value, f"{at}.")
    if item is not None:
        return _in_items(item, list(old or ()), path, value, at)
    if get_origin(kind) is Mapping:
        return _in_dict(old or {}, path, value, at)
    if path:
        raise _Unknown(".".join([at, *path]))
    return _leaf(cls, field, kind, value, at)


def _in_items(item: type, old: list[Any], path: Sequence[str], value: Any, at: str) -> list[Any]:
    "A list of dataclasses with `value` at `path`, which begins with a number; with an empty path, another list."
    if not path:
        if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
            raise LDMError(f"{at}={shown(value)} should be a list of {{{fields(item)[0].name}: …}}")
        return [_changed(item, {}, (), each, f"{at}.{i}.") for i, each in enumerate(value)]
    index, *rest = path
    if not re.fullmatch("[0-9]{1,4}", index):
        raise _Unknown(".".join([at, *path]))
    if int(index) > len(old):
        raise LDMError(f"{at}.{index}: {at} has {len(old)}, numbered from 0; one more would be {at}.{len(old)}")
    here = f"{at}.{int(index)}"
    if not rest and not isinstance(value, Mapping):
        raise LDMError(f"{here}={shown(value)} has fields of its own: set one, such as {here}.{fields(item)[0].name}")
    new = [*old, {}] if int(index) == len(old) else old
    return [_changed(item, each, rest, value, f"{here}.") if i == int(index) else each for i, each in enumerate(new)]


def _in_dict(old: Mapping[str, Any], path: Sequence[str], value: Any, at: str) -> dict[str, Any]:
    "A dict of any names with `value` at `path`; with an empty path, with the entries of another dict."
    if not path:
        if not isinstance(value, Mapping):
            raise LDMError(f"{at}={shown(value)} should be a dict, {{name: value}}")
        return {**old, **value}
    name, *rest = path
    if not name:
        raise _Unknown(".".join([at, *path]))
    if rest:
        inner = old.get(name)
        return {**old, name: _in_dict(inner if isinstance(inner, Mapping) else {}, rest, value, f"{at}.{name}")}
    return {**old, name: float(value) if isinstance(old.get(name), float) and type(value) is int else value}


# All of them ---------------------------------------------------------------------------------------------------------


def _lacking(cls: type, values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    "The dotted names of fields that have no default and no value, in a recipe as nested dicts."
    for field in fields(cls):
        at, value = f"{prefix}{field.name}", values.get(field.name)
        part, item = _part(field.type), _item(field.type)
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            yield at
        elif part is not None and isinstance(value, Mapping):
            yield from _lacking(part, value, f"{at}.")
        elif item is not None and isinstance(value, list | tuple):
            for i, each in enumerate(value):
                yield from _lacking(item, each, f"{at}.{i}.")


def _applied(recipe: AnyRecipe, overrides: Sequence[str]) -> dict[str, Any]:
    "The fields of a recipe as nested dicts, with these overrides; `LDMError` for a wrong name or type."
    values = recipe_to_dict(recipe)
    for override in overrides:
        path, value = _split(override)
        if path == ["kind"]:
            raise LDMError("kind cannot be set: it says what a recipe is for; take another recipe")
        try:
            values = {"kind": values["kind"]} | _changed(type(recipe), values, path, value, "")
        except _Unknown as error:
            raise _unknown(recipe, str(error)) from None
    return values


def _whole(recipe: A, values: Mapping[str, Any]) -> A:
    "The recipe of nested dicts; `LDMError`, as a recipe itself says it, where they do not fit each other."
    if lacking := list(_lacking(type(recipe), values)):
        raise LDMError(f"more is needed there: set {' and '.join(lacking)}, too")
    return cast(A, recipe_from_dict(values))


def _works(recipe: AnyRecipe, overrides: Sequence[str]) -> bool:
    "Do these overrides make a recipe?"
    try:
        return bool(_whole(recipe, _applied(recipe, overrides)))
    except LDMError:
        return False


def with_overrides(
    recipe: A,
    overrides: Sequence[str],  # each one `name=value`, such as "diffusion.training.lr=1e-4"
) -> A:
    """The recipe with other values in some of its fields.

    Names are those of `as_overrides`. Values are YAML: 1e-4, true, null, [1, 2, 4]. A dict sets the fields that it
    names, {start: 100, weight: 0.5}, a list takes the place of the whole list. Of two values for one field the last
    one counts. A part that is null is built as soon as all of its fields without a default are given. `LDMError` names
    the override that is not possible. Nothing is looked up elsewhere: OmegaConf's ${…} is refused.
    """
    if not isinstance(recipe, AnyRecipe):
        raise LDMError(f"recipe should be a recipe, such as find_recipe('toy-demo'), not {shown(recipe)}")
    if isinstance(overrides, str) or not isinstance(overrides, Sequence):
        raise LDMError(f"overrides should be a list of texts, ['name=value'], not {shown(overrides)}")
    values = _applied(recipe, overrides)
    try:
        return _whole(recipe, values)
    except LDMError as error:
        others = [[*overrides[:i], *overrides[i + 1 :]] for i in range(len(overrides))]
        blamed = [each for each, rest in zip(overrides, others) if _works(recipe, rest)] or overrides
        raise LDMError(f"{', '.join(printable(each)[:100] for each in blamed)}: {error}") from error
