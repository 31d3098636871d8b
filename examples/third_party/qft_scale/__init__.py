"""A qft strategy in a package of its own; `qft_scale.output_scale` holds it."""
