"""Text <-> token ids, chat templates, and where texts meet and part. Knows no model."""
