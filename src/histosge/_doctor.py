"""Look at the machine: can histosge run here, and what is to be done where it cannot."""
