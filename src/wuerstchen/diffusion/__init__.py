"""Noise schedules and samplers, as pure functions on tensors."""
