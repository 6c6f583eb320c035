"""Federated on-device fine-tuning atop a Once-for-All supernet."""
