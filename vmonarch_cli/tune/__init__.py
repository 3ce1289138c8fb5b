"""`vmonarch tune`: a LoRA that undoes what a preset's structured attention changes, learned from prompts alone."""
