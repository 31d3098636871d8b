"""The demo room: a small base model, and a task whose rows the running Python brings along."""
