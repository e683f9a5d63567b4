"""Rows -> token ids and labels, through the server's renderer. May import `trainer.data`; knows no tensors."""
