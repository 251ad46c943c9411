"""A fused network distilled from its members by the Trainer of Hugging Face transformers.

    pip install -e . transformers accelerate scikit-learn && python examples/distill_with_trainer.py

Two vision transformers learn the digits of scikit-learn, each with many images of its own half of
the classes and few of the others. They are fused, and the Trainer brings the fused network to the
mean of their logits, without a label. What it needs for that is one method.
"""

from __future__ import annotations

import argparse
import copy
import tempfile

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import fxfuse
from fxfuse import Refit, Transplant


class EnsembleTrainer(Trainer):
    """Trains a network to answer like the mean of its members' logits; labels are not looked at.

    Args:
        members: The networks to learn from; run in eval mode and never changed.
        *args: As for `Trainer`.
        **kwargs: As for `Trainer`.
    """

    def __init__(self, members: list[nn.Module], *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.members = [member.to(self.args.device).eval() for member in members]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: object
    ) -> Tensor | tuple[Tensor, object]:
        """The mean squared difference of the logits, each centred over the classes."""
        images = inputs["pixel_values"]
        with torch.no_grad():
            wanted = torch.stack([m(pixel_values=images).logits for m in self.members]).mean(0)
        outputs = model(pixel_values=images)
        difference = outputs.logits - wanted
        loss = (difference - difference.mean(1, keepdim=True)).square().mean()
        return (loss, outputs) if return_outputs else loss


class Images(Dataset):
    """Images [n, 1, 8, 8] with labels [n], as the Trainer takes them."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def arguments(steps: int, folder: str, rate: float) -> TrainingArguments:
    return TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )


def main(steps: int) -> dict[str, float]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, unlabelled, test = order.split([900, 400, 497])
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=10,
        # What the fused module could not follow in training (README, limits).
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )

    def accuracy(answers: Tensor) -> float:
        return 100 * float((answers.argmax(1) == labels[test]).float().mean())

    with tempfile.TemporaryDirectory() as folder:
        members = []
        for seed in range(2):
            torch.manual_seed(seed)
            own = labels[train] % 2 == seed
            seen = train[own | (torch.rand(len(train)) < 0.1)]
            member = ViTForImageClassification(config)
            data = Images(images[seen], labels[seen])
            Trainer(member, arguments(steps, folder, 2e-3), train_dataset=data).train()
            members.append(member.cpu().eval())

        result = fxfuse.fuse(
            members,
            images[:4],
            calibration=images[unlabelled],
            method=Transplant(score="obs"),
            refine=[Refit()],
        )
        # A copy of the members' own class: the Trainer knows how to save it, too.
        fused = result.to_module()
        with torch.no_grad():
            found = {f"member {i}": accuracy(m(images[test]).logits) for i, m in enumerate(members)}
            found["ensemble"] = accuracy(sum(m(images[test]).logits for m in members) / 2)
            found["fused, refitted"] = accuracy(fused(images[test]).logits)
        data = Images(images[unlabelled], labels[unlabelled])
        # The control: the first member, with the same images and steps.
        alone = copy.deepcopy(members[0])
        for name, student in {"fused": fused, "member 0": alone}.items():
            given = arguments(steps, folder, 5e-4)
            EnsembleTrainer(members, student, given, train_dataset=data).train()
            with torch.no_grad():
                found[f"{name}, distilled"] = accuracy(student.cpu().eval()(images[test]).logits)
    for name, percent in found.items():
        print(f"{name}: {percent:.1f} %")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
