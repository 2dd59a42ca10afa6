"""Llama 1, 2, 3, 3.1, 3.2 and everything published with `model_type: llama`."""

from jaxchat.config import ModelConfig
from jaxchat.families.decoder import llama_config, llama_params
from jaxchat.families.hf_config import HfConfig
from jaxchat.families.tables import Family


def config(hf: HfConfig) -> ModelConfig:
    """Reads a LlamaConfig."""
    bias = hf.flag("attention_bias", False)
    return llama_config(hf, family="llama", qkv_bias=bias, o_bias=bias, mlp_bias=hf.flag("mlp_bias", False))


FAMILIES = (Family("llama", ("llama",), config, llama_params),)
