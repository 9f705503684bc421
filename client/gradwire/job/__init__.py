"""The main job: a byte-level GPT on real text. What `gradwire train` runs, and what the reference job is."""
