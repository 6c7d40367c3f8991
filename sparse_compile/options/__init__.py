"""What the user may choose: the configuration, its checks, its presets, and published files of it."""
