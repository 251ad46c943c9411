"""A result of transformers networks as a folder of `save_pretrained`, with a model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from torch import nn

import fxfuse
from fxfuse.api.own_config import config_problem, has_config
from fxfuse.api.result import FusionResult
from fxfuse.cli.hub import member_path
from fxfuse.cli.recipe.schema import Recipe
from fxfuse.cli.report.content import Network, measures
from fxfuse.common.json_file import read_json
from fxfuse.common.output import MARK, write_manifest
from fxfuse.errors import FxfuseError

#: What a folder holds beside weights and configuration, and that belongs to its network's inputs.
_OF_INPUTS = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "*processor_config.json",
)
_CARD = "README.md"


def write_pretrained(
    result: FusionResult,
    recipe: Recipe,
    member: Path,
    folder: Path,
    networks: Iterable[Network] = (),
) -> str:
    """Write a network as `save_pretrained` does, which `from_pretrained` of transformers reads.

    Args:
        result: The network.
        recipe: What it was made by.
        member: The folder of a member, whose tokenizer and image processor are copied.
        folder: The folder to write.
        networks: What was measured.

    Returns:
        Why it cannot be written, and then nothing is; or "".
    """
    try:
        model: Any = result.to_module()
    except FxfuseError as error:
        return f"{error.what}: {error.why}"
    if not has_config(model):
        return f"{type(model).__name__} has no configuration to save"
    if problem := config_problem(model):
        return problem
    folder.mkdir()
    if hasattr(model.config, "use_cache"):
        # Members run without a cache, and are stored as they were.
        model.config.use_cache = read_json(member / "config.json").get("use_cache", True)
    model.save_pretrained(folder)
    for pattern in _OF_INPUTS:
        for file in member.glob(pattern):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
    card = model_card(result, recipe, model, tuple(networks))
    (folder / _CARD).write_text(card, encoding="utf-8")
    write_manifest(folder)
    return ""


def model_card(
    result: FusionResult, recipe: Recipe, model: nn.Module, networks: tuple[Network, ...]
) -> str:
    """Return what the network is, in Markdown: its members, how it was made, how close it is."""
    made = recipe.made
    hashes = {} if made is None else made.sha256
    front = {"library_name": "transformers", "tags": ["fxfuse", "model-fusion"]}
    # The members' place on this machine and its versions are nobody's concern.
    told = _placeless(recipe.model_dump(exclude_defaults=True, exclude={"base", "made", "output"}))
    kind = type(model).__name__
    lines = [
        "---",
        yaml.safe_dump(front).strip(),
        "---",
        "",
        f"# {recipe.title}",
        "",
        f"A `{kind}` that [fxfuse](https://pypi.org/project/fxfuse) {fxfuse.__version__} made of "
        f"{len(recipe.members)} trained network{'s' * (len(recipe.members) > 1)}.",
        "",
        "```python",
        f"from transformers import {kind}",
        "",
        f'model = {kind}.from_pretrained("FOLDER OR HUB ID")',
        "```",
        "",
        "## Members",
        "",
        "| member | SHA-256 of its files |",
        "|---|---|",
    ]
    for member in recipe.members:
        place = member_path(member.path)
        files = {name: Path(name).absolute() for name in hashes}
        own = [hashes[n] for n, file in files.items() if file.is_relative_to(place.absolute())]
        name = member.path if place != Path(member.path) else place.name
        lines.append(f"| {name} | {'<br>'.join(own) or '–'} |")
    lines += ["", "## Method and distance", "", f"Method: {result.plan.method}.", ""]
    if result.history is not None:
        lines += [f"{result.history.described()[0]}.", ""]
        chosen = result.history[result.history.chosen]
        lines += [f"Distance from the ensemble: {chosen.judged:.3g} ({result.history.unit}).", ""]
    elif result.raw_note:
        lines += [f"**{result.raw_note}**", ""]
    if networks:
        columns = {"network": [n.name for n in networks], **measures(networks)}
        lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(row)} |" for row in zip(*columns.values(), strict=True)]
        lines.append("")
    recipe_text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True).strip()
    lines += ["## Recipe", "", "```yaml", recipe_text, "```", "", f"<!-- {MARK}. -->", ""]
    return "\n".join(lines)


def _placeless(value: Any) -> Any:
    """Return a recipe's content without the folders of absolute paths."""
    if isinstance(value, dict):
        return {name: _placeless(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_placeless(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
