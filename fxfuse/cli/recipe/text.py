"""Recipes as YAML: read with the line of every mistake, and written."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fxfuse.cli.hub import PREFIX, is_hub_id
from fxfuse.cli.model_names import is_named
from fxfuse.cli.recipe.schema import Part, Recipe, Step
from fxfuse.cli.sources import is_function
from fxfuse.cli.zoo import import_from
from fxfuse.common.output import MARK, write_text
from fxfuse.errors import OptionError

#: The file in a result's folder.
RECIPE = "recipe.yaml"
#: Longest recipe that is read, in bytes, and how deep its parts may lie in each other.
_LONGEST, _DEEPEST = 1_000_000, 20
#: Most values, and longest text of a number or a date.
_MOST, _LONGEST_NUMBER = 20_000, 100


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        path: A YAML file, or a folder that `fxfuse` wrote.

    Returns:
        The recipe, whose `base` says where relative paths begin.

    Raises:
        OptionError: It cannot be read; names every line and field that is wrong, and the nearest
            name that would be right.
    """
    path = Path(path)
    file = path / RECIPE if path.is_dir() else path
    try:
        with file.open("rb") as opened:
            content = opened.read(_LONGEST + 1)
    except OSError as error:
        raise OptionError(
            f"the recipe {file.name} cannot be read",
            where=str(file),
            why=error.strerror or str(error),
            how="use a recipe, or a folder that `fxfuse fuse` or `fxfuse run` wrote",
        ) from error
    recipe = parse_recipe(content.decode("utf-8", errors="replace"), str(file))
    if recipe.base is None:
        recipe = recipe.model_copy(update={"base": str(file.absolute().parent)})
    return recipe


def parse_recipe(text: str, where: str = "recipe") -> Recipe:
    """Read a recipe from YAML; `where` is what it is called in messages."""
    if len(text) > _LONGEST:
        raise OptionError(
            "the text is too long for a recipe",
            where=where,
            why=f"it has more than {_LONGEST:,} characters",
            how="check the path",
        )
    try:
        _check_events(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_nodes(root)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _not_yaml(error, where) from error
    # A date that is none, a number with too many digits, parts that lie too deep in each other.
    except (ValueError, RecursionError, TypeError, OverflowError) as error:
        raise OptionError(
            "the recipe is not valid YAML", where=where, why=str(error), how="fix its spelling"
        ) from error
    if not isinstance(content, dict):
        raise OptionError(
            "the recipe holds no fields",
            where=where,
            why=f"it holds {'nothing' if content is None else f'a {type(content).__name__}'}",
            how="start from `fxfuse recipe --example`",
        )
    return as_recipe(content, where, root)


def as_recipe(content: dict[str, Any], where: str = "", root: yaml.Node | None = None) -> Recipe:
    """Check the fields of a recipe.

    Args:
        content: The fields.
        where: What the recipe is called in messages; "" for one that was not read from a file.
        root: Where in the file each of them stands.

    Raises:
        OptionError: Names every field that is wrong, and its line.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        found = [_problem(details, root) for details in error.errors()]
        # Of what may be of several kinds, it is said for each why it is not of that one.
        whys = list(dict.fromkeys(f"line {n}, {text}" if root else text for n, text in found))
        raise OptionError(
            f"the recipe has {len(whys)} mistake{'s' * (len(whys) > 1)}"
            if root
            else "an option has an unusable value",
            where=f"{where}, line {found[0][0]}" if root else where,
            why="; ".join(whys),
            how="see `fxfuse recipe --example`, which shows every field",
        ) from error


def changed(recipe: Recipe, **parts: Any) -> Recipe:
    """Return a recipe with other parts, which was not run yet.

    Args:
        recipe: The recipe.
        parts: Fields of the recipe and what they hold now.

    Raises:
        OptionError: They cannot hold that.
    """
    content = recipe.model_dump(exclude={"made"}, exclude_defaults=True)
    return as_recipe({**content, **parts})


def moved_to(recipe: Recipe, folder: str) -> Recipe:
    """Return a recipe whose result goes to another folder.

    Args:
        recipe: The recipe.
        folder: The folder.
    """
    output = recipe.output.model_copy(update={"folder": folder})
    return recipe.model_copy(update={"output": output})


def trusted(
    recipe: Recipe,
    folder: str | Path,
    *,
    model: str | None = None,
    trust: bool = False,
    data: Sequence[str] = (),
) -> Recipe:
    """Return a recipe out of a result's folder, which runs nothing that only the folder names.

    Args:
        recipe: The recipe.
        folder: The folder, which may come from a stranger.
        model: The factory of the members, in place of the recipe's.
        trust: Whether functions that the recipe names may be imported, from its `base`, too.
        data: The fields of sources that will be read: "calibration", "evaluation", "train".

    Raises:
        OptionError: It names a function to import, and is not trusted.
    """
    if model is not None:
        recipe = recipe.model_copy(update={"model": model})
    if trust:
        import_from(recipe.base)
        return recipe
    sources = {"calibration": recipe.calibration, "evaluation": recipe.evaluation}
    sources["train"] = recipe.train.data if recipe.train else None
    used = {name: source.source for name, source in sources.items() if source and name in data}
    named = {name: spec for name, spec in used.items() if is_function(spec)}
    if model is None and not is_named(recipe.model):
        named = {"model": recipe.model, **named}
    prefixed = [recipe.model] * (model is None) + [member.path for member in recipe.members]
    for spec in prefixed:
        if spec.startswith(PREFIX) and is_hub_id(spec.removeprefix(PREFIX)):
            raise OptionError(
                f"{spec!r} is not downloaded only because a folder names it",
                where=str(Path(folder) / RECIPE),
                why="whoever made the folder chose it",
                how="pass --trust, if you trust the folder and what it names",
            )
    for field, spec in named.items():
        own = "--model with a factory that you know, or " if field == "model" else ""
        raise OptionError(
            f"{spec!r} is not imported only because a folder names it",
            where=f"{field} in {Path(folder) / RECIPE}",
            why="importing a function runs code, and whoever made the folder chose it",
            how=f"pass {own}--trust, if you trust the folder and what it names",
        )
    return recipe


def write_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe, without the fields that are at their defaults.

    Args:
        recipe: The recipe.
        path: The file; an existing one is replaced.
    """
    content = recipe.model_dump(mode="python", exclude_defaults=True)
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    write_text(path, f"# {MARK}.\n{text}")


class _Dumper(yaml.SafeDumper):
    """Writes what occurs twice twice: aliases are not read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def example() -> str:
    """Return a recipe to begin with: every field, what it means, and its default."""
    lines = [
        "# A recipe: `fxfuse run recipe.yaml`. A field behind a # without a space is optional, and",
        "# shows its default. Relative paths begin at the folder of this file.",
        *_fields(Recipe, "", ""),
    ]
    return "\n".join(lines) + "\n"


#: What the example has for fields that have no default.
_SAMPLES = {
    "model": "torchvision:resnet18",
    "members": "[a.safetensors, b.safetensors]",
    "input": "[3, 224, 224]",
    "folder": "fused",
    "source": "images.npy",
    "path": "a.safetensors",
}
#: Fields that fxfuse itself writes.
_OWN = ("base", "made")
#: Width of the example.
_WIDTH = 100


def _fields(part: type[BaseModel], indent: str, mark: str) -> list[str]:
    """Return the lines of a part; `mark` is # where the part as a whole is optional."""
    lines = []
    for name, field in part.model_fields.items():
        if name in _OWN:
            continue
        lines += _comment(field.description or "", indent)
        parts = _parts_of(field.annotation)
        if name == "members" or not parts:
            optional = mark or ("" if field.is_required() else "#")
            value = _SAMPLES.get(name) or _named(parts or [part], name) or _as_yaml(field)
            lines.append(f"{indent}{optional}{name}: {value}")
            continue
        optional = mark or ("#" if not field.is_required() and field.default is None else "")
        lines.append(f"{indent}{optional}{name}:")
        lines += _inner(parts, f"{indent}  ", optional)
    return lines


def _inner(parts: Sequence[type[Part]], indent: str, mark: str) -> list[str]:
    """Return the lines of the first of several parts, and what the others have."""
    first, *others = parts
    if issubclass(first, Step):
        lines = []
        for name, field in first.model_fields.items():
            lines.append(f"{indent}{mark}- {name}:")
            lines += _fields(_parts_of(field.annotation)[0], f"{indent}    ", mark)
        return lines
    lines = _fields(first, indent, mark)
    for other in others:
        lines += _comment(f"Or name: {_named([other], 'name')}", indent)
        for name, field in other.model_fields.items():
            if name != "name":
                text = f"{name}: {_as_yaml(field)}  {field.description}"
                lines += _comment(text, f"{indent}", "    ")
    return lines


def _comment(text: str, indent: str, further: str = "") -> list[str]:
    """Return lines that say something."""
    start = f"{indent}# {further}"
    return wrap(text, _WIDTH, initial_indent=start, subsequent_indent=start)


def _named(parts: Sequence[type[BaseModel]], name: str) -> str:
    """Return the only value of a field that tells parts apart, or ""."""
    annotation = parts[0].model_fields[name].annotation if name in parts[0].model_fields else None
    values = get_args(annotation) if get_origin(annotation) is Literal else ()
    return str(values[0]) if len(values) == 1 else ""


def _as_yaml(field: FieldInfo) -> str:
    dumped: str = yaml.safe_dump(field.get_default(), default_flow_style=True)
    return dumped.removesuffix("...\n").strip()


def _parts_of(annotation: Any) -> list[type[Part]]:
    """Return the parts of a recipe that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return [annotation]
    return [part for inner in get_args(annotation) for part in _parts_of(inner)]


def _check_events(text: str) -> None:
    """Check what a text would become, before anything is made of it: aliases can have no end."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if number > _MOST:
            raise _mistake(f"it holds more than {_MOST:,} values", event)
        if isinstance(event, yaml.AliasEvent):
            raise _mistake(f"the alias *{event.anchor:.99} is not read: write it out", event)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise _mistake("parts lie too deep in each other", event)


def _check_nodes(root: yaml.Node | None) -> None:
    """Check what YAML's own reader lets pass: fields that are given twice, and endless numbers."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.ScalarNode):
            if node.tag != "tag:yaml.org,2002:str" and len(node.value) > _LONGEST_NUMBER:
                raise _mistake("a number is too long", node)
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            seen: set[Any] = set()
            for key, value in node.value:
                if key.value in seen:
                    raise _mistake(f"{key.value!r} is given twice", key)
                if isinstance(key.value, str):
                    seen.add(key.value)
                waiting += [key, value]


def _mistake(what: str, place: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    mark: Any = place.start_mark
    return yaml.MarkedYAMLError(problem=what, problem_mark=mark)


def _not_yaml(error: yaml.YAMLError, where: str) -> OptionError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    why = getattr(error, "problem", None) or getattr(error, "context", None) or str(error)
    return OptionError(
        "the recipe is not valid YAML",
        where=f"{where}, line {mark.line + 1}" if mark else where,
        why=why,
        how="fix its spelling; `fxfuse recipe --example` prints one to start from",
    )


def _problem(details: ErrorDetails, root: yaml.Node | None) -> tuple[int, str]:
    """Return the line of a mistake, and what it is."""
    location = details["loc"]
    line, named = _line_of(root, location)
    field = ".".join(map(str, named)) or "the recipe"
    if details["type"] == "extra_forbidden":
        word, known = str(location[-1]), _names_at(location[:-1])
        near = get_close_matches(word, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        # A text that stands for a part has no line of its own.
        what = "such field" if named and named[-1] == word else repr(word)
        return line, f"{field}: there is no {what}; {hint}"
    if details["type"] == "missing":
        return line, f"{field}.{location[-1]} is missing".replace("the recipe.", "")
    said = details["msg"].removeprefix("Value error, ")
    said = said[:1].lower() + said[1:]
    context = details.get("ctx", {})
    allowed = context.get("expected" if details["type"] == "literal_error" else "expected_tags")
    if allowed is not None:
        allowed = str(allowed).replace("'", "")
        value = str(context.get("tag", details["input"]))
        near = get_close_matches(value, allowed.replace(" or ", ", ").split(", "), n=1)
        hint = f"did you mean {near[0]}?" if near else f"use {allowed}"
        said = f"{value[:40]!r} is not one of its values; {hint}"
    return line, f"{field}: {said}"


def _line_of(root: yaml.Node | None, location: Sequence[int | str]) -> tuple[int, list[int | str]]:
    """Return where in the text a field is, and its name without what pydantic adds for unions."""
    node, line, named = root, 1, list[int | str]()
    if root is None:
        return line, [step for step in location if isinstance(step, int) or step.isidentifier()]
    for step in location:
        found = None
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(step)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            found = (node.value[step],) * 2 if step < len(node.value) else None
        if found is not None:
            line, node = found[0].start_mark.line + 1, found[1]
            named.append(step)
    return line, named


def _names_at(location: Sequence[int | str]) -> list[str]:
    """Return the fields that there are at a place, which names the parts of a choice, too."""
    parts: list[type[BaseModel]] = [Recipe]
    for step in location:
        fields = [part.model_fields[str(step)] for part in parts if str(step) in part.model_fields]
        if fields:
            parts = [part for field in fields for part in _parts_of(field.annotation)]
        else:
            parts = [part for part in parts if _named([part], "name") == step] or parts
    names = [name for part in parts for name in part.model_fields if name not in _OWN]
    return list(dict.fromkeys(names))
