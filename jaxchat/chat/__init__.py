"""Conversations as token ids: history, replies, sessions, batches."""
