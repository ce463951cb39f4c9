"""SmolLM2-135M-Instruct behind a private system prompt, served by released text."""
