"""The rules of scoring. Pure: no clock, no ids made here, no input or output."""
