"""Order and selection of stages."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.graph import Selection, Stage, lazy, make_plan, order_stages

ALL = ["target", "calibrate", "quantize", "export"]


def plan_of(stages: list[Stage], **selection: Any) -> tuple[list[str], set[str]]:
    plan = make_plan(stages, Selection(**selection))
    return [stage.instance for stage in plan.stages], set(plan.forced)


def test_inputs_come_first_whatever_the_order_given(bench: Any) -> None:
    assert [stage.instance for stage in order_stages(reversed(bench.chain()))] == ALL


def test_nothing_asked_means_everything_and_nothing_forced(bench: Any) -> None:
    assert plan_of(bench.chain()) == (ALL, set())


def test_a_named_stage_brings_its_inputs_and_nothing_after_it(bench: Any) -> None:
    assert plan_of(bench.chain(), stage=("quantize",)) == (ALL[:3], set())


def test_from_stage_forces_it_and_what_depends_on_it(bench: Any) -> None:
    chain = [*bench.chain(), bench.stage("aside")]
    assert plan_of(chain, from_stage="calibrate") == ([*ALL, "aside"], set(ALL[1:]))


def test_force_forces_the_named_ones_only(bench: Any) -> None:
    assert plan_of(bench.chain(), force=("target", "export"))[1] == {"target", "export"}


def test_a_name_stands_for_all_its_instances_and_an_instance_for_itself(bench: Any) -> None:
    stages = [bench.stage("quantize-rtn"), bench.stage("quantize-gptq")]
    assert plan_of(stages, force=("quantize",))[1] == {"quantize-rtn", "quantize-gptq"}
    assert plan_of(stages, stage=("quantize-gptq",))[0] == ["quantize-gptq"]


@pytest.mark.parametrize("selection", [{"stage": ("nope",)}, {"force": ("nope",)}, {"from_stage": "nope"}])
def test_an_unknown_name_lists_the_valid_ones(bench: Any, selection: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"=nope: no such stage; choose from target, calibrate, quantize, export$"):
        make_plan(bench.chain(), Selection(**selection))


@pytest.mark.parametrize("forcing", [{"force": ("export",)}, {"from_stage": "export"}])
def test_forcing_a_stage_that_the_selection_leaves_out_is_refused(bench: Any, forcing: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="names export, which stage=quantize leaves out"):
        make_plan(bench.chain(), Selection(stage=("quantize",), **forcing))


def test_two_stages_of_one_name_are_refused(bench: Any) -> None:
    with pytest.raises(ValueError, match="two stages are called target"):
        order_stages([bench.stage("target"), bench.stage("target", text="other")])


def test_a_lazy_callable_imports_when_called() -> None:
    assert lazy("os.path:basename")("a/b") == "b"
    missing = lazy("no_such_module:build")
    with pytest.raises(ModuleNotFoundError):
        missing(None)


def test_a_name_that_is_an_instance_stands_for_that_one_alone(bench):
    stages = [bench.stage("quantize"), bench.stage("quantize-rtn")]
    assert plan_of(stages, force=("quantize",))[1] == {"quantize"}
