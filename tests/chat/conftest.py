"""Chats over tiny random models: with real tokenizers and templates, and with one token a byte."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxchat
from jaxchat.checkpoints.load import load_params
from jaxchat.engine.session import Engine
from jaxchat.layer_plan import LayerPlan
from jaxchat.runtime import Model
from tests.support import real_chats
from tests.support.tiny import write_tiny_hf
from tests.support.tiny_chat import write_tiny_chat

VOCABULARY = 152_000  # of the tiny model, as large as the largest tokenizer: one set of executables for all


@pytest.fixture(scope="session")
def chat_of(tmp_path_factory):
    """`chat_of(name)`: a tiny random model with a real one's tokenizer and template, and its end of turn."""
    folder = tmp_path_factory.mktemp("tiny")
    options = {"eos_token_id": None, "bos_token_id": None, "max_position_embeddings": 1024}
    write_tiny_hf(folder, "llama", seed=3, vocab_size=VOCABULARY, **options)
    config, params = load_params(folder)

    @functools.cache
    def build(name):
        tokenizer, template, end = real_chats.load(name)
        rows = np.array(params["lm_head.weight"])
        rows[tokenizer.vocab_size :] = 0  # ids that the tokenizer does not know
        rows[tokenizer.special_tokens[end]] *= 10  # turns end now and then
        engine = Engine(config, {**params, "lm_head.weight": jnp.asarray(rows)})
        return Model(
            engine, LayerPlan.identity(3), tokenizer=tokenizer, template=template, max_slots=4
        ), tokenizer.special_tokens[end]

    return build


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny model with one token a byte, and a chat template."""
    return jaxchat.load(
        write_tiny_chat(tmp_path_factory.mktemp("bytes"), max_position_embeddings=400), max_slots=4
    )
