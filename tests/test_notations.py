"""What each notation of a layer plan means, that what is printed is read back, and what bad spellings say."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat import notations
from jaxchat.layer_plan import LayerPlan, PlanError, Slot
from tests.test_layer_plan import plans


def layers(spec, num_layers=12):
    plan = LayerPlan.parse(spec, num_layers)
    assert all(slot.is_plain for slot in plan)
    return [slot.layer for slot in plan]


def error_of(spec, num_layers=12):
    with pytest.raises(PlanError) as caught:
        LayerPlan.parse(spec, num_layers)
    return str(caught.value)


# --- meaning


def test_a_rys_pair_repeats_layers_i_to_j_minus_1():
    assert layers("(4,8)") == [*range(8), *range(4, 12)]
    assert layers(" ( 4 , 8 ) ") == layers("(4,8)")


def test_rys_xlarge_is_qwen2_72b_with_seven_layers_repeated():
    assert len(layers("(45,52)", 80)) == 87


def test_the_rys_pair_0_0_is_the_model_as_it_is():
    assert layers("(0,0)") == list(range(12))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        # RYS's own two examples, over eight layers
        ("blocks:3,6", [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]),
        ("blocks:3,6;4,6", [0, 1, 2, 3, 4, 5, 3, 4, 5, 4, 5, 6, 7]),
        ("blocks: 5,6 ; 2,3", [0, 1, 2, 2, 3, 4, 5, 5, 6, 7]),
        ("blocks:1,2;1,2", [0, 1, 1, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_rys_blocks_are_inserted_after_the_last_time_their_last_layer_runs(spec, expected):
    assert layers(spec, 8) == expected


def test_exllamav2_ranges_run_one_after_the_other_and_the_last_on_to_the_end():
    assert layers("[(0,8),(4,12)]") == [*range(8), *range(4, 12)]
    assert layers("[ (0, 2),\t(0, 2), ]", 4) == [0, 1, 0, 1, 2, 3]
    assert layers("[(3,5)]", 6) == [3, 4, 5]
    venus = "[(0,20),(10,30),(20,40),(30,50),(40,60),(50,70),(60,79)]"
    assert layers(venus, 80) == [*layers(venus, 79), 79]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("layers:0, 1,1", [0, 1, 1]), ("0..3,2,3,4..5", [0, 1, 2, 3, 2, 3, 4, 5]), ("7..7", [7])],
)
def test_rys_lists_and_circuit_finder_ranges(spec, expected):
    assert layers(spec) == expected


def test_a_file_holds_any_notation_over_any_number_of_lines(tmp_path):
    file = tmp_path / "plan.txt"
    for text in ("0:3,\r\n  5:7  # then two\n\n", "# a RYS repeat\n(4,8)\n", "[\n [1, 0.5, 1.0],\n 2\n]"):
        file.write_bytes(text.encode())
        one_line = " ".join(line.split("#")[0] for line in text.splitlines())
        assert LayerPlan.parse(f"@{file}", 12) == LayerPlan.parse(one_line, 12)


# --- printing


@st.composite
def repeats(draw):
    """Plans of RYS blocks: what the notation can say, with the text that says it."""
    count = draw(st.integers(1, 9))
    pairs = st.tuples(st.integers(0, count - 1), st.integers(1, count)).filter(lambda pair: pair[0] < pair[1])
    blocks = draw(st.lists(pairs, min_size=1, max_size=5))
    return LayerPlan.parse("blocks:" + ";".join(f"{i},{j}" for i, j in blocks), count)


@given(plans(), st.sampled_from(["spec", "json"]))
def test_every_plan_printed_as_spec_or_json_parses_to_itself(plan, kind):
    assert LayerPlan.parse(plan.to_notation(kind), plan.num_layers) == plan


@given(plans(scales=st.just(1.0)))
def test_every_plan_without_scales_that_ends_with_the_last_layer_printed_as_ranges_parses_to_itself(plan):
    if plan.slots[-1].layer == plan.num_layers - 1:
        assert LayerPlan.parse(plan.to_notation("exllama"), plan.num_layers) == plan
    else:
        with pytest.raises(
            PlanError, match=r"exllamav2 ranges run on to the last layer, .*; write it as spec"
        ):
            plan.to_notation("exllama")


@given(repeats())
def test_every_repeat_printed_as_rys_parses_to_itself(plan):
    assert LayerPlan.parse(plan.to_notation("rys"), plan.num_layers) == plan


@given(plans(scales=st.just(1.0)))
def test_a_plan_is_printed_as_rys_exactly_if_blocks_can_say_it(plan):
    order = [slot.layer for slot in plan]
    steps = itertools.pairwise(order)
    sayable = (order[0], order[-1]) == (0, plan.num_layers - 1) and all(b <= a + 1 for a, b in steps)
    if sayable:
        assert LayerPlan.parse(plan.to_notation("rys"), plan.num_layers) == plan
    else:
        with pytest.raises(PlanError, match="not a RYS repeat"):
            plan.to_notation("rys")


@given(plans(), st.sampled_from(notations.KINDS))
def test_a_plan_in_a_file_is_the_plan(tmp_path_factory, plan, kind):
    try:
        text = plan.to_notation(kind)
    except PlanError:
        return
    file = tmp_path_factory.getbasetemp() / "plan.txt"
    file.write_text(text + "\n")
    assert LayerPlan.parse(f"@{file}", plan.num_layers) == plan


@pytest.mark.parametrize(
    ("spec", "kind", "printed"),
    [
        ("0:8,4:", "rys", "(4,8)"),
        ("all", "rys", "(0,0)"),
        ("0:8,4:12,8:", "rys", "blocks:4,8;8,12"),
        ("0:8,4:12,8:", "exllama", "[(0,8),(4,12),(8,16)]"),
        ("2,1,15", "exllama", "[(2,3),(1,2),(15,16)]"),
        ("(4,8)", "spec", "0:8,4:16"),
        ("[[2, 0.5, 1], 3]", "json", "[[2, 0.5, 1.0], 3]"),
        ("0:2", "json", "[0, 1]"),
    ],
)
def test_conversions(spec, kind, printed):
    assert LayerPlan.parse(spec, 16).to_notation(kind) == printed


@pytest.mark.parametrize(
    ("plan", "kind", "problem"),
    [
        ("0:8", "rys", "the plan runs from layer 0 to 7, a repeat from 0 to 15"),
        ("0:8,9:", "rys", "goes from layer 7 to 9, a repeat leaves no layer out"),
        ("[[0, 0.5, 1]]", "rys", "RYS blocks cannot say scales, and slot 0 .layer 0. has 0.5 and 1"),
        ("[0, [3, 0, 0]]", "exllama", "exllamav2 ranges cannot say scales, and slot 1 .layer 3. has 0 and 0"),
        ("all", "yaml", "no notation is called 'yaml': expected one of spec, json, rys, exllama"),
    ],
)
def test_what_a_notation_cannot_say_is_an_error(plan, kind, problem):
    with pytest.raises(PlanError, match=problem):
        LayerPlan.parse(plan, 16).to_notation(kind)


def test_scales_survive_json_to_the_last_bit():
    plan = LayerPlan((Slot(0, 0.1, 1e-30), Slot(1, -3.3e38, 2**0.5)), 2)
    assert json.loads(plan.to_notation("json")) == [[0, 0.1, 1e-30], [1, -3.3e38, 2**0.5]]


# --- errors


@pytest.mark.parametrize(
    ("spec", "problem", "underline"),
    [
        ("(8,4)", "'(8,4)' is reversed: expected 0 <= i < j <= 12", "^~~~~"),
        ("(4,4)", "'(4,4)' is empty", "^~~~~"),
        ("(-4,4)", "'(-4,4)' has a negative end", "^~~~~~"),
        ("(4,13)", "'(4,13)' is out of range: the model has 12 layers", "^~~~~~"),
        ("(4;8)", "cannot read the RYS repeat: expected (i,j), e.g. (4,8)", "^~~~~"),
        ("(4,8) 9", "text after the list of the layer plan: expected nothing after ')'", "      ^"),
        (
            "(0,2),(2,4)",
            "more than one pair: expected [(0,2),(2,4)] for ranges that run one after the other, or "
            "blocks:0,2;2,4 for blocks that run twice",
            "     ^~~~~~",
        ),
        ("blocks:4,8;9", "cannot read '9' in the RYS blocks: expected i,j", "           ^"),
        ("blocks:4,8;", "cannot read '' in the RYS blocks", "           ^"),
        ("blocks:4,8;3,1", "'3,1' is reversed", "           ^~~"),
        ("[(0,8),(9,4)]", "'(9,4)' is reversed: expected 0 <= start < stop <= 12", "       ^~~~~"),
        ("[(0,8),(4,99)]", "'(4,99)' is out of range", "       ^~~~~~"),
        ("[(0,8) (4,5)]", "cannot read the list of ranges here: expected ',' or ']'", "       ^"),
        ("[(0,8),[4,5]]", "cannot read the list of ranges here: expected (start,stop)", "       ^"),
        ("[(0,8)", "cannot read the list of ranges here", "      ^"),
        ("[(0,8)],4", "text after the list of the layer plan: expected nothing after ']'", "       ^~"),
        ("[[0,20],[10,30]]", "a slot has 2 values, '[0,20]'", " ^~~~~~"),
        ("[[0, 1.0, 1.0, 1.0]]", "a slot has 4 values", " ^~~~~~~~~~~~~~~~~~"),
        ("0,5..2", "'5..2' is reversed: expected first..last in 0..11", "  ^~~~"),
        ("0,5..12", "'5..12' is out of range", "  ^~~~~"),
        ("layers:0,x", "cannot read 'x' in the layer plan", "         ^"),
    ],
)
def test_a_malformed_plan_is_underlined(spec, problem, underline):
    first, shown, carets = error_of(spec).split("\n")
    assert first.startswith(problem)
    assert (shown, carets) == (spec, underline)


def test_an_error_in_a_file_says_file_line_and_column(tmp_path):
    file = tmp_path / "plan.txt"
    file.write_text("# mine\n0:3,\n 4, 99, # too far\n5\n")
    assert error_of(f"@{file}").split("\n") == [
        f"{file}:3:5: layer 99 is out of range: the model has 12 layers, expected -12 to 11",
        " 4, 99, # too far",
        "    ^~",
    ]


def test_an_entry_that_spans_lines_is_underlined_where_it_begins(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text("[0,\n [99,\n 1.0, 1.0]]")
    assert error_of(f"@{file}").split("\n")[1:] == [" [99,", " ^~~~"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "plan.txt:1:1: the layer plan is empty"),
        (b"# nothing but this\n", "plan.txt:1:1: the layer plan is empty"),
        (b"\xff", "not UTF-8 text: byte 0xff at offset 0"),
        (b"@other.txt", "plan.txt:1:1: a plan in a file cannot name another file"),
        (b"slices:\n- sources: []\n", "is a mergekit recipe, not a layer plan: give it with recipe="),
        (b" " * (2 << 20), "more than 1 MiB"),
    ],
)
def test_a_file_that_holds_no_plan(tmp_path, data, problem):
    (tmp_path / "plan.txt").write_bytes(data)
    assert problem in error_of(f"@{tmp_path / 'plan.txt'}")


@pytest.mark.parametrize("name", ["nowhere.txt", "", ".", "a\0b"])
def test_a_file_that_cannot_be_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert "expected" in error_of(f"@{name}").split("\n")[0]
