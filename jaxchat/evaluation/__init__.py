"""How good a model is under a layer plan, and how sure one can be: tasks, scores, intervals, comparisons.

    prepared = tasks.prepare("arc_easy,piqa", data="evals")
    measured = run.evaluate(model.with_plan("0:8,4:12,8:"), prepared)
    report.summaries(measured)[0].scores["acc"]

What is asked is `items.py`'s and `tasks/`'s, which need no JAX; what a model answers `likelihood.py`'s and
`replies.py`'s; how sure that is `statistics.py`'s. `jaxchat evaluate` is the command line.
"""
