"""Measure a served draft: acceptance, speed, agreement with the trainer."""
