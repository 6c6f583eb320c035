"""How a supernet is trained: schedules as data, sampling of subnets, teachers, the central loop."""
