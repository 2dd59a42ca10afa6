"""A model for lm-evaluation-harness, under any layer plan: `--model jaxchat`. Needs lm_eval, no torch.

    python -m jaxchat.evaluation.lm_eval run --model jaxchat \\
        --model_args pretrained=DIR,layer_spec='0:8;4:12;8:' --tasks arc_easy

It is lm_eval's own command, with one model more; importing this module adds it to a program that calls
lm_eval itself. Texts are cut into contexts and continuations as lm_eval does it for its `hf` model.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxchat.errors import UsageError
from jaxchat.options import GenerateOptions
from jaxchat.pallas.backends import use_32_bits
from jaxchat.runtime import load
from jaxchat.visible import shown

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
"""Of lm_eval's generation settings, those that mean the same here."""
_NOTHING = ("do_sample", "device", "trust_remote_code", "max_batch_size", "backend", "revision")
"""Settings of other models that need no counterpart."""


@register_model("jaxchat")
class JaxchatLM(TemplateLM):
    """See the module.

    Args:
      pretrained: the model's directory, as `jaxchat.load` takes it.
      layer_spec: the layers to run, in any notation. lm_eval cuts its arguments at commas: a plan is written
        with `;` instead, `layer_spec=0:8;4:12;8:`, or in a file, `layer_spec=@plan.txt`.
      recipe: instead, a mergekit recipe.
      adapter: a LoRA adapter.
      quant, dtype, kv_dtype, kernels, chat_template: as `jaxchat.load` takes them.
      max_length: the longest context; default the model's own.
      batch_size: sequences computed together.
      max_gen_toks: the longest reply, where the task does not say.
      add_bos_token: whether texts begin with BOS; default as the tokenizer does it.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        layer_spec: str | None = None,
        *,
        recipe: str | None = None,
        adapter: str | None = None,
        quant: str | None = None,
        dtype: str | None = None,
        kv_dtype: str | None = None,
        kernels: str = "auto",
        chat_template: str | None = None,
        max_length: int | None = None,
        batch_size: int | str = 8,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        **others: Any,
    ):
        super().__init__()
        if unknown := sorted(set(others) - set(_NOTHING)):
            raise UsageError(f"unknown model argument {shown(unknown[0])}; see jaxchat.evaluation.lm_eval")
        use_32_bits()
        self.model = load(
            pretrained,
            None if layer_spec is None else str(layer_spec).replace(";", ","),
            recipe=recipe,
            adapter=adapter,
            quant=quant,
            dtype=None if dtype in (None, "auto") else dtype,
            kv_dtype=kv_dtype,
            kernels=kernels,
            chat_template=chat_template,
            max_length=None if max_length is None else int(max_length),
        )
        if self.model.tokenizer is None:
            raise UsageError(f"{pretrained}: has no tokenizer; lm_eval's tasks are texts")
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 8
        self._max_gen_toks, self._add_bos = int(max_gen_toks), add_bos_token

    # --- tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ids = self.model.tokenizer.eos_ids or self.model.eos_ids  # type: ignore[union-attr]
        if not ids:
            raise UsageError("the model has no token that ends a text, which lm_eval needs")
        return int(ids[0])

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or the token that ends a text."""
        bos = self.model.tokenizer.bos_id  # type: ignore[union-attr]
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens of the longest context."""
        return self.model.engine.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens that are spelled out are those. One BOS is enough."""
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        special = self._add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(tokenizer.decode([self.prefix_token_id]) or "\0"):
            special = False
        return tokenizer.encode(
            string, add_special_tokens=True if special is None else special, parse_special=True
        )

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.model.decode(tokens, skip_special=skip_special_tokens)

    # --- what lm_eval asks

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _texts, context, continuation in requests:
            more = continuation[-self.max_length :]
            pairs.append((context[-(self.max_length + 1 - len(more)) :], more))
        likelihoods = self.model.loglikelihoods(pairs, batch_size=self.batch_size)
        found = [(likelihood.total, likelihood.greedy) for likelihood in likelihoods]
        for (texts, *_rest), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, read in windows that predict every token once."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners = []
        for number, request in enumerate(requests):
            (text,) = request.args
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Replies, each ending before one of its stop texts."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            asked = requests[numbers[0]].args[1]
            options = self._options(asked)
            room = max(self.max_length - (options.max_new_tokens or 0), 1)
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            results = self.model.generate(token_ids=prompts, batch_size=self.batch_size, options=options)
            for number, result in zip(numbers, results, strict=True):
                texts[number] = result.text or ""
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
        return texts

    def _options(self, asked: Mapping[str, Any]) -> GenerateOptions:
        settings = dict(normalize_gen_kwargs(dict(asked), self._max_gen_toks))
        stop = handle_stop_sequences(settings.pop("until", None), eos=None)
        chosen = {name: settings.pop(name) for name in _SAMPLING if settings.get(name) is not None}
        limit = settings.pop("max_gen_toks")
        if unknown := sorted(set(settings) - {*_NOTHING, *_SAMPLING}):
            raise UsageError(
                f"the task sets {unknown[0]} for its replies, which jaxchat has no counterpart of"
            )
        return GenerateOptions(max_new_tokens=limit, stop=tuple(filter(None, stop)), **chosen)

    # --- chats

    @property
    def tokenizer_name(self) -> str:
        """What tells the tokenizer and chat template apart in lm_eval's caches."""
        return re.sub(r"\W+", "__", self.model.name or "jaxchat")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's chat template as text, for the record; None where none is asked for."""
        if chat_template is False or chat_template is None:
            return ""
        template = self.model.template
        if template is None:
            raise UsageError("this model has no chat template; give chat_template=NAME in --model_args")
        return template.sources.get("default")

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat; without a generation prompt it ends where the last message does."""
        if self.model.template is None:
            raise UsageError("this model has no chat template; give chat_template=NAME in --model_args")
        text = self.model.template.render(chat_history, add_generation_prompt=add_generation_prompt)
        if not add_generation_prompt:
            last = chat_history[-1]["content"].strip()
            text = text[: text.rindex(last) + len(last)]
        return text


def main() -> Any:
    """lm_eval's command."""
    from lm_eval.__main__ import cli_evaluate

    return cli_evaluate()


if __name__ == "__main__":
    main()
