"""What every verb that writes a checkpoint shares: running a plan, and keeping what was measured before it."""
