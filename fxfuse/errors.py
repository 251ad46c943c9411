"""Exceptions of fxfuse: each says what went wrong, where, why, and how to fix it."""

from __future__ import annotations


class FxfuseError(Exception):
    """Base of every error that fxfuse raises on purpose.

    Args:
        what: What went wrong: a short clause without a full stop.
        where: The graph node and source line, parameter, file or option concerned.
        why: The reason, in terms of what the program needs.
        how: What the caller can do about it, beginning with an imperative.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", how: str = "") -> None:
        super().__init__(what, where, why, how)
        self.what = what
        self.where = where
        self.why = why
        self.how = how

    def __str__(self) -> str:
        lines = [self.what]
        for label, text in (("where", self.where), ("why", self.why), ("how to fix", self.how)):
            if text:
                lines.append(f"  {label}: {text}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the keyword arguments when the error crosses a process boundary."""
        return (_rebuild, (type(self), self.what, self.where, self.why, self.how))


def _rebuild(kind: type[FxfuseError], what: str, where: str, why: str, how: str) -> FxfuseError:
    return kind(what, where=where, why=why, how=how)


class OptionError(FxfuseError):
    """An option names nothing in the network, has an unusable value, or contradicts another one.

    Fix: Use names of `model.state_dict()`, a value that the message lists, or drop one of the
    options.
    """


class MemberError(FxfuseError):
    """Members are too few, differ, hold unusable weights or outputs, or failed in another process.

    Fix: Pass two or more trained networks that were built with the same arguments, dtype and
    device, with finite dense weights on a real device; `fxfuse.prune` takes one network.
    """


class InputError(FxfuseError):
    """Example inputs, calibration inputs or labels do not fit the network or the method.

    Fix: Pass inputs that the network accepts, with a batch of at least 2; a method or score that
    measures activations needs `calibration=`, and some scores need labels.
    """


class CaptureError(FxfuseError):
    """A network cannot be captured as a graph, or was captured without one that can run elsewhere.

    Fix: Rewrite what `torch.export` rejects, or pass inputs that reach all parameters; where only
    the weights were fused, `result.to_module()` needs no graph.
    """


class RuleError(FxfuseError):
    """An operator rule is registered twice, or returns labels that cannot be right.

    Fix: Correct the rule; docs/how-to/add-an-operator.md says what it must return.
    """


class PlanError(FxfuseError):
    """A plan is damaged, was made for other members, or has nothing to fuse.

    Fix: Make the plan again with these members; `fxfuse.analyze(model)` says what is frozen and
    why.
    """


class RewriteError(FxfuseError):
    """A network cannot be written at this size, in this form, or in the user's own class.

    Fix: Use `result.module`, another size, or follow the message.
    """


class CompileError(FxfuseError):
    """A backend cannot compile or write the network, or what it made answers differently.

    Fix: Use another backend, or `fxfuse.compile`, which falls back to eager with `strict=False`.
    """


class VerificationError(FxfuseError):
    """An oracle failed: the network is not returned.

    Fix: Report it with the network. `verify=False` returns the network all the same.
    """


class CheckpointError(FxfuseError):
    """A checkpoint or result folder is missing, damaged, pickled, or does not fit the network.

    Fix: Write weights with `safetensors.torch.save_file`, or `torch.save(model.state_dict(), ...)`;
    use the model that they were trained with.
    """


class OutputError(FxfuseError):
    """An output exists already, or another process is writing it.

    Fix: Choose another folder, or pass `force=True` (`--force`) to replace an earlier result.
    """


class RefineError(FxfuseError):
    """Training diverged, or has no parameter to train.

    Fix: Lower the learning rate, or call `module.requires_grad_(True)`.
    """


class MissingDependencyError(FxfuseError, ImportError):
    """An optional package is not installed.

    Fix: Install the extra that the message names.
    """
