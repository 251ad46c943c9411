"""How images and texts are prepared where a network's library says it: timm and transformers."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.cli.hub import local_folder
from fxfuse.cli.model_names import is_pretrained, library_module
from fxfuse.cli.wording import in_one_line
from fxfuse.common.json_file import read_json
from fxfuse.errors import OptionError

_PROCESSOR = "preprocessor_config.json"
_MASK = "attention_mask"

_log = logging.getLogger(__name__)


def own_transform(model: str, size: tuple[int, int] | None) -> Callable[[Any], Tensor] | None:
    """Return what a network's library does to an image, or None where it says nothing.

    Args:
        model: Name of the network, such as `timm:convnext_tiny` or `hf:FOLDER`.
        size: Height and width of the example inputs, for timm; None: those of its configuration.
    """
    library, _, name = model.partition(":")
    if library == "timm":
        return _timm_transform(name, size)
    if library != "hf":
        return None
    folder = local_folder(name)
    return _processor(folder) if (folder / _PROCESSOR).is_file() else None


def _timm_transform(name: str, size: tuple[int, int] | None) -> Callable[[Any], Tensor] | None:
    data = library_module("timm.data", "timm")
    told: Any = None
    if is_pretrained(Path(name)):
        told = read_json(Path(name) / "config.json").get("pretrained_cfg")
    elif (found := library_module("timm.models", "timm").get_pretrained_cfg(name)) is not None:
        told = found.to_dict()
    if not told:
        return None
    # Images are as large as the example inputs, whatever the network was first trained on.
    given = {} if size is None else {"input_size": (3, *size)}
    config = data.resolve_data_config(given, pretrained_cfg=told)
    _log.info(
        "images are prepared as timm does for %s: size %s, mean %s, std %s, crop %s; "
        "--preset none leaves them as they are",
        name,
        list(config["input_size"][1:]),
        [round(x, 3) for x in config["mean"]],
        [round(x, 3) for x in config["std"]],
        config["crop_pct"],
    )
    transform: Callable[[Any], Tensor] = data.create_transform(**config, is_training=False)
    return transform


def _processor(folder: Path) -> Callable[[Any], Tensor]:
    transformers = library_module("transformers", "transformers")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    # What its many classes raise is not documented.
    except Exception as error:
        raise _unusable("image processor", folder / _PROCESSOR, error) from error
    _log.info(
        "images are prepared by the %s of %s; --preset none leaves them as they are",
        type(processor).__name__,
        folder,
    )

    def transform(image: Any) -> Tensor:
        pixels: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    return transform


def takes_mask(network: nn.Module) -> bool:
    """Tell whether texts need a mask: a network's second input says which tokens count.

    One that writes texts answers at every token, so padding would count, whatever a mask says.
    """
    generates = getattr(network, "can_generate", lambda: False)
    names = list(inspect.signature(network.forward).parameters)
    return names[1:2] == [_MASK] and not generates()


def own_tokens(
    model: str, length: int, *, masked: bool
) -> Callable[[Sequence[str]], tuple[Tensor, ...]]:
    """Return what makes a network's inputs of texts, with the tokenizer of its folder.

    With a mask, each text is one example, cut or padded to `length` tokens. Without one, texts
    stand one after the other and are cut into examples of this length, since padding would count.

    Args:
        model: Name of the network, `hf:FOLDER`.
        length: Number of tokens of an example.
        masked: Whether the network takes a mask.

    Raises:
        OptionError: The folder has no tokenizer.
    """
    library, _, name = model.partition(":")
    if library != "hf":
        raise OptionError(
            "texts need a tokenizer",
            where=model,
            why="only folders that save_pretrained of transformers wrote bring one",
            how="use --model hf:FOLDER, or pass token ids as a .npy file",
        )
    folder = local_folder(name)
    transformers = library_module("transformers", "transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise _unusable("tokenizer", folder, error) from error

    def rows(texts: Sequence[str]) -> tuple[Tensor, ...]:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        found = tokenizer(
            list(texts),
            truncation=True,
            max_length=length,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )
        return found["input_ids"], found[_MASK]

    def blocks(texts: Sequence[str]) -> tuple[Tensor, ...]:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        each = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.tensor([token for text in each for token in (*text, *end)], dtype=torch.int64)
        return (ids[: len(ids) // length * length].reshape(-1, length),)

    return rows if masked else blocks


def _unusable(what: str, path: Path, error: Exception) -> OptionError:
    return OptionError(
        f"{path.name} holds no usable {what}",
        where=str(path),
        why=in_one_line(error),
        how=f"save the {what} into the folder with its save_pretrained; code of a folder is never "
        "run",
    )
