"""How good a model's answers are, task by task: what is kept of each batch, and what it makes."""
