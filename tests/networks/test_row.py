import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from adaptexit import ThresholdCalibrator
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.routing import accepts
from adaptexit.networks.models import build_model
from adaptexit.networks.readers import LogitsReader
from adaptexit.networks.row import Row
from adaptexit.staging.cost import measure_latency
from adaptexit.staging.executor import execute, record
from adaptexit.staging.nested import take
from tests.contract.cases import fitted_once
from tests.nets import (
    Columns,
    Recording,
    branched_model,
    branched_trained,
    digits,
    leaving_above,
    middle_trained,
    small_trained,
)

VAL, TEST = digits()[1:]
SMALL, MIDDLE = 4 * 9 * 16 + 64 * 10, 8 * 9 * 64 + 128 * 10
CUTOFFS = [0.6, 0.7, 0.6, np.inf, 0.9, -np.inf]


def whole(net, label):
    return build_model(net, None, label)


def branched():
    """Exits on a frozen model, whose last is the model itself."""
    return copy.copy(branched_model()._network)


def row(last=None, **kwargs):
    """Two whole models before a branched one."""
    networks = [whole(small_trained(), "small"), whole(middle_trained(), "middle"), last or branched()]
    return Row(networks, reader=LogitsReader("max_proba"), **kwargs)


def batches(X, size=50):
    return torch.from_numpy(X).split(size)


# -- running it -------------------------------------------------------------------------------------------------------


def test_it_is_a_network_of_all_exits():
    joined = row()
    assert joined.n_exits == len(joined.stages) == len(joined.heads) == 6
    assert joined.exit_names == ["small", "middle", "one", "two", "three", "full model"]
    assert row(exit_names="abcdef").exit_names == list("abcdef")
    assert isinstance(joined.heads[0], nn.Sequential)
    assert list(joined.heads)[2:] == list(branched().heads)
    assert not joined.chained
    assert row(fitted_once("ztw")._network).chained
    assert set(joined.modules) >= {joined.heads[0], joined.heads[1]}


def by_hand(x, cutoffs):
    """Class and exit of one sample, part after part; the parts behind that at which it leaves are not asked."""
    for k, net in enumerate((small_trained(), middle_trained())):
        logits = net(x)
        if float(logits.softmax(1).max()) > cutoffs[k]:
            return int(logits.argmax()), k
    part = branched()
    carried = part.prepare(x)
    for k in range(4):
        carried = part.stage(k, carried)
        output, carried = part.exit(k, carried)
        if k == 3 or (cutoffs[k + 2] < np.inf and float(output.logits.softmax(1).max()) > cutoffs[k + 2]):
            return int(output.logits.argmax()), k + 2
    raise AssertionError("the last exit answers for everybody")


def test_running_it_is_running_its_parts_by_hand():
    X = TEST[0][:200]
    answer = execute(row(), batches(X), leaving_above(CUTOFFS), batch_size=32)
    with torch.inference_mode():
        expected = [by_hand(x[None], CUTOFFS) for x in torch.from_numpy(X)]
    assert list(zip(answer.predictions.tolist(), answer.exits.tolist(), strict=True)) == expected
    assert set(answer.exits.tolist()) == {0, 1, 2, 4, 5}


def test_only_survivors_go_on():
    nets = [Recording(small_trained()), Recording(middle_trained())]
    part, entered = branched(), []
    joined = Row([whole(nets[0], "small"), whole(nets[1], "middle"), part], reader=LogitsReader("max_proba"))
    prepare = part.prepare
    part.prepare = lambda x: (entered.append(len(x)), prepare(x))[1]
    exits = execute(joined, batches(TEST[0]), leaving_above(CUTOFFS), batch_size=64).exits
    reach = [int((exits >= k).sum()) for k in range(6)]
    assert reach[0] > reach[1] > reach[2] > 0
    assert [sum(net.sizes) for net in nets] == reach[:2]
    assert sum(entered) == reach[2]
    assert nets[1].sizes[:-1] == [64] * (len(nets[1].sizes) - 1)


def test_networks_that_are_off_are_passed_by():
    nets = [Recording(small_trained()), Recording(middle_trained())]
    joined = Row([whole(nets[0], "small"), whole(nets[1], "middle"), branched()], reader=LogitsReader("max_proba"))
    cutoffs = [np.inf, 0.7, np.inf, np.inf, 0.9, -np.inf]
    exits = execute(joined, batches(TEST[0]), leaving_above(cutoffs), batch_size=64).exits
    assert nets[0].sizes == []
    assert sum(nets[1].sizes) == len(TEST[0])
    assert set(exits.tolist()) == {1, 4, 5}
    last_alone = execute(joined, batches(TEST[0]), leaving_above([np.inf] * 5 + [-np.inf]), batch_size=64)
    assert sum(nets[1].sizes) == len(TEST[0])
    assert last_alone.predictions.tolist() == branched_trained()(torch.from_numpy(TEST[0])).argmax(1).tolist()


def test_the_inputs_are_carried_for_survivors_alone_and_not_in_the_last_network():
    joined, x = row(), torch.from_numpy(TEST[0][:10])
    with torch.inference_mode():
        carried = joined.stage(0, joined.prepare(x))
        _, onward = joined.exit(0, carried)
        assert onward[0] is x
        assert onward[1] is None
        survivors = take(onward, np.array([2, 5, 7]))
        assert torch.equal(survivors[0], x[[2, 5, 7]])
        _, onward = joined.exit(1, joined.stage(1, survivors))
        assert torch.equal(onward[0], x[[2, 5, 7]])
        for k in range(2, 6):
            carried = joined.stage(k, onward)
            assert carried[0] is None
            _, onward = joined.exit(k, carried)
            assert onward[0] is None


def test_what_is_recorded_is_what_each_part_says():
    answers = record(row(), batches(TEST[0]), logits=True, features=True)
    branches = record(branched(), batches(TEST[0]), logits=True, features=True)
    x = torch.from_numpy(TEST[0])
    with torch.inference_mode():
        for answer, net in zip(answers, (small_trained(), middle_trained()), strict=False):
            np.testing.assert_allclose(answer.logits, net(x), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(answer.features, net[:-1](x), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(answers[2:], branches, strict=True):
        assert ours.logits.tobytes() == theirs.logits.tobytes()
        assert ours.features is theirs.features is None or ours.features.tobytes() == theirs.features.tobytes()


def test_calibrated_it_leaves_online_as_offline():
    joined, labels = row(), VAL[1]
    costs = joined.costs(torch.from_numpy(VAL[0][:1]))
    outputs = ExitOutputs.from_answers(record(joined, batches(VAL[0])), labels, 10, costs)
    calibrator = ThresholdCalibrator(search="geometric").fit(outputs)
    for point in calibrator.frontier_.points[::15]:
        policy = calibrator.policy(point=point)
        answer = execute(joined, batches(VAL[0]), policy, batch_size=64)
        assert answer.exits.tolist() == calibrator.exit_index(outputs, point).tolist()
        assert policy.path_costs[answer.exits].mean() / policy.full_cost == pytest.approx(point.cost)


def test_heads_that_read_earlier_ones_do_so_behind_other_networks():
    part = copy.copy(fitted_once("ztw")._network)
    joined = row(part)
    alone, together = record(part, batches(TEST[0])), record(joined, batches(TEST[0]))
    for ours, theirs in zip(together[2:], alone, strict=True):
        assert ours.predictions.tolist() == theirs.predictions.tolist()
    cutoffs = [0.6, np.inf, 0.5, 0.5, -np.inf]
    exits = execute(joined, batches(TEST[0]), leaving_above(cutoffs), batch_size=32).exits
    leaves = [accepts(a.predictions, a.scores, c) for a, c in zip(together, cutoffs, strict=True)]
    assert exits.tolist() == np.argmax(leaves, axis=0).tolist()


@pytest.mark.parametrize("inner", [lambda: row(), lambda: native_row()])
def test_a_row_of_networks_is_a_network(inner):
    first = whole(small_trained(), "first")
    nested, joined = Row([first, inner()], reader=LogitsReader("max_proba")), inner()
    assert nested.exit_names == ["first", *joined.exit_names]
    flat = Row([first, *joined.networks], reader=LogitsReader("max_proba"))
    costs, flat_costs = (network.costs(torch.from_numpy(TEST[0][:1])) for network in (nested, flat))
    assert costs.stages.tolist() == flat_costs.stages.tolist()
    assert costs.exits.tolist() == flat_costs.exits.tolist()
    cutoffs = [*[0.5, *CUTOFFS][: nested.n_exits - 1], -np.inf]
    ours, theirs = (execute(n, batches(TEST[0]), leaving_above(cutoffs), batch_size=50) for n in (nested, flat))
    assert ours.exits.tolist() == theirs.exits.tolist()
    assert ours.predictions.tolist() == theirs.predictions.tolist()
    alone = np.arange(1.0, nested.n_exits + 1)
    assert nested.costs(None, alone).stages.tolist() == flat.costs(None, alone).stages.tolist()


def native_row():
    return Row([whole(middle_trained(), "middle"), copy.copy(fitted_once("native")._network)])


# -- costs ------------------------------------------------------------------------------------------------------------


def test_macs_of_whole_models_are_paid_where_they_are_on_and_stages_by_all():
    joined, x = row(), torch.from_numpy(TEST[0][:3])
    costs, branches = joined.costs(x), branched().costs(x)
    assert costs.unit == "MACs"
    assert costs.stages.tolist() == [0, 0, *branches.stages]
    assert costs.exits.tolist() == [SMALL, MIDDLE, *branches.exits]
    assert costs.full == branches.full
    assert joined.countable


def test_given_costs_are_split_as_each_part_splits_its_own():
    costs = row().costs(torch.from_numpy(TEST[0][:3]), [5, 4, 1, 3, 9, 10])
    assert costs.unit == "given"
    assert costs.stages.tolist() == [0, 0, 1, 2, 6, 1]
    assert costs.exits.tolist() == [5, 4, 0, 0, 0, 0]
    assert costs.alone().tolist() == [5, 4, 1, 3, 9, 10]
    with pytest.raises(ValueError, match=r"cost must not fall from exit to exit.*got \[3.0, 1.0, 9.0, 10.0\]"):
        row().costs(torch.from_numpy(TEST[0][:3]), [5, 4, 3, 1, 9, 10])
    with pytest.raises(
        ValueError, match=r"cost must be 6 positive numbers.*\(small, middle, one, two, three, full model\)"
    ):
        row().costs(torch.from_numpy(TEST[0][:3]), [1, 2, 3])


def test_seconds_of_every_part(monkeypatch):
    monkeypatch.setattr("adaptexit.networks.base.measure_latency", partial(measure_latency, min_seconds=0.002))
    costs = row().costs(torch.from_numpy(TEST[0][:64]), "latency")
    assert costs.unit == "seconds"
    assert (costs.alone() > 0).all()
    assert costs.stages[:2].tolist() == [0, 0]
    measured = row().latencies(torch.from_numpy(TEST[0][:4]), (1, 8))
    assert measured.stage_s.shape == measured.exit_s.shape == (6, 2)
    assert ((measured.stage_s + measured.exit_s) > 0).all()


def test_a_part_without_macs_is_named():
    joined = Row([whole(Columns(0), "first"), whole(nn.Linear(6, 3), "last")])
    with pytest.raises(ValueError, match=r"cost='macs' found no multiply-accumulates in first\. Use cost='latency'"):
        joined.costs(torch.zeros(1, 6), "macs")


# -- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [branched, lambda: copy.copy(fitted_once("native")._network)])
def test_several_exits_before_the_last_network_are_refused(several):
    joined = several()
    names = ".*".join(joined.exit_names)
    with pytest.raises(
        ValueError, match=f"networks before the last must have one exit each; got one with the exits .*{names}"
    ):
        Row([joined, whole(small_trained(), "last")])


def test_what_is_written_are_all_parts():
    described, tensors = row().get_state()
    assert len(described["models"]) == 3
    assert described["models"][2]["cuts"] == ["one", "two", "three"]
    for i, net in enumerate((small_trained(), middle_trained())):
        for key, value in net.state_dict().items():
            assert torch.equal(tensors[f"models.{i}.{key}"], value)
    assert {name.split(".")[1] for name in tensors} == {"0", "1", "2"}


def test_a_row_of_one_is_that_network():
    joined, net = Row([branched()], reader=LogitsReader("max_proba")), branched()
    for ours, theirs in zip(record(joined, batches(TEST[0])), record(net, batches(TEST[0])), strict=True):
        assert ours.scores.tobytes() == theirs.scores.tobytes()
