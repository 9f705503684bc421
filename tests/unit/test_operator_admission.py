"""Custom operators on either side of the wire: what a server admits, and which servers a run may have."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gradwire_coordinator.custom_operators import can_run, cannot_run, read_operators
from gradwire_coordinator.model_checks import check_model
from gradwire_coordinator.registry import Registry
from gradwire_protocol.errors import LimitExceeded, ModelError, PlanError, SettingsError
from gradwire_protocol.operators import ALLOWED_OPERATORS, is_custom
from gradwire_protocol.v1 import coordinator_pb2, graph_pb2
from gradwire_stage.custom_operators import described, load_operators
from gradwire_stage.settings import load_stage_settings

NEEDED = {"own.scale.default": "own::scale(Tensor x) -> Tensor", "own.add.default": "own::add(Tensor x) -> Tensor"}
OTHER = {**NEEDED, "own.add.default": "own::add(Tensor x, float y) -> Tensor"}


def test_torch_operators_are_not_custom() -> None:
    assert not any(map(is_custom, ALLOWED_OPERATORS))
    assert not any(is_custom(target) for target in ("aten.set_.source_Tensor", "prims.sin.default", "own", ""))
    assert is_custom("own.scale.default")


def test_the_namespaces_of_torch_are_all_known() -> None:
    # In a process of its own: other tests import libraries that have operators.
    listing = (
        "import torch, torch.export, torch.onnx, torch.distributed.tensor, torch.ao.quantization, torch._inductor\n"
        "print(*{name.partition('::')[0] for name in torch._C._dispatch_get_all_op_names()})"
    )
    shown = subprocess.run([sys.executable, "-W", "ignore", "-c", listing], capture_output=True, text=True, check=True)
    namespaces = shown.stdout.split()
    assert "aten" in namespaces
    assert not [name for name in namespaces if is_custom(f"{name}.operator.default")]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write_module(name: str, text: str) -> str:
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return str(path)

    return write_module


def test_what_a_module_defines_is_admitted(write: Callable[[str, str], str]) -> None:
    module = write(
        "unit_operators_a",
        "import torch\n"
        "library = torch.library.Library('unit_a', 'DEF')\n"
        "library.define('plain(Tensor x) -> Tensor')\n"
        "library.define('plain.variant(Tensor x, int n=2) -> Tensor')\n"
        "library.define('writes(Tensor(a!) x) -> ()')\n"
        "library.define('returns(Tensor(a) x) -> Tensor(a)')\n"
        f"library.define('long(Tensor {'x' * 5000}) -> Tensor')\n"
        "torch.library.Library('aten', 'FRAGMENT').define('unit_a_in_aten(Tensor x) -> Tensor')\n",
    )
    admitted = load_operators([module])
    assert {item.target: item.schema for item in described(admitted)} == {
        "unit_a.plain.default": "unit_a::plain(Tensor x) -> Tensor",
        "unit_a.plain.variant": "unit_a::plain.variant(Tensor x, int n=2) -> Tensor",
    }
    assert admitted["unit_a.plain.variant"] is torch.ops.unit_a.plain.variant
    assert load_operators([]) == {}


def test_what_lies_beside_a_module_stands_in_for_nothing(write: Callable[[str, str], str], tmp_path: Path) -> None:
    write("colorsys", "raise SystemError('the wrong colorsys')")
    module = write(
        "unit_operators_b",
        "import colorsys, torch\n"
        "library = torch.library.Library('unit_b', 'DEF')\n"
        "library.define('plain(Tensor x) -> Tensor')",
    )
    assert list(load_operators([module])) == ["unit_b.plain.default"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("unit_operators_c", "import no_such_module", "No module named 'no_such_module'"),
        ("unit_operators_d", "import torch", "define no operators"),
        ("colorsys", "", "in the way"),
        ("not-a-module", "", "Not a module"),
    ],
)
def test_modules_that_cannot_be_used_are_named(
    write: Callable[[str, str], str], name: str, text: str, message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        load_operators([write(name, text)])
    assert name in str(caught.value)


def test_settings_take_several_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = {"coordinator": "127.0.0.1:1"}
    assert load_stage_settings(flags, None).operators == ()
    file = tmp_path / "stage.toml"
    file.write_text('operators = ["in_file"]')
    assert load_stage_settings(flags, file).operators == ("in_file",)
    monkeypatch.setenv("GRADWIRE_STAGE_OPERATORS", "first, second.inner")
    assert load_stage_settings(flags, file).operators == ("first", "second.inner")
    assert load_stage_settings({**flags, "operators": ["./flag.py"]}, file).operators == ("./flag.py",)


def listed(operators: dict[str, str]) -> list[graph_pb2.CustomOperator]:
    return [graph_pb2.CustomOperator(target=target, schema=schema) for target, schema in operators.items()]


@pytest.mark.parametrize(
    "wrong",
    [
        listed({"aten.add.Tensor": "aten::add() -> ()"}),
        listed({"own.scale.default": ""}),
        listed({"own.scale.default": "x" * 4001}),
        listed({f"own.{'x' * 200}.default": "own::x() -> ()"}),
        listed(NEEDED) + listed(NEEDED),
    ],
)
def test_lists_from_the_wire_are_checked(wrong: list[graph_pb2.CustomOperator]) -> None:
    with pytest.raises(SettingsError, match="Server a"):
        read_operators(wrong, "Server a", SettingsError)
    with pytest.raises(LimitExceeded):
        read_operators(wrong * 1001, "Server a", SettingsError)
    registry = Registry()
    with pytest.raises(SettingsError):
        registry.register(registration("a", wrong))
    assert registry.servers() == []
    with pytest.raises(ModelError, match="The model"):
        read_operators(wrong, "The model", ModelError)


def registration(name: str, operators: list[graph_pb2.CustomOperator]) -> coordinator_pb2.RegisterRequest:
    role = coordinator_pb2.SERVER_ROLE_STAGE
    return coordinator_pb2.RegisterRequest(server=name, role=role, address="127.0.0.1:7000", operators=operators)


def test_a_run_gets_servers_that_have_its_operators() -> None:
    registry = Registry()
    for name, operators in (("none", {}), ("all", NEEDED), ("other", OTHER), ("all too", NEEDED)):
        registry.register(registration(name.replace(" ", "-"), listed(operators)))
    assert [server.server for server in registry.reserve("run", 2, NEEDED)] == ["all", "all-too"]
    registry.release("run")
    with pytest.raises(ModelError, match=r"own\.scale\.default is not known to stage server none"):
        registry.reserve("run", 3, NEEDED)
    with pytest.raises(PlanError):
        registry.reserve("run", 5, NEEDED)
    assert not any(server.run for server in registry.servers())
    assert [server.server for server in registry.reserve("run", 2)] == ["none", "all"]
    with pytest.raises(ModelError, match=r"own\.add\.default has another schema on stage server other") as caught:
        registry.reserve("another", 2, NEEDED)
    assert (caught.value.expected, caught.value.got) == (NEEDED["own.add.default"], OTHER["own.add.default"])


def test_many_servers_are_counted() -> None:
    error = cannot_run(NEEDED, [(f"server-{number}", {}) for number in range(20)])
    assert "server-7 and 12 more" in error.message
    assert can_run(OTHER, {})
    assert not can_run(OTHER, NEEDED)


def test_a_graph_with_an_operator_that_is_not_listed_is_refused() -> None:
    node = graph_pb2.Node(name="a", target="own.scale.default", output=graph_pb2.ValueSpec(kind=1, data_type=1))
    graphs = [graph_pb2.Graph(kind=kind, nodes=[node], outputs=[graph_pb2.GraphOutput(value="a")]) for kind in (1, 2)]
    model = graph_pb2.Model(train=graphs[0], evaluate=graphs[1], loss_form=graph_pb2.LOSS_FORM_MEAN_OVER_ROWS)
    with pytest.raises(ModelError, match="does not list"):
        check_model(model)
    model.operators.extend(listed(NEEDED))
    assert check_model(model).operators == NEEDED
