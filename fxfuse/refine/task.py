"""The task: what the output of a network means, what its ensemble answers, and how far others are.

Everything that learns or chooses measures the distance to the user's ensemble, and the task says
what that is. The ensemble's answers are kept as what the distance needs: log-probabilities of
classes, probabilities of labels, values, directions.

Notation of shapes: n inputs, k classes, d entries of a vector, * any further dimensions.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from fxfuse.common.options import Options, fields_of
from fxfuse.errors import InputError, MemberError, OptionError
from fxfuse.graph.torch_compat import pytree

#: What a network answers, as a task reads it: a tensor [n, *], or several by name.
Answer = Any
#: The keyword inputs that a network answers to, by name.
Kwargs = Mapping[str, Any]

#: A probability below this is taken for this: the least that float32 tells from zero near one.
_TINY = 1e-12
#: How far from 1 the probabilities of one position may sum up to.
_ROUNDING = 1e-2
#: Variance of an output that hardly varies, as a share of the mean variance of all.
_LEAST_SHARE = 1e-6


class Task(Options, ABC):
    """What the output of a network means, and so how far a network is from its ensemble."""

    #: The unit of the distance.
    unit: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check the values; weights may be any sequence."""
        super().__post_init__()
        weights: Sequence[float] | None = getattr(self, "weights", None)
        if weights is not None:
            object.__setattr__(self, "weights", tuple(weights))

    def __str__(self) -> str:
        """The task as it is written, without what is at its default."""
        fields = ((f.name, getattr(self, f.name), f.default) for f in fields_of(type(self)))
        given = ", ".join(f"{name}={value!r}" for name, value, usual in fields if value != usual)
        return f"{type(self).__name__}({given})"

    @abstractmethod
    def combine(self, answers: Sequence[Answer]) -> Answer:
        """Return what the ensemble answers, from what its members answer, `[n, *]` each."""

    def target(self, answers: Sequence[Answer], kwargs: Mapping[str, Any]) -> Answer:
        """Return what the distance is measured to: what the ensemble answers, and what counts.

        Args:
            answers: What the members answer, `[n, *]` each.
            kwargs: The keyword inputs that they answer to.
        """
        return self.combine(answers)

    @abstractmethod
    def distance(self, answer: Answer, wanted: Answer) -> Tensor:
        """Return how far each input's answer is from the ensemble's, float `[n]`, 0 if equal.

        Args:
            answer: What a network answers, `[n, *]`.
            wanted: What `combine` or `target` returned for the same inputs.
        """

    def loss(self, answer: Answer, wanted: Answer) -> Tensor:
        """Return what matching minimises, a scalar."""
        return self.distance(answer, wanted).mean()

    def label_loss(self, answer: Answer, labels: Tensor) -> Tensor | None:
        """Return the loss of each input on its label, `[n]`; None where labels say nothing."""
        return None

    def probe(
        self, answer: Answer, kwargs: Mapping[str, Any], generator: torch.Generator
    ) -> Tensor:
        """Return a random scalar that tells how much the distance depends on an answer.

        The outer product of its gradient, on average over the random numbers, is the second
        derivative of the distance where both answers are equal, but for a factor: of classes the
        Fisher information (Amari, "Natural gradient works efficiently in learning", 1998), of
        values their squares, relative to each other.

        Args:
            answer: What a network answers, `[n, *]`.
            kwargs: The keyword inputs that it answers to.
            generator: On the CPU.
        """
        parts = [x for x in pytree.tree_leaves(answer) if isinstance(x, Tensor)]
        return torch.stack(
            [
                (_signs(x, generator) * x / x.detach().std(correction=0).clamp(min=1e-30)).sum()
                for x in parts
                if x.is_floating_point()
            ]
        ).sum()

    def read(self, output: Any) -> Answer:
        """Return the part of a network's output that counts."""
        return main_output(output)

    def exact(self, answer: Answer) -> Answer:
        """Return an answer in float64: rounding must bring nothing closer to the ensemble."""
        return answer.double()

    def check(self, answer: Answer) -> None:
        """Check that an answer is one of this task.

        Raises:
            OptionError: It is not.
        """
        if not answer.is_floating_point() or answer.dim() < 1:
            raise self.misfit(answer, "it is no floating tensor with a batch dimension")

    def prepared(self, wanted: Answer, members: Sequence[Answer] = ()) -> Task:
        """Return this task with what it takes from the ensemble's answers as a whole.

        Args:
            wanted: What `target` returned.
            members: What the members answer.
        """
        return self

    def misfit(self, answer: Tensor, why: str) -> OptionError:
        """Return the error for an output that this task does not describe."""
        return OptionError(
            f"{type(self).__name__} does not fit an output {list(answer.shape)} of {answer.dtype}",
            where=f"task={self}",
            why=why,
            how="pass the task of the output: fxfuse.Classification(dim=...), MultiLabel(), "
            "Regression(), Embedding(), or a mapping from names of outputs to tasks",
        )


@dataclass(frozen=True)
class Classification(Task):
    """One of k classes at every position: KL(ensemble ‖ network), mean over positions, in nats.

    Attributes:
        dim: Dimension of the classes.
        outputs: What the network returns: logits, of which only differences count, probabilities,
            or log-probabilities.
        combine_by: How the ensemble combines its members: the mean of their probabilities, the mean
            of their logits, or their votes.
        weights: Weight of each member in the ensemble. None: all the same.
    """

    dim: int = 1
    outputs: Literal["logits", "probabilities", "log_probabilities"] = "logits"
    combine_by: Literal["probabilities", "logits", "vote"] = "probabilities"
    weights: tuple[float, ...] | None = None

    unit: ClassVar[str] = "KL in nats"

    def check(self, answer: Tensor) -> None:
        """Check for classes along the dimension, and for probabilities that sum to one."""
        super().check(answer)
        if not (-answer.dim() <= self.dim < answer.dim()) or self.dim % answer.dim() == 0:
            raise self.misfit(answer, f"it has no dimension {self.dim} beside the batch's")
        if answer.shape[self.dim] < 2:
            raise self.misfit(answer, f"there is one class along dimension {self.dim}")
        if self.outputs == "logits" or answer.is_meta:
            return
        given = answer.detach().double()
        total = (given if self.outputs == "probabilities" else given.exp()).sum(self.dim)
        off = float((total - 1).abs().max())
        if not off <= _ROUNDING or (self.outputs == "probabilities" and bool((given < 0).any())):
            raise self.misfit(
                answer, f"{self.outputs} along dimension {self.dim} miss a sum of one by {off:.3g}"
            )

    def log_probabilities(self, answer: Tensor) -> Tensor:
        """Return log-probabilities of an answer, float32 or wider."""
        answer = answer.to(torch.promote_types(answer.dtype, torch.float32))
        if self.outputs == "logits":
            return answer.log_softmax(self.dim)
        return answer if self.outputs == "log_probabilities" else answer.clamp(min=_TINY).log()

    def combine(self, answers: Sequence[Tensor]) -> Tensor:
        """Return log-probabilities of the ensemble, `[n, *]`."""
        logs = [self.log_probabilities(answer) for answer in answers]
        weights = weights_of(self.weights, len(logs))
        if self.combine_by == "probabilities":
            terms = [log + math.log(w) for log, w in zip(logs, weights, strict=True) if w > 0]
            return torch.stack(terms).logsumexp(0)
        if self.combine_by == "logits":
            raw = answers if self.outputs == "logits" else logs
            return weighted([x.to(logs[0].dtype) for x in raw], weights).log_softmax(self.dim)
        votes = [(log == log.amax(self.dim, keepdim=True)).to(log.dtype) for log in logs]
        shares = [vote / vote.sum(self.dim, keepdim=True) for vote in votes]
        return weighted(shares, weights).clamp(min=_TINY).log()

    def probe(
        self, answer: Answer, kwargs: Mapping[str, Any], generator: torch.Generator
    ) -> Tensor:
        """Minus the log-probability of classes drawn at every position."""
        return self.drawn(answer, generator).sum()

    def drawn(self, answer: Tensor, generator: torch.Generator) -> Tensor:
        """Return minus the log-probability of a class drawn from the answer, at every position."""
        logs = self.log_probabilities(answer).movedim(self.dim, -1)
        shares = logs.detach().exp().flatten(0, -2).cpu().double()
        chosen = torch.multinomial(shares, 1, generator=generator).to(logs.device)
        return -logs.gather(-1, chosen.reshape(*logs.shape[:-1], 1))[..., 0]

    def distance(self, answer: Tensor, wanted: Tensor) -> Tensor:
        """KL divergence, mean over the positions of each input."""
        check_shapes(answer, wanted)
        found = self.log_probabilities(answer).to(wanted.dtype)
        return per_input(self._divergence(found, wanted))

    def _divergence(self, found: Tensor, wanted: Tensor) -> Tensor:
        return (wanted.exp() * (wanted - found)).sum(self.dim).clamp(min=0)

    def label_loss(self, answer: Tensor, labels: Tensor) -> Tensor | None:
        """Negative log-likelihood of class numbers, mean over the positions of each input.

        Raises:
            InputError: The labels are no class numbers, one for each position.
        """
        logs = self.log_probabilities(answer)
        labels = labels.to(logs.device)
        shape = tuple(n for d, n in enumerate(logs.shape) if d != self.dim % logs.dim())
        whole = not labels.is_floating_point()
        if tuple(labels.shape) != shape or not whole:
            raise InputError(
                f"the labels do not fit: {list(labels.shape)} of {labels.dtype}",
                where="labels",
                why=f"the outputs are {list(answer.shape)}, with classes along {self.dim}",
                how=f"pass class numbers {list(shape)}, or leave the labels out",
            )
        if int(labels.min()) < 0 or int(labels.max()) >= logs.shape[self.dim]:
            raise InputError(
                f"a label lies outside 0 to {logs.shape[self.dim] - 1}",
                where="labels",
                how="number the classes from 0, as the network's outputs are",
            )
        return per_input(-logs.gather(self.dim, labels.unsqueeze(self.dim)).squeeze(self.dim))

    def loss(self, answer: Tensor, wanted: Tensor) -> Tensor:
        """KL divergence, and a tenth of it at temperature 3, which shows what is improbable.

        Hinton et al., "Distilling the knowledge in a neural network", arXiv:1503.02531, section 2.
        """
        check_shapes(answer, wanted)
        found = self.log_probabilities(answer).to(wanted.dtype)
        return self._losses(found, wanted).mean()

    def _losses(self, found: Tensor, wanted: Tensor) -> Tensor:
        """The loss at every position."""
        hot = [(x / _TEMPERATURE).log_softmax(self.dim) for x in (found, wanted)]
        warm = self._divergence(hot[0], hot[1]) * _TEMPERATURE**2
        return self._divergence(found, wanted) + _WARM * warm


#: Temperature of the second divergence of the loss, and its weight.
_TEMPERATURE, _WARM = 3.0, 0.1


@dataclass(frozen=True)
class NextToken(Classification):
    """The next token at every position: KL divergence along the last dimension, in nats.

    Attributes:
        dim: Dimension of the tokens.
        mask: Name of the keyword input that is 0 where a position does not count. Where the network
            takes no such input, every position counts.
    """

    dim: int = -1
    mask: str = "attention_mask"

    def target(self, answers: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Answer:
        """Return log-probabilities of the ensemble, `[n, *]`, and which positions count.

        Raises:
            OptionError: The mask is not one number for each position.
        """
        wanted, mask = self.combine(answers), kwargs.get(self.mask)
        if mask is None:
            return wanted
        shape = wanted.select(self.dim, 0).shape
        if not isinstance(mask, Tensor) or mask.shape != shape:
            found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise self.misfit(
                answers[0], f"the input {self.mask!r} is {found}, the positions are {list(shape)}"
            )
        return {"tokens": wanted, "counted": (mask != 0).to(wanted)}

    def probe(
        self, answer: Answer, kwargs: Mapping[str, Any], generator: torch.Generator
    ) -> Tensor:
        """As of any classification, at the positions that count."""
        each, mask = self.drawn(answer, generator), kwargs.get(self.mask)
        if isinstance(mask, Tensor) and mask.shape == each.shape:
            each = each * mask.ne(0).to(each)
        return each.sum()

    def distance(self, answer: Tensor, wanted: Answer) -> Tensor:
        """KL divergence, mean over the positions of each input that count."""
        if isinstance(wanted, Tensor):
            return super().distance(answer, wanted)
        found, tokens, counted = self._found(answer, wanted)
        each = (self._divergence(found, tokens) * counted).flatten(1).sum(1)
        return each / counted.flatten(1).sum(1).clamp(min=1)

    def loss(self, answer: Tensor, wanted: Answer) -> Tensor:
        """As for any classification, mean over all positions that count."""
        if isinstance(wanted, Tensor):
            return super().loss(answer, wanted)
        found, tokens, counted = self._found(answer, wanted)
        return (self._losses(found, tokens) * counted).sum() / counted.sum().clamp(min=1)

    def _found(self, answer: Tensor, wanted: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What was found, what is wanted, and which positions count."""
        tokens, counted = wanted["tokens"], wanted["counted"]
        check_shapes(answer, tokens)
        return self.log_probabilities(answer).to(tokens.dtype), tokens, counted


@dataclass(frozen=True)
class MultiLabel(Task):
    """Labels that are each true or false: binary KL(ensemble ‖ network) of each, mean, in nats.

    Attributes:
        outputs: What the network returns: logits, or probabilities (after a sigmoid).
        weights: Weight of each member in the ensemble, which is the mean of the members'
            probabilities. None: all the same.
    """

    outputs: Literal["logits", "probabilities"] = "logits"
    weights: tuple[float, ...] | None = None

    unit: ClassVar[str] = "KL in nats"

    def check(self, answer: Tensor) -> None:
        """Check that probabilities lie in [0, 1]."""
        super().check(answer)
        if self.outputs == "probabilities" and not answer.is_meta:
            low, high = float(answer.min()), float(answer.max())
            if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
                raise self.misfit(answer, f"its values lie in [{low:.3g}, {high:.3g}]")

    def _log(self, answer: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of true, and of false."""
        answer = answer.to(torch.promote_types(answer.dtype, torch.float32))
        if self.outputs == "logits":
            return functional.logsigmoid(answer), functional.logsigmoid(-answer)
        return answer.clamp(min=_TINY).log(), (1 - answer).clamp(min=_TINY).log()

    def combine(self, answers: Sequence[Tensor]) -> Tensor:
        """Return the mean of the members' probabilities, `[n, *]`."""
        weights = weights_of(self.weights, len(answers))
        return weighted([self._log(x)[0].exp() for x in answers], weights)

    def probe(
        self, answer: Answer, kwargs: Mapping[str, Any], generator: torch.Generator
    ) -> Tensor:
        """Minus the log-probability of labels that are drawn."""
        true, false = self._log(answer)
        shares = true.detach().exp().cpu().clamp(max=1)
        drawn = torch.bernoulli(shares, generator=generator).to(true.device)
        return -torch.where(drawn > 0, true, false).sum()

    def distance(self, answer: Tensor, wanted: Tensor) -> Tensor:
        """Binary KL divergence, mean over all labels of each input."""
        check_shapes(answer, wanted)
        true, false = (x.to(wanted.dtype) for x in self._log(answer))
        entropy = torch.special.entr(wanted) + torch.special.entr(1 - wanted)
        return per_input(-(wanted * true + (1 - wanted) * false) - entropy).clamp(min=0)

    def label_loss(self, answer: Tensor, labels: Tensor) -> Tensor | None:
        """Binary cross-entropy with labels of 0 and 1, mean over the labels of each input.

        Raises:
            InputError: The labels have another shape than the outputs, or other values.
        """
        true, false = self._log(answer)
        labels = _like(labels, answer).to(true)
        if not bool(((labels >= 0) & (labels <= 1)).all()):
            raise InputError(
                "a label lies outside 0 to 1",
                where="labels of the calibration inputs",
                how="pass 1 where a label is true and 0 where it is not",
            )
        return per_input(-(labels * true + (1 - labels) * false))


@dataclass(frozen=True)
class Regression(Task):
    """Values: squared error relative to the variance of each output over the inputs.

    Attributes:
        combine_by: How the ensemble combines its members.
        weights: Weight of each member in the mean. None: all the same.
    """

    combine_by: Literal["mean", "median"] = "mean"
    weights: tuple[float, ...] | None = None
    _scale: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    unit: ClassVar[str] = "share of the variance"

    def combine(self, answers: Sequence[Tensor]) -> Tensor:
        """Return mean or median, `[n, *]`."""
        given = [a.to(torch.promote_types(a.dtype, torch.float32)) for a in answers]
        if self.combine_by == "median":
            return torch.stack(given).quantile(0.5, dim=0)
        return weighted(given, weights_of(self.weights, len(given)))

    def prepared(self, wanted: Tensor, members: Sequence[Answer] = ()) -> Task:
        """Return the task with the variance of each output, which is an index of dimension 1."""
        values = wanted.double()
        rows = values.movedim(1, -1).flatten(0, -2) if values.dim() > 1 else values[:, None]
        variance = rows.var(0, correction=0)
        variance = variance.clamp(min=max(_LEAST_SHARE * float(variance.mean()), 1e-30))
        shape = [1, -1] + [1] * (wanted.dim() - 2) if wanted.dim() > 1 else [-1]
        task = copy.copy(self)
        object.__setattr__(task, "_scale", variance.reshape(shape).to(wanted))
        return task

    def distance(self, answer: Tensor, wanted: Tensor) -> Tensor:
        """Squared error over variance, mean over the outputs of each input."""
        check_shapes(answer, wanted)
        squares = (answer.to(wanted.dtype) - wanted).square()
        return per_input(squares if self._scale is None else squares / self._scale.to(squares))

    def label_loss(self, answer: Tensor, labels: Tensor) -> Tensor | None:
        """Squared error from the labels, over the variance of the ensemble's outputs.

        Raises:
            InputError: The labels have another shape than the outputs.
        """
        answer = answer.to(torch.promote_types(answer.dtype, torch.float32))
        return self.distance(answer, _like(labels, answer).to(answer))


@dataclass(frozen=True)
class Embedding(Task):
    """A vector of which only the direction counts: 1 - cosine with the ensemble's.

    Attributes:
        dim: Dimension of the vector's entries.
        weights: Weight of each member in the ensemble, which is the mean of the members' normalised
            vectors. None: all the same.
    """

    dim: int = -1
    weights: tuple[float, ...] | None = None

    unit: ClassVar[str] = "1 - cosine"

    def check(self, answer: Tensor) -> None:
        """Check for a dimension of entries."""
        super().check(answer)
        if answer.dim() < 2 or not (-answer.dim() <= self.dim < answer.dim()):
            raise self.misfit(answer, f"it has no dimension {self.dim} beside the batch's")

    def combine(self, answers: Sequence[Tensor]) -> Tensor:
        """Return unit vectors, `[n, *]`."""
        weights = weights_of(self.weights, len(answers))
        given = [a.to(torch.promote_types(a.dtype, torch.float32)) for a in answers]
        units = [functional.normalize(a, dim=self.dim) for a in given]
        return functional.normalize(weighted(units, weights), dim=self.dim)

    def distance(self, answer: Tensor, wanted: Tensor) -> Tensor:
        """1 - cosine, mean over the vectors of each input."""
        check_shapes(answer, wanted)
        units = functional.normalize(answer.to(wanted.dtype), dim=self.dim)
        # As a square, since 1 - cosine is lost in rounding where vectors are alike.
        return per_input((units - wanted).square().sum(self.dim) / 2)

    def loss(self, answer: Tensor, wanted: Tensor) -> Tensor:
        """1 - cosine, and the squared error of the similarities between the inputs of the batch.

        The similarities are what embeddings are compared by (Park et al., "Relational knowledge
        distillation", arXiv:1904.05068).
        """
        own = self.distance(answer, wanted).mean()
        if wanted.dim() != 2 or len(wanted) < 2:
            return own
        units = functional.normalize(answer.to(wanted.dtype), dim=self.dim)
        return own + (units @ units.T - wanted @ wanted.T).square().mean()


@dataclass(frozen=True)
class Custom(Task):
    """Your own functions define the ensemble and the distance.

    Attributes:
        combine_by: Function from the outputs of all members, a list of `[n, *]`, to the ensemble's
            output.
        distance_by: Function from an output `[n, *]` and the ensemble's output to the distance of
            each input `[n]`: differentiable, 0 if equal.
    """

    combine_by: Callable[[Sequence[Any]], Any]
    distance_by: Callable[[Any, Any], Tensor]

    unit: ClassVar[str] = "the task's own distance"

    def read(self, output: Any) -> Answer:
        """Return the output as it is."""
        return output

    def exact(self, answer: Answer) -> Answer:
        """Return the answer as it is: the functions know which dtype they take."""
        return answer

    def check(self, answer: Answer) -> None:
        """Accept anything: the functions know."""

    def combine(self, answers: Sequence[Answer]) -> Answer:
        """Return what the user's function returns."""
        return self.combine_by(answers)

    def distance(self, answer: Answer, wanted: Answer) -> Tensor:
        """Return what the user's function returns, checked."""
        found: Any = self.distance_by(answer, wanted)
        if not isinstance(found, Tensor) or found.dim() != 1:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise OptionError(
                f"distance_by returns {shape}, not one number for each input [n]",
                where="task=Custom(...)",
                how="return a tensor [n]: take the mean over all other dimensions",
            )
        checked: Tensor = found
        return checked


@dataclass(frozen=True)
class Outputs(Task):
    """Several outputs, each with a task of its own; outputs that are not named do not count.

    The distance is the mean over the outputs, each relative to how far the members are from the
    ensemble there.

    Attributes:
        tasks: Name of an output → its task: the key of a mapping, the attribute of an object, or
            the place in a tuple, as in `{"0": Classification()}`; dots lead into outputs of
            outputs.
    """

    tasks: Mapping[str, Task]
    _scale: Mapping[str, float] | None = field(default=None, init=False, repr=False, compare=False)

    unit: ClassVar[str] = "relative to a member's distance"

    def __str__(self) -> str:
        """The tasks by name."""
        return "{" + ", ".join(f"{name!r}: {task}" for name, task in self.tasks.items()) + "}"

    def read(self, output: Any) -> dict[str, Answer]:
        """Return the outputs that count, by name."""
        return {name: task.read(_part(output, name)) for name, task in self.tasks.items()}

    def exact(self, answer: Mapping[str, Answer]) -> dict[str, Answer]:
        """Return every output as its task compares it."""
        return {name: task.exact(answer[name]) for name, task in self.tasks.items()}

    def check(self, answer: Mapping[str, Answer]) -> None:
        """Check every output."""
        for name, task in self.tasks.items():
            task.check(answer[name])

    def combine(self, answers: Sequence[Mapping[str, Answer]]) -> dict[str, Answer]:
        """Combine every output by its task."""
        return {
            name: task.combine([answer[name] for answer in answers])
            for name, task in self.tasks.items()
        }

    def target(
        self, answers: Sequence[Mapping[str, Answer]], kwargs: Mapping[str, Any]
    ) -> dict[str, Answer]:
        """Return what the distance of every output is measured to."""
        return {
            name: task.target([answer[name] for answer in answers], kwargs)
            for name, task in self.tasks.items()
        }

    def probe(
        self, answer: Answer, kwargs: Mapping[str, Any], generator: torch.Generator
    ) -> Tensor:
        """The sum over the outputs."""
        each = (task.probe(answer[n], kwargs, generator) for n, task in self.tasks.items())
        return torch.stack(list(each)).sum()

    def prepared(self, wanted: Mapping[str, Answer], members: Sequence[Answer] = ()) -> Task:
        """Return the task with how far the members are from the ensemble in each output."""
        tasks = {name: task.prepared(wanted[name]) for name, task in self.tasks.items()}
        found = Outputs(tasks)
        if len(members) > 1:
            far = {
                name: [float(task.distance(m[name], wanted[name]).mean()) for m in members]
                for name, task in tasks.items()
            }
            scale = {name: max(sum(each) / len(each), 1e-30) for name, each in far.items()}
            object.__setattr__(found, "_scale", scale)
        return found

    def distance(self, answer: Mapping[str, Answer], wanted: Mapping[str, Answer]) -> Tensor:
        """Mean over the outputs."""
        scale = self._scale or {}
        return torch.stack(
            [
                task.distance(answer[name], wanted[name]) / scale.get(name, 1.0)
                for name, task in self.tasks.items()
            ]
        ).mean(0)


def as_task(given: Any) -> Task | None:
    """Return what a caller gave as a task.

    Args:
        given: A task, or a mapping from names of outputs to tasks; None in it ignores the output.

    Raises:
        OptionError: It is neither, or every output is ignored.
    """
    if given is None or isinstance(given, Task):
        return given
    if isinstance(given, Mapping):
        tasks = {str(name): task for name, task in given.items() if task is not None}
        if tasks and all(isinstance(task, Task) for task in tasks.values()):
            return Outputs(tasks)
    raise OptionError(
        f"unknown task {given!r}",
        how="use fxfuse.Classification(), MultiLabel(), Regression(), Embedding(), NextToken() or "
        "Custom(...), or a mapping from names of outputs to such; or leave task out",
    )


def main_output(output: Any) -> Tensor:
    """Return the tensor that a network answers: the only one, or the field or key `logits`."""
    named = named_tensors_in(output)
    # An object of which torch does not know what it holds has the field all the same.
    found = named.get("logits", getattr(output, "logits", None))
    if len(named) == 1:
        (found,) = named.values()
    if isinstance(found, Tensor):
        return found
    raise MemberError(
        f"the network returns a {type(output).__name__}, and it is not clear which part counts",
        where=f"the network's outputs: {', '.join(named) or 'no tensor'}",
        why="the distance to the ensemble needs one tensor, or one that is called `logits`",
        how='say what each output means: task={"name or place": fxfuse.Classification(), ...}',
    )


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Plus and minus one at random, of the shape of a tensor."""
    drawn = torch.randint(2, like.shape, generator=generator)
    return (2 * drawn - 1).to(like.device, like.dtype)


def named_tensors_in(output: Any, kind: type = Tensor) -> dict[str, Any]:
    """Return the tensors in an output, each under the name that `task=` has for it.

    `kind` is what counts as a tensor: in a graph they are nodes.
    """
    return {
        ".".join(str(_step(key)) for key in path): value
        for path, value in pytree.tree_leaves_with_path(output)
        if isinstance(value, kind)
    }


def _step(key: Any) -> Any:
    """Return a key, place or field on the way to a tensor."""
    return next(getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind))


def _part(output: Any, name: str) -> Any:
    """The part of an output that a name leads to."""
    found = output
    for step in name.split("."):
        if isinstance(found, Mapping) and step in found:
            found = found[step]
        elif isinstance(found, (tuple, list)) and step.isdigit() and int(step) < len(found):
            found = found[int(step)]
        elif hasattr(found, step) and not isinstance(found, Tensor):
            found = getattr(found, step)
        else:
            known = (
                ", ".join(map(str, found))
                if isinstance(found, Mapping)
                else f"0 to {len(found) - 1}"
                if isinstance(found, (tuple, list))
                else type(found).__name__
            )
            raise OptionError(
                f"the network has no output {name!r}",
                where=f"task={{{name!r}: ...}}",
                why=f"there is: {known}",
                how="name an output that there is",
            )
    return found


def _like(labels: Tensor, answer: Tensor) -> Tensor:
    """Labels of the shape of the outputs; a last dimension of size one may be missing."""
    if labels.dim() == answer.dim() - 1 and answer.shape[-1] == 1:
        labels = labels.unsqueeze(-1)
    if labels.shape != answer.shape:
        raise InputError(
            f"the labels do not fit: {list(labels.shape)} of {labels.dtype}",
            where="labels of the calibration inputs",
            why=f"the outputs are {list(answer.shape)}",
            how="pass labels of the outputs' shape, or leave them out",
        )
    return labels


def check_shapes(answer: Tensor, wanted: Tensor) -> None:
    """Check that answers can be compared."""
    if answer.shape != wanted.shape:
        raise MemberError(
            "module and members return outputs of different shapes",
            where=f"module {list(answer.shape)}, members {list(wanted.shape)}",
            why="the distance compares them value by value",
            how="use members with the module's classes and output size",
        )


def per_input(values: Tensor) -> Tensor:
    """Return the mean over all but the first dimension."""
    return values.flatten(1).mean(1) if values.dim() > 1 else values


def weights_of(given: Sequence[float] | None, count: int) -> list[float]:
    """Return the members' weights, which sum to one.

    Raises:
        OptionError: They are not one for each member, or not positive.
    """
    if given is None:
        return [1 / count] * count
    if len(given) != count or min(given) < 0 or not sum(given) > 0:
        raise OptionError(
            f"weights={tuple(given)} does not fit {count} members",
            why="it needs one weight for each, none below zero, and some above",
            how="pass as many weights as members, or leave weights out",
        )
    return [weight / sum(given) for weight in given]


def weighted(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted sum of tensors of one shape."""
    total = weights[0] * parts[0]
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        total = total + weight * part
    return total


def check_answers(answer: Answer, name: str) -> None:
    """Check that the answers of a network, called `name` in messages, are finite.

    Raises:
        InputError: They are not.
    """
    if isinstance(answer, Mapping):
        for part in answer.values():
            check_answers(part, name)
    elif isinstance(answer, Tensor) and not bool(answer.isfinite().all()):
        raise InputError(
            f"{name} answers NaN or infinity",
            where="calibration inputs",
            how="check the members' weights and the inputs for such values",
        )
