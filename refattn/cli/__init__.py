"""The commands: thin text over the rooms that do the work."""
