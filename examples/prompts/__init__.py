"""Public system prompts, and a part of them that is held out."""
