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
    """Fewer than two members were given.

    Mend: Give two or more trained networks of one architecture; `fxfuse.prune` takes one.
    """


class ControlError(FxfuseError):
    """An option names nothing in the network, or contradicts another one.

    Mend: Use names of `model.state_dict()`, or leave one of the two options out.
    """


class WidthError(FxfuseError):
    """A width that no network can have, a budget that cannot be met, or a group cut to nothing.

    Mend: Use a width in (0, N], or a budget that the message says can be met.
    """


class PartialFusionError(FxfuseError):
    """Heads cannot be kept apart from the trunk, or a partial fusion cannot do what was asked.

    Mend: Name other head modules, or leave out what needs members with one head.
    """


class MemberMismatchError(FxfuseError):
    """Members differ in graph, parameter names, shapes, dtypes or constants.

    Mend: Build all members with the same arguments, dtype and device.
    """


class NonFiniteWeightsError(FxfuseError):
    """A member holds NaN or infinite weights.

    Mend: Leave the member out, or take an earlier checkpoint of it.
    """


class NoWeightsError(FxfuseError):
    """A network is on the meta device: it can be analysed, but there is nothing to run or fuse.

    Mend: Load the weights; a template with tables of its own is built on the CPU.
    """


class UnsupportedTensorError(FxfuseError):
    """A model holds weights that are sparse, quantised or no tensors at all.

    Mend: Fuse dense floating-point networks, and convert the result.
    """


class ExampleInputError(FxfuseError):
    """The example inputs are no good, or the model rejects them.

    Mend: Pass inputs with which the model itself runs, batch dimension included.
    """


class CaptureError(FxfuseError):
    """torch.export cannot capture the model, nor can a trace of it replace that.

    Mend: Write the forward pass without data-dependent Python, or export it yourself.
    """


class NotEmittedError(FxfuseError):
    """There is no GraphModule to run: torch.export refused the network.

    Mend: Use `to_module()` or `load_into(model)`, or make the forward pass exportable.
    """


class NoOwnModuleError(FxfuseError):
    """There is no module of the user's own class to put the fused weights into.

    Mend: Use `result.module`, or build your model and call `result.load_into(model)`.
    """


class UnreachedParametersError(FxfuseError):
    """The trace of a network that torch.export refuses did not reach some of its tensors.

    Mend: Pass an example that reaches these tensors, or name them in `ignore=`.
    """


class UnknownMethodError(FxfuseError):
    """No fusion method of this name is registered.

    Mend: Use one of the methods that the message lists.
    """


class UnknownScoreError(FxfuseError):
    """No importance score of this name is registered.

    Mend: Use one of the scores that the message lists.
    """


class BatchSizeError(FxfuseError):
    """An input holds another number of examples than the network was captured with.

    Mend: Pass as many at a time as the example held, or capture with `dynamic_shapes`.
    """


class CalibrationError(FxfuseError):
    """Calibration inputs or labels are missing or no good, or an activation on them is NaN.

    Mend: Pass 100 to 1,000 inputs of the members' own domain, with labels where asked.
    """


class DataError(FxfuseError):
    """Data for calibration or evaluation cannot be read, or have no labels where some are needed.

    Mend: Name a source that the message lists, with as many labels as inputs.
    """


class UnknownTensorError(FxfuseError):
    """A (tensor name, dimension) that the captured network does not have.

    Mend: Use a name of `model.state_dict()` and one of its dimensions.
    """


class NothingToFuseError(FxfuseError):
    """No parameter has a free dimension, so there is nothing to fuse.

    Mend: Look at `fxfuse.analyze(...).frozen`; an operator can get a rule.
    """


class VerificationError(FxfuseError):
    """An oracle failed: the fused network would be wrong, so it is not handed over.

    Mend: Please report the network; the message names the group and its operators.
    """


class PlanError(FxfuseError):
    """A fusion plan is malformed, was edited, or does not belong to this network.

    Mend: Use the plan as `to_json()` wrote it, or make it again.
    """


class PlanMismatchError(PlanError):
    """A fusion plan was made for other members than the ones given.

    Mend: Give the networks that were fused, in that order, or make a new plan.
    """


class RewriteError(FxfuseError):
    """A graph cannot be rewritten at another width.

    Mend: Leave the width out, or give the group that the message names its own size.
    """


class PassError(FxfuseError):
    """A pass was given a graph that it is not for, or left one that is not what it promises.

    Mend: Apply `fxfuse.compile.EvalForm` first.
    """


class CompileError(FxfuseError):
    """A network cannot be compiled, packaged or exported in the way that was asked for.

    Mend: Leave `strict` out, or do what the message says about the compiler or the path.
    """


class StackError(FxfuseError):
    """A stack cannot reduce its members' outputs as asked, or a module is no stack.

    Mend: Use `reduce='none'`, or pass what `fxfuse.stack` returned.
    """


class RuleError(FxfuseError):
    """An operator rule contradicts the operator that it describes.

    Mend: Mend the rule, or choose another name for it.
    """


class CheckpointMissingError(FxfuseError):
    """A checkpoint file does not exist.

    Mend: Check the path and its permissions.
    """


class CheckpointCorruptError(FxfuseError):
    """A checkpoint file is truncated or not in a format that fxfuse reads.

    Mend: Copy or download the file again, or save it in a format that is read.
    """


class CheckpointPickleError(FxfuseError):
    """A checkpoint holds pickled objects other than tensors; fxfuse never unpickles.

    Mend: Where you trust the file, load it yourself and save its `state_dict()`.
    """


class CheckpointMismatchError(FxfuseError):
    """A checkpoint does not fit the model that it is loaded into.

    Mend: Give the model the arguments that it was trained with.
    """


class ModelFactoryError(FxfuseError):
    """The model factory of the command line cannot be imported or called.

    Mend: Check the name, `package.module:factory`, and its arguments.
    """


class OutputExistsError(FxfuseError):
    """The output exists already and may not be overwritten.

    Mend: Add `--force`, or choose another name.
    """


class OutputBusyError(FxfuseError):
    """Another process is writing the same output.

    Mend: Wait until it is done, or choose another name.
    """


class RecipeError(FxfuseError):
    """A recipe cannot be read, asks for what there is not, or its members have changed.

    Mend: Change the line that the message names; `fxfuse recipe --example` shows all fields.
    """


class SavedError(FxfuseError):
    """A folder holds no fused network, or one that is not what was written.

    Mend: Name the folder of `fxfuse fuse` or `fxfuse.save`, or write it again.
    """


class RankError(FxfuseError):
    """Another rank failed while members were fused over ranks, with an error that is not fxfuse's.

    Mend: See what that process printed, and start all of them again.
    """


class RefineError(FxfuseError):
    """A fine-tuning or distillation run cannot go on.

    Mend: Check the batches, the budget and the learning rate.
    """


class MissingDependencyError(FxfuseError):
    """An optional dependency is needed for what was asked.

    Mend: Install the extra that the message names.
    """
