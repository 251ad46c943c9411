"""What `print` and a notebook show: at most ten lines, no index arrays, no path of this machine."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

import fxfuse
from fxfuse import Heads
from fxfuse.common.readable import Description, Readable
from fxfuse.errors import RewriteError
from fxfuse.graph.source_lines import source_of
from fxfuse.verify import Check, Verification
from tests.nets import SmallResNet, images, resnets
from tests.options import flat


def steady(shown: object) -> str:
    """The text without what differs between machines: errors of an oracle, numbers of lines."""
    text = re.sub(r"\.py:\d+", ".py:1", f"{shown}")
    return re.sub(r"error \d\S*(?= \(at most 1e-09)", "error 1e-15", text)


def rounded(shown: object) -> str:
    """The text without the digits in which machines differ."""
    return re.sub(r"\d\.\d+(e-\d+)?", "0.1", f"{shown}")


def transformer(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5).eval()
    nn.init.normal_(model.heads.head.weight)
    return model


@pytest.fixture(scope="module")
def frozen() -> fxfuse.FusionResult:
    options = {"freeze": ["stem.*"], "base_member": 1, "width": 0.5}
    return fxfuse.fuse(resnets(2), images(), **flat(**options))


@pytest.fixture(scope="module")
def wide() -> fxfuse.FusionResult:
    torch.manual_seed(0)
    return fxfuse.fuse([transformer(0), transformer(1)], torch.randn(2, 3, 32, 32), size=2)


def test_plans(frozen: fxfuse.FusionResult, wide: fxfuse.FusionResult) -> None:
    assert_expected_inline(
        f"{frozen.plan}",
        """\
Fusion plan: 2 members by transplant (score l2)
  units        8 in 2 groups: 4 from member 0, 4 from member 1
  tensors      9 fused, 18 kept from member 1, 5 copied
  constraints  freeze=['stem.*'], base_member=1""",
    )
    assert_expected_inline(
        steady(wide.plan),
        """\
Fusion plan: 2 members by concatenate
  units    168 in 5 groups: 84 from member 0, 84 from member 1
  tensors  22 fused, 10 one for each member
  mixing   5 one by one: layer_norm (torchvision/models/vision_transformer.py:1) and 4 more""",
    )
    torch.manual_seed(0)
    heads = fxfuse.fuse(
        [SmallResNet(), SmallResNet(classes=5)], images(), verify=False, heads=Heads(["fc"])
    )
    assert_expected_inline(
        f"{heads.plan}",
        """\
Fusion plan: 2 members by transplant (score l2)
  units    24 in 3 groups: 13 from member 0, 11 from member 1
  tensors  25 fused, 5 copied, 4 in heads
  heads    fc; output: tuple""",
    )


def test_modules_that_are_left_out() -> None:
    """Those of which training only makes use, and those whose answer nobody reads."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
            self.aux = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))])
            self.unread = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(x).relu()
            self.unread(x)
            return self.aux[0](x) if self.training else self.last(x)

    members, x = [Deep().eval() for _ in range(2)], torch.randn(2, 4)
    result = fxfuse.fuse(members, x, size=0.5)
    assert (
        "kept    as in member 0, since the forward pass does not use them: aux, unread\n"
        in f"{result}"
    )
    assert torch.equal(result.state_dict()["aux.0.0.weight"], members[0].aux[0][0].weight)
    with pytest.raises(RewriteError, match="no output depends on aux, unread"):
        result.to_module()
    assert "kept    as they were" in f"{fxfuse.prune(members[1], x, size=0.5)}"


def test_graphs(frozen: fxfuse.FusionResult, wide: fxfuse.FusionResult) -> None:
    assert_expected_inline(
        f"{frozen.graph}",
        """\
Coupling graph of SmallResNet: 2 groups, 88.6% of the weights are free
  groups       block1.conv1.weight:0 (8 units), block2.conv1.weight:0 (8 units)
  frozen       21 dimensions: asked for: freeze=stem.*
  constraints  freeze=['stem.*'], base_member=1""",
    )
    assert_expected_inline(
        steady(wide.graph),
        """\
Coupling graph of VisionTransformer: 5 groups, 99.9% of the weights are free
  groups  class_token:2 (16 units) and 4 more
  mixing  layer_norm (torchvision/models/vision_transformer.py:1) and 4 more""",
    )

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
            self.second, self.other = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x).cumsum(-1)) + self.other(self.second(x).relu())

    assert_expected_inline(
        steady(fxfuse.analyze(Summed(), torch.randn(2, 4))),
        """\
Coupling graph of Summed: 1 group, 47.8% of the weights are free
  groups  second.weight:0 (8 units)
  frozen  3 dimensions (tests/test_readable.py:1): the operator goes along this dimension in order""",  # noqa: E501
    )


def test_verifications(wide: fxfuse.FusionResult) -> None:
    assert_expected_inline(
        steady(wide.verification),
        """\
Verification: all 4 checks passed
  permutation           error 1e-15 (at most 1e-09 passes); 5 groups, 99.94% of the weights ...
  output shape          error 0 (at most 0 passes); (2, 5)
  finite outputs        error 0 (at most 0 passes); 0 values are not finite
  wide equals ensemble  error 1e-15 (at most 1e-09 passes); no operator mixes members""",
    )
    failed = Check("permutation", 0.25, 1e-9, False, "3 groups")
    mixed = Check("wide equals ensemble", 0.5, float("inf"), True, "mixing: layer_norm")
    assert_expected_inline(
        f"{Verification((failed, mixed))}",
        """\
Verification: FAILED: permutation
  permutation           FAILED: error 0.25 (at most 1e-09 passes); 3 groups
  wide equals ensemble  error 0.5 (any passes); mixing: layer_norm""",
    )
    assert_expected_inline(f"{Verification()}", """Verification: no check ran""")


def test_results(frozen: fxfuse.FusionResult, wide: fxfuse.FusionResult) -> None:
    assert_expected_inline(
        f"{frozen}",
        """\
2 members of SmallResNet (2,636 parameters) fused into one network (1,468 parameters)
  method  transplant (score l2)
  checks  all 3 checks passed
  note    This is a raw transplant, most likely at chance level: no layer was fitted to the members.
  next    pass calibration=..., 100 to 1,000 inputs, to refit it and match it""",
    )
    assert_expected_inline(
        f"{wide}",
        """\
2 members of VisionTransformer (7,941 parameters) fused into one network (24,069 parameters)
  method  concatenate
  checks  all 4 checks passed
  next    use result.module, or keep it with fxfuse.save(result, folder)""",
    )
    torch.manual_seed(0)
    members, inputs = resnets(2), images(100)
    refitted = fxfuse.fuse(members, images(), calibration=inputs, refine=[fxfuse.Refit()])
    assert_expected_inline(
        rounded(refitted),
        """\
2 members of SmallResNet (2,636 parameters) fused into one network (2,636 parameters)
  method  transplant (score obs, start refitted)
  refit   5 of 6 layers fitted on 70 inputs, median error from 0.1 to 0.1 of the variance, ...
  judged  refitted is returned, judged on 15 inputs that no fit has seen (KL in nats)
  task    Classification(): the output [b, 4] is that of a layer; task= says otherwise
  checks  all 3 checks passed
  next    use result.module, or keep it with fxfuse.save(result, folder)""",
    )
    steps = [fxfuse.Refit(), fxfuse.Match(steps=2)]
    matched = fxfuse.fuse(members, images(), calibration=inputs, refine=steps)
    assert_expected_inline(
        rounded(matched),
        """\
2 members of SmallResNet (2,636 parameters) fused into one network (2,636 parameters)
  method  transplant (score obs, start refitted)
  refit   5 of 6 layers fitted on 70 inputs, median error from 0.1 to 0.1 of the variance, ...
  judged  matched from refitted is returned, judged on 15 inputs that no fit has seen (KL in nats)
  task    Classification(): the output [b, 4] is that of a layer; task= says otherwise
  checks  all 3 checks passed
  next    use result.module, or keep it with fxfuse.save(result, folder)""",
    )
    small = fxfuse.prune(resnets(1)[0], images(), size=0.5)
    assert_expected_inline(
        f"{small}",
        """\
SmallResNet (2,636 parameters) pruned to 744 parameters
  method  transplant (score l2)
  checks  all 3 checks passed
  note    This network is pruned and not refitted: it is most likely far less accurate than before.
  next    pass calibration=..., 100 to 1,000 inputs, to refit it and match it""",
    )


def test_notebooks_get_a_table(frozen: fxfuse.FusionResult) -> None:
    for shown in (frozen, frozen.plan, frozen.graph, frozen.verification):
        html = shown._repr_html_()
        assert html.count("<tr>") <= 9
        assert html.count("<tr>") == html.count("</tr>") > 0
    assert "freeze=[&#x27;stem.*&#x27;]" in frozen.plan._repr_html_()


def test_no_more_than_ten_lines_of_no_more_than_100_letters() -> None:
    class Long(Readable):
        def described(self) -> Description:
            rows = {f"row {i}": [f"item {j}" for j in range(50)] for i in range(20)}
            return "Title", rows | {"row 0": "word " * 100, "row 1": "", "row 2": ()}

    lines = f"{Long()}".splitlines()
    assert len(lines) == 10
    assert max(map(len, lines)) <= 100
    assert lines[1].endswith("word ...")
    assert lines[2].startswith("  row 3  item 0, item 1")
    assert lines[2].endswith(" more")
    assert lines[-1].startswith("  ...    and 10 more: row 10, row 11")


def test_lines_are_named_as_python_imports_them(
    wide: fxfuse.FusionResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [note.source for note in wide.plan.mixing.notes]
    assert {s.partition(":")[0] for s in sources} == {"torchvision/models/vision_transformer.py"}
    assert re.fullmatch(r"\S+:\d+  x = self.ln_1\(input\)", sources[0])
    node = next(n for n in wide.graph.program.graph.nodes if source_of(n) == sources[0])
    # A file of no folder that modules are imported from has its whole path.
    monkeypatch.setattr(sys, "path", [])
    assert source_of(node).startswith("/")
