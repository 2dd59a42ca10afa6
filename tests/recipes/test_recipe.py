"""What a mergekit recipe becomes: sources, plan, scaled copies, notes; and what every bad recipe says."""

import json
import re
import textwrap

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxchat.checkpoints.assembly import LayerSource
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families import count_parameters, parameter_table
from jaxchat.layer_plan import LayerPlan, PlanError, Slot
from jaxchat.recipes.recipe import RecipeError, read_recipe, source_plan, to_mergekit
from tests.support.tiny import TINY_CONFIGS
from tests.test_layer_plan import plans

OPENCHAT = {
    "model_type": "mistral",
    "vocab_size": 32002,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
ONE_MODEL = """
slices:
  - sources:
      - model: a
        layer_range: [0, 8]
        {source}
    {slice}
merge_method: passthrough
{recipe}
"""


@pytest.fixture
def models(tmp_path):
    """`models(name, model_type, ...)`: a directory beside the recipe that holds a `config.json` only."""

    def write(name, model_type="llama", **changes):
        defaults = {"n_layer": 8} if model_type == "gpt2" else {"num_hidden_layers": 8, "layer_types": None}
        config = {"model_type": model_type, **TINY_CONFIGS[model_type], **defaults, **changes}
        config = {key: value for key, value in config.items() if value is not None}
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return tmp_path / name

    return write


@pytest.fixture
def read(tmp_path):
    """`read(text, ...)`: what `read_recipe` makes of a file with that text."""

    def run(text, *arguments, **options):
        (tmp_path / "recipe.yml").write_text(text)
        return read_recipe(tmp_path / "recipe.yml", *arguments, **options)

    return run


@pytest.fixture
def scaled(read, models):
    """`scaled(scale at source, at slice, in the recipe)`: over the eight layers of one Llama, called a."""

    def run(source=None, slice_=None, recipe=None, model_type="llama", **changes):
        models("a", model_type, **changes)
        levels = {
            name: "" if scale is None else f"parameters: {{scale: {scale}}}"
            for name, scale in (("source", source), ("slice", slice_), ("recipe", recipe))
        }
        text = ONE_MODEL
        for name, value in levels.items():
            text = text.replace(f"{{{name}}}", value)
        return read(text)

    return run


def sources(*slices):
    """A recipe of (model, first, stop) slices."""
    items = [f"- sources: [{{model: {m}, layer_range: [{i}, {j}]}}]" for m, i, j in slices]
    return "\n".join(["merge_method: passthrough", "slices:", *items]) + "\n"


def error_of(function, *arguments, **options):
    with pytest.raises(JaxchatError) as caught:
        function(*arguments, **options)
    assert isinstance(caught.value, UsageError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the seed's recipe


@pytest.fixture
def openchat(tmp_path, models):
    """The recipe of OpenChat-3.5-0106_BlockExpansion-36Layers-End, as its model card has it, and its base."""
    copy = """
  - sources:
    - model: openchat/openchat-3.5-0106
      layer_range: [31, 32]
      parameters:
        scale:
        - filter: o_proj
          value: 0.0
        - filter: down_proj
          value: 0.0
        - value: 1.0"""
    first = "slices:\n  - sources:\n    - model: openchat/openchat-3.5-0106\n      layer_range: [0, 32]"
    (tmp_path / "seed.yml").write_text(first + 4 * copy + "\nmerge_method: passthrough\ndtype: bfloat16\n")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(OPENCHAT))
    return tmp_path / "seed.yml", {"openchat/openchat-3.5-0106": tmp_path / "base"}


def test_the_seeds_recipe_is_a_plan_with_four_slots_that_are_not_executed(openchat):
    assembly = read_recipe(*openchat)
    assert assembly.plan == LayerPlan((*map(Slot, range(32)), *[Slot(31, 0.0, 0.0)] * 4), 32)
    assert len(assembly.plan.executed()) == 32
    assert assembly.layers == tuple(LayerSource(0, layer) for layer in range(32))
    assert (assembly.dtype, assembly.base, assembly.tokenizer) == ("bfloat16", 0, 0)
    assert assembly.notes == (
        "4 slots with both scales 0: counted and exported, but not executed (keep_identity runs them)",
    )


def test_the_seeds_recipe_has_8_114_196_480_parameters(openchat):
    recipe, paths = openchat
    config = ModelDirectory.at(paths["openchat/openchat-3.5-0106"]).config
    assert count_parameters(config, len(read_recipe(recipe, paths).plan)) == 8_114_196_480


def test_keep_identity_executes_the_new_layers_with_projections_that_are_zero(openchat):
    assembly = read_recipe(*openchat, keep_identity=True)
    assert len(assembly.plan) == len(assembly.plan.executed()) == 36
    assert assembly.layers[32:] == (LayerSource(0, 31, (("down.weight", 0.0), ("o.weight", 0.0))),)
    assert [slot.layer for slot in assembly.plan] == [*range(32), 32, 32, 32, 32]


# --- slices


def test_slices_follow_each_other_and_every_layer_is_loaded_once(read, models):
    models("a")
    assembly = read(sources(("a", 0, 5), ("a", 2, 7)))
    assert [source.layer for source in assembly.layers] == [0, 1, 2, 3, 4, 5, 6]
    assert assembly.plan == LayerPlan.parse("0:5,2:7", 7)
    assert source_plan(assembly, 8) == LayerPlan.parse("0:5,2:7", 8)


def test_goliath_takes_only_the_layers_it_uses_from_each_of_its_two_models(read, models):
    for name in ("xwin", "euryale"):
        models(name, num_hidden_layers=80)
    slices = [(0, 16), (8, 24), (17, 32), (25, 40), (33, 48), (41, 56), (49, 64), (57, 72), (65, 80)]
    names = ("xwin", "euryale")
    assembly = read(sources(*[(names[i % 2], *ends) for i, ends in enumerate(slices)]))
    assert len(assembly.plan) == 137
    assert [path.name for path in assembly.models] == ["xwin", "euryale"]
    used = {(i % 2, layer) for i, (first, stop) in enumerate(slices) for layer in range(first, stop)}
    assert {(source.model, source.layer) for source in assembly.layers} == used
    assert len(assembly.layers) == len(used)
    sequence = [(assembly.layers[s.layer].model, assembly.layers[s.layer].layer) for s in assembly.plan]
    assert sequence == [(i % 2, layer) for i, ends in enumerate(slices) for layer in range(*ends)]


def test_embedding_is_the_first_slices_and_norm_and_head_are_the_last_slices(read, models):
    models("a"), models("b")
    assembly = read(sources(("a", 0, 5), ("b", 3, 8)))
    assert assembly.globals == (
        ("embed.weight", (0, 1.0)),
        ("norm.weight", (1, 1.0)),
        ("lm_head.weight", (1, 1.0)),
    )


def test_base_and_tokenizer_are_the_first_slices_model_unless_said_otherwise(read, models):
    for name in "abc":
        models(name)
    text = sources(("a", 0, 5), ("b", 3, 8))
    assert (read(text).base, read(text).tokenizer) == (0, 0)
    assembly = read(text + "base_model: b\ntokenizer_source: base\n")
    assert (assembly.base, assembly.tokenizer) == (1, 1)
    assembly = read(text + "base_model: b\ntokenizer_source: c\n")
    assert [assembly.models[i].name for i in (assembly.base, assembly.tokenizer)] == ["b", "c"]
    assert {source.model for source in assembly.layers} == {0, 1}


def test_a_model_under_two_names_is_one_model(read, models, tmp_path):
    models("a")
    assembly = read(sources(("a", 0, 4), ("x/y", 4, 8)), {"x/y": tmp_path / "a"})
    assert len(assembly.models) == 1
    assert source_plan(assembly, 8) == LayerPlan.identity(8)


def test_models_are_sought_beside_the_recipe_and_then_in_the_working_directory(
    read, models, tmp_path, monkeypatch
):
    models("a", num_hidden_layers=3)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").mkdir()
    models("elsewhere/b")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assembly = read(sources(("a", 0, 3), ("b", 0, 1)))
    assert [model.path.resolve() for model in assembly.models] == [
        tmp_path / "a",
        tmp_path / "elsewhere" / "b",
    ]


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ("", None),
        ("dtype: float16", "float16"),
        ("dtype: torch.bfloat16", "bfloat16"),
        ("dtype: float32\nout_dtype: bfloat16", "bfloat16"),
        ("out_dtype: float16", "float16"),
    ],
)
def test_the_dtype_is_that_of_the_output(read, models, keys, dtype):
    models("a")
    assembly = read(sources(("a", 0, 8)) + keys)
    assert (assembly.dtype, assembly.notes) == (dtype, ())


def test_two_roundings_are_one_here_and_that_is_said(read, models):
    models("a")
    notes = read(sources(("a", 0, 8)) + "dtype: float16\nout_dtype: bfloat16").notes
    assert re.search("where mergekit rounds to float16 first", notes[0])


# --- scales: which value


def attn_scales(assembly):
    return [slot.attn_scale for slot in assembly.plan]


def test_a_scale_on_both_output_projections_is_a_scale_of_the_slots(scaled):
    assembly = scaled("[{filter: o_proj, value: 0.5}, {filter: down_proj, value: 2}, {value: 1}]")
    assert set(assembly.plan) == {Slot(layer, 0.5, 2.0) for layer in range(8)}
    assert all(source.scales == () for source in assembly.layers)
    expected = "8 slots with self_attn.o_proj and mlp.down_proj scaled by the plan, without a copy"
    assert assembly.notes == (expected,)


def test_source_goes_before_slice_before_recipe(scaled):
    for levels, value in (
        ((0.25, 0.5, 2.0), 0.25),
        ((None, 0.5, 2.0), 0.5),
        ((None, None, 2.0), 2.0),
        ((None, None, None), 1.0),
    ):
        rules = [value and f"[{{filter: o_proj, value: {value}}}]" for value in levels]
        assert set(attn_scales(scaled(*rules))) == {value}


def test_a_level_without_a_matching_filter_falls_through_to_the_next(scaled):
    assembly = scaled("[{filter: down_proj, value: 3}]", "[{filter: o_proj, value: 0.5}]", "[{value: 1}]")
    assert set(assembly.plan) == {Slot(layer, 0.5, 3.0) for layer in range(8)}


def test_the_first_matching_filter_wins(scaled):
    assembly = scaled("[{filter: self_attn.o, value: 0.5}, {filter: o_proj, value: 9}, {value: 1}]")
    assert set(attn_scales(assembly)) == {0.5}
    assert re.search(
        r"filter 'o_proj' has no effect: an earlier entry.* always comes first", assembly.notes[0]
    )
    assert "parameters.scale[1] (line 6)" in assembly.notes[0]


@pytest.mark.parametrize("rule", ["{value: 0.5, filter: '*'}", "{value: 0.5}", "{value: 0.5, filter: null}"])
def test_a_star_or_no_filter_is_every_tensor(scaled, rule):
    assembly = scaled(f"[{{filter: norm, value: 1}}, {rule}]")
    assert set(assembly.plan) == {Slot(layer, 0.5, 0.5) for layer in range(8)}
    assert assembly.layers[0].scales == tuple(
        (f"{name}.weight", 0.5) for name in ("gate", "k", "q", "up", "v")
    )
    assert dict(assembly.globals)["embed.weight"] == (0, 0.5)


def test_a_filter_is_a_plain_substring_of_the_name_in_the_source(scaled):
    assembly = scaled("[{filter: layers.3, value: 0.5}]", num_hidden_layers=40)
    assert [s for s in assembly.plan if not s.is_plain] == [Slot(7, 0.5, 0.5)]  # after the plain layers
    assert assembly.layers[7] == LayerSource(
        0,
        3,
        tuple(
            (f"{name}.weight", 0.5)
            for name in ("attn_norm", "gate", "k", "mlp_norm", "q", "up", "v")
        ),
    )  # fmt: skip
    assert attn_scales(scaled("[{filter: o.proj, value: 0.5}]")) == [1.0] * 8


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("[0, 7]", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("[0, 0.5, 0.3, 0.7, 1]", [0, 2 / 7, 0.5 - 0.2 / 7, 0.5 - 1 / 7, 0.3 + 0.8 / 7, 0.7 - 0.4 / 7]),
        ("[0.25]", [0.25] * 8),
        ("[1, 2, 3, 4, 5, 6, 7, 8]", [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_a_list_is_a_gradient_over_the_slice(scaled, values, expected):
    found = attn_scales(scaled(f"[{{filter: o_proj, value: {values}}}]"))
    assert found[: len(expected)] == pytest.approx(expected)


def test_a_gradient_over_one_layer_is_its_last_value(read, models):
    models("a")
    rules = "parameters: {scale: [{filter: o_proj, value: [0.5, 0.75]}]}"
    assembly = read(
        "merge_method: passthrough\nslices:\n"
        f"- sources: [{{model: a, layer_range: [3, 4]}}]\n  {rules}\n"
        f"- sources: [{{model: a, layer_range: [3, 5]}}]\n  {rules}\n"
    )
    assert attn_scales(assembly) == [0.75, 0.5, 0.75]
    assert any("2 values for a slice of 1 layer: only the last is used" in note for note in assembly.notes)


def test_a_gradient_with_more_values_than_layers_passes_some_over_and_says_so(scaled):
    assembly = scaled(f"[{{filter: o_proj, value: {list(range(1, 16))}}}]")
    assert attn_scales(assembly) == [1, 3, 5, 7, 9, 11, 13, 15]
    assert any("15 values for a slice of 8 layers: some are passed over" in note for note in assembly.notes)


def test_embedding_norm_and_head_take_the_first_value_of_a_gradient(scaled):
    assembly = scaled("[0.5, 1]")
    assert [factor for _, (_, factor) in assembly.globals] == [0.5, 0.5, 0.5]
    assert any("lm_head.weight get the first of the values" in note for note in assembly.notes)


def test_a_number_in_scientific_notation_is_a_number_as_in_mergekit(scaled):
    assert set(attn_scales(scaled("[{filter: o_proj, value: 5e-1}]"))) == {0.5}


def test_a_lone_condition_is_a_list_of_one(scaled):
    assert set(attn_scales(scaled("{filter: o_proj, value: 0.5}"))) == {0.5}


def test_a_filter_that_matches_nothing_is_a_warning_that_names_it(scaled):
    notes = scaled("[{filter: out_proj, value: 0}]").notes
    assert notes == (
        "slices[0].sources[0].parameters.scale[0] (line 6): filter 'out_proj' matches no tensor it could "
        "apply to, so it has no effect; tensors are called model.layers.0.self_attn.o_proj.weight, "
        "model.layers.0.mlp.down_proj.weight and so on",
    )
    assert (
        "transformer.h.0.attn.c_proj.weight"
        in scaled("[{filter: o_proj, value: 0}]", None, None, "gpt2").notes[0]
    )


# --- scales: what becomes of them


@pytest.mark.parametrize(
    ("model_type", "filter_", "names"),
    [
        ("llama", "q_proj", ["q.weight"]),
        ("qwen2", "k_proj", ["k.bias", "k.weight"]),
        ("llama", "input_layernorm", ["attn_norm.weight"]),
        ("llama", "mlp.gate", ["gate.weight"]),
        ("phi3", "qkv_proj", ["k.weight", "q.weight", "v.weight"]),
        ("phi3", "gate_up_proj", ["gate.weight", "up.weight"]),
        ("gpt2", "c_attn", ["k.bias", "k.weight", "q.bias", "q.weight", "v.bias", "v.weight"]),
        ("gemma2", "post_feedforward_layernorm", ["mlp_post_norm.weight"]),
    ],
)
def test_any_other_scale_is_a_copy_of_that_tensor_alone(scaled, model_type, filter_, names):
    assembly = scaled(f"[{{filter: {filter_}, value: 0.5}}]", None, None, model_type)
    assert all(slot.is_plain for slot in assembly.plan)
    assert {source.scales for source in assembly.layers} == {tuple((name, 0.5) for name in names)}
    assert re.match(r"8 slots with scaled copies of .*" + re.escape(filter_), assembly.notes[0])


def test_a_projection_is_scaled_by_the_slot_only_if_its_bias_is_scaled_alike(scaled):
    assembly = scaled("[{filter: attn.c_proj, value: 0.5}]", None, None, "gpt2")
    assert set(assembly.plan) == {Slot(layer, 0.5, 1.0) for layer in range(8)}
    assembly = scaled("[{filter: attn.c_proj.weight, value: 0.5}]", None, None, "gpt2")
    assert all(slot.is_plain for slot in assembly.plan)
    assert {source.scales for source in assembly.layers} == {(("o.weight", 0.5),)}
    assembly = scaled("[{filter: attn.c_proj.weight, value: 0}, {filter: mlp, value: 0}]", None, None, "gpt2")
    assert not any(slot.is_identity for slot in assembly.plan)  # the bias of the attention stays


def test_a_layer_with_and_without_a_scaled_copy_is_two_rows_of_the_stack(read, models):
    models("a")
    assembly = read(
        "merge_method: passthrough\nslices:\n"
        "- sources: [{model: a, layer_range: [0, 3]}]\n"
        "- sources: [{model: a, layer_range: [1, 3], parameters: {scale: [{filter: q_proj, value: 0.5}]}}]\n"
    )
    copies = [LayerSource(0, layer, (("q.weight", 0.5),)) for layer in (1, 2)]
    assert assembly.layers == (LayerSource(0, 0), LayerSource(0, 1), LayerSource(0, 2), *copies)
    assert assembly.plan == LayerPlan.parse("all", 5)
    with pytest.raises(
        PlanError, match=r"the recipe scales q\.weight of layer 1, which a layer plan cannot say"
    ):
        source_plan(assembly, 8)


def test_an_unfiltered_scale_reaches_embedding_norm_and_head(scaled):
    assembly = scaled("0.5")
    assert dict(assembly.globals) == dict.fromkeys(
        ("embed.weight", "norm.weight", "lm_head.weight"), (0, 0.5)
    )
    assert "scaled copies of embed.weight (0.5), norm.weight (0.5), lm_head.weight (0.5)" in assembly.notes


def test_what_happens_to_a_tied_head_is_said(scaled):
    notes = scaled("[{filter: embed, value: 0.5}]", None, None, "qwen2").notes
    assert "the output head is the embedding (tied), so the scale 0.5 is on both" in notes
    assembly = scaled("[{filter: lm_head, value: 0.5}]", None, None, "qwen2")
    assert "lm_head.weight" not in dict(assembly.globals)
    assert any("the scale 0.5 for lm_head.weight has no effect, as in mergekit" in n for n in assembly.notes)


def test_a_tied_head_of_two_models_is_the_first_ones_and_that_is_said(read, models):
    models("a", "qwen2"), models("b", "qwen2")
    notes = read(sources(("a", 0, 4), ("b", 4, 8))).notes
    assert re.search(r"the embedding \(tied\), of \S*/a; the final norm is of \S*/b", notes[0])


@pytest.mark.parametrize(
    ("model_type", "filter_", "norm"),
    [
        ("gemma2", "o_proj", "the norm after the attention"),
        ("gemma2", "down_proj", "the norm after the MLP"),
        ("gemma2", "v_proj", "the norm after the attention"),
        ("gemma3_text", "mlp.up", "the norm after the MLP"),
        ("qwen3", "q_proj", "the norm of queries"),
        ("gemma3_text", "k_proj", "the norm of keys"),
    ],
)
def test_a_scale_that_a_norm_undoes_is_a_warning(scaled, model_type, filter_, norm):
    notes = scaled(f"[{{filter: {filter_}, value: 0.5}}]", None, None, model_type).notes
    assert any(re.search(f"8 slots where a scale on .*{filter_}.*: {norm} normalizes it", n) for n in notes)
    notes = scaled(f"[{{filter: {filter_}, value: 0}}]", None, None, model_type).notes
    assert not any("next to no effect" in note for note in notes)


def test_keys_that_mergekit_reads_and_does_not_use_are_remarked_on(read, models):
    models("a")
    notes = read(sources(("a", 0, 8)).rstrip() + "\n  residual_weight: 0.5\n  base_model: a\n").notes
    assert [note.split(":")[0] for note in notes] == [
        "slices[0].base_model (line 5)",
        "slices[0].residual_weight (line 4)",
    ]


def test_of_a_key_that_is_there_twice_the_last_counts_and_that_is_said(read, models):
    models("a")
    assembly = read(sources(("a", 0, 8)) + "dtype: float16\ndtype: bfloat16\n")
    assert assembly.dtype == "bfloat16"
    assert assembly.notes == ("dtype (line 5): 'dtype' is given twice; the last one counts, as in mergekit",)


def test_anchors_and_merge_keys_are_yaml(read, models):
    models("a")
    assembly = read(
        "merge_method: passthrough\nslices:\n"
        "- sources: [&one {model: a, layer_range: [0, 4]}]\n"
        "- sources: [{<<: *one, layer_range: [2, 8]}]\n- sources: [*one]\n"
    )
    assert source_plan(assembly, 8) == LayerPlan.parse("0:4,2:8,0:4", 8)


# --- against mergekit

SCALARS = st.sampled_from([0, 1, 0.5, 2.0, -1, 0.25, "1e-3"])
VALUES = SCALARS | st.lists(SCALARS, min_size=1, max_size=5)
FILTERS = st.sampled_from(
    ["o_proj", "down_proj", "*", None, "self_attn", "mlp", "layers.1", ".2.", "norm", "embed", "wte",
     "lm_head", "c_attn", "c_proj", "weight", "bias", "q_proj", "nothing"]
)  # fmt: skip
CONDITIONS = st.fixed_dictionaries({"value": VALUES}, optional={"filter": FILTERS})
LEVELS = st.fixed_dictionaries(
    {}, optional={"scale": VALUES | CONDITIONS | st.lists(CONDITIONS, min_size=1, max_size=4)}
)
RANGES = st.tuples(st.integers(0, 7), st.integers(1, 8)).filter(lambda ends: ends[0] < ends[1])
SLICES = st.builds(
    lambda model, ends, source, own: {
        "sources": [{"model": model, "layer_range": list(ends), "parameters": source}],
        "parameters": own,
    },
    st.sampled_from("ab"), RANGES, LEVELS, LEVELS,
)  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gpt2", "phi3", "gemma2"])
@settings(suppress_health_check=list(HealthCheck), max_examples=100)
@given(slices=st.lists(SLICES, min_size=1, max_size=4), whole=LEVELS)
def test_every_tensor_has_the_scale_that_mergekit_gives_it(read, models, model_type, slices, whole):
    resolver = pytest.importorskip("mergekit.parameter_resolver")
    from mergekit.config import ConfigReader, MergeConfiguration
    from mergekit.merge_methods import get

    recipe = {"merge_method": "passthrough", "slices": slices, "parameters": whole}
    table = parameter_table(ModelDirectory.at(models("a", model_type)).config)
    models("b", model_type)
    assembly = read(yaml.safe_dump(recipe))
    theirs = MergeConfiguration.model_validate(recipe)

    def mergekits(part, tensor, t):
        reader = ConfigReader(config=theirs, slice_out=part, t=t)
        names = {part.sources[0].model: tensor}
        _, found = resolver.resolve_parameters(
            get("passthrough").spec, tensor_name=tensor, inputs=names, sources=reader.parameter_sources, t=t
        )
        value = found[part.sources[0].model]["scale"]
        return 1.0 if value is None else value

    slots = iter(assembly.plan)
    for part in theirs.slices:
        first, stop = part.sources[0].layer_range
        for layer in range(first, stop):
            slot = next(slots)
            source = assembly.layers[slot.layer]
            assert (assembly.models[source.model].name, source.layer) == (str(part.sources[0].model), layer)
            t = (layer - first) / (stop - first - 1) if stop - first > 1 else 1
            scales, halves = dict(source.scales), {"o": slot.attn_scale, "down": slot.mlp_scale}
            for param in (param for param in table if param.per_layer):
                name = param.name.removeprefix("layers.")
                ours = scales.get(name, 1.0) * halves.get(name.split(".")[0], 1.0)
                assert ours == pytest.approx(mergekits(part, param.hf.format(layer), t), abs=1e-12)
    assert next(slots, None) is None
    for param in (param for param in table if not param.per_layer):
        part = theirs.slices[0 if param.name in ("embed.weight", "positions.weight") else -1]
        model, factor = dict(assembly.globals)[param.name]
        assert assembly.models[model].name == str(part.sources[0].model)
        assert factor == pytest.approx(mergekits(part, param.hf, 0), abs=1e-12)


# --- plans as recipes


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "gemma2"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(plan=plans(num_layers=8))
def test_a_plan_written_as_a_recipe_is_read_as_itself(read, models, model_type, plan):
    config = ModelDirectory.at(models("a model: #1", model_type)).config
    assembly = read(to_mergekit(plan, "a model: #1", config, "bfloat16"))
    assert source_plan(assembly, 8) == plan
    assert assembly.dtype == "bfloat16"


def test_a_recipe_is_written_like_those_on_model_cards():
    plan = LayerPlan.parse("[0, 1, 2, [2, 1e-05, 0.0]]", 3)
    assert to_mergekit(plan, "openchat/openchat-3.5-0106", dtype="bfloat16") == textwrap.dedent("""\
        slices:
        - sources:
          - model: openchat/openchat-3.5-0106
            layer_range: [0, 3]
        - sources:
          - model: openchat/openchat-3.5-0106
            layer_range: [2, 3]
            parameters:
              scale:
              - filter: o_proj
                value: 1.0e-05
              - filter: down_proj
                value: 0.0
              - value: 1.0
        merge_method: passthrough
        dtype: bfloat16
        """)


def test_a_recipe_of_two_models_is_no_plan(read, models):
    models("a"), models("b")
    with pytest.raises(PlanError, match="the recipe stacks layers of 2 models; a layer plan is over one"):
        source_plan(read(sources(("a", 0, 5), ("b", 3, 8))), 8)


# --- bad recipes


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("slices: [\n", "recipe.yml:2:1: not YAML: "),
        ("slices:\n- sources:\n   - model: a\n  - model: b\n", "recipe.yml:4:3: not YAML: "),
        ("a: *nowhere\n", "recipe.yml:1:4: not YAML: found undefined alias 'nowhere'"),
        ("a: \x07\n", "recipe.yml:1:4: not YAML: special characters are not allowed"),
        ("a: b\n---\na: b\n", "recipe.yml:2:1: not YAML: but found another document"),
        ("[" * 2000, "recipe.yml:1:1: not a recipe: nested too deeply"),
        ("", "recipe.yml: the file is empty; expected a mergekit recipe"),
        ("# nothing\n", "recipe.yml: the file is empty"),
        ("just text\n", "recipe.yml:1:1: found 'just text'; expected the keys of a mergekit recipe"),
        ("slices: []\n", "recipe.yml:1:1: the key 'merge_method' is missing; expected merge_"),
        (
            "merge_method: slerp\nmodels: []\n",
            "recipe.yml:1:15: merge_method: merge method 'slerp' computes new weights, which no layer plan "
            "can; run mergekit and load the model it writes",
        ),
        ("merge_method: [passthrough]\n", "merge_method: found a list; expected the name of a merge method"),
        (
            "merge_method: passthrough\nmodels:\n- model: a\n",
            "recipe.yml:3:1: models: 'models' is not supported; known here: merge_method, slices,",
        ),
        ("merge_method: passthrough\nmodules: {}\n", "'modules' is not supported"),
        ("merge_method: passthrough\ntokenizer: {source: base}\n", "'tokenizer' is not supported"),
        ("merge_method: passthrough\n", "the key 'slices' is missing; expected a list of slices"),
        ("merge_method: passthrough\nslices:\n", "the key 'slices' is missing"),
        ("merge_method: passthrough\nslices: []\n", "slices: the list is empty; expected a list of slices"),
        (
            "a: &a {sources: [{model: a, layer_range: [0, 1]}]}\nmerge_method: passthrough\nslices: ["
            + "*a," * 5000 + "]\n",
            "recipe.yml:3:9: slices: found 5000 slices; expected at most 4096",
        ),
        ("merge_method: passthrough\nslices: {a: b}\n", "slices: found keys and values; expected a list"),
        ("merge_method: passthrough\nslices: [x]\n", "slices[0]: found 'x'; expected a slice"),
        ("merge_method: passthrough\nslices: [{sources: []}]\n", "slices[0].sources: the list is empty"),
        ("merge_method: passthrough\nslices: [{model: a}]\n", "slices[0].model: unknown key 'model'"),
        ("merge_method: passthrough\nslices: [{}]\n", "slices[0]: the key 'sources' is missing"),
        ("merge_method: passthrough\n? [a]\n: b\n", "a key that is not text"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe(read, text, problem):
    assert problem in error_of(read, text)


NOT_APPLIED = "chat_template is not applied: the chat template is the tokenizer's own"
NO_EFFECT = "has no effect in a passthrough merge, in mergekit as here"


@pytest.mark.parametrize(
    ("root", "source", "notes"),
    [
        ("name: tower\n", "", ["name (line 4): has no effect, in mergekit as here"]),
        (
            "chat_template: chatml\n",
            "",
            [f"chat_template (line 4): {NOT_APPLIED}"],
        ),
        ("anchors: &x {a: 1}\n", "", ["anchors (line 4): has no effect, in mergekit as here"]),
        ("anchors:\nname:\n", "", []),
        (
            "parameters: {int8_mask: true, normalize: false}\n",
            "",
            [f"parameters.int8_mask (line 4): {NO_EFFECT}", f"parameters.normalize (line 4): {NO_EFFECT}"],
        ),
        (
            "",
            ", parameters: {weight: 0.5, scale: 1.0, density: [0, 1]}",
            [f"slices[0].sources[0].parameters.{key} (line 3): {NO_EFFECT}" for key in ("weight", "density")],
        ),
        ("name: one\nname: two\n", "", [
            "name (line 5): 'name' is given twice; the last one counts, as in mergekit",
            "name (line 5): has no effect, in mergekit as here",
        ]),
    ],
)  # fmt: skip
def test_a_key_without_effect_is_a_remark(read, models, root, source, notes):
    models("a")
    slices = f"slices:\n- sources: [{{model: a, layer_range: [0, 2]{source}}}]\n"
    assembly = read(f"merge_method: passthrough\n{slices}{root}")
    assert len(assembly.plan) == 2
    assert list(assembly.notes) == notes


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("layer_range: [0, 2]", "recipe.yml:3:13: slices[0].sources[0]: the key 'model' is missing"),
        ("model: a", "slices[0].sources[0]: the key 'layer_range' is missing"),
        ("model: a, layer_range: 3", "slices[0].sources[0].layer_range: found '3'; expected [first, stop]"),
        ("model: a, layer_range: [0]", "recipe.yml:3:37: slices[0].sources[0].layer_range: found 1 number;"),
        ("model: a, layer_range: [0, 1, 2]", "layer_range: found 3 numbers; expected [first, stop]"),
        ("model: a, layer_range: []", "layer_range: the list is empty; expected [first, stop]"),
        ("model: a, layer_range: [0, 1.5]", "layer_range[1]: found '1.5'; expected a whole number"),
        ("model: a, layer_range: [0, yes]", "layer_range[1]: found 'yes'; expected a whole number"),
        ("model: a, layer_range: ['0', 1]", "layer_range[0]: found '0'; expected a whole number"),
        ("model: a, layer_range: [-2, 3]", "layer_range: [-2, 3] has a negative end"),
        ("model: a, layer_range: [5, 2]", "layer_range: [5, 2] is reversed; expected [first, stop]"),
        ("model: a, layer_range: [2, 2]", "layer_range: [2, 2] holds no layer"),
        ("model: a, layer_range: [4, 9]", "layer_range: [4, 9] is out of range: a has 8 layers"),
        ("model: a, layer_range: [0, " + "9" * 5000 + "]", "expected a whole number"),
        ("model: 7, layer_range: [0, 2]", "slices[0].sources[0].model: found '7'; expected the path or name"),
        ("model: '', layer_range: [0, 2]", "model: found nothing; expected the path or name of a model"),
        ("model: {model: a, lora: b}, layer_range: [0, 2]", "a model with lora or override_arch"),
        ("model: a+b, layer_range: [0, 2]", "model: 'a+b' names a LoRA, which is not supported; run"),
        ("model: a@main, layer_range: [0, 2]", "model: 'a@main' names a revision, which is not supported"),
        ("model: a, layer_range: [0, 2], weight: 1", "slices[0].sources[0].weight: unknown key 'weight'"),
        ("model: a, layer_range: [0, 2], parameters: 1", "parameters: found '1'; expected scale"),
    ],
)  # fmt: skip
def test_a_malformed_source_is_named_by_line_column_and_key(read, models, source, problem):
    models("a")
    message = error_of(read, f"merge_method: passthrough\nslices:\n- sources: [{{{source}}}]\n")
    assert "recipe.yml:3:" in message
    assert problem in message


@pytest.mark.parametrize(
    ("scale", "problem"),
    [
        ("x", "parameters.scale: found 'x'; expected a number"),
        ("yes", "scale: found 'yes'; expected a number"),
        ("[]", "scale: the list is empty; expected a number"),
        ("[1, x]", "scale[1]: found 'x'; expected a number"),
        ("[1, [2]]", "scale[1]: found a list; expected a number"),
        (".nan", "scale: found '.nan'; expected a number"),
        ("1e39", "scale: found '1e39'; expected a number"),
        ("[{value: []}]", "scale[0].value: the list is empty"),
        ("[{filter: x}]", "scale[0]: the key 'value' is missing"),
        ("[{value: 1}, 2]", "scale[1]: found '2'; expected value"),
        ("[{value: 1, filter: 3}]", "filter: found '3'; expected"),
        ("[{value: 1, name: x}]", "unknown key 'name'"),
    ],
)
def test_a_malformed_scale_is_named_by_line_column_and_key(read, models, scale, problem):
    models("a")
    source = f"model: a, layer_range: [0, 2], parameters: {{scale: {scale}}}"
    message = error_of(read, f"merge_method: passthrough\nslices:\n- sources: [{{{source}}}]\n")
    assert re.search(r"recipe\.yml:3:\d\d: slices\[0\]\.sources\[0\]\.parameters\.scale", message)
    assert problem in message


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("dtype: int8", "dtype 'int8' is not supported; expected one of float32, bfloat16, float16"),
        ("dtype: float64", "dtype 'float64' is not supported"),
        ("out_dtype: [float32]", "out_dtype: found a list; expected one of float32"),
        ("tokenizer_source: union", "tokenizer_source: a union of tokenizers needs a new embedding"),
        ("tokenizer_source: nowhere", "tokenizer_source: no model 'nowhere'"),
        ("base_model: nowhere", "base_model: no model 'nowhere'"),
    ],
)
def test_a_bad_value_of_a_recipe_is_named(read, models, key, problem):
    models("a")
    message = error_of(read, sources(("a", 0, 8)) + key)
    assert re.search(r"recipe\.yml:4:\d+: ", message)
    assert problem in message


def test_passthrough_of_two_sources_in_one_slice_is_refused(read, models):
    models("a")
    text = (
        "merge_method: passthrough\nslices:\n- sources:\n"
        "  - {model: a, layer_range: [0, 4]}\n  - {model: a, layer_range: [4, 8]}\n"
    )
    assert error_of(read, text).endswith(
        "recipe.yml:5:5: slices[0].sources[1]: 2 sources in one slice; passthrough takes one: give each its "
        "own slice, or for a merge of them run mergekit and load the model it writes"
    )


def test_a_missing_model_says_what_was_tried_and_how_to_name_it(read, tmp_path):
    message = error_of(read, sources(("x/y", 0, 8)))
    assert "slices[0].sources[0].model: no model 'x/y': tried " in message
    assert f"{tmp_path}/x/y and x/y, and the Hub: x/y: the Hugging Face Hub cannot be reached" in message
    assert message.endswith("; give it with model_paths={'x/y': 'DIR'}")
    assert f"{tmp_path}/y and y; give it with model_paths={{'y': 'DIR'}}" in error_of(
        read, sources(("y", 0, 8))
    )


def test_a_recipe_cannot_smuggle_control_characters_into_the_terminal(read):
    message = error_of(read, sources(('"\\e[31mx\\ny"', 0, 8)))
    assert message.isprintable()
    assert r"model_paths={'\x1b[31mx\ny': 'DIR'}" in message


def test_a_model_path_must_be_a_directory_and_a_name_of_the_recipe(read, models, tmp_path):
    models("a")
    text = sources(("a", 0, 8))
    assert "model_paths={'a': '/nowhere'}: no such directory" in error_of(read, text, {"a": "/nowhere"})
    message = error_of(read, text, {"b": tmp_path / "a"})
    assert message == "model_paths b: the recipe has no model of that name; it has a"


def test_a_model_path_may_name_what_looks_like_a_revision(read, models, tmp_path):
    models("a")
    assert read(sources(("a@main", 0, 8)), {"a@main": tmp_path / "a"}).models == (
        ModelDirectory.at(tmp_path / "a"),
    )


@pytest.mark.parametrize(
    ("model_type", "changes", "field", "values"),
    [
        ("mistral", {}, "family", ("llama", "mistral")),
        ("llama", {"vocab_size": 68}, "vocab_size", (67, 68)),
        ("llama", {"hidden_size": 28, "head_dim": 6}, "hidden_size", (24, 28)),
        ("llama", {"num_key_value_heads": 4}, "num_kv_heads", (2, 4)),
        ("llama", {"tie_word_embeddings": True}, "tied_embeddings", (False, True)),
        ("llama", {"attention_bias": True}, "qkv_bias", (False, True)),
    ],
)
def test_models_that_do_not_stack_are_refused_with_the_first_differing_field(
    read, models, model_type, changes, field, values
):
    models("a"), models("b", model_type, **changes)
    message = error_of(read, sources(("a", 0, 4), ("b", 4, 8)))
    assert re.search(
        rf"recipe\.yml:4:\d+: slices\[1\]\.sources\[0\]\.model: models differ in {field}: "
        rf"\S*/a has {values[0]}, \S*/b has {values[1]}; layers stack only if",
        message,
    )


def test_models_may_differ_in_depth_and_in_what_belongs_to_a_layer(read, models):
    models("a"), models("b", num_hidden_layers=5, rope_theta=1e6, eos_token_id=5)
    assert read(sources(("a", 0, 4), ("b", 4, 5))).notes == ()
    models("b", rms_norm_eps=1e-6)
    notes = read(sources(("a", 0, 4), ("b", 4, 8))).notes
    assert re.search(r"models differ in norm_eps: \S*/a has 1e-05, \S*/b has 1e-06; the first", notes[0])


def test_a_recipe_that_is_not_there(tmp_path):
    message = error_of(read_recipe, tmp_path / "nowhere.yml")
    assert (
        message
        == f"{tmp_path / 'nowhere.yml'}: No such file or directory; give the YAML file of a mergekit recipe"
    )


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b" " * (2 << 20)])
def test_a_recipe_that_is_not_text(tmp_path, data):
    (tmp_path / "recipe.yml").write_bytes(data)
    assert "give the YAML file of a mergekit recipe" in error_of(read_recipe, tmp_path / "recipe.yml")


def test_recipe_errors_are_usage_errors():
    assert issubclass(RecipeError, UsageError)


def test_the_recipe_among_mergekits_examples_is_read_and_the_others_are_refused(
    shared_data, models, tmp_path
):
    models("x", num_hidden_layers=40)
    for path in sorted((shared_data / "configs" / "mergekit" / "examples").glob("*.yml")):
        names = dict.fromkeys(("psmathur/orca_mini_v3_13b", "garage-bAInd/Platypus2-13B"), tmp_path / "x")
        if path.name == "orcamini-platy-44layer.yml":
            assert len(read_recipe(path, names).plan) == 44
        else:
            assert "run mergekit and load the model it writes" in error_of(read_recipe, path, names)
