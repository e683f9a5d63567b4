"""Base against tuned against others: paired differences, tables, answers side by side, and the report of it."""
