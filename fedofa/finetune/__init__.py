"""What a client does with a subnet: plans, levers against memory, the memory model and the planner, the trainer."""
