"""Command-line tools beside the chat itself."""
