"""The machine that the application runs on, and its files."""
