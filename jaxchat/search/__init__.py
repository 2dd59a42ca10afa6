"""Which layer plan is best for a text or a task: candidates tried on one part, the best validated on another.

    question = text_question(model.engine, model.plan, windows)
    found = search(model.engine, question, Budget(plans=200), {})
    found.verdict.best

`moves.py` is what a candidate changes, `sample.py` what it is scored on, `scorer.py` how, `trials.py` what is
kept on disk, and within which budget, `ladder.py` the stages, `validation.py` what is left of the best.
"""

import lazy_loader

# Names are listed once, in the stub beside this file: `jaxchat search --help` needs none of them.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
