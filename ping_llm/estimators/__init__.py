"""Classical estimates of RTTs, from tables of measurements."""
