"""One text or vision class for each model type of `transformers`, made by a small config.

`classes()` reads the tables of the library's auto classes; `build` shrinks the default config: each
number is replaced by the small one that its name asks for, in nested configs too. Where these do
not fit together, only layers, tokens and the like become fewer. A class whose config asks for more
than that cannot be built so, and says why.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

#: A model type is represented by its class in the first table that has it.
_TEXT = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SEQUENCE_CLASSIFICATION")
_VISION = (
    "IMAGE_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "OBJECT_DETECTION",
    "DEPTH_ESTIMATION",
    "IMAGE",
)
#: Small sizes by name; the first pattern that matches the whole name counts.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size", 64),
    (r"max_.*positions?(_embeddings)?|n_positions|n_ctx|max_seq(_?len|uence_length)", 64),
    (r"(moe|shared|expert)\w*_(intermediate|hidden)_(size|dim)|moe_\w*ffn\w*", 16),
    (
        r"\w*(intermediate_size|ffn_(hidden_)?(dim|size))|n_inner|d(im)?_?ff|\w*mlp_dim|dim_feedforward",
        48,
    ),
    (r"(?!qk_head)\w*head_dim|d_kv|attention_head_size|rotary_dim", 8),
    (r"(q|kv|o)\w*_lora_rank|embedding_size|\w*bottleneck\w*size|expert_dim|projection_dim", 16),
    (r"\w*(num|n)_(encoder_|decoder_)?(hidden_)?(layers?|blocks)|n_layers?|(en|de)coder_layers", 2),
    (r"(num_)?\w*(kv|key_value|group)s?_heads", 2),
    (r"\w*n_heads?|(en|de)coder_attention_heads|num_\w*heads|nhead|heads", 4),
    (r"num_\w*experts_per_tok|\w*top_?k|num_selected_experts", 2),
    (r"(num|n)_(\w*_)?experts|moe_num_experts|num_local_experts", 4),
    (r"n_shared_experts|num_shared_experts|n_group|topk_group|first_k_dense_replace", 1),
    (r"embed_dim", 48),
    (r"\w*(hidden_size|hidden_dim)|d_model|n_embd|dim|model_dim|width", 32),
    (r"image_size|input_size", 32),
    (r"patch_size", 8),
    (r"num_labels", 5),
    (r"num_queries", 6),
    (r"(pad|bos|eos|sep|cls|mask|decoder_start|image|unk)\w*_(id|index)", 2),
)
#: Lists of sizes, one for each stage.
_LISTS = r"depths|\w*hidden_sizes|embed_dims"
#: Those of them that no width follows from: what is left where all of them do not fit together.
_COUNTS = tuple(s for s in _SIZES if re.search(r"vocab|layers|expert|label|queries|_id", s[0]))
#: A network of more parameters is not small.
_MOST = 8_000_000
SIDE, LENGTH = 32, 7


def classes() -> list[str]:
    """Names of the classes, those of text first."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for tables in (_TEXT, _VISION):
        seen: set[str] = set()
        for table in tables:
            names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES")
            for kind, name in names.items():
                if kind not in seen and name is not None:
                    seen.add(kind)
                    first = name if isinstance(name, str) else name[0]
                    found.setdefault(first, kind)
    return list(found)


def _smaller(config: Any, sizes: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """What a config is made from anew: small numbers for large ones."""
    changed: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        own = getattr(config, name, value)
        if hasattr(own, "to_dict"):
            changed[name] = type(own)(**_smaller(own, sizes))
        elif isinstance(value, int) and not isinstance(value, bool):
            # As many heads of keys as of queries stay as many.
            alike = name.endswith("heads") and value == config.to_dict().get("num_attention_heads")
            asked = "num_attention_heads" if alike else name
            size = next((size for like, size in sizes if re.fullmatch(like, asked)), None)
            if size is not None and value > size:
                changed[name] = size
        elif re.fullmatch(_LISTS, name) and value and all(type(each) is int for each in value):
            # All alike: what must divide what is not said.
            changed[name] = [1 if "depths" in name else 48 for _ in value]
    return changed


class NotBuiltError(Exception):
    """The small numbers are not what a class's config asks for."""


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A class with a small config and random weights, and keyword inputs for it.

    Raises:
        NotBuiltError: The class cannot be made so, or does not take these inputs, or is not small.
    """
    why: Exception | None = None
    for sizes in (_SIZES, _COUNTS):
        try:
            model = _build(name, sizes).eval()
            if (count := sum(p.numel() for p in model.parameters())) > _MOST:
                raise ValueError(f"{count / 1e6:.0f} M parameters")
            inputs = _inputs(model)
            with torch.no_grad():
                model(**inputs)
        except Exception as error:
            why = why or error
        else:
            return model, inputs
    text = " ".join(str(why).split())
    raise NotBuiltError(f"{type(why).__name__}: {text[:200]}") from why


def _build(name: str, sizes: Sequence[tuple[str, int]]) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    model_class = getattr(transformers, name)
    kind = model_class.config_class
    config = kind(**_smaller(kind(), sizes))
    for each in (config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))):
        if hasattr(each, "use_cache"):
            each.use_cache = False
        # The other ways to run experts ask the values which of them run.
        each._experts_implementation = "batched_mm"
    model: nn.Module = model_class(config)
    return model


def _inputs(model: Any) -> dict[str, Any]:
    main = model.main_input_name
    if main == "pixel_values":
        channels = getattr(model.config, "num_channels", 3)
        return {main: torch.randn(2, channels, SIDE, SIDE)}
    if main != "input_ids":
        raise ValueError(f"the main input is {main}, neither text nor an image")
    inputs = {main: torch.randint(3, 60, (2, LENGTH))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 60, (2, LENGTH - 2))
    return inputs
