"""The measured sections of README and docs, a file per page."""
