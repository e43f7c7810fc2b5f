"""Objectives, noise schedules and samplers, as pure functions on tensors."""
