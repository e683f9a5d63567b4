"""Data files to rows and back: read, checked, cleaned, divided. Knows nothing about tokens, templates or models."""
