"""Distillation: what a student learns from a teacher, and the cache that keeps it."""
