"""The chat page: a Bottle application that serves one shell page and its static files."""
