"""What a layer plan means, how it prints, and what every wrong spelling says."""

import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxchat.errors import UsageError
from jaxchat.layer_plan import LayerPlan, PlanError, Slot

SELF_MERGE = "0:8,4:12,8:16,12:20,16:24,20:28,24:32"  # chatllm.cpp's LLaMA-3 8B -> 13.3B

FLOAT32_MAX = float(np.finfo(np.float32).max)
SCALES = st.floats(-FLOAT32_MAX, FLOAT32_MAX)
POWERS_OF_TWO = st.sampled_from(
    [0.0, 0.5, 1.0, -2.0]
)  # exact under multiplication, so that it is associative
ENDS = st.none() | st.integers(-20, 20)


def layers(spec, num_layers=32):
    return [slot.layer for slot in LayerPlan.parse(spec, num_layers)]


@st.composite
def plans(draw, num_layers=None, scales=SCALES):
    count = num_layers or draw(st.integers(1, 12))
    plain = st.builds(Slot, st.integers(0, count - 1))
    scaled = st.builds(Slot, st.integers(0, count - 1), scales, scales)
    entries = plain if draw(st.booleans()) else scaled
    return LayerPlan(tuple(draw(st.lists(entries, min_size=1, max_size=12))), count)


@st.composite
def nested_plans(draw, depth):
    """Plans, outermost first, each over the slots of the next."""
    chain = [draw(plans(scales=POWERS_OF_TWO))]
    for _ in range(depth - 1):
        chain.insert(0, draw(plans(num_layers=len(chain[0]), scales=POWERS_OF_TWO)))
    return chain


# --- meaning


def test_self_merge_of_32_layers_has_56_slots():
    merged = [layer for start in range(0, 28, 4) for layer in range(start, start + 8)]
    assert layers(SELF_MERGE) == merged
    assert len(merged) == 56


def test_pruning_example_keeps_27_of_32_layers():
    assert layers("0:10,10:20:2,20:") == [*range(10), 10, 12, 14, 16, 18, *range(20, 32)]


@given(ENDS, ENDS, ENDS.filter(lambda step: step != 0), st.integers(1, 12))
def test_a_slice_selects_what_python_selects(start, stop, step, num_layers):
    expected = list(range(num_layers))[start:stop:step]
    assume(expected)
    shown = ["" if end is None else str(end) for end in (start, stop, step)]
    assert layers(":".join(shown), num_layers) == expected
    if step is None:
        assert layers(":".join(shown[:2]), num_layers) == expected


@given(st.integers(-6, 5))
def test_an_integer_selects_what_python_indexes(index):
    assert layers(str(index), 6) == [list(range(6))[index]]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", [0, 1, 2, 3]),
        (" all , 0", [0, 1, 2, 3, 0]),
        ("\t3 ,\n+1", [3, 1]),
        (" 0 : 4 : 2 ", [0, 2]),
        ("[3, -1, 0]", [3, 3, 0]),
    ],
)
def test_all_and_blanks_and_lists(spec, expected):
    assert layers(spec, 4) == expected


def test_a_list_carries_scales():
    plan = LayerPlan.parse("[0, 1, [31, 0.0, 0.0], [2, 1, 0.5]]", 32)
    assert list(plan) == [Slot(0), Slot(1), Slot(31, 0.0, 0.0), Slot(2, 1.0, 0.5)]


# chatllm.cpp accepts each of these silently with another meaning (or loads half a model, then throws).
@pytest.mark.parametrize(
    ("spec", "expected"),
    [("::-1", [3, 2, 1, 0]), ("-1", [3]), ("2:99", [2, 3]), ("2::-1", [2, 1, 0]), ("-9:2", [0, 1])],
)
def test_what_chatllm_gets_wrong_is_right_here(spec, expected):
    assert layers(spec, 4) == expected


@pytest.mark.parametrize(
    "spec",
    ["", "0,,1", "0,", ",0", "0-3", "x", "1x", "0x1", "1.0", "0:4:0", "3:3", "0:4:1:9", "4", "-5", "all:"],
)
def test_what_chatllm_ignores_is_an_error_here(spec):
    with pytest.raises(PlanError):
        LayerPlan.parse(spec, 4)


# --- printing


@given(plans())
def test_a_printed_plan_parses_to_itself(plan):
    parsed = LayerPlan.parse(str(plan), plan.num_layers)
    assert parsed == plan
    assert hash(parsed) == hash(plan)
    assert str(parsed) == str(plan)


@pytest.mark.parametrize(
    ("spec", "printed"),
    [
        ("0:32", "all"),
        (SELF_MERGE, SELF_MERGE),
        ("0,1,2,5,5,9,8,7,4,3", "0:3,5,5,9:6:-1,4,3"),
        ("::-1", "31::-1"),
        ("::2", "0:31:2"),
        ("[0, 1, 2]", "0:3"),
        ("[-1,[0,1,0.1]]", "[31, [0, 1.0, 0.1]]"),
    ],
)
def test_plans_print_compactly(spec, printed):
    assert str(LayerPlan.parse(spec, 32)) == printed


def test_a_scaled_plan_prints_as_json():
    assert json.loads(str(LayerPlan((Slot(0), Slot(1, 0.1, 1e-30)), 2))) == [0, [1, 0.1, 1e-30]]


# --- composition


@given(nested_plans(3))
def test_composition_is_associative(chain):
    outer, middle, inner = chain
    assert outer(middle)(inner) == outer(middle(inner))


@given(plans())
def test_the_identity_plan_is_neutral(plan):
    assert LayerPlan.identity(len(plan))(plan) == plan
    assert plan(LayerPlan.identity(plan.num_layers)) == plan


def test_composition_picks_slots_and_multiplies_scales():
    inner = LayerPlan((Slot(7, 0.5, 1.0), Slot(3)), 8)
    outer = LayerPlan((Slot(1), Slot(0, 0.5, 0.25)), 2)
    assert outer.compose(inner) == LayerPlan((Slot(3), Slot(7, 0.25, 0.25)), 8)


def test_select_counts_the_slots_of_a_plan():
    assert LayerPlan.parse("[5, [6, 0.5, 1]]", 8).select("1,::-1") == LayerPlan.parse(
        "[[6, 0.5, 1], [6, 0.5, 1], 5]", 8
    )


def test_composition_of_plans_that_do_not_fit_is_an_error():
    with pytest.raises(PlanError, match="outer layer plan is for 4 slots but the inner one has 2"):
        LayerPlan.identity(4)(LayerPlan.identity(2))


# --- execution


def test_identity_slots_are_counted_but_not_executed():
    plan = LayerPlan.parse("[0, [1, 0, 0], [2, 0, 1], [3, 1, 0]]", 4)
    assert len(plan) == 4
    assert plan.executed() == (Slot(0), Slot(2, 0.0, 1.0), Slot(3, 1.0, 0.0))


def test_a_plan_may_execute_nothing():
    arrays = LayerPlan((Slot(0, 0.0, 0.0),), 1).arrays(2)
    assert arrays.length == 0
    np.testing.assert_array_equal(arrays.attn_scale, [0.0, 0.0])


def test_arrays_are_padded_to_capacity():
    arrays = LayerPlan.parse("[3, [1, 0, 0], [2, 0.5, 1]]", 4).arrays(4)
    np.testing.assert_array_equal(arrays.layer, [3, 2, 0, 0])
    np.testing.assert_array_equal(arrays.attn_scale, [1.0, 0.5, 0.0, 0.0])
    np.testing.assert_array_equal(arrays.mlp_scale, [1.0, 1.0, 0.0, 0.0])
    assert arrays.length == 2
    assert arrays.length.shape == ()
    assert [a.dtype.name for a in arrays] == ["int32", "float32", "float32", "int32"]


def test_more_slots_than_capacity_is_an_error_that_says_how_many():
    with pytest.raises(PlanError, match=r"executes 56 slots but there is room for 40.*at least 56"):
        LayerPlan.parse(SELF_MERGE, 32).arrays(40)


# --- errors


@pytest.mark.parametrize(
    ("spec", "problem", "underline"),
    [
        ("", "the layer plan is empty", "^"),
        ("0,,2", "empty item in the layer plan", "  ^"),
        ("0,1,", "empty item in the layer plan", "    ^"),
        ("0,   ,2", "empty item in the layer plan", "  ^~~"),
        ("0, 0-3", "cannot read '0-3' in the layer plan", "   ^~~"),
        ("1, 2 3", "cannot read '2 3' in the layer plan", "   ^~~"),
        ("0, 1:x:2", "cannot read 'x' in the slice", "     ^"),
        ("1:2: 3 : 45", "too many fields in the slice", "         ^~"),
        ("1,0:8: 00", "the step of a slice cannot be 0", "       ^~"),
        ("1, 5:5 ,2", "'5:5' selects no layer: expected a slice of 0..31", "   ^~~"),
        ("8:4", "'8:4' selects no layer", "^~~"),
        ("1,32", "layer 32 is out of range: the model has 32 layers, expected -32 to 31", "  ^~"),
        ("-33", "layer -33 is out of range", "^~~"),
        ("[]", "cannot read the list of the layer plan here", " ^"),
        ("[1, 2", "cannot read the list of the layer plan here: expected ',' or ']'", "     ^"),
        ("[1, 2,]", "cannot read the list of the layer plan here", "      ^"),
        ("[1, [2, 3]]", "a slot has 2 values, '[2, 3]': expected an integer or [layer,", "    ^~~~~~"),
        ("[1, true]", "cannot read 'true' in the layer plan", "    ^~~~"),
        ("[1, [2, true, 0]]", "cannot read '[2, true, 0]' in the layer plan", "    ^~~~~~~~~~~~"),
        ("[1, 2.0]", "cannot read '2.0' in the layer plan", "    ^~~"),
        ("[1, 40]", "layer 40 is out of range", "    ^~"),
        ("[[1, NaN, 0]]", "a scale is not finite", " ^~~~~~~~~~~"),
        ("[[1, 1e39, 0]]", "a scale is not finite", " ^~~~~~~~~~~~"),
        (" [1] 2 ", "text after the list of the layer plan", "     ^"),
    ],
)
def test_a_malformed_spec_is_underlined(spec, problem, underline):
    with pytest.raises(PlanError) as caught:
        LayerPlan.parse(spec, 32)
    first, shown, carets = str(caught.value).split("\n")
    assert first.startswith(problem)
    assert shown == spec
    assert carets == underline


def test_a_spec_cannot_smuggle_control_characters_into_the_terminal():
    with pytest.raises(PlanError) as caught:
        LayerPlan.parse("0,\x1b[31mx\n", 4)
    assert str(caught.value).split("\n")[1:] == ["0, [31mx ", "  ^~~~~~"]


@pytest.mark.parametrize("spec", ["[" * 100_000, "9" * 5000, "[" + "9" * 5000 + "]"])
def test_absurd_specs_are_plan_errors(spec):
    with pytest.raises(PlanError):
        LayerPlan.parse(spec, 4)


@pytest.mark.parametrize(
    ("slots", "num_layers", "problem"),
    [
        ((), 4, "has no slot"),
        ((Slot(4),), 4, "slot 0 of the layer plan uses layer 4: expected 0 to 3"),
        ((Slot(0), Slot(-1)), 4, "slot 1 of the layer plan uses layer -1"),
        ((Slot(0, float("nan")),), 4, "slot 0 of the layer plan has attn_scale nan"),
        ((Slot(0, 1.0, float("inf")),), 4, "mlp_scale inf"),
        ((Slot(0),), 0, "expected num_layers >= 1, got 0"),
    ],
)
def test_a_plan_built_by_hand_is_checked(slots, num_layers, problem):
    with pytest.raises(PlanError, match=problem):
        LayerPlan(slots, num_layers)


def test_plan_errors_are_usage_errors():
    assert issubclass(PlanError, UsageError)
