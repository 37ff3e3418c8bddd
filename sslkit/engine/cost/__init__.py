"""What a step costs and how well it uses the device: FLOPs, memory of activations, MFU. Read `step_cost` first."""
