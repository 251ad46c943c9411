"""Every model of the coverage sweep: how to build it small, and example inputs for it.

`models()` lists them as `library:name`; `build` makes one of them with random weights. timm's
families are the modules of `timm.models`, each represented by its smallest model
(`benchmarks/timm_families.json`, written by `python benchmarks/coverage_models.py`).
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import transformers_models
from benchmarks.plain_models import NETWORKS

FAMILIES = Path(__file__).with_name("timm_families.json")
CLASSES = 10
BATCH = 2

#: Makes positional and keyword inputs.
Inputs = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]


def _image(*shape: int) -> Inputs:
    return lambda: ((torch.randn(BATCH, 3, *shape),), {})


# --- torchvision --------------------------------------------------------------------------------

#: Sides other than 64, where the architecture asks for them.
_SIDES = {
    # Smaller images leave four pixels to its last forty blocks, and rounding grows in them.
    "efficientnet_b7": 128,
    "inception_v3": 96,
    "quantized_inception_v3": 96,
    "maxvit_t": 224,
    "vit_h_14": 56,
}
_VIDEO = {
    "mc3_18": (8, 64),
    "r3d_18": (8, 64),
    "r2plus1d_18": (8, 64),
    "s3d": (16, 224),
    "mvit_v1_b": (16, 224),
    "mvit_v2_s": (16, 224),
    "swin3d_t": (4, 64),
    "swin3d_s": (4, 64),
    "swin3d_b": (4, 64),
}


def torchvision_names() -> list[str]:
    import torchvision

    return torchvision.models.list_models()


def _is_detection(name: str) -> bool:
    return any(part in name for part in ("rcnn", "retinanet", "fcos", "ssd"))


def _detection_options(name: str) -> dict[str, Any]:
    """Small images, and few boxes of which the detector may be as unsure as it likes."""
    options: dict[str, Any] = {}
    if "rcnn" in name:
        # The heads work on every box: a few of them say as much as a hundred.
        options |= {"box_score_thresh": 0.0, "box_detections_per_img": 10}
        options |= {"rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 40}
    else:
        options |= {"score_thresh": 0.0}
    # The size of an SSD is fixed.
    return options if name.startswith("ssd") else options | {"min_size": 96, "max_size": 128}


def build_torchvision(name: str) -> tuple[nn.Module, Inputs]:
    import torchvision

    options: dict[str, Any] = {"weights": None}
    if name.startswith("raft"):
        model = torchvision.models.get_model(name, **options)
        return model, lambda: (
            tuple(torch.rand(2, BATCH, 3, 128, 128) * 2 - 1),
            {"num_flow_updates": 2},
        )
    options["num_classes"] = CLASSES
    if _is_detection(name):
        options["weights_backbone"] = None
        options |= _detection_options(name)
        model = torchvision.models.get_model(name, **options)
        return model, lambda: (([torch.rand(3, 96, 128), torch.rand(3, 80, 96)],), {})
    if name.startswith(("fcn", "deeplab", "lraspp")):
        options["weights_backbone"] = None
    if name.startswith("quantized"):
        options["quantize"] = False
    if name in _VIDEO:
        frames, side = _VIDEO[name]
        model = torchvision.models.get_model(name, **options)
        return model, _image(frames, side, side)
    side = _SIDES.get(name, 64)
    if name.startswith("vit"):
        options["image_size"] = side
    if name in ("googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3"):
        options["init_weights"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.get_model(name, **options)
    return model, _image(side, side)


# --- timm ---------------------------------------------------------------------------------------

#: Well-known families that share a module with others.
TIMM_MORE = (
    "caformer_s18",
    "coatnet_nano_rw_224",
    "convformer_s18",
    "convnextv2_atto",
    "darknet53",
    "deit3_small_patch16_224",
    "efficientnet_b0",
    "eva02_tiny_patch14_224",
    "ghostnetv2_100",
    "gmixer_24_224",
    "gmlp_ti16_224",
    "halonet26t",
    "lambda_resnet26t",
    "maxvit_pico_rw_256",
    "mobilenetv4_conv_small",
    "mobilenetv4_hybrid_medium",
    "mobilevitv2_050",
    "poolformer_s12",
    "repvgg_a0",
    "resmlp_12_224",
    "resnext50_32x4d",
    "seresnet50",
    "skresnet18",
    "swinv2_tiny_window8_256",
    "tf_efficientnet_b0",
    "vit_small_patch14_dinov2",
    "wide_resnet50_2",
)


def timm_names() -> list[str]:
    families = json.loads(FAMILIES.read_text(encoding="utf-8"))["families"]
    return sorted({*families.values(), *TIMM_MORE})


def build_timm(name: str) -> tuple[nn.Module, Inputs]:
    import timm

    options: dict[str, Any] = {"num_classes": CLASSES}
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(name, **options)
    # Smaller images tell an oracle as much, where the network takes them.
    size = model.default_cfg["input_size"][1:]
    small = tuple(side // 2 for side in size)
    return model, _image(*(small if _takes(model, small) else size))


def _takes(model: nn.Module, size: tuple[int, ...]) -> bool:
    try:
        with torch.no_grad():
            model.eval()(torch.randn(BATCH, 3, *size))
    except Exception:
        return False
    return True


def smallest_of_families() -> dict[str, str]:
    """For each module of `timm.models`, its model with the fewest parameters."""
    import timm

    found = {}
    for module in sorted(timm.list_modules()):
        sizes: dict[str, int] = {}
        for name in timm.list_models(module=module):
            if name.startswith("test_"):
                continue
            # Built without memory; what cannot be built so is no candidate.
            with (
                contextlib.suppress(Exception),
                torch.device("meta"),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                model = timm.create_model(name)
                sizes[name] = sum(p.numel() for p in model.parameters())
        if sizes:
            found[module] = min(sizes, key=lambda name: (sizes[name], name))
    return found


# --- transformers -------------------------------------------------------------------------------

_TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_ENCODER = {**_TEXT, "intermediate_size": 48, "max_position_embeddings": 32}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def _ids(rows: int = BATCH, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 50, (rows, length))


def _tokens() -> dict[str, Any]:
    return {"input_ids": _ids()}


def _pixels(side: int = 32) -> dict[str, Any]:
    return {"pixel_values": torch.randn(BATCH, 3, side, side)}


def _both() -> dict[str, Any]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(length=5)}


#: Name → (model class, config class, config options, inputs).
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", _ENCODER, _tokens),
    "bert-eager": (
        "BertForMaskedLM",
        "BertConfig",
        {**_ENCODER, "attn_implementation": "eager"},
        _tokens,
    ),
    "roberta": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**_ENCODER, "pad_token_id": 1},
        _tokens,
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        _tokens,
    ),
    "albert": (
        "AlbertForSequenceClassification",
        "AlbertConfig",
        {**_ENCODER, "embedding_size": 16},
        _tokens,
    ),
    "electra": (
        "ElectraForSequenceClassification",
        "ElectraConfig",
        {**_ENCODER, "embedding_size": 16},
        _tokens,
    ),
    "deberta": (
        "DebertaForSequenceClassification",
        "DebertaConfig",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        _tokens,
    ),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {
            **_ENCODER,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
        _tokens,
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 50,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
            "use_cache": False,
        },
        _tokens,
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**_ENCODER, "use_cache": False},
        _tokens,
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 32,
            "use_cache": False,
        },
        _tokens,
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER, _tokens),
    "llama-tied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_DECODER, "tie_word_embeddings": True, "attn_implementation": "eager"},
        _tokens,
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER, _tokens),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER, _tokens),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 4}, _tokens),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _DECODER, _tokens),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_DECODER, "sliding_window": 4}, _tokens),
    "phi": ("PhiForCausalLM", "PhiConfig", {**_ENCODER, "use_cache": False}, _tokens),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {
            **_DECODER,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "experts_implementation": "batched_mm",
        },
        _tokens,
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 50,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "use_cache": False,
        },
        _both,
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": 50,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 32,
            "use_cache": False,
        },
        _both,
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": 50,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "use_cache": False,
        },
        lambda: {
            "input_features": torch.randn(BATCH, 8, 32),
            "decoder_input_ids": _ids(length=5),
        },
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**_ENCODER, "projection_dim": 16, "eos_token_id": 49},
            "vision_config": {**_VISION, "projection_dim": 16},
            "projection_dim": 16,
        },
        lambda: {**_tokens(), **_pixels()},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", _VISION, _pixels),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _VISION, _pixels),
    "dinov2": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {**_VISION, "mlp_ratio": 2},
        _pixels,
    ),
    "beit": (
        "BeitForImageClassification",
        "BeitConfig",
        {**_VISION, "use_relative_position_bias": True},
        _pixels,
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        _pixels,
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]},
        lambda: _pixels(64),
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "hidden_sizes": [8, 16, 16, 24],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 16,
        },
        lambda: _pixels(64),
    ),
    "sam-encoder": (
        "SamVisionModel",
        "SamVisionConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "mlp_dim": 48,
            "image_size": 64,
            "patch_size": 8,
            "output_channels": 16,
            "window_size": 4,
            "global_attn_indexes": [1],
        },
        lambda: _pixels(64),
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **_ENCODER,
            "conv_dim": [16, 16],
            "conv_stride": [4, 2],
            "conv_kernel": [8, 4],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
        },
        lambda: {"input_values": torch.randn(BATCH, 400)},
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "use_cache": False,
        },
        _tokens,
    ),
}


class _Answer(nn.Module):
    """A model that returns its answer only, none of the hidden states that come with it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        output = self.model(**inputs)
        names = ("logits", "logits_per_image", "last_hidden_state", *output)
        return next(output[name] for name in names if name in output)


def build_transformers(name: str) -> tuple[nn.Module, Inputs]:
    import transformers

    transformers.logging.set_verbosity_error()
    model_class, config_class, options, inputs = TRANSFORMERS[name]
    options = dict(options)
    attention = options.pop("attn_implementation", None)
    experts = options.pop("experts_implementation", None)
    config = getattr(transformers, config_class)(**options)
    if attention:
        config._attn_implementation = attention
    if experts:
        config._experts_implementation = experts
    model = getattr(transformers, model_class)(config)
    return _Answer(model), lambda: ((), inputs())


def build_type(name: str) -> tuple[nn.Module, Inputs]:
    model, inputs = transformers_models.build(name)
    return _Answer(model), lambda: ((), inputs)


# --- plain torch --------------------------------------------------------------------------------


def build_plain(name: str) -> tuple[nn.Module, Inputs]:
    network, inputs = NETWORKS[name]
    return network(), lambda: (inputs(), {})


# --- all ----------------------------------------------------------------------------------------

BUILDERS = {
    "torchvision": build_torchvision,
    "timm": build_timm,
    "transformers": build_transformers,
    "plain": build_plain,
    "transformers-types": build_type,
}


def models() -> list[str]:
    """Every model of the sweep, as `library:name`."""
    names = {
        "torchvision": torchvision_names(),
        "timm": timm_names(),
        "transformers": list(TRANSFORMERS),
        "plain": list(NETWORKS),
        "transformers-types": transformers_models.classes(),
    }
    return [f"{library}:{name}" for library, found in names.items() for name in found]


def build(model: str, seed: int = 0) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model of the sweep in eval mode with random weights, and its inputs, alike for any seed."""
    library, _, name = model.partition(":")
    torch.manual_seed(seed)
    network, make_inputs = BUILDERS[library](name)
    torch.manual_seed(0)
    args, kwargs = make_inputs()
    return network.eval(), args, kwargs


if __name__ == "__main__":
    import timm

    content = {"timm": timm.__version__, "families": smallest_of_families()}
    FAMILIES.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
