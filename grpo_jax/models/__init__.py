"""Policies: the bundled decoder."""
