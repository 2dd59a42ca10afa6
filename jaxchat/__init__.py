"""jaxchat: chat with open LLMs in JAX and reshape their layers on the fly."""
