"""Sampling at boxes: torchvision's operators, by name, since it need not be installed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fxfuse.labels import Value, positions
from fxfuse.rules.algebra import only_unlabelled
from fxfuse.rules.registry import Call, concrete_shape, rule


@rule("torchvision::roi_align", "torchvision::roi_pool")
def roi(call: Call) -> Any:
    """`b c *, k box -> k c *`: channels pass, every box is a sample of its own."""
    x, boxes = call.args[:2]
    call.ledger.touch(x)
    x = only_unlabelled(call.ledger, x, (0, 2, 3), "sampled at boxes: neighbours matter")
    boxes = only_unlabelled(call.ledger, boxes, (0, 1), "the coordinates of a box are in order")
    for f in x.fields:
        call.ledger.mix("an averaged activation is sampled at boxes", ids=f.ids)
    produced = call.node.meta["val"]
    # roi_pool also returns where each maximum was found, channel by channel.
    if isinstance(produced, list | tuple):
        return [_sampled(x, boxes, concrete_shape(fake)) for fake in produced]
    return _sampled(x, boxes, call.shape)


def _sampled(x: Value, boxes: Value, shape: tuple[int, ...]) -> Value:
    sources = None if x.sources is None or boxes.sources is None else x.sources | boxes.sources
    varying = x.unlabelled | {0, 2, 3}
    return replace(
        x, shape=shape, positions=positions(shape, varying), sources=sources, constant=None
    )
