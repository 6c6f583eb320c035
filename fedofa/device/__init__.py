"""What a subnet and a plan cost on a device."""
