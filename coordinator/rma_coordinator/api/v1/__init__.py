"""OpenAI's API: what is asked, what runs for it, and how its answers go out."""
