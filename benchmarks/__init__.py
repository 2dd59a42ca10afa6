"""Measurements of jaxchat on the machine at hand; `RESULTS.md` holds the last run."""
