"""StageOptimizer: equal to torch.optim over the same members; only what is allowed; groups keep their index."""

from __future__ import annotations

import copy

import pytest
import torch

from gradwire_protocol.errors import OptimizerError
from gradwire_protocol.v1 import graph_pb2, run_pb2
from gradwire_stage.optimizer import ALLOWED, StageOptimizer


def argument(value: object) -> graph_pb2.Argument:
    match value:
        case None:
            return graph_pb2.Argument(none=graph_pb2.Nothing())
        case bool():
            return graph_pb2.Argument(boolean=value)
        case int():
            return graph_pb2.Argument(integer=value)
        case float():
            return graph_pb2.Argument(real=value)
        case str():
            return graph_pb2.Argument(text=value)
        case tuple():
            return graph_pb2.Argument(list=graph_pb2.ArgumentList(items=map(argument, value)))
    raise TypeError(value)


def group(names: list[str], **settings: object) -> run_pb2.OptimizerGroup:
    return run_pb2.OptimizerGroup(
        parameters=names,
        settings=[graph_pb2.NamedArgument(name=name, value=argument(value)) for name, value in settings.items()],
    )


def parameters(*names: str, shape: tuple[int, ...] = (3, 2)) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator)) for name in names}


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_each_class_steps_as_torch_does(name: str) -> None:
    ours, theirs = parameters("a", "b"), parameters("a", "b")
    kind = getattr(torch.optim, name)
    settings = kind(list(theirs.values())).defaults
    stage = StageOptimizer(run_pb2.Optimizer(name=name, groups=[group(["a", "b"], **settings)]), ours)
    reference = kind(list(theirs.values()))
    for step in range(3):
        for tensors in (ours, theirs):
            tensors["a"].grad = torch.full((3, 2), 0.1 * (step + 1), dtype=torch.float64)
            tensors["b"].grad = torch.full((3, 2), -0.2, dtype=torch.float64)
        stage.step()
        reference.step()
    for key in ours:
        assert torch.equal(ours[key], theirs[key])
        assert not torch.equal(ours[key], parameters("a", "b")[key])


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_each_class_goes_on_from_its_state(name: str) -> None:
    kind = getattr(torch.optim, name)
    # With what makes these two keep all that they can.
    settings = kind(list(parameters("a").values())).defaults | ({"momentum": 0.9} if name in ("SGD", "RMSprop") else {})

    def optimizer(tensors: dict[str, torch.nn.Parameter]) -> StageOptimizer:
        return StageOptimizer(run_pb2.Optimizer(name=name, groups=[group(["a", "b"], **settings)]), tensors)

    def step(stage: StageOptimizer, tensors: dict[str, torch.nn.Parameter], seed: int) -> None:
        tensors["a"].grad = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        stage.step()

    whole = parameters("a", "b")
    first = optimizer(whole)
    for seed in range(3):
        step(first, whole, seed)
    # "b" has never had a gradient.
    saved = {key: {state: copy.deepcopy(value) for state, value in first.state_of(key).items()} for key in whole}
    resumed = {key: torch.nn.Parameter(tensor.detach().clone()) for key, tensor in whole.items()}
    second = optimizer(resumed)
    step(second, parameters("a", "b"), 9)
    second.restore({key: state for key, state in saved.items() if state})
    for seed in range(3, 6):
        step(first, whole, seed)
        step(second, resumed, seed)
    assert saved["a"]
    assert torch.equal(whole["a"], resumed["a"])
    # Nothing named: as at the start, also for a class that begins with a state.
    fresh, fresh_tensors = optimizer(parameters("a", "b")), parameters("a", "b")
    fresh.restore({})
    again = optimizer(fresh_tensors)
    assert fresh.state_of("a").keys() == again.state_of("a").keys()


def test_state_that_does_not_fit_is_refused() -> None:
    tensors = parameters("a")
    optimizer = StageOptimizer(run_pb2.Optimizer(name="SGD", groups=[group(["a"], lr=1.0, momentum=0.5)]), tensors)
    with pytest.raises(OptimizerError, match="'b' came"):
        optimizer.restore({"b": {"momentum_buffer": torch.zeros(1)}})
    with pytest.raises(OptimizerError, match="does not fit 'a'"):
        optimizer.restore({"a": {"momentum_buffer": torch.zeros(7)}})
    assert optimizer.state_of("a") == {}


def test_groups_without_members_here_keep_their_index() -> None:
    tensors = parameters("b")
    before = tensors["b"].detach().clone()
    spec = run_pb2.Optimizer(name="SGD", groups=[group(["a"], lr=1.0), group(["b"], lr=0.0), group(["c"], lr=1.0)])
    optimizer = StageOptimizer(spec, tensors)
    tensors["b"].grad = torch.ones(3, 2, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(tensors["b"], before)
    optimizer.set_hyperparameters([group([], lr=7.0), group([], lr=0.5), group([], lr=9.0)])
    optimizer.step()
    assert torch.equal(tensors["b"], before - 0.5)
    with pytest.raises(OptimizerError, match="3 groups"):
        optimizer.set_hyperparameters([group([], lr=1.0)])


def test_parameters_without_gradient_stay_as_they_are() -> None:
    tensors = parameters("a", "b")
    before = tensors["b"].detach().clone()
    optimizer = StageOptimizer(
        run_pb2.Optimizer(name="AdamW", groups=[group(["a", "b"], lr=0.1, weight_decay=0.5, betas=(0.9, 0.99))]),
        tensors,
    )
    tensors["a"].grad = torch.ones(3, 2, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(tensors["b"], before)


def test_a_server_without_any_member_has_nothing_to_do() -> None:
    optimizer = StageOptimizer(run_pb2.Optimizer(name="SGD", groups=[group(["a"], lr=1.0)]), {})
    optimizer.set_hyperparameters([group([], lr=2.0)])
    optimizer.step()


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam", "Optimizer", "lr_scheduler", "__class__", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(OptimizerError, match="cannot run on stage servers"):
        StageOptimizer(run_pb2.Optimizer(name=name), {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.1, "initial_lr": 0.1}, "no setting 'initial_lr'"),
        ({"params": 1.0}, "no setting 'params'"),
        ({"lr": -1.0}, "refuses its settings"),
        ({"lr": 0.1, "nesterov": True}, "refuses its settings"),
        ({"lr": "fast"}, "refuses its settings"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(OptimizerError, match=message):
        StageOptimizer(run_pb2.Optimizer(name="SGD", groups=[group(["a"], **settings)]), parameters("a"))


def test_settings_that_are_no_literals_are_refused() -> None:
    spec = run_pb2.Optimizer(name="SGD", groups=[group(["a"])])
    spec.groups[0].settings.add(name="lr").value.value = "a_node"
    with pytest.raises(OptimizerError, match="'lr'"):
        StageOptimizer(spec, parameters("a"))


def test_a_parameter_in_two_groups_is_refused() -> None:
    spec = run_pb2.Optimizer(name="SGD", groups=[group(["a"], lr=0.1), group(["a"], lr=0.2)])
    with pytest.raises(OptimizerError, match="two groups"):
        StageOptimizer(spec, parameters("a"))
