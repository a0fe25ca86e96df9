"""Simulated fleets that play rollouts by the decisions of the server, on a clock of their own."""
