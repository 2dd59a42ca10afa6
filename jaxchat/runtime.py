"""The library: load a model, then generate, stream, chat and score text under any layer plan.

Joins the engine (token ids) with the tokenizer and chat template (text).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax

from jaxchat.chat.batch import ChatBatch
from jaxchat.chat.conversation import Conversation
from jaxchat.chat.replies import Batch, Result, Row, Score, TextStream, numbered
from jaxchat.chat.session import ChatSession
from jaxchat.chat.vocabulary import Vocabulary
from jaxchat.checkpoints.assembly import Assembly
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.load import Progress, load_assembly, load_params
from jaxchat.checkpoints.quantized import Quant
from jaxchat.config import ModelConfig
from jaxchat.engine.compile_cache import enable_compilation_cache
from jaxchat.engine.session import Engine, Session, kernels_for, read_kv_dtype
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.layer_plan import LayerPlan
from jaxchat.options import DEFAULTS, GenerateOptions, GenerateOverrides, checked_options
from jaxchat.pallas import backends
from jaxchat.quant import QuantFormat
from jaxchat.recipes.recipe import read_recipe
from jaxchat.text.chat_template import ChatTemplate
from jaxchat.text.reasoning import ThoughtTags
from jaxchat.text.tokenizer import Tokenizer
from jaxchat.visible import shown

logger = logging.getLogger(__name__)


class Model:
    """A loaded model under one layer plan. Build with `load`; `with_plan` gives others over the same weights.

    Attributes:
      config: the model's configuration.
      plan: the layer plan that runs.
      base_plan: what plans in text count the slots of: the plan of the recipe, or the one that the checkpoint
        records, else every layer once. A `LayerPlan` is over the stacked layers.
      engine: the token-level runtime.
      tokenizer: None where the directory has none; token ids still work.
      template: the chat template, or None.
      max_slots: cache slots that its sessions reserve.
    """

    def __init__(
        self,
        engine: Engine,
        plan: LayerPlan,
        *,
        base_plan: LayerPlan | None = None,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        max_slots: int = 0,
    ):
        self.base_plan = base_plan or LayerPlan.identity(engine.config.num_layers)
        self.config: ModelConfig = engine.config
        self.engine = engine
        self.plan = plan
        self.tokenizer = tokenizer
        self.template = template
        self.max_slots = max_slots

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Token ids that end a text: the model's and the tokenizer's."""
        own = self.tokenizer.eos_ids if self.tokenizer else ()
        return tuple(dict.fromkeys((*self.config.eos_ids, *own)))

    @property
    def vocabulary(self) -> Vocabulary:
        """What the model's token ids are."""
        return Vocabulary(self.tokenizer, self.eos_ids, self.config.vocab_size)

    def with_plan(self, plan: str | LayerPlan) -> "Model":
        """The same weights under another plan: no copy, no reload, no recompilation up to the same slots.

        >>> doubled = model.with_plan("0:2,1:4,3:")  # doctest: +SKIP
        """
        return Model(
            self.engine,
            as_plan(plan, self.base_plan),
            base_plan=self.base_plan,
            tokenizer=self.tokenizer,
            template=self.template,
            max_slots=self.max_slots,
        )

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """A text's token ids as a prompt of its own (with BOS where the model wants one).

        Args:
          text: any string.
          parse_special: special tokens spelled out in it (`<|im_start|>`, `<fim_prefix>`) are those, as in
            transformers; otherwise they are text. Messages of a chat are always text.
        """
        if self.tokenizer is None:
            raise UsageError("this model directory has no tokenizer; give token_ids")
        ids = self.tokenizer.encode(text, parse_special=parse_special)
        self.vocabulary.check(ids)
        if text and not ids:
            raise JaxchatError(
                f"the tokenizer makes no token of the text {shown(text)}: its vocabulary is not the model's; "
                "download the tokenizer's files again, or give token_ids"
            )
        if ids[:2] == [self.tokenizer.bos_id] * 2:
            name = self.tokenizer.decode(ids[:1])
            logger.warning("the text begins with %s, which the model adds itself: it is there twice", name)
        return ids

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        token_ids: Sequence[Sequence[int]] | None = None,
        plans: Sequence[str | LayerPlan | None] | None = None,
        batch_size: int = 8,
        parse_special: bool = True,
        options: GenerateOptions = DEFAULTS,
        **overrides: Unpack[GenerateOverrides],
    ) -> list[Result]:
        """Continues each prompt; prompts of different lengths run together.

        Args:
          prompts: texts, continued as they are (no chat template). One string is a list of one.
          token_ids: instead of texts; needs no tokenizer.
          plans: a layer plan a prompt, None for the model's own; prompts under the same plan run together.
          batch_size: how many sequences are decoded together.
          parse_special: special tokens spelled out in a text are those, see `encode`.
          options: how to go on; single ones can be given by name: `max_new_tokens=20`.

        Returns:
          One result a prompt, in order.

        >>> model.generate("Once upon a time", max_new_tokens=20)[0].text  # doctest: +SKIP
        """
        settings = checked_options(overrides, options)
        ids = self._prompt_ids(prompts, token_ids, parse_special)
        chosen, slots = self._plans(plans, len(ids))
        results: dict[int, Result] = {}
        for group, session in self._groups(ids, chosen, slots, batch_size):
            rows = [Row.of_prompt(ids[number], numbered(settings, number)) for number in group]
            batch = Batch(self.vocabulary, session, rows)
            for _ in batch.pieces():
                pass
            results.update((number, batch.result(row)) for row, number in enumerate(group))
        return [results[number] for number in range(len(ids))]

    def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        parse_special: bool = True,
        options: GenerateOptions = DEFAULTS,
        **overrides: Unpack[GenerateOverrides],
    ) -> TextStream:
        """Continues one prompt, yielding text as it comes; everything is as for `generate`.

        >>> for piece in model.stream("Once upon a time", max_new_tokens=20):  # doctest: +SKIP
        ...     print(piece, end="", flush=True)
        """
        ids = self._prompt_ids(prompt, None if token_ids is None else [token_ids], parse_special)
        session = self.engine.session(self.plan, max_slots=self.max_slots)
        row = Row.of_prompt(ids[0], numbered(checked_options(overrides, options), 0))
        return TextStream(Batch(self.vocabulary, session, [row]))

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        options: GenerateOptions = DEFAULTS,
        **overrides: Unpack[GenerateOverrides],
    ) -> Result:
        """Replies to a conversation through the model's chat template.

        Args:
          messages: dicts with `role` and `content`, or one user message as a string.
          options: as for `generate`.

        >>> model.chat("do you like music?", max_new_tokens=20).text  # doctest: +SKIP
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        chat = self.chat_session()
        chat.conversation.extend(messages)
        stream = chat.reply(options=options, **overrides)
        for _ in stream:
            pass
        return stream.result

    def chat_session(
        self,
        system: str | None = None,
        *,
        reversed_role: bool = False,
        opening: str | None = None,
        thought_tags: ThoughtTags | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> ChatSession:
        """A conversation whose KV cache is kept between turns.

        Args:
          system: the system prompt.
          reversed_role: the model plays the user, and what is sent to it is the assistant's.
          opening: with `reversed_role`, the user's first message, which stands before what is sent.
          thought_tags: what the model thinks between; default what its chat template says.
          template_kwargs: variables for the chat template, such as `enable_thinking`.
        """
        conversation = self.conversation(
            system=system,
            reversed_role=reversed_role,
            opening=opening,
            thought_tags=thought_tags,
            template_kwargs=template_kwargs,
        )
        return ChatSession(self.chat_batch([conversation]))

    def chat_batch(self, conversations: Sequence[Conversation]) -> ChatBatch:
        """Several conversations, from `conversation`, whose replies are decoded as one batch."""
        return ChatBatch(
            self.engine,
            self.plan,
            conversations,
            self.vocabulary,
            base_plan=self.base_plan,
            max_slots=self.max_slots,
        )

    def load_session(self, path: str | Path) -> ChatSession:
        """The conversation that `ChatSession.save` wrote, its KV cache included.

        Raises:
          UsageError: there is no such file, or the chat is another model's or another plan's; the message
            says what differs and what to do.
          JaxchatError: the file is damaged, no session, or of another version.
        """
        chat = self.chat_session()
        chat.load(path)
        return chat

    def score(
        self,
        texts: str | Sequence[str] | None = None,
        *,
        token_ids: Sequence[Sequence[int]] | None = None,
        plans: Sequence[str | LayerPlan | None] | None = None,
        batch_size: int = 1,
        parse_special: bool = True,
    ) -> list[Score]:
        """Log-likelihood of every token of each text, given those before it.

        `plans`, `batch_size` and `parse_special` are as in `generate`.

        >>> model.score("Once upon a time")[0].total  # doctest: +SKIP
        """
        all_ids = self._prompt_ids(texts, token_ids, parse_special)
        chosen, slots = self._plans(plans, len(all_ids))
        scores: dict[int, Score] = {}
        for group, session in self._groups(all_ids, chosen, slots, batch_size):
            for number, logprobs in zip(group, session.score_rows(range(len(group))), strict=True):
                scores[number] = Score(list(all_ids[number]), logprobs.tolist())
        return [scores[number] for number in range(len(all_ids))]

    def _groups(
        self, ids: Sequence[Sequence[int]], plans: Sequence[LayerPlan], slots: int, batch_size: int
    ) -> Iterator[tuple[list[int], Session]]:
        """The numbers of the prompts that run together, under one plan, and a session that holds them."""
        session: Session | None = None
        for plan in dict.fromkeys(plans):
            numbers = [number for number, other in enumerate(plans) if other == plan]
            for start in range(0, len(numbers), batch_size):
                group = numbers[start : start + batch_size]
                if session is None or session.batch != len(group):
                    session = self.engine.session(plan, batch=len(group), max_slots=slots)
                session.set_plan(plan)
                for row, number in enumerate(group):
                    session.set_ids(ids[number], row)
                yield group, session

    def _prompt_ids(
        self,
        prompts: str | Sequence[str] | None,
        token_ids: Sequence[Sequence[int]] | None,
        parse_special: bool,
    ) -> list[list[int]]:
        if (prompts is None) == (token_ids is None):
            raise UsageError("give either prompts or token_ids")
        if token_ids is not None:
            ids = [list(row) for row in token_ids]
        else:
            texts = [prompts] if isinstance(prompts, str) else prompts or []
            ids = [self.encode(text, parse_special=parse_special) for text in texts]
        for number, row in enumerate(ids):
            if not row:
                raise UsageError(f"prompt {number} is empty; give at least one token")
        return ids

    def _plans(
        self, plans: Sequence[str | LayerPlan | None] | None, count: int
    ) -> tuple[list[LayerPlan], int]:
        """The plan of each of `count` prompts, and the cache slots that let all share their executables."""
        if plans is None:
            plans = [None] * count
        if isinstance(plans, str) or len(plans) != count:
            what = f"the string {plans!r}" if isinstance(plans, str) else f"{len(plans)} plans"
            raise UsageError(f"plans: got {what} for {count} prompts; give a list of one a prompt (or None)")
        chosen = [self.plan if plan is None else as_plan(plan, self.base_plan) for plan in plans]
        for plan in chosen:  # before the first one runs
            self.engine.check_plan(plan)
        return chosen, max([self.max_slots, *(len(plan.executed()) for plan in chosen)])

    def conversation(self, **settings: Any) -> Conversation:
        """A history for this model; the settings are those of `Conversation`. `chat_session` runs one."""
        if self.tokenizer is None:
            raise UsageError("this model directory has no tokenizer; chat needs one")
        if self.template is None:
            raise UsageError(
                "this model has no chat template (tokenizer_config.json, chat_template.jinja); "
                "it can continue a text: use --format completion"
            )
        return Conversation(self.template, self.tokenizer, **settings)


def load(
    path: str | Path | ModelDirectory | None = None,
    plan: str | LayerPlan | None = None,
    *,
    recipe: str | Path | Assembly | None = None,
    model_paths: Mapping[str, str | Path] | None = None,
    keep_identity: bool = False,
    dtype: str | None = None,
    quant: str | QuantFormat | None = None,
    kv_dtype: str | None = None,
    kernels: str = "auto",
    max_length: int | None = None,
    max_slots: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    compilation_cache_dir: str | None = None,
    progress: Progress | None = None,
) -> Model:
    """Loads a model directory (Hugging Face layout, or one that `tools/convert.py` wrote), or a recipe.

    Args:
      path: the directory.
      plan: a layer plan or `--layer_spec` string; default every layer once, in order. Of a recipe, or of a
        directory that records a plan, a string counts the slots, and the default is that plan.
      recipe: instead of `path`, a mergekit recipe; its remarks are logged as warnings. Or what `read_recipe`
        made of one.
      model_paths: model names of the recipe -> directories.
      keep_identity: executes the recipe's layers that change nothing, too.
      dtype: of the weights, `float32`, `bfloat16` or `float16`; default as stored.
      quant: quantizes the weights while they are read: `int8`, `int4`, `int4:64`, ... (`QuantFormat.parse`);
        default as stored.
      kv_dtype: of the KV cache, `float32`, `bfloat16` or `int8`; default that of the activations, which is
        float32 on CPU and with float32 weights, else bfloat16.
      kernels: `auto`, `reference`, `native` or `pallas`: which implementations of the operations run.
      max_length: the longest context in tokens (the KV cache grows up to it); default the model's own.
      max_slots: cache slots to reserve, so that longer plans chosen later need no new executable.
      mesh: shards the model over its `model` axis and batches over its `data` axis.
      compilation_cache_dir: where compiled executables are kept; default a user cache directory, "" is none.
      progress: called while weights are read, see `checkpoints.load`.

    Raises:
      UsageError, JaxchatError: one line that says what is wrong with the directory, plan or setting.

    >>> model = jaxchat.load("path/to/model", plan="0:8,4:12,8:", quant="int4")  # doctest: +SKIP
    """
    wanted: Quant = QuantFormat.parse(quant) if isinstance(quant, str) else quant or "auto"
    enable_compilation_cache(compilation_cache_dir)
    if (path is None) == (recipe is None):
        raise UsageError("give a model directory or a recipe, one of them")
    if recipe is None:
        assembly, directory = None, ModelDirectory.at(path or "")
        base_plan = directory.plan
    else:
        assembly = recipe if isinstance(recipe, Assembly) else _read(recipe, model_paths, keep_identity)
        directory, base_plan = assembly.models[assembly.tokenizer], assembly.plan
    chosen = as_plan(plan, base_plan)
    # Before the weights: what is wrong with a setting or a small file is not told after minutes of loading.
    selected = kernels_for(kernels, backends.devices()[0] if mesh is None else mesh.devices.flat[0], mesh)
    cache_dtype = None if kv_dtype is None else read_kv_dtype(kv_dtype)
    tokenizer, template = directory.tokenizer, directory.template
    weights: dict[str, Any] = {"dtype": dtype, "quant": wanted, "mesh": mesh, "progress": progress}
    if assembly is None:
        config, params = load_params(directory, **weights)
    else:
        config, params = load_assembly(assembly, **weights)
    engine = Engine(config, params, max_length=max_length, kv_dtype=cache_dtype, kernels=selected, mesh=mesh)
    model = Model(
        engine,
        chosen,
        base_plan=base_plan,
        tokenizer=tokenizer,
        template=template,
        max_slots=max_slots,
    )
    if tokenizer is not None and max(tokenizer.special_tokens.values(), default=0) >= config.vocab_size:
        _warn_of_template(model, directory)
    return model


def _warn_of_template(model: Model, directory: ModelDirectory) -> None:
    """Says once that no chat can work, where the template writes a token that the model does not have."""
    try:
        conversation = model.conversation()
        conversation.add_typed("Hello")
        unknown = model.vocabulary.unknown(conversation.prompt_ids())
    except JaxchatError:  # whoever chats is told
        return
    if unknown is not None:
        logger.warning("%s: the chat template needs what the model does not have: %s", directory, unknown)


def _read(recipe: str | Path, paths: Mapping[str, str | Path] | None, keep_identity: bool) -> Assembly:
    assembly = read_recipe(recipe, paths, keep_identity=keep_identity)
    for note in assembly.notes:
        logger.warning("%s: %s", recipe, note)
    return assembly


def as_plan(plan: str | LayerPlan | None, base: LayerPlan) -> LayerPlan:
    """A plan over the stacked layers: a spec of the slots of `base`, a plan as it is, or `base` itself."""
    if isinstance(plan, str):
        return base.select(plan)
    return base if plan is None else plan
