"""Where the rule of an operator belongs, from what torch itself says about the operator."""

from __future__ import annotations

import re
from typing import Any

import torch

from fxfuse.analysis.rules.registry import find
from fxfuse.graph.torch_compat import schema_of

#: Word in the operator's name → family; the first that is found counts.
_WORDS = (
    (r"fft|stft|complex|conj$", "fourier"),
    (r"softmax|norm", "normalisation"),
    (r"cum(sum|prod|max|min)|sort|topk|tri[lu]$", "ordering"),
    (r"grid_sampler", "sampling"),
    (r"pool|upsample|interpolate", "reduction"),
    (r"lstm|gru|rnn", "recurrent"),
    (r"conv|linear|mm|matmul|mv$|dot|einsum|attention|outer|cdist", "contraction"),
    (r"embedding", "lookup"),
    (r"index|gather|scatter|take", "selection"),
)


def rule_file(target: Any) -> str:
    """The file of `fxfuse/analysis/rules/` in which a rule for an operator would stand, or stands.

    Returns:
        A path from the root of the repository; for a rule of the user's own, its module.
    """
    rule = find(target)
    if rule is not None:
        module: str = rule.__module__
        return f"{module.replace('.', '/')}.py" if module.startswith("fxfuse.") else module
    return f"fxfuse/analysis/rules/{_family(target)}.py"


def _family(target: Any) -> str:
    schema = schema_of(target)
    tags = getattr(target, "tags", ())
    if torch.Tag.pointwise in tags:
        return "pointwise"
    if schema is None:
        return "movement"
    views = any(result.alias_info is not None for result in schema.returns)
    if torch.Tag.view_copy in tags or (views and not schema.is_mutable):
        return "movement"
    if not any("Tensor" in str(argument.type) for argument in schema.arguments):
        return "creation"
    name = schema.name.partition("::")[2]
    for words, family in _WORDS:
        if re.search(words, name):
            return family
    # An operator that works along a dimension lets the others pass, as a reduction does.
    along = any(argument.name in ("dim", "dims", "axis") for argument in schema.arguments)
    return "reduction" if along or torch.Tag.reduction in tags else "movement"
