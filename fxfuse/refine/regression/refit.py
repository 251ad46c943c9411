"""The refit of a fusion result, as users call it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxfuse.refine.fused import Fused, Member, check_joint, measurable
from fxfuse.refine.regression.run import Refit, RefitReport, refit_state
from fxfuse.refine.task import Task, as_task


def refit(
    result: Fused,
    members: Sequence[Member],
    calibration: Any,
    options: Refit | None = None,
    *,
    task: Task | None = None,
) -> RefitReport:
    """Refits a fused network in place, layer by layer, in closed form and without labels.

    Every layer is regressed on its own current input: its targets are the activations that its
    kept units have in the members. A layer that completes a residual sum aims at the sum, so that
    it makes up for earlier errors; targets that the activation behind cuts off are relaxed; behind
    a batch norm the fit is written through the norm. The last layer of a classifier is then fitted
    to the ensemble's probabilities. What cannot be fitted stays as it was transplanted.

    In a partial fusion the trunk's layers aim at all members, and those of head i at what member i
    computes there; the last layer of a classifier, at its probabilities.

    Memory does not grow with the number of inputs: activations of all inputs at one place of the
    graph, for the members and the fused network, as far as they fit into `memory` (what does not is
    in a temporary folder, and the result is the same), those of one batch, and a sample of rows of
    one layer.

    Args:
        result: What `fxfuse.fuse` returned; `result.module` is changed.
        members: The networks that were fused, in the same order.
        calibration: 100 to 1,000 unlabelled inputs from the members' own domain, or a
            `Calibration`.
        options: Ridge, seed and memory.
        task: What the output means; None lets its shape decide.

    Returns:
        The error of every layer before and after, and what was left.

    Raises:
        InputError: The members reject the inputs, or an activation is NaN.
        MemberError: These are not the members that were fused.
        CaptureError: `torch.export` rejected the members, so there is no graph to run.
        OptionError: The members run one by one in the network, so it is their mean already; or the
            task is none.
    """
    task = as_task(task)
    states, batches = measurable(result, members, calibration)
    check_joint(result, "refit")
    module = result.module
    state, report = refit_state(
        result.graph, result.plan, states, module.state_dict(), batches, options or Refit(), task
    )
    module.load_state_dict(state)
    return report
