"""Which layer plan is best for a text or a task: candidates tried on one part, the best validated on another.

moves.py       what a candidate changes in the base plan
sample.py      what candidates are scored on, and by what
scorer.py      the scores of plans on a sample
trials.py      scores kept on disk, and the budget
ladder.py      which candidates are tried, one stage after the other
validation.py  what is left of the best on data that the search has not seen
"""
