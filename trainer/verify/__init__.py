"""Proof that what was trained is what is served: before training by rules, after it by tokens."""
