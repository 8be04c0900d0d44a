"""What a type checker tells users of the public names."""

import re
import textwrap

import pytest
from mypy import api

SNIPPET = """
    from adaptexit import CascadeSaver, MultiExitClassifier, ParetoFrontier, compare, list_cuts, load

    def asked(model: MultiExitClassifier, cascade: CascadeSaver, frontier: ParetoFrontier) -> None:
        reveal_type(model.pareto())
        reveal_type(cascade.pareto())
        reveal_type(frontier.plot())
        reveal_type(frontier.at(budget=0.5))
        reveal_type(frontier.accuracy_at(reduction=0.3))
        reveal_type(load("folder"))
        reveal_type(MultiExitClassifier.load("folder"))
        reveal_type(model.fit([[0.0]], [0]))
        reveal_type(cascade.calibrate([[0.0]], [0]))
        reveal_type(model.at(max_drop=0.01))
        reveal_type(model.trace([[0.0]]))
        reveal_type(model.record([[0.0]]))
        reveal_type(model.latencies([[0.0]]))
        reveal_type(model.outputs_)
        reveal_type(model.stages_)
        reveal_type(model.heads_)
        reveal_type(list_cuts("resnet18"))
"""
TYPES = [
    "core.frontier.ParetoFrontier",
    "core.frontier.ParetoFrontier",
    "displays.curves.ParetoDisplay",
    "core.frontier.OperatingPoint",
    "numpy.ndarray",
    "adaptexit.cascade.CascadeSaver | adaptexit.multi_exit.MultiExitClassifier",
    "multi_exit.MultiExitClassifier",
    "multi_exit.MultiExitClassifier",
    "cascade.CascadeSaver",
    "predictor.Predictor",
    "core.trace.ExitTrace",
    "core.outputs.ExitOutputs",
    "staging.cost.StageLatencies",
    "core.outputs.ExitOutputs",
    "container.ModuleList",
    "container.ModuleList",
    "staging.cut_table.CutTable",
]


def checked(tmp_path, source):
    """What mypy says of a file in its strictest mode."""
    file = tmp_path / "snippet.py"
    file.write_text(textwrap.dedent(source))
    return api.run(["--strict", "--config-file=", "--follow-imports=silent", str(file)])


@pytest.mark.slow
def test_what_users_are_given_has_a_type(tmp_path):
    out, err, status = checked(tmp_path, SNIPPET)
    assert status == 0, out + err
    revealed = re.findall(r'Revealed type is "(.*)"', out)
    assert len(revealed) == len(TYPES)
    for own, expected in zip(revealed, TYPES, strict=True):
        assert expected in own
        assert own != "Any"


@pytest.mark.slow
def test_names_that_cannot_be_are_seen_before_anything_runs(tmp_path):
    out, _, status = checked(
        tmp_path,
        """
        from torch import nn

        from adaptexit import CascadeSaver, MultiExitClassifier, ThresholdCalibrator

        MultiExitClassifier(nn.Identity(), recipe="calexent")
        MultiExitClassifier(nn.Identity(), head="nosuchhead")
        CascadeSaver(nn.Identity(), nn.Identity(), confidence="sure")
        ThresholdCalibrator("sure")
        ThresholdCalibrator(search="nosuchsearch")
        """,
    )
    assert status == 1
    assert [int(line) for line in re.findall(r"snippet\.py:(\d+): error: Argument", out)] == [6, 7, 8, 9, 10]
