"""The refit of a fusion result, as users call it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxfuse.activations import MEMORY
from fxfuse.refine.fused import Fused, Member, check_joint, measurable
from fxfuse.refine.outputs import kind_of_network
from fxfuse.refine.regression.run import RefitReport, Settings, refit_state


def refit(
    result: Fused,
    members: Sequence[Member],
    inputs: Any,
    *,
    alpha: float | None = None,
    outputs: str | None = None,
    seed: int = 0,
    memory: int = MEMORY,
    limit: int = 1000,
    copies: int = 0,
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
        inputs: 100 to 1,000 unlabelled inputs from the members' own domain: a tensor [n, ...], a
            tuple or mapping of tensors, or an iterable of batches.
        alpha: Ridge of the regressions, relative to the mean square of a feature; None: 1e-3, or
            1e-2 with fewer than 100 inputs.
        outputs: `logits` or `values`; None lets the output's shape decide.
        seed: Decides which rows of large layers are taken.
        memory: Bytes of activations that stay in memory.
        limit: So many inputs are taken at most, in a random order that is always the same.
        copies: So many augmented copies of each input are looked at as well: of images and signals,
            by `shift_and_mix`.

    Returns:
        The error of every layer before and after, and what was left.

    Raises:
        InputError: The members reject the inputs, or an activation is NaN.
        MemberError: These are not the members that were fused.
        CaptureError: `torch.export` rejected the members, so there is no graph to run.
        OptionError: The members run one by one in the network, so it is their mean already.
    """
    states, calibration = measurable(result, members, inputs, limit, copies)
    check_joint(result, "refit")
    logits = kind_of_network(result.graph.program, outputs) == "logits"
    module = result.module
    settings = Settings(alpha, logits, seed, memory)
    state, report = refit_state(
        result.graph, result.plan, states, module.state_dict(), calibration, settings
    )
    module.load_state_dict(state)
    return report
