"""A run that does not fit is refused with numbers and the setting to change, and places must be seen by all nodes."""
