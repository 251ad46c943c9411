"""Exceptions of fxfuse: each says what went wrong, where, why, and how to mend it."""

from __future__ import annotations


class FxfuseError(Exception):
    """Base of every error that fxfuse raises on purpose.

    Args:
        what: One sentence: what went wrong.
        where: The graph node and source line, parameter, file or option concerned.
        why: The reason, in terms of what the program needs.
        how: What the caller can do about it.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", how: str = "") -> None:
        super().__init__(what, where, why, how)
        self.what = what
        self.where = where
        self.why = why
        self.how = how

    def __str__(self) -> str:
        lines = [self.what]
        for label, text in (("where", self.where), ("why", self.why), ("how to mend", self.how)):
            if text:
                lines.append(f"  {label}: {text}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the keyword arguments when the error crosses a process boundary."""
        return (_rebuild, (type(self), self.what, self.where, self.why, self.how))


def _rebuild(kind: type[FxfuseError], what: str, where: str, why: str, how: str) -> FxfuseError:
    return kind(what, where=where, why=why, how=how)


class TooFewMembersError(FxfuseError):
    """Fewer than two members were given."""


class ControlError(FxfuseError):
    """An option names nothing in the network, or contradicts another one."""


class WidthError(FxfuseError):
    """A width that no network can have, a budget that cannot be met, or a group cut to nothing."""


class PartialFusionError(FxfuseError):
    """Heads cannot be kept apart from the trunk, or a partial fusion cannot do what was asked."""


class MemberMismatchError(FxfuseError):
    """Members differ in graph, parameter names, shapes, dtypes or constants."""


class NonFiniteWeightsError(FxfuseError):
    """A member holds NaN or infinite weights."""


class NoWeightsError(FxfuseError):
    """A network is on the meta device: it can be analysed, but there is nothing to run or fuse."""


class UnsupportedTensorError(FxfuseError):
    """A model holds weights that are sparse, quantised or no tensors at all."""


class ExampleInputError(FxfuseError):
    """The example inputs are no good, or the model rejects them."""


class CaptureError(FxfuseError):
    """torch.export cannot capture the model, nor can a trace of it replace that."""


class NotEmittedError(FxfuseError):
    """There is no GraphModule to run: torch.export refused the network."""


class NoOwnModuleError(FxfuseError):
    """There is no module of the user's own class to put the fused weights into."""


class UnreachedParametersError(FxfuseError):
    """The trace of a network that torch.export refuses did not reach some of its tensors."""


class UnknownMethodError(FxfuseError):
    """No fusion method of this name is registered."""


class UnknownScoreError(FxfuseError):
    """No importance score of this name is registered."""


class CalibrationError(FxfuseError):
    """Calibration inputs or labels are missing or no good, or an activation on them is NaN."""


class UnknownTensorError(FxfuseError):
    """A (tensor name, dimension) that the captured network does not have."""


class NothingToFuseError(FxfuseError):
    """No parameter has a free dimension, so there is nothing to fuse."""


class VerificationError(FxfuseError):
    """An oracle failed: the fused network would be wrong, so it is not handed over."""


class PlanError(FxfuseError):
    """A fusion plan is malformed, was edited, or does not belong to this network."""


class PlanMismatchError(PlanError):
    """A fusion plan was made for other members than the ones given."""


class RewriteError(FxfuseError):
    """A graph cannot be rewritten at another width."""


class PassError(FxfuseError):
    """A pass was given a graph that it is not for, or left one that is not what it promises."""


class CompileError(FxfuseError):
    """A network cannot be compiled, packaged or exported in the way that was asked for."""


class StackError(FxfuseError):
    """A stack cannot reduce its members' outputs as asked, or a module is no stack."""


class RuleError(FxfuseError):
    """An operator rule contradicts the operator that it describes."""


class CheckpointMissingError(FxfuseError):
    """A checkpoint file does not exist."""


class CheckpointCorruptError(FxfuseError):
    """A checkpoint file is truncated or not in a format that fxfuse reads."""


class CheckpointPickleError(FxfuseError):
    """A checkpoint holds pickled objects other than tensors; fxfuse never unpickles."""


class CheckpointMismatchError(FxfuseError):
    """A checkpoint does not fit the model that it is loaded into."""


class ModelFactoryError(FxfuseError):
    """The model factory of the command line cannot be imported or called."""


class OutputExistsError(FxfuseError):
    """The output exists already and may not be overwritten."""


class RefineError(FxfuseError):
    """A fine-tuning or distillation run cannot go on."""


class MissingDependencyError(FxfuseError):
    """An optional dependency is needed for what was asked."""
