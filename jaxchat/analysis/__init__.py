"""What the layers of a model do, on a text: influence, skips, repeats, halves, a lens; and plans compared.

    windows = cut_windows(model.encode(text), 256)
    result = analyze(model.engine, model.plan, windows)
    result.influence, result.skip["both"], result.rys[3, 7]

`Sweep` evaluates any plans of one's own the same way; `python -m jaxchat.analyze` is the command line.
"""

import lazy_loader

# Names are listed once, in the stub beside this file. `cost.py` and `show.py` need no JAX, whose import takes
# half a second.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
