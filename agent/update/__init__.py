"""Updates of the device: assignments, verification, the update machine, effects, and the stored state."""
