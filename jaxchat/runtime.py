"""The library: load a model, then generate, stream, chat and score text under any layer plan.

Joins the engine (token ids) with the tokenizer and chat template (text).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import jax
import numpy as np

from jaxchat import arguments
from jaxchat.adapter_use import AdapterLike, Uses, read_uses, refuse_recipe
from jaxchat.chat.batch import ChatBatch
from jaxchat.chat.conversation import Conversation
from jaxchat.chat.replies import Batch, Likelihood, Result, Row, Score, TextStream, numbered
from jaxchat.chat.session import ChatSession
from jaxchat.chat.vocabulary import Vocabulary
from jaxchat.checkpoints.adapter import common_replication, read_adapter, replicated_config
from jaxchat.checkpoints.assembly import Assembly
from jaxchat.checkpoints.delta import model_at
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.load import Progress, load_assembly, load_params
from jaxchat.checkpoints.low_rank import Adapter
from jaxchat.checkpoints.quantized import Quant
from jaxchat.config import ModelConfig
from jaxchat.draft_use import DraftUse, read_draft
from jaxchat.engine.adapters import adapter_set, check_uses
from jaxchat.engine.compile_cache import enable_compilation_cache
from jaxchat.engine.drafts import load_draft
from jaxchat.engine.session import Engine, Session, default_dtype, kernels_for, placement_of, read_kv_dtype
from jaxchat.errors import JaxchatError, UsageError, option, told
from jaxchat.layer_plan import LayerPlan, PlanLike, as_plan
from jaxchat.options import DEFAULTS, MAX_SLOTS, GenerateOptions, GenerateOverrides, checked_options
from jaxchat.pallas import backends
from jaxchat.quant import QuantFormat
from jaxchat.recipes.recipe import read_recipe
from jaxchat.text.chat_template import ChatTemplate
from jaxchat.text.named_templates import advice_on, chosen_template
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
      name: what people call it, "" where nobody said.
      uses: what its requests use of the adapters that it was loaded with, where they do not say it.
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
        name: str = "",
        uses: Uses | None = None,
    ):
        self.base_plan = base_plan or LayerPlan.identity(engine.config.num_layers)
        self.config: ModelConfig = engine.config
        self.engine = engine
        self.plan = plan
        self.tokenizer = tokenizer
        self.template = template
        self.max_slots = max_slots
        self.name = name
        self.uses = engine.uses if uses is None else uses

    def __repr__(self) -> str:
        """What it is, in a line."""
        return f"<Model {self.engine.described()}, plan {shown(str(self.plan))}>"

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Token ids that end a text: the model's and the tokenizer's."""
        own = self.tokenizer.eos_ids if self.tokenizer else ()
        return tuple(dict.fromkeys((*self.config.eos_ids, *own)))

    @property
    def vocabulary(self) -> Vocabulary:
        """What the model's token ids are."""
        return Vocabulary(self.tokenizer, self.eos_ids, self.config.vocab_size)

    def with_plan(self, plan: PlanLike) -> "Model":
        """The same weights under another plan: no copy, no reload, no recompilation up to the same slots.

        >>> doubled = model.with_plan("0:2,1:4,3:")  # doctest: +SKIP
        >>> shorter = model.with_plan([0, 1, slice(4, None), [-1, 0.5, 1.0]])  # doctest: +SKIP
        """
        if plan is None:
            raise arguments.refused("plan", plan, "a layer plan; 'all' is every layer once")
        chosen = as_plan(plan, self.base_plan)
        self.engine.check_uses(self.uses, chosen)
        return Model(
            self.engine,
            chosen,
            base_plan=self.base_plan,
            tokenizer=self.tokenizer,
            template=self.template,
            max_slots=self.max_slots,
            name=self.name,
            uses=self.uses,
        )

    def with_adapters(self, adapters: AdapterLike | Sequence[AdapterLike] | None) -> "Model":
        """The same weights with other adapters, of those it was loaded with: nothing is read or compiled.

        Several add up, each being what it is to the model itself. (PEFT applies DoRA to the sum of model and
        adapters before it, so that their order counts; here it does not.)

        Args:
          adapters: names or directories, each with a strength or a slot if wanted: `"poet"`, `"poet=0.5"`,
            `["poet@3", "critic=0.2"]`; None or [] is the model itself.

        >>> model = jaxchat.load("path/to/model", adapter=["loras/poet", "loras/critic"])  # doctest: +SKIP
        >>> poet, plain = model.with_adapters("poet"), model.with_adapters(None)  # doctest: +SKIP
        """
        uses = read_uses(adapters, "adapters")
        self.engine.check_uses(uses, self.plan)
        return Model(
            self.engine,
            self.plan,
            base_plan=self.base_plan,
            tokenizer=self.tokenizer,
            template=self.template,
            max_slots=self.max_slots,
            name=self.name,
            uses=uses,
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
        arguments.text("text", text)
        ids = self.tokenizer.encode(text, parse_special=arguments.switch("parse_special", parse_special))
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

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text that token ids stand for: of a prompt, or of `Result.token_ids`.

        Args:
          ids: any of the model's; bytes that are no UTF-8 become U+FFFD.
          skip_special: leaves out special tokens, such as those that begin and end a text.

        >>> model.decode(model.encode("Once upon a time"), skip_special=True)  # doctest: +SKIP
        'Once upon a time'
        """
        if self.tokenizer is None:
            raise UsageError("this model directory has no tokenizer, so its token ids are no text")
        ids = arguments.token_ids("ids", ids)
        self.engine.check_ids(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=arguments.switch("skip_special", skip_special))

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        token_ids: Sequence[Sequence[int]] | None = None,
        plans: Sequence[PlanLike | None] | None = None,
        adapters: Sequence[AdapterLike | Sequence[AdapterLike] | None] | None = None,
        batch_size: int = 8,
        parse_special: bool = True,
        options: GenerateOptions = DEFAULTS,
        **overrides: Unpack[GenerateOverrides],
    ) -> list[Result]:
        """Continues each prompt; prompts of different lengths run together.

        Args:
          prompts: texts, continued as they are (no chat template). One string is a list of one.
          token_ids: instead of texts; needs no tokenizer.
          plans: a layer plan a prompt, as `with_plan` takes it, None for the model's own; prompts under the
            same plan run together.
          adapters: what each prompt uses of the model's adapters, as `with_adapters` takes it, None for the
            model's own and [] for none; prompts with different ones run together.
          batch_size: how many sequences are decoded together.
          parse_special: special tokens spelled out in a text are those, see `encode`.
          options: how to go on; single ones can be given by name: `max_new_tokens=20`.

        Returns:
          One result a prompt, in order.

        >>> model.generate("Once upon a time", max_new_tokens=20)[0].text  # doctest: +SKIP
        """
        settings = checked_options(overrides, options)
        arguments.whole("batch_size", batch_size, 1)
        ids = self._prompt_ids("prompts", prompts, token_ids, parse_special)
        chosen, slots = self._plans(plans, len(ids))
        uses = self._uses(adapters, chosen)
        results: dict[int, Result] = {}
        for group, session in self._groups(ids, chosen, uses, slots, batch_size):
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
        settings = checked_options(overrides, options)
        if prompt is not None and not isinstance(prompt, str):
            raise arguments.refused("prompt", prompt, "one text (generate takes several)")
        one = None if token_ids is None else [arguments.token_ids("token_ids", token_ids)]
        ids = self._prompt_ids("prompt", prompt, one, parse_special)
        session = self.engine.session(self.plan, max_slots=self.max_slots, uses=self.uses)
        row = Row.of_prompt(ids[0], numbered(settings, 0))
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
          messages: dicts with `role` and `content`, or one user message as a string. Content in parts is
            for chat templates that read it.
          options: as for `generate`.

        >>> model.chat("do you like music?", max_new_tokens=20).text  # doctest: +SKIP
        """
        settings = checked_options(overrides, options)
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        listed = arguments.several("messages", messages, "a text, or a list of dicts with role and content")
        if not listed:
            raise UsageError("messages is empty; give at least one")
        chat = self.chat_session()
        chat.conversation.extend(listed)
        stream = chat.reply(options=settings)
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
        for name, value in (("system", system), ("opening", opening)):
            if value is not None:
                arguments.text(name, value)
        arguments.switch("reversed_role", reversed_role)
        if template_kwargs is not None:
            arguments.mapping("template_kwargs", template_kwargs)
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
            uses=self.uses,
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
        plans: Sequence[PlanLike | None] | None = None,
        adapters: Sequence[AdapterLike | Sequence[AdapterLike] | None] | None = None,
        batch_size: int = 1,
        parse_special: bool = True,
    ) -> list[Score]:
        """Log-likelihood of every token of each text, given those before it.

        `plans`, `adapters`, `batch_size` and `parse_special` are as in `generate`.

        >>> model.score("Once upon a time")[0].total  # doctest: +SKIP
        """
        arguments.whole("batch_size", batch_size, 1)
        all_ids = self._prompt_ids("texts", texts, token_ids, parse_special)
        chosen, slots = self._plans(plans, len(all_ids))
        uses = self._uses(adapters, chosen)
        scores: dict[int, Score] = {}
        for group, session in self._groups(all_ids, chosen, uses, slots, batch_size):
            for number, row in zip(group, session.score_rows(range(len(group))), strict=True):
                scores[number] = Score(list(all_ids[number]), row.logprobs.tolist())
        return [scores[number] for number in range(len(all_ids))]

    def loglikelihoods(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        batch_size: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Likelihood]:
        """How probable continuations are, each after a context of its own; what contexts share runs once.

        Args:
          pairs: token ids, (context, continuation), of at least one token each. For texts see
            `evaluation.likelihood.encode_pair`.
          batch_size: how many are computed together.
          progress: called with how many of how many are known.

        Raises:
          UsageError: a pair is empty, or longer than the context.

        >>> model.loglikelihoods([(model.encode("Once upon a"), model.encode(" time"))])  # doctest: +SKIP
        """
        arguments.whole("batch_size", batch_size, 1)
        for number, (context, continuation) in enumerate(pairs):
            if not len(context) or not len(continuation):
                raise UsageError(f"pairs[{number}] has an empty part; give at least one token of each")
        found: dict[int, Likelihood] = {}
        batch = min(batch_size, len(pairs))
        session = self.engine.session(self.plan, batch=batch or 1, max_slots=self.max_slots, uses=self.uses)
        for group in _runs([[*map(int, context), *map(int, more)] for context, more in pairs], batch):
            starts = {}
            for row, number in group.items():
                context, continuation = pairs[number]
                session.set_ids([*context, *continuation], row)
                starts[row] = len(context)
            scores = session.score_rows(list(group), starts)
            for number, (logprobs, greedy) in zip(group.values(), scores, strict=True):
                found[number] = Likelihood(float(np.sum(logprobs, dtype=np.float64)), bool(greedy.all()))
            if progress is not None:
                progress(len(found), len(pairs))
        return [found[number] for number in range(len(pairs))]

    def embed(
        self,
        texts: str | Sequence[str] | None = None,
        *,
        token_ids: Sequence[Sequence[int]] | None = None,
        plans: Sequence[PlanLike | None] | None = None,
        adapters: Sequence[AdapterLike | Sequence[AdapterLike] | None] | None = None,
        batch_size: int = 8,
        parse_special: bool = True,
    ) -> np.ndarray:
        """A vector for each text: the mean over its tokens of the final, normed hidden states, of length 1.

        That is what a decoder without a pooling head can give; cosines between such vectors tell texts of one
        kind from those of another, less well than a model that was trained for it. A text's vector does not
        depend on those that it is computed with, as far as rounding allows.

        `plans`, `adapters` and `parse_special` are as in `generate`; `batch_size` texts run together.

        Returns:
          float32 [texts, D].

        >>> model.embed(["a cat", "a dog"]).shape  # doctest: +SKIP
        (2, 896)
        """
        arguments.whole("batch_size", batch_size, 1)
        all_ids = self._prompt_ids("texts", texts, token_ids, parse_special)
        chosen, slots = self._plans(plans, len(all_ids))
        uses = self._uses(adapters, chosen)
        vectors = np.zeros((len(all_ids), self.config.hidden_size), np.float32)
        for group, session in self._groups(all_ids, chosen, uses, slots, batch_size):
            vectors[group] = [unit(mean) for mean in session.mean_rows(range(len(group)))]
        return vectors

    def _groups(
        self,
        ids: Sequence[Sequence[int]],
        plans: Sequence[LayerPlan],
        uses: Sequence[Uses],
        slots: int,
        batch_size: int,
    ) -> Iterator[tuple[list[int], Session]]:
        """The numbers of the prompts that run together, under one plan, and a session that holds them."""
        session: Session | None = None
        for plan in dict.fromkeys(plans):
            numbers = [number for number, other in enumerate(plans) if other == plan]
            for start in range(0, len(numbers), batch_size):
                group = numbers[start : start + batch_size]
                if session is None or session.batch != len(group):
                    session = self.engine.session(plan, batch=len(group), max_slots=slots, uses=())
                if plan != session.plan:
                    for row in range(len(group)):
                        session.set_adapters((), row)  # those before may be in slots that this plan has not
                    session.set_plan(plan)
                for row, number in enumerate(group):
                    session.set_adapters(uses[number], row)
                    session.set_ids(ids[number], row)
                yield group, session

    def _prompt_ids(
        self,
        name: str,
        prompts: str | Sequence[str] | None,
        token_ids: Sequence[Sequence[int]] | None,
        parse_special: bool,
    ) -> list[list[int]]:
        """The ids of the texts that the caller's parameter `name` holds, or those that are given."""
        if (prompts is None) == (token_ids is None):
            raise UsageError(f"give either {name} or token_ids")
        if token_ids is not None:
            expected = "a list with a list of token ids for each prompt, such as [[1, 5, 9]]"
            rows = arguments.several("token_ids", token_ids, expected)
            if rows and not hasattr(rows[0], "__iter__"):
                raise arguments.refused("token_ids", token_ids, expected)
            ids = [arguments.token_ids(f"token_ids[{number}]", row) for number, row in enumerate(rows)]
        else:
            texts = arguments.texts(name, prompts)
            ids = [self.encode(text, parse_special=parse_special) for text in texts]
        for number, row in enumerate(ids):
            if not row:
                raise UsageError(f"prompt {number} is empty; give at least one token")
        return ids

    def _plans(self, plans: Sequence[PlanLike | None] | None, count: int) -> tuple[list[LayerPlan], int]:
        """The plan of each of `count` prompts, and the cache slots that let all share their executables."""
        if plans is None:
            plans = [None] * count
        try:
            listed = arguments.several("plans", plans, "a list of one a prompt (or None)")
        except UsageError:
            raise UsageError(
                f"plans: got {shown(plans)} for {count} prompts; give a list of one a prompt (or None)"
            ) from None
        if len(listed) != count:
            raise UsageError(
                f"plans: got {len(listed)} plans for {count} prompts; give a list of one a prompt (or None)"
            )
        chosen = [
            self.plan if plan is None else as_plan(plan, self.base_plan, f"plans[{number}]")
            for number, plan in enumerate(listed)
        ]
        return chosen, max([self.max_slots, *(len(plan.executed()) for plan in chosen)])

    def _uses(
        self,
        adapters: Sequence[AdapterLike | Sequence[AdapterLike] | None] | None,
        plans: Sequence[LayerPlan],
    ) -> list[Uses]:
        """What each prompt, under its plan, uses of the adapters."""
        if adapters is None:
            adapters = [None] * len(plans)
        expected = "a list of one a prompt: a name, a list of names, [] for none, or None"
        listed = arguments.several("adapters", adapters, expected)
        if len(listed) != len(plans):
            raise UsageError(
                f"adapters: got {len(listed)} entries for {len(plans)} prompts; give a list of one a prompt"
            )
        uses = [
            self.uses if entry is None else read_uses(entry, f"adapters[{number}]")
            for number, entry in enumerate(listed)
        ]
        for own, plan in zip(uses, plans, strict=True):
            self.engine.check_uses(own, plan)
        return uses

    def conversation(self, **settings: Any) -> Conversation:
        """A history for this model; the settings are those of `Conversation`. `chat_session` runs one."""
        if self.tokenizer is None:
            raise UsageError("this model directory has no tokenizer; chat needs one")
        if self.template is None:
            advice = advice_on(self.name) or f"{option('chat_template', 'NAME')} gives it one"
            other = told("use generate() or stream()", "use --format completion")
            raise UsageError(
                "this model has no chat template (tokenizer_config.json, chat_template.jinja); "
                f"{advice}, or it can continue a text: {other}"
            )
        return Conversation(self.template, self.tokenizer, **settings)


def _runs(texts: Sequence[list[int]], batch: int) -> Iterator[dict[int, int]]:
    """Texts in an order in which what a sequence of a batch holds is much of what it gets next.

    Yields:
      Sequence -> the number of its text.
    """
    order = sorted(range(len(texts)), key=lambda number: texts[number])
    length = -(-len(order) // batch) if order else 0
    for step in range(length):
        yield {row: order[row * length + step] for row in range(batch) if row * length + step < len(order)}


def unit(vector: np.ndarray) -> np.ndarray:
    """The vector of length 1 in the same direction, float32 [D]; zeros stay zeros."""
    length = np.sqrt(np.sum(np.square(vector, dtype=np.float64)))
    return (vector / max(length, np.finfo(np.float32).tiny)).astype(np.float32)


def load(
    path: str | Path | ModelDirectory | None = None,
    plan: PlanLike | None = None,
    *,
    base: str | Path | ModelDirectory | None = None,
    recipe: str | Path | Assembly | None = None,
    model_paths: Mapping[str, str | Path] | None = None,
    keep_identity: bool = False,
    adapter: AdapterLike | Sequence[AdapterLike] | None = None,
    draft: str | None = None,
    draft_tree: str | None = None,
    draft_accept: str = "lossless",
    dtype: str | None = None,
    quant: str | QuantFormat | None = None,
    keep: Literal["small", "exact"] = "small",
    kv_dtype: str | None = None,
    kernels: str = "auto",
    max_length: int | None = None,
    max_slots: int = 0,
    chat_template: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    compilation_cache_dir: str | None = None,
    progress: Progress | None = None,
) -> Model:
    """Loads a model (Hugging Face layout, GGUF, or what `tools/convert.py` wrote), or a recipe.

    Args:
      path: the directory or GGUF file; "box" is the model in the box, unless there is a folder of that name.
      plan: a layer plan in any notation (`LayerPlan.parse`), a list of layers (`LayerPlan.of`) or a
        `LayerPlan`; default every layer once, in order. Of a recipe, or of a directory that records a plan,
        text and lists count the slots, and the default is that plan.
      base: the model to which the one at `path` is the difference, where it was published so.
      recipe: instead of `path`, a mergekit recipe; its remarks are logged as warnings. Or what `read_recipe`
        made of one.
      model_paths: model names of the recipe -> directories.
      keep_identity: executes the recipe's layers that change nothing, too.
      adapter: LoRA adapters, one or a list: PEFT's directory or a GGUF file, with a strength (`"DIR=0.5"`) or
        the one slot that it is in (`"DIR@3"`) if wanted. All are loaded, and used with these strengths where
        a request does not say (`generate(adapters=)`, `Model.with_adapters`): changing that compiles nothing.
        One that repeats layers (`layer_replication`) makes the model one of so many layers.
      draft: guesses tokens ahead, which the model then verifies several at a time: `chimera:DIR`, heads that
        were trained for it. Texts are the same, greedy or sampled: with quantized weights on a CPU to the
        last bit, elsewhere as far as rounding allows, as several tokens are summed in another order than one.
      draft_tree: what is guessed: `25`, a tree of 25 tokens as deep as there are heads (the default), or
        `chain:N`, N tokens one after the other.
      draft_accept: `lossless`; or a rule that is LOSSY, accepting more and changing what is generated:
        `typical` takes what is probable enough (Medusa's rule), `top_k` what is among the 3 likeliest.
      dtype: of the weights, `float32`, `bfloat16` or `float16`; default as stored.
      quant: quantizes the weights while they are read: `int8`, `int4`, `int4:64`, ... (`QuantFormat.parse`);
        default as stored.
      keep: of weights that another program has quantized in a way that no format here is the same as: `small`
        quantizes them again, `exact` keeps the numbers they stand for, at 32 bits.
      kv_dtype: of the KV cache, `float32`, `bfloat16` or `int8`; default that of the activations, which is
        float32 on CPU and with float32 weights, else bfloat16.
      kernels: `auto`, `reference`, `native` or `pallas`: which implementations of the operations run.
      max_length: the longest context in tokens (the KV cache grows up to it); default the model's own.
      max_slots: cache slots to reserve, so that longer plans chosen later need no new executable.
      chat_template: instead of the model's own, a Jinja file or the name of a prompt format: `vicuna_v1.1`,
        `alpaca`, ... (`text.named_templates.NAMED`).
      mesh: shards the model over its `model` axis and batches over its `data` axis.
      compilation_cache_dir: where compiled executables are kept; default a user cache directory, "" is none.
      progress: called while weights are read, see `checkpoints.load`.

    Raises:
      UsageError, JaxchatError: one line that says what is wrong with the directory, plan or setting.

    >>> model = jaxchat.load("path/to/model", plan="0:8,4:12,8:", quant="int4")  # doctest: +SKIP
    """
    _check_settings(locals())
    wanted_draft = _read_draft(draft, draft_tree, draft_accept)
    uses = read_uses(adapter, option("adapter"))
    wanted: Quant = QuantFormat.parse(quant) if isinstance(quant, str) else quant or "auto"
    enable_compilation_cache(compilation_cache_dir)
    if (path is None) == (recipe is None):
        raise UsageError("give a model directory or a recipe, one of them")
    adapters: list[Adapter] = []
    if recipe is None:
        assembly, directory = None, model_at(path or "", base)
        adapters, base_plan = _adapters(uses, directory), directory.plan
    else:
        _refuse_with_recipe(uses, base)
        assembly = recipe if isinstance(recipe, Assembly) else _read(recipe, model_paths, keep_identity)
        directory, base_plan = assembly.models[assembly.tokenizer], assembly.plan
    if (repeated := common_replication(adapters)) is not None:
        base_plan = LayerPlan.identity(len(repeated))
    chosen = as_plan(plan, base_plan)
    check_uses(adapters, uses, chosen)
    # Before the weights: what is wrong with a setting or a small file is not told after minutes of loading.
    selected = kernels_for(kernels, backends.devices()[0] if mesh is None else mesh.devices.flat[0], mesh)
    cache_dtype = None if kv_dtype is None else read_kv_dtype(kv_dtype)
    tokenizer, template = directory.tokenizer, directory.template
    if chat_template is not None and tokenizer is not None:
        template = chosen_template(chat_template, tokenizer, template)
    weights: dict[str, Any] = {
        "dtype": dtype,
        "quant": wanted,
        "keep": keep,
        "mesh": mesh,
        "progress": progress,
    }
    if assembly is None:
        config, params = load_params(directory, **weights)
    else:
        config, params = load_assembly(assembly, **weights)
    if repeated is not None:
        config = replicated_config(config, repeated)
    placement = placement_of(params, mesh)
    engine = Engine(
        config,
        params,
        max_length=max_length,
        kv_dtype=cache_dtype,
        kernels=selected,
        mesh=mesh,
        adapters=adapter_set(adapters, config, params, dtype=default_dtype(params), placement=placement)
        if adapters
        else None,
        uses=uses,
        draft=None if wanted_draft is None else load_draft(wanted_draft, config, params),
        draft_accept=draft_accept,
    )
    model = Model(
        engine,
        chosen,
        base_plan=base_plan,
        tokenizer=tokenizer,
        template=template,
        max_slots=max_slots,
        name=directory.name,
    )
    if tokenizer is not None and max(tokenizer.special_tokens.values(), default=0) >= config.vocab_size:
        _warn_of_template(model, directory)
    return model


def _read_draft(draft: str | None, shape: str | None, accept: str) -> DraftUse | None:
    if draft is not None:
        return read_draft(draft, shape, accept)
    if shape is not None or accept != "lossless":
        name = "draft_accept" if shape is None else "draft_tree"
        raise UsageError(f"{option(name)} is given without {option('draft')}; it says how to use a draft")
    return None


def _refuse_with_recipe(uses: Uses, base: object) -> None:
    """Raises UsageError for what belongs to one model's directory."""
    if uses:
        raise refuse_recipe(option("adapter"))
    if base is not None:
        raise UsageError(f"{option('base')} is given with a recipe; it is what a model directory is added to")


def _adapters(uses: Uses, directory: ModelDirectory) -> list[Adapter]:
    """The adapters for a model, each once.

    Raises:
      UsageError: the layers of the directory are not those that an adapter counts.
    """
    names = list(dict.fromkeys(use.name for use in uses))
    if names and not directory.is_plain:
        raise UsageError(
            f"{directory}: is stored with a layer plan or a recipe's layers, and adapters count the layers "
            f"of the model itself; convert it with --to_hf, or load that model with {option('plan')}"
        )
    return [read_adapter(name, directory.config) for name in names]


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


_PATH = (str, Path)
_SETTINGS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "path": ((*_PATH, ModelDirectory), "a directory"),
    "base": ((*_PATH, ModelDirectory), "a directory"),
    "recipe": ((*_PATH, Assembly), "a file, or what read_recipe gave"),
    "draft": ((str,), "chimera:DIR"),
    "draft_tree": ((str,), "25 or chain:N"),
    "draft_accept": ((str,), "lossless, typical or top_k"),
    "dtype": ((str,), "float32, bfloat16 or float16"),
    "quant": ((str, QuantFormat), "a format such as 'int8'"),
    "keep": ((str,), "small or exact"),
    "kv_dtype": ((str,), "float32, bfloat16 or int8"),
    "kernels": ((str,), "auto, reference, native or pallas"),
    "chat_template": (_PATH, "a name or a Jinja file"),
    "mesh": ((jax.sharding.Mesh,), "a jax.sharding.Mesh"),
    "compilation_cache_dir": (_PATH, "a directory"),
}
"""Of `load`: what may be given beside None."""


def _check_settings(given: Mapping[str, Any]) -> None:
    """Refuses what is no value of a parameter of `load`."""
    for name, (types, expected) in _SETTINGS.items():
        if given[name] is not None and not isinstance(given[name], types):
            raise arguments.refused(name, given[name], expected)
    if given["keep"] not in ("small", "exact"):
        raise arguments.refused("keep", given["keep"], _SETTINGS["keep"][1])
    for name in ("kernels", "draft_accept"):
        if given[name] is None:
            raise arguments.refused(name, None, _SETTINGS[name][1])
    if given["max_length"] is not None:
        arguments.whole("max_length", given["max_length"], 1)
    arguments.whole("max_slots", given["max_slots"], 0, MAX_SLOTS)
    arguments.switch("keep_identity", given["keep_identity"])
    if given["model_paths"] is not None:
        arguments.mapping("model_paths", given["model_paths"])
    if given["progress"] is not None and not callable(given["progress"]):
        raise arguments.refused("progress", given["progress"], "a function")
