"""What people install: the wheel, and the images of `deployments/`."""
