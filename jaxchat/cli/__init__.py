"""What the commands are made of: flags, progress, and the terminal."""
