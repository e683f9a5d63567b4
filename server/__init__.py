"""qloop's serving side: supervisor, engine and OpenAI API workers."""

__version__ = "0.1.0"
