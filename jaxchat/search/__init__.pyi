from .run import Found, Question, search, text_question
from .trials import Budget
from .validation import Candidate, Probe, Verdict

__all__ = ["Budget", "Candidate", "Found", "Probe", "Question", "Verdict", "search", "text_question"]
