"""The board's update machine: pure functions over frozen data, no clock, no I/O, no logging."""
