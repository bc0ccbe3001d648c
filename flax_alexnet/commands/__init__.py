"""The commands, a file each: parse the flags, compose the parts, report."""
