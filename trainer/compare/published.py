"""Figures that others have published, shown beside ours for orientation only: other items, other prompts, other models.

MMCU's zero-shot accuracies as its authors' repository (Felixgithub2017/MMCU) tabulates them, as shares of 1.
"""

MMCU_SUBJECTS = ("medicine", "law", "psychology", "education", "average")
MMCU_ZERO_SHOT: dict[str, tuple[float, float, float, float, float]] = {
    "bloomz_560m": (0.298, 0.163, 0.201, 0.247, 0.227),
    "bloomz_1b1": (0.213, 0.14, 0.187, 0.275, 0.204),
    "bloomz_3b": (0.374, 0.18, 0.319, 0.315, 0.297),
    "bloomz_7b1_mt": (0.364, 0.174, 0.346, 0.316, 0.300),
    "ChatGLM-6B": (0.338, 0.169, 0.288, 0.333, 0.282),
    "MOSS-16B": (0.234, 0.133, 0.211, 0.253, 0.208),
    "GPT-3.5-turbo": (0.512, 0.239, 0.447, 0.455, 0.413),
}


def is_mmcu(task: str) -> bool:
    return "mmcu" in task.lower()
