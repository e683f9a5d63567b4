"""The run folder: claimed, written, stopped, resumed, drawn. Knows no rows; `callbacks`, `samples` meet the model."""
