"""Which subnet suits a device: within all its limits, alone or for a whole fleet at once."""
