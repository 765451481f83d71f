"""Every equation numbered, every value proven, every implementation checkable."""
