"""Adapters while a model runs: of every sequence its own, following layers or in one slot, compiled once."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxchat
from jaxchat.adapter_use import AdapterUse, read_uses
from jaxchat.analysis import sweep
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.merged import merged_directory
from jaxchat.checkpoints.write import convert, to_hf
from jaxchat.engine import steps
from jaxchat.engine.generation import generate
from jaxchat.errors import UsageError
from tests.support.adapters import PREFIX, logits_of, lora_tensors, projections, write_adapter

pytestmark = pytest.mark.usefixtures("quick_compilation")

IDS = [[1, 7, 33, 5, 60, 2, 9], [4, 4, 8, 15, 16, 23, 42], [9, 8, 7, 6, 5, 4, 3], [50, 40, 30, 20, 10, 5, 1]]


@pytest.fixture(scope="module")
def base(tiny_directory):
    return tiny_directory("llama")


@pytest.fixture(scope="module")
def config(base):
    return ModelDirectory.at(base).config


@pytest.fixture(scope="module")
def adapters(config, tmp_path_factory):
    """`poet`, of all projections, and `critic`, of other rank and of other parts of the model as well."""
    folder = tmp_path_factory.mktemp("loras")
    modules = projections(config)
    write_adapter(folder / "poet", lora_tensors(modules, seed=1), target_modules="all-linear")
    rng = np.random.default_rng(2)
    tensors = lora_tensors({n: s for n, s in modules.items() if "mlp" in n} | {"lm_head": (67, 24)}, rank=6)
    tensors |= {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": rng.standard_normal((6, 67), np.float32) * 0.2,
        f"{PREFIX}model.embed_tokens.lora_embedding_B": rng.standard_normal((24, 6), np.float32) * 0.2,
        f"{PREFIX}model.norm.weight": rng.uniform(0.5, 1.5, 24).astype(np.float32),
        f"{PREFIX}model.layers.1.self_attn.v_proj.weight": rng.standard_normal((12, 24), np.float32) * 0.2,
    }
    targets = ["up_proj", "gate_proj", "down_proj", "embed_tokens", "lm_head"]
    write_adapter(
        folder / "critic",
        tensors,
        r=6,
        target_modules=targets,
        modules_to_save=["model.norm", "1.self_attn.v_proj"],
    )
    return folder


@pytest.fixture(scope="module")
def model(base, adapters):
    return jaxchat.load(base, adapter=[f"{adapters / 'poet'}", f"{adapters / 'critic'}=0.5"])


def merged(base, uses, tmp_path, **options):
    """The logits of the model with adapters in its weights."""
    to_hf(merged_directory(base, uses), tmp_path / "merged", **options)
    return logits_of(jaxchat.load(tmp_path / "merged"), IDS)


def assert_close(found, expected, tolerance=2e-5):
    assert np.abs(found - expected).max() <= tolerance * np.ptp(expected)


USES = [
    pytest.param(uses, marks=() if len(uses) == 2 else pytest.mark.full)
    for uses in ([], ["poet"], ["poet=-0.7"], ["critic"], ["poet=0.5", "critic=1.5"])
]


@pytest.mark.parametrize("uses", USES)
def test_a_sequence_with_adapters_is_the_model_with_them_merged(uses, model, base, adapters, tmp_path):
    used = read_uses(uses, "")
    found = logits_of(model, IDS, [used] * len(IDS))
    whole = [AdapterUse(str(adapters / use.name), use.strength) for use in used]
    assert_close(found, merged(base, whole, tmp_path))


def test_every_sequence_of_a_batch_has_its_own(model):
    each = [read_uses(uses, "") for uses in ([], ["poet"], ["critic=0.5"], ["poet", "critic=-1"])]
    together = logits_of(model, IDS, each)
    for row, uses in enumerate(each):
        assert_close(together[row], logits_of(model, [IDS[row]], [uses])[0], 5e-6)
    assert len({row.tobytes() for row in logits_of(model, [IDS[0]] * 4, each)}) == 4


def test_without_adapters_a_sequence_is_the_model_to_the_last_bit(model, base):
    both = logits_of(model, IDS, [(), (AdapterUse("poet"),), (), (AdapterUse("critic"),)])
    plain = logits_of(jaxchat.load(base), IDS)
    np.testing.assert_array_equal(both[::2], plain[::2])


def test_what_is_used_is_the_models_own_unless_a_request_says_more(model):
    assert model.uses == read_uses([model.uses[0], model.uses[1]], "")
    prompts, settings = [IDS[0]] * 4, {"max_new_tokens": 5}
    own, none, poet, both = model.generate(
        token_ids=prompts, adapters=[None, [], "poet", ["poet", "critic=0.5"]], **settings
    )
    assert own.logprobs == pytest.approx(both.logprobs, rel=1e-4)
    assert own.token_ids == both.token_ids
    for changed, result in ((None, none), ("poet", poet)):
        alone = model.with_adapters(changed).generate(token_ids=prompts, **settings)[0]
        assert alone.token_ids == result.token_ids
        assert alone.logprobs == pytest.approx(result.logprobs, rel=1e-4)
    assert len({tuple(np.round(result.logprobs, 4)) for result in (own, none, poet)}) == 3


@pytest.mark.full
def test_scores_are_of_what_each_text_uses(model):
    scores = model.score(token_ids=[IDS[0]] * 2, adapters=[[], "poet"], batch_size=2)
    for uses, score in zip(((), read_uses("poet", "")), scores, strict=True):
        logits = logits_of(model, [IDS[0]], [uses])[0]
        logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert score.logprobs == pytest.approx([logits[i, t] for i, t in enumerate(IDS[0][1:])], abs=1e-4)


def test_switching_adapters_and_plans_compiles_nothing(model):
    session = model.engine.session(model.plan, max_slots=5, uses=())

    def run(uses, plan="all"):
        session.set_adapters((), 0)
        session.set_plan(model.base_plan.select(plan))
        session.set_adapters(read_uses(uses, ""), 0)
        session.set_ids(IDS[0])
        return [token.id for token in generate(session, max_new_tokens=3)]

    run([])
    before = steps.prefill._cache_size(), steps.decode._cache_size()
    for uses in (["poet"], ["critic=2"], ["poet@2=0.5", "critic"], []):
        run(uses)
        run(uses, "0,1,1,2")
    assert (steps.prefill._cache_size(), steps.decode._cache_size()) == before


def test_decoding_is_what_a_prefill_of_the_same_would_be(model):
    """The native kernel of few rows, and XLA's of many."""
    session = model.engine.session(model.plan, uses=read_uses("poet", ""))
    session.set_ids(IDS[0])
    drawn = [token.id for token in generate(session, max_new_tokens=6)]
    text = [*IDS[0], *drawn]
    logits = logits_of(model, [text], [read_uses("poet", "")])[0]
    assert drawn == logits[len(IDS[0]) - 1 : -1].argmax(-1).tolist()


# --- the cache is of one use of adapters


def test_changing_adapters_in_a_session_computes_its_cache_anew(model):
    session = model.engine.session(model.plan, batch=2, uses=())
    for row in (0, 1):
        session.set_ids(IDS[row], row)
    session.prefill()
    session.set_adapters(read_uses("poet", ""), 1)
    assert session.cached == [7, 0]
    after = session.prefill()
    expected = logits_of(model, IDS[:2], [(), read_uses("poet", "")])
    assert_close(np.asarray(after[:2]), expected[:, -1])
    session.set_adapters(read_uses("poet", ""), 1)
    assert session.cached == [7, 7]  # the same again: nothing is lost


def test_changing_them_between_two_tokens_counts_at_the_next(model):
    session = model.engine.session(model.plan, uses=())
    session.set_ids(IDS[0])
    drawn = []
    for token in generate(session, max_new_tokens=6):
        drawn.append(token)
        if len(drawn) == 3:  # the next step has begun
            session.set_adapters(read_uses("poet", ""))
    text = [*IDS[0], *(token.id for token in drawn)]
    plain, poet = (logits_of(model, [text], [read_uses(uses, "")])[0] for uses in ([], ["poet"]))
    expected = [plain] * 3 + [poet] * 3
    for place, (token, logits) in enumerate(zip(drawn, expected, strict=True)):
        assert token.id == logits[len(IDS[0]) - 1 + place].argmax(), place


def test_an_adapter_in_a_slot_is_not_that_of_the_slot_of_another_plan(model):
    """The slots that run are the same, but the third of them is another slot."""
    session = model.engine.session(model.base_plan.select("0,1,1,2"), uses=read_uses("poet@2", ""))
    session.set_ids(IDS[0])
    session.prefill()
    session.set_plan(model.base_plan.select([[0, 0, 0], 0, 1, 1, 2]))
    assert session.cached == [0]


# --- plans and slots


def under(model, spec):
    return model.with_adapters(None).with_plan(spec)


def test_an_adapter_follows_its_layers_under_any_plan(model, base, adapters, tmp_path):
    spec = "[2, 0, [1, 0.5, 2], 1, 0]"
    found = logits_of(under(model, spec).with_adapters(["poet"]), IDS)
    uses = [AdapterUse(str(adapters / "poet"))]
    assert_close(found, merged(base, uses, tmp_path, layer_spec=spec))


def test_an_adapter_in_one_slot_is_in_no_other_of_its_layer(model, base, adapters, config, tmp_path):
    to_hf(base, tmp_path / "unrolled", layer_spec="0,1,1,2")
    tensors = {
        name.replace("layers.1.", "layers.2."): values
        for name, values in lora_tensors(projections(config), seed=1).items()
        if ".layers.1." in name
    }
    settings = {"target_modules": r".*\.2\..*(_proj)"}
    adapter = write_adapter(tmp_path / "second", tensors, **settings)
    expected = merged(tmp_path / "unrolled", [AdapterUse(str(adapter), 0.5)], tmp_path)
    planned = under(model, "0,1,1,2")
    assert_close(logits_of(planned.with_adapters("poet@2=0.5"), IDS), expected)
    first = logits_of(planned.with_adapters("poet@1=0.5"), IDS)
    assert np.abs(first - expected).max() > 0.01 * np.ptp(expected)


def test_layer_replication_is_a_plan_with_an_adapter_for_each_slot(base, config, tmp_path):
    """Against a model that is unrolled and merged slot by slot, with another adapter that follows layers."""
    longer = dataclasses.replace(config, num_layers=5)
    repeated = write_adapter(
        tmp_path / "repeated", lora_tensors(projections(longer), seed=3), target_modules="all-linear",
        layer_replication=[[0, 2], [0, 3]],
    )  # fmt: skip
    poet = write_adapter(
        tmp_path / "poet", lora_tensors(projections(config), seed=1), target_modules="all-linear"
    )
    uses = [AdapterUse(str(repeated)), AdapterUse(str(poet), 0.5)]
    expected = merged(base, uses, tmp_path)
    loaded = jaxchat.load(base, adapter=uses)
    assert (len(loaded.plan), loaded.config.num_layers) == (5, 5)
    weights = jaxchat.load(base).engine.params
    assert {n: w.shape for n, w in loaded.engine.params.items()} == {n: w.shape for n, w in weights.items()}
    assert_close(logits_of(loaded, IDS), expected)
    spec = "4,3,2,0"
    to_hf(tmp_path / "merged", tmp_path / "shuffled", layer_spec=spec)
    assert_close(logits_of(loaded.with_plan(spec), IDS), logits_of(jaxchat.load(tmp_path / "shuffled"), IDS))


# --- other weights


@pytest.mark.parametrize(
    ("quant", "kernels", "tolerance"),
    [
        ("int4", "reference", 5e-3),  # beside int4 the deltas are float16
        pytest.param("int8", "reference", 1e-4, marks=pytest.mark.full),
        pytest.param("int4", "auto", 0.06, marks=pytest.mark.full),  # the native kernels round activations
        pytest.param("int8", "auto", 0.01, marks=pytest.mark.full),
    ],
)
def test_adapters_beside_quantized_weights(quant, kernels, tolerance, base, adapters, tmp_path):
    """Against the numbers that the quantized weights stand for, with the adapter merged into those."""
    from jaxchat.quant import QuantFormat

    convert(base, tmp_path / "small", quant=QuantFormat.parse(quant))
    poet = AdapterUse(str(adapters / "poet"))
    to_hf(
        merged_directory(tmp_path / "small", [poet], dequantized=True), tmp_path / "merged", dequantize=True
    )
    expected = logits_of(jaxchat.load(tmp_path / "merged", kernels="reference"), IDS)
    loaded = jaxchat.load(tmp_path / "small", adapter=[poet], kernels=kernels)
    assert_close(logits_of(loaded, IDS), expected, tolerance)


@pytest.mark.full
def test_dora_beside_quantized_weights_takes_the_lengths_of_those(base, config, tmp_path):
    tensors = lora_tensors(projections(config))
    for name, (out, _) in projections(config).items():
        tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = np.linspace(0.5, 2, out, dtype=np.float32)
    use = AdapterUse(
        str(write_adapter(tmp_path / "dora", tensors, target_modules="all-linear", use_dora=True))
    )
    from jaxchat.quant import QuantFormat

    convert(base, tmp_path / "small", quant=QuantFormat.parse("int8"))
    to_hf(merged_directory(tmp_path / "small", [use], dequantized=True), tmp_path / "merged", dequantize=True)
    expected = logits_of(jaxchat.load(tmp_path / "merged", kernels="reference"), IDS)
    assert_close(
        logits_of(jaxchat.load(tmp_path / "small", adapter=[use], kernels="reference"), IDS), expected, 1e-3
    )


@pytest.mark.full
def test_adapters_beside_bfloat16_weights(base, adapters, tmp_path):
    model = jaxchat.load(base, dtype="bfloat16", adapter=[f"{adapters / 'poet'}"])
    convert(base, tmp_path / "half", dtype="bfloat16")
    # The product is exact in float32 here, and rounded in what is merged.
    expected = merged(tmp_path / "half", [AdapterUse(str(adapters / "poet"))], tmp_path)
    assert_close(logits_of(model, IDS), expected, 0.02)


# --- what is refused


def test_uses_that_cannot_be_are_refused_by_name(model, base, adapters):
    for uses, expected in {
        ("pot",): "adapter 'pot' is not loaded; did you mean poet",
        ("poet@3",): r"adapter 'poet@3': the layer plan has 3 slots; expected a slot from 0 to 2",
        ("critic@1",): r"critic changes embed.weight, lm_head.weight, norm.weight, which is in no slot",
        ("poet=x",): "poet: the strength is 'x'; expected a number",
        ("poet=1e9",): "strength",
        ("poet@-1",): "slot is '-1'; expected a whole number",
        ("=0.5",): "expected a folder",
        (3,): r"adapters is 3; expected a folder",
    }.items():
        with pytest.raises(UsageError, match=expected):
            model.with_adapters(list(uses))
    with pytest.raises(UsageError, match="got 1 entries for 2 prompts"):
        model.generate(token_ids=IDS[:2], adapters=["poet"])
    with pytest.raises(UsageError, match="the model has no adapters; load it with adapter"):
        jaxchat.load(base).with_adapters("poet")
    with pytest.raises(UsageError, match="the layer plan has 2 slots"):
        model.with_adapters("poet@2").with_plan("0:2")
    with pytest.raises(UsageError, match=r"layer plan has 3 slots"):
        jaxchat.load(base, adapter=f"{adapters / 'poet'}@7")


def test_a_model_with_a_recorded_plan_is_refused(base, adapters, tmp_path):
    convert(base, tmp_path / "planned", layer_spec="0,1,1")
    with pytest.raises(UsageError, match=r"is stored with a layer plan.*convert it with --to_hf"):
        jaxchat.load(tmp_path / "planned", adapter=str(adapters / "poet"))


def test_an_analysis_does_not_leave_adapters_out_silently(model):
    with pytest.raises(UsageError, match=r"without adapters.*merge them first"):
        sweep.Sweep(model.engine, model.plan, sweep.Windows(np.ones((1, 4), np.int32), np.array([4])))


def test_adapters_are_on_every_device_of_a_mesh(base, adapters):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    uses = [f"{adapters / 'poet'}", f"{adapters / 'critic'}=0.5"]
    sharded = jaxchat.load(base, adapter=uses, mesh=mesh)
    assert_close(logits_of(sharded, IDS), logits_of(jaxchat.load(base, adapter=uses), IDS))


def test_repetitions_that_differ_are_refused(base, config, tmp_path):
    longer = dataclasses.replace(config, num_layers=4)
    tensors = lora_tensors(projections(longer))
    for name, spans in (("a", [[0, 2], [1, 3]]), ("b", [[0, 3], [2, 3]])):
        write_adapter(tmp_path / name, tensors, target_modules="all-linear", layer_replication=spans)
    with pytest.raises(UsageError, match="have different layer_replication; load them apart"):
        jaxchat.load(base, adapter=[tmp_path / "a", tmp_path / "b"])
