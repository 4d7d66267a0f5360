"""What the README promises of faults: real servers, real clients, real processes that are killed or stopped."""
