"""The numbers of torch's own layers that their tensors decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.rnn import RNNCellBase

from fxfuse.graph.torch_compat import ConvNd, NormBase

#: What a layer says of its own size, by attribute.
Sizes = dict[str, Any]


def _convolution(layer: Any) -> Sizes:
    # A transposed kernel has the input channels first.
    front, back = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    first, second = ("in_channels", "out_channels")[:: 1 if layer.transposed else -1]
    return {first: front, second: back}


def _linear(layer: Any) -> Sizes:
    return {"out_features": layer.weight.shape[0], "in_features": layer.weight.shape[1]}


def _bilinear(layer: Any) -> Sizes:
    out, first, second = layer.weight.shape
    return {"out_features": out, "in1_features": first, "in2_features": second}


def _channel_norm(layer: Any) -> Sizes:
    tensor = layer.running_mean if layer.weight is None else layer.weight
    return {} if tensor is None else {"num_features": tensor.shape[0]}


def _group_norm(layer: Any) -> Sizes:
    return {} if layer.weight is None else {"num_channels": layer.weight.shape[0]}


def _shape_norm(layer: Any) -> Sizes:
    return {} if layer.weight is None else {"normalized_shape": tuple(layer.weight.shape)}


def _embedding(layer: Any) -> Sizes:
    return {"num_embeddings": layer.weight.shape[0], "embedding_dim": layer.weight.shape[1]}


def _recurrent(layer: Any) -> Sizes:
    gates = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)
    sizes = {
        "input_size": layer.weight_ih_l0.shape[1],
        "hidden_size": layer.weight_ih_l0.shape[0] // gates,
    }
    return sizes | ({"proj_size": layer.weight_hr_l0.shape[0]} if layer.proj_size else {})


def _cell(layer: Any) -> Sizes:
    return {"input_size": layer.weight_ih.shape[1], "hidden_size": layer.weight_hh.shape[1]}


def _attention(layer: Any) -> Sizes:
    if layer.in_proj_weight is None:
        heads, keys, values = layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight
        sizes = {"kdim": keys.shape[1], "vdim": values.shape[1]}
    else:
        heads = layer.in_proj_weight[: layer.in_proj_weight.shape[0] // 3]
        sizes = {"kdim": heads.shape[1], "vdim": heads.shape[1]}
    # A head is kept or dropped as a whole, so its own size stays.
    num_heads = heads.shape[0] // layer.head_dim
    return sizes | {"embed_dim": layer.out_proj.weight.shape[0], "num_heads": num_heads}


def _slopes(layer: Any) -> Sizes:
    return {"num_parameters": layer.weight.shape[0]}


_LAYERS: tuple[tuple[type[nn.Module], Callable[[Any], Sizes]], ...] = (
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    (ConvNd, _convolution),
    (NormBase, _channel_norm),
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _shape_norm),
    (nn.RMSNorm, _shape_norm),
    (nn.Embedding, _embedding),
    (nn.EmbeddingBag, _embedding),
    (nn.RNNBase, _recurrent),
    (RNNCellBase, _cell),
    (nn.MultiheadAttention, _attention),
    (nn.PReLU, _slopes),
)


def sizes_of_layer(layer: nn.Module) -> Sizes | None:
    """Return what a layer's attributes have to be for the tensors that it holds, by attribute.

    None where the module is none of torch's own layers. Of a convolution, `groups` counts, which
    its tensors do not decide.
    """
    for kind, sizes in _LAYERS:
        if isinstance(layer, kind):
            return sizes(layer)
    return None
