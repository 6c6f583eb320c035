"""Labelled images by name, and how they are split among clients. No torch."""
