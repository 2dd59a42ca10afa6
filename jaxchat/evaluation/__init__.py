"""How good a model is under a layer plan, and how sure one can be: tasks, scores, intervals, comparisons."""
