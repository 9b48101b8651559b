"""The rules of lead intake. Pure: no clock, no ids made, no input or output."""
