"""Folders that the server and the trainer share: home, model folders, adapter registry, names and hashes.

Files and JSON only: nothing here imports torch, transformers or the network stack at module level.
"""
