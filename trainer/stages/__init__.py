"""pt and sft, dpo, rm, ppo: each brings examples, method and steps together. May import every room."""
