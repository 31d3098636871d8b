"""Folding an adapter into its base: streamed tensor by tensor, never the whole model in memory."""
