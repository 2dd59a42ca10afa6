"""jaxchat: chat with open LLMs in JAX on TPU, GPU and CPU, and reshape their layers on the fly.

>>> import jaxchat
>>> model = jaxchat.load("path/to/model", plan="0:8,4:12,8:")  # doctest: +SKIP
>>> model.chat("do you like music?").text  # doctest: +SKIP
"""

import lazy_loader

__version__ = "0.1.0"

# Names are listed once, in the stub beside this file, and resolved at first use: importing JAX takes half a
# second that `--help`, `--show` and tools which only need a plan or a configuration should not wait for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
